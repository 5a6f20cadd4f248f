"""Peak resident memory of extract and of training as the number of cases, or of slices in one volume, grows.

Usage: python benchmarks/memory.py [--few N] [--many N] [--image-size N] [--side N]

Every figure is the most memory that a process of its own ever held (VmHWM), with `embedkit/scattering` as the backbone
and small phantoms: blobs in noise, NIfTI, one view. Much of it is the imported libraries, so a process that imports
alone is measured too, and growth is told in MB as well. Extract writes shards of 1 MiB: with the usual 64 MiB the
tokens of all these small cases would wait in memory for the first shard. The volumes of 128 and of 1,024 slices have
160 x 160 voxels (13 and 105 MB in float32). The last line is `ratio N.NN`: extract of many cases over that of few.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import SimpleITK as sitk

PEAK = """
import re
from pathlib import Path
print("PEAK", int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""
IMPORTS = "import torch, embedkit.extraction, embedkit.training"
EXTRACT = """
import sys
from embedkit.extraction import extract
summary = extract(sys.argv[1], sys.argv[2], backbone="embedkit/scattering", image_size=int(sys.argv[3]),
                  tokens=["cls", "patch@2"], precision="fp32", device="cpu", preview=0, shard_bytes=1 << 20)
if summary.failures:
    raise SystemExit(summary.failures[0].reason)
"""
TRAIN = """
import sys
from embedkit.training import train
train(sys.argv[1], sys.argv[2], targets="grade", out=sys.argv[3], heads=["abmil"], folds=2, device="cpu",
      fit_options={"epochs": 3}, resamples=50)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=50)
    parser.add_argument("--many", type=int, default=500)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--side", type=int, default=160, help="voxels of a slice of the two long volumes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    idle = peak_bytes("imports alone", IMPORTS)
    image_size = str(options.image_size)
    extracts, trainings = [], []
    for cases in (options.few, options.many):
        data = write_cases(folder / f"{cases}-cases", cases, (12, 48, 48))
        extracts.append(peak_bytes(f"extract, {cases} cases", EXTRACT, data, data.parent / "cache", image_size))
        labels = data.with_name("labels.csv")
        size = sum(file.stat().st_size for file in (data.parent / "cache").rglob("*.h5"))
        print(f"the cache of {cases} cases: {size / 1e6:.0f} MB")
        out = data.parent / "runs"
        trainings.append(peak_bytes(f"train, {cases} cases", TRAIN, data.parent / "cache", labels, out))
    volumes = []
    for slices in (128, 1024):
        data = write_cases(folder / f"{slices}-slices", 1, (slices, options.side, options.side))
        volumes.append(peak_bytes(f"extract, {slices} slices", EXTRACT, data, data.parent / "cache", image_size))
    for name, (small, large) in {"slices in a volume": volumes, "training": trainings, "extract": extracts}.items():
        print(f"{name}: {large / small:.2f} times, {(large - small) / 1e6:+.0f} MB over {(small - idle) / 1e6:.0f} MB")
    print(f"ratio {extracts[1] / extracts[0]:.2f}")


def peak_bytes(name: str, program: str, *arguments: object) -> int:
    """Most memory that a process running ``program`` ever held."""
    started = time.perf_counter()
    command = [sys.executable, "-c", program + PEAK, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
    peak = int(next(line for line in done.stdout.splitlines() if line.startswith("PEAK ")).removeprefix("PEAK "))
    print(f"{name}: {peak / 1e6:.0f} MB in {time.perf_counter() - started:.0f} s", flush=True)
    return peak


def write_cases(folder: Path, cases: int, shape: tuple[int, int, int]) -> Path:
    """Noise with a bright blob in the cases of grade 1, as NIfTI; the manifest, and labels.csv beside it."""
    folder.mkdir()
    random = np.random.default_rng(cases)
    names = [f"case-{number:04d}" for number in range(cases)]
    for number, name in enumerate(names):
        voxels = random.normal(100, 20, shape).astype(np.int16)
        if number % 2:
            voxels[tuple(slice(size // 3, size // 2) for size in shape)] += 200
        image = sitk.GetImageFromArray(voxels)
        image.SetSpacing((1.0, 1.0, 2.0))
        sitk.WriteImage(image, str(folder / f"{name}.nii.gz"), useCompression=True, compressionLevel=1)
    pl.DataFrame({"case_id": names, "path": [f"{name}.nii.gz" for name in names]}).write_csv(folder / "cases.csv")
    grades = ["high" if number % 2 else "low" for number in range(cases)]
    pl.DataFrame({"case_id": names, "grade": grades}).write_csv(folder / "labels.csv")
    return folder / "cases.csv"


if __name__ == "__main__":
    main()

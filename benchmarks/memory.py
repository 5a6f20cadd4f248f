"""Peak resident memory of extract and of training as the number of cases, or of slices in one volume, grows.

Usage: python benchmarks/memory.py [--few N] [--many N] [--image-size N] [--side N] [--slices N,N,...] [--only PART]

Every figure is the most memory that the program ever held (VmHWM), or the program and all processes below it, looked at
twenty times a second (PSS), whichever is more; mapped files count as far as they are resident. The backbone is
`embedkit/scattering` and the images are phantoms: blobs in noise, one view. Much of it is the imported libraries, so a
process that imports alone is measured too, and growth is told in MB as well. Extract writes shards of 1 MiB: with the
usual 64 MiB the tokens of all these small cases would wait in memory for the first shard. The huge volumes have 512 x
512 voxels a slice, int16: 128, 256 and 512 MiB, as a gzipped NIfTI, as a DICOM series, as a NIfTI looked at in all
three planes, and as one stored sagittal slice by sagittal slice. The last line is `ratio N.NN`: the greatest of
extract's peaks over many cases, or over the most slices, by that over few.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import SimpleITK as sitk

KINDS = ("gzipped NIfTI", "DICOM series", "NIfTI, three planes", "NIfTI stored in sagittal slices")
PEAK = """
import re
from pathlib import Path
print("PEAK", int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""
IMPORTS = "import torch, embedkit.extraction, embedkit.training"
EXTRACT = """
import sys
from embedkit.cli.main import app
options = "--backbone embedkit/scattering --tokens cls,patch@2 --precision fp32 --device cpu --preview 0"
command = ["extract", sys.argv[1], "-o", sys.argv[2], "--image-size", sys.argv[3], "--planes", sys.argv[4]]
if app([*command, *options.split(), "--shard-size", "1MB"], standalone_mode=False):
    raise SystemExit("a case failed")
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
    parser.add_argument("--side", type=int, default=512, help="voxels of a side of a slice of the huge volumes")
    parser.add_argument("--slices", default="256,512,1024", help="of the huge volumes")
    parser.add_argument("--only", choices=["cases", "volumes", *KINDS])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    idle = peak_bytes("imports alone", IMPORTS)
    ratios = []
    if options.only in (None, "cases"):
        ratios.append(measure_cases(options, folder, idle))
    kinds = [kind for kind in KINDS if options.only in (None, "volumes", kind)]
    ratios += [measure_volumes(kind, options, folder, idle) for kind in kinds]
    print(f"ratio {max(ratios):.2f}")


def measure_cases(options: argparse.Namespace, folder: Path, idle: int) -> float:
    """Extract and training of few and of many small cases; the ratio of extract."""
    extracts, trainings = [], []
    for cases in (options.few, options.many):
        data = write_cases(folder / f"{cases}-cases", cases, (12, 48, 48))
        arguments = (data, data.parent / "cache", options.image_size, "axial")
        extracts.append(peak_bytes(f"extract, {cases} cases", EXTRACT, *arguments))
        labels = data.with_name("labels.csv")
        size = sum(file.stat().st_size for file in (data.parent / "cache").rglob("*.h5"))
        print(f"the cache of {cases} cases: {size / 1e6:.0f} MB")
        out = data.parent / "runs"
        trainings.append(peak_bytes(f"train, {cases} cases", TRAIN, data.parent / "cache", labels, out))
    tell_growth("training", trainings, idle)
    return tell_growth("extract, cases", extracts, idle)


def measure_volumes(kind: str, options: argparse.Namespace, folder: Path, idle: int) -> float:
    """Extract of one huge volume of a kind, by its slices; the ratio of most to fewest."""
    peaks = []
    for slices in map(int, options.slices.split(",")):
        place = folder / f"volume-{len(list(folder.iterdir()))}"
        path = write_volume(place, kind, (slices, options.side, options.side))
        manifest = place / "cases.csv"
        manifest.write_text(f"case_id,path\nhuge,{path.name}\n")
        planes = "axial,coronal,sagittal" if "planes" in kind else "axial"
        peaks.append(
            peak_bytes(f"{kind}, {slices} slices", EXTRACT, manifest, place / "cache", options.image_size, planes)
        )
        shutil.rmtree(place)
    return tell_growth(kind, peaks, idle)


def tell_growth(name: str, peaks: list[int], idle: int) -> float:
    first, last = peaks[0], peaks[-1]
    print(f"{name}: {last / first:.2f} times, {(last - first) / 1e6:+.0f} MB over {(first - idle) / 1e6:.0f} MB")
    return last / first


def peak_bytes(name: str, program: str, *arguments: object) -> int:
    """Most memory that a process running ``program``, and those that it started, ever held."""
    started = time.perf_counter()
    command = [sys.executable, "-c", program + PEAK, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        running = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        seen = 0
        while running.poll() is None:
            seen = max(seen, tree_bytes(running.pid))
            time.sleep(0.05)
        output.seek(0)
        errors.seek(0)
        if running.returncode:
            raise SystemExit(f"{name} failed: {errors.read()[-2000:]}")
        told = next(line for line in output if line.startswith("PEAK "))
    peak = max(seen, int(told.removeprefix("PEAK ")))
    print(f"{name}: {peak / 1e6:.0f} MB in {time.perf_counter() - started:.0f} s", flush=True)
    return peak


def tree_bytes(pid: int) -> int:
    """What a process and all below it hold now, pages that several share told once; 0 where it has just ended."""
    place = Path("/proc") / str(pid)
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", (place / "smaps_rollup").read_text(), re.M)
        below = [each for task in (place / "task").iterdir() for each in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return (int(found[1]) * 1024 if found else 0) + sum(tree_bytes(int(each)) for each in below)


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


def write_volume(folder: Path, kind: str, shape: tuple[int, int, int]) -> Path:
    """One image of smooth noise with a bright block, written slice by slice or repeated, so that it takes no memory."""
    folder.mkdir()
    random = np.random.default_rng(0)
    slices = random.normal(100, 20, (8, *shape[1:])).astype("<i2")
    slices[:, shape[1] // 3 : shape[1] // 2, shape[2] // 3 : shape[2] // 2] += 200
    if kind == "DICOM series":
        for number in range(shape[0]):
            write_dicom_slice(folder / "series" / f"{number:05d}.dcm", slices[number % 8], number)
        return folder / "series"
    packed = kind.startswith("gzipped")
    path = folder / ("scan.nii.gz" if packed else "scan.nii")
    with gzip.open(path, "wb", compresslevel=1) if packed else path.open("wb") as file:
        file.write(nifti_header(shape, sagittal="sagittal" in kind))
        for number in range(shape[0]):
            file.write(slices[number % 8].tobytes())
    return path


def nifti_header(shape: tuple[int, int, int], *, sagittal: bool) -> bytes:
    """Of int16 voxels of 1 mm; the slowest axis runs upwards, or with ``sagittal`` to the left."""
    head = bytearray(352)
    struct.pack_into("<i", head, 0, 348)
    struct.pack_into("<8h", head, 40, 3, *shape[::-1], 1, 1, 1, 1)
    struct.pack_into("<2h8f3f", head, 70, 4, 16, *[1.0] * 8, 352.0, 1.0, 0.0)
    rows = [[0, 0, -1, 0], [-1, 0, 0, 0], [0, 1, 0, 0]] if sagittal else [[-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 1, 0]]
    struct.pack_into("<2h", head, 252, 0, 1)
    struct.pack_into("<12f", head, 280, *np.ravel(rows))
    head[344:348] = b"n+1\0"
    return bytes(head)


def write_dicom_slice(file: Path, pixels: np.ndarray, number: int) -> None:
    file.parent.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(pixels[None])
    tags = {"0008|0060": "CT", "0020|000e": "1.2.3.4", "0020|0032": f"0\\0\\{number}", "0020|0013": str(number)}
    tags |= {"0020|0037": "1\\0\\0\\0\\1\\0", "0008|0018": f"1.2.3.4.{number}", "0020|000d": "1.2.3"}
    for tag, value in tags.items():
        image.SetMetaData(tag, value)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(file))
    writer.Execute(image)


if __name__ == "__main__":
    main()

"""Slices per second of extract on a CUDA device over those of the bare compiled backbone, DINOv2 ViT-S, B and L.

Usage: python benchmarks/extract_gpu.py [--backbones NAME ...] [--sizes N ...] [--slices N] [--eager]
                                           [--device DEVICE]

The bare side is the timm model compiled by torch.compile at the same precision (bf16), fed with batches that lie on
the device already; extract, as with `--compile` (`--eager`: without), reads compressed NIfTI phantoms from disk (page
cache warm) and writes shards. Both have random weights and run once before their clock starts. They take turns, and the
median of some turns counts.

Without a CUDA device it says so and exits with code 2. `--device cpu` checks the arithmetic with a tiny model and few
slices; its figures mean nothing else. The last line is `ratio N.NN`: the lowest of all backbones and sizes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import timm
import torch
from safetensors.torch import save_file

from embedkit.backbones import compile_backbone, load_backbone
from embedkit.cache import create_cache
from embedkit.extraction import extract_cases
from embedkit.forward import require_compiled
from embedkit.planning import AUTOCAST_DTYPES, COMPILED, make_recipe
from embedkit.sources import Case

BACKBONES = ("vit_small_patch14_dinov2", "vit_base_patch14_dinov2", "vit_large_patch14_dinov2")
SIZES = (224, 518)
PRECISION = "bf16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+")
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--slices", type=int, help="in all, in cases of 160 (32 on the CPU)")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--eager", action="store_true", help="extract runs without --compile")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    tiny = options.device == "cpu"
    if not tiny and not torch.cuda.is_available():
        print("there is no CUDA device here; run this on a machine that has one, or check it with --device cpu")
        sys.exit(2)
    options.backbones = options.backbones or (["vit_tiny_patch16_224"] if tiny else BACKBONES)
    options.sizes = options.sizes or ([64] if tiny else SIZES)
    options.slices = options.slices or (96 if tiny else 20_480)
    options.batch_size = options.batch_size or (16 if tiny else 256)
    options.repeats = options.repeats or (1 if tiny else 3)
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    per_case, side = (32, 64) if options.device == "cpu" else (160, 256)
    cases = write_cases(folder / "images", options.slices, per_case=per_case, side=side)
    ratios = []
    for name in options.backbones:
        for image_size in options.sizes:
            ratios.append(compare(options, name, image_size, cases, folder / f"{name}-{image_size}"))
    print(f"ratio {min(ratios):.2f}")


def compare(options: argparse.Namespace, name: str, image_size: int, cases: list[Case], folder: Path) -> float:
    """Slices per second of extract over those of the bare model."""
    folder.mkdir()
    device = torch.device(options.device)
    torch.manual_seed(0)
    save_file(timm.create_model(name, pretrained=False, num_classes=0).state_dict(), folder / "random.safetensors")
    backbone = load_backbone(name, weights=folder / "random.safetensors", image_size=image_size, device=options.device)
    precision = PRECISION if options.eager else PRECISION + COMPILED
    recipe = make_recipe(backbone.info, tokens=["cls", "patch@4"], precision=precision)
    if not options.eager:
        compile_backbone(backbone)
        require_compiled(backbone, recipe, device, batch_size=options.batch_size)
    network: Any = timm.create_model(name, pretrained=False, num_classes=0, img_size=image_size).eval().to(device)
    network.forward = network.forward_features
    bare: Callable[[torch.Tensor], object] = torch.compile(network)
    time_bare(bare, options, image_size, options.batch_size)
    ours, theirs = [], []
    for turn in range(options.repeats + 1):
        create_cache(folder / f"cache{turn}", recipe)
        summary = extract_cases(
            cases[:1] if turn == 0 else cases,
            folder / f"cache{turn}",
            backbone,
            recipe,
            device=device,
            batch_size=options.batch_size,
            workers=options.workers,
        )
        sent = summary.slices - summary.blank_slices
        if turn:  # the first only warms up
            ours.append(sent / summary.seconds)
            theirs.append(sent / time_bare(bare, options, image_size, sent))
    ratio: float = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
    print(
        f"{name} at {image_size}, {precision}, batches of {options.batch_size}: extract {statistics.median(ours):.0f},"
        f" bare {statistics.median(theirs):.0f} slices per second, {ratio:.2f}",
        flush=True,
    )
    return ratio


def time_bare(
    bare: Callable[[torch.Tensor], object], options: argparse.Namespace, image_size: int, slices: int
) -> float:
    """Seconds for ``slices`` slices in full batches, in proportion where the last batch would not be full."""
    batches = -(-slices // options.batch_size)
    images = torch.rand(options.batch_size, 3, image_size, image_size, device=options.device)
    synchronise(options.device)
    started = time.perf_counter()
    with torch.inference_mode(), torch.autocast(options.device, AUTOCAST_DTYPES[PRECISION]):
        for _ in range(batches):
            bare(images)
    synchronise(options.device)
    seconds = time.perf_counter() - started
    return seconds * slices / float(batches * options.batch_size)


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def write_cases(folder: Path, slices: int, *, per_case: int, side: int) -> list[Case]:
    """Cases of ``per_case`` smooth slices with a little noise, as compressed NIfTI."""
    folder.mkdir()
    random = np.random.default_rng(0)
    cases = []
    wave = np.sin(np.linspace(0, 9, side))
    plane = 400 * np.add.outer(wave, wave)
    for number in range(max(1, slices // per_case)):
        depth = np.cos(np.arange(per_case) / 20 + number)[:, None, None]
        voxels = (plane * depth + random.integers(0, 8, (per_case, side, side))).astype(np.int16)
        name = f"case-{number:04d}"
        path = folder / f"{name}.nii.gz"
        image = sitk.GetImageFromArray(voxels)
        sitk.WriteImage(image, str(path), useCompression=True, compressionLevel=1)
        cases.append(Case(name, name, {"image": path}))
    return cases


if __name__ == "__main__":
    main()

"""Wall time of extract over the bare forward time of the same backbone on the same slices, already in memory.

Usage: python benchmarks/extract.py [--cases N] [--backbone NAME] [--weights FILE] [--data FOLDER] [--precision P]

Without --weights a timm backbone gets random weights, which cost the same time. Without real scans
(../shared/data, or --data) it runs on phantoms. The last line is `ratio N.NN`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import polars as pl
import torch

from embedkit.backbones import load_backbone
from embedkit.cache import open_cache
from embedkit.extraction import extract
from embedkit.features import Backbone
from embedkit.manifest import read_manifest
from embedkit.phantoms import make_phantoms
from embedkit.pipeline import Rendered, render_cases, run_backbone
from embedkit.recipe import Recipe
from embedkit.sources import group_cases, read_case

DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "lgg" / "manifest.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    manifest = read_manifest(options.data if options.data.exists() else make_phantoms(folder / "phantoms").manifest)
    chosen = manifest["case_id"].unique(maintain_order=True).head(options.cases)
    manifest = manifest.filter(pl.col("case_id").is_in(chosen.to_list()))
    weights = options.weights or random_weights(options.backbone, folder)
    ratios = []
    for repeat in range(options.repeats):
        cache = folder / f"cache{repeat}"
        started = time.perf_counter()
        summary = extract(
            manifest,
            cache,
            backbone=options.backbone,
            weights=weights,
            precision=options.precision,
            batch_size=options.batch_size,
        )
        with_loading = time.perf_counter() - started
        recipe = open_cache(cache).recipe
        backbone = load_backbone(options.backbone, weights=weights, image_size=recipe.image_size)
        bare = time_bare_forward(manifest, backbone, recipe, options.batch_size)
        size = sum(file.stat().st_size for file in cache.rglob("*.h5"))
        ratios.append(summary.seconds / bare)
        print(
            f"{summary.slices} slices ({summary.blank_slices} blank): extract {summary.seconds:.1f} s"
            f" ({with_loading:.1f} s with loading the backbone), bare forward {bare:.1f} s,"
            f" {1e3 * summary.seconds / summary.slices:.1f} ms and {size / summary.slices:.0f} bytes per slice"
        )
    print(f"ratio {min(ratios):.2f}")


def time_bare_forward(manifest: pl.DataFrame, backbone: Backbone, recipe: Recipe, batch_size: int) -> float:
    """Seconds of the forward passes alone over the slices that are not blank, rendered before the clock starts."""
    rendered = render_cases(
        group_cases(manifest), read_case, recipe, backbone, batch_size=batch_size, workers=1, device=torch.device("cpu")
    )
    images = torch.cat([part.images for part in rendered if isinstance(part, Rendered)])
    started = time.perf_counter()
    for batch in images.split(batch_size):
        run_backbone(batch, backbone, recipe)
    return time.perf_counter() - started


def random_weights(name: str, folder: Path) -> Path:
    """A weight file for a timm model, of the right shapes."""
    import timm
    from safetensors.torch import save_file

    file = folder / "random.safetensors"
    save_file(timm.create_model(name, pretrained=False).state_dict(), file)
    return file


if __name__ == "__main__":
    main()

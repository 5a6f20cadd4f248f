"""Forward time of a transformer with compiled blocks over eager ones, what compiling costs, when it is paid back.

Usage: python benchmarks/compile.py [--backbone NAME] [--device D] [--precision P] [--batch-size N] [--repeats N]

Both sides are the backbone as `embedkit extract` runs it, random weights, one batch at a time, in turns. On the CPU the
time is that of the processor (`time.process_time`, with as many threads as torch has: set OMP_NUM_THREADS), so that
other programs do not count; on CUDA it is wall time around a synchronised batch. Compiling is timed once, from nothing
(TORCHINDUCTOR_FORCE_DISABLE_CACHES). The last line is `ratio N.NN`: compiled over eager, below 1 where it gains.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from embedkit.allocator import keep_freed_memory
from embedkit.backbones import compile_backbone, load_backbone
from embedkit.features import Backbone
from embedkit.forward import require_compiled, run_backbone
from embedkit.planning import COMPILED, choose_device, choose_precision, make_recipe
from embedkit.recipe import Recipe
from extract import random_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    device = choose_device(options.device)
    weights = random_weights(options.backbone, folder)
    backbone = load_backbone(options.backbone, weights=weights, device=str(device))
    precision = choose_precision(options.precision, device, backbone.info)
    recipe = make_recipe(backbone.info, precision=precision + COMPILED)
    compile_backbone(backbone)
    started = time.perf_counter()
    require_compiled(backbone, recipe, device, batch_size=options.batch_size)
    compiling = time.perf_counter() - started
    images = torch.rand(options.batch_size, 1, recipe.image_size, recipe.image_size, device=device)
    best = {"default": float("inf"), "force_eager": float("inf")}
    for _ in range(options.repeats):
        for stance in tuple(best):
            with torch.compiler.set_stance(stance):
                best[stance] = min(best[stance], time_batch(images, backbone, recipe))
    compiled, eager = (1e3 * seconds / options.batch_size for seconds in best.values())
    print(f"{options.backbone}, {precision}, {device}, {torch.get_num_threads()} threads, batches of {len(images)}")
    print(f"eager {eager:.1f} ms a slice, compiled {compiled:.1f} ms; the first batch and its check {compiling:.0f} s")
    if compiled < eager:
        print(f"paid back after some {compiling / (eager - compiled) * 1e3:,.0f} slices")
    print(f"ratio {compiled / eager:.2f}")


def time_batch(images: torch.Tensor, backbone: Backbone, recipe: Recipe) -> float:
    clock = time.perf_counter if images.is_cuda else time.process_time
    started = clock()
    run_backbone(images, backbone, recipe)
    return clock() - started


if __name__ == "__main__":
    main()

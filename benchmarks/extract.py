"""Wall time of extract over the bare eager forward time of the same backbone, dtype and batch on the same slices.

Usage: python benchmarks/extract.py [--cases N] [--backbone NAME] [--weights FILE] [--data MANIFEST] [--precision P]
                                    [--part forward|stages|reading]

Each side runs in a process of its own, in turns: the bare forward as a plain loop over slices in memory, the same loop
told to keep freed memory (`embedkit.allocator`), and extraction as `embedkit extract` does it, which keeps it too.
Printed are the ratio over all slices, blank ones included (what a user without embedkit would send through the
network), the ratios over the slices that extract sends, to the loop that keeps memory and to the plain one (the last
line, `ratio N.NN`), and how long each stage stood still.
Without --weights a timm backbone gets random weights, which cost the same time. Without real scans it runs on phantoms.

`--part stages` compares extraction as it is with the same stages one after the other: nothing read ahead, shards
written before it goes on. It prints what share of the time each stage waits; the last line is the wall time of the
first over the second. `--part reading` reads all cases in two threads, as extraction does, in two processes that hand
over the volumes, and one after the other; the last line is the wall time of threads over processes. Both print
processor time too, for a machine that does other things.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import polars as pl
import torch

from embedkit import pipeline
from embedkit.allocator import keep_freed_memory
from embedkit.backbones import compile_backbone, load_backbone
from embedkit.cache import create_cache
from embedkit.extraction import extract_cases
from embedkit.features import Backbone
from embedkit.forward import require_compiled, run_backbone
from embedkit.manifest import read_manifest
from embedkit.phantoms import make_phantoms
from embedkit.pipeline import Rendered, render_cases
from embedkit.planning import COMPILED, choose_precision, make_recipe
from embedkit.readahead import Waits
from embedkit.recipe import Recipe
from embedkit.sources import Case, group_cases, read_case
from embedkit.writing import ShardWriter

DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "lgg" / "manifest.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--slices", default="all")
    parser.add_argument("--compile", action="store_true", help="extract compiles; the bare forward stays eager")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=("forward", "stages", "reading"), default="forward")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        {"forward": measure, "stages": measure_stages, "reading": measure_reading}[options.part](options, Path(folder))


def choose_cases(options: argparse.Namespace, folder: Path) -> Path:
    """A manifest of the first cases."""
    manifest = read_manifest(options.data if options.data.exists() else make_phantoms(folder / "phantoms").manifest)
    chosen = manifest["case_id"].unique(maintain_order=True).head(options.cases)
    manifest.filter(pl.col("case_id").is_in(chosen.to_list())).write_parquet(folder / "cases.parquet")
    return folder / "cases.parquet"


def run_alone(side: Callable[..., Any], *arguments: Any) -> Any:
    """What a side gives in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(side, *arguments).result()


def measure_stages(options: argparse.Namespace, folder: Path) -> None:
    """Extraction with its stages side by side and one after the other, in turns."""
    manifest, weights = choose_cases(options, folder), options.weights or random_weights(options.backbone, folder)
    found: dict[str, list[dict[str, Any]]] = {"side by side": [], "in turn": []}
    for _ in range(options.repeats):
        for name, side in (("side by side", time_extract), ("in turn", time_in_turn)):
            found[name].append(run_alone(side, options, manifest, weights, Path(tempfile.mkdtemp(dir=folder))))
            last = found[name][-1]
            took = f"{last['seconds']:.1f} s, {last['processor']:.1f} s of processors"
            print(f"{name}: {last['slices']} slices in {took}; waited: {describe_waits(last)}", flush=True)
    for name in sorted({name for run in found["side by side"] for name in run["waits"]}):
        shares = [run["waits"].get(name, 0.0) / run["seconds"] for run in found["side by side"]]
        print(f"side by side, {name}: waited {statistics.median(shares):.2%} of the time (median)")
    best = {name: min(each["seconds"] for each in runs) for name, runs in found.items()}
    print(f"ratio {best['side by side'] / best['in turn']:.2f}")


def time_in_turn(options: argparse.Namespace, manifest: Path, weights: Path, folder: Path) -> dict[str, Any]:
    """`time_extract` with nothing ahead or in the background."""

    def read_plainly(function: Callable[[Case], Any], items: Iterable[Case], **_: Any) -> Iterator[tuple[Case, Any]]:
        return ((item, function(item)) for item in items)

    def flush(writer: ShardWriter) -> None:
        real_flush(writer)
        writer._wait()

    real_flush = ShardWriter._flush
    pipeline.read_ahead = read_plainly
    ShardWriter._flush = flush  # type: ignore[method-assign]
    return time_extract(options, manifest, weights, folder)


def measure_reading(options: argparse.Namespace, folder: Path) -> None:
    """Reading alone: in threads, in processes, and one case after the other, in turns."""
    cases = group_cases(read_manifest(choose_cases(options, folder)))
    best: dict[str, float] = {}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes, ThreadPoolExecutor(2) as threads:
        list(processes.map(read_case, cases[:4]))  # which have imported everything by then
        ways: dict[str, Callable[..., Iterable[Any]]] = {
            "threads": threads.map,
            "processes": processes.map,
            "one after the other": map,
        }
        for _ in range(options.repeats):
            for name, over in ways.items():
                started, used = time.perf_counter(), os.times()
                for _images in over(read_case, cases):
                    pass
                seconds, now = time.perf_counter() - started, os.times()
                best[name] = min(best.get(name, seconds), seconds)
                print(f"{name}: {seconds:.2f} s, {sum(now[:2]) - sum(used[:2]):.2f} s of this process", flush=True)
    print(f"ratio {best['threads'] / best['processes']:.2f}")


def measure(options: argparse.Namespace, folder: Path) -> None:
    """All sides in turns, each in a process of its own: a user's plain loop twice, and what `embedkit extract` does."""
    manifest, weights = choose_cases(options, folder), options.weights or random_weights(options.backbone, folder)
    ratios, ratios_kept, ratios_all = [], [], []
    for _ in range(options.repeats):
        sides: dict[str, dict[str, Any]] = {}
        for name, side in (("bare", time_bare), ("kept", time_kept), ("extract", time_extract)):
            sides[name] = run_alone(side, options, manifest, weights, Path(tempfile.mkdtemp(dir=folder)))
        bare, extracted = sides["bare"], sides["extract"]
        every = extracted["slices"]
        ratios.append(extracted["seconds"] / bare["seconds"])
        ratios_kept.append(extracted["seconds"] / sides["kept"]["seconds"])
        ratios_all.append(extracted["seconds"] / (bare["seconds"] * every / bare["slices"]))
        took = extracted["seconds"]
        print(
            f"{every} slices ({extracted['blank']} blank) of {options.cases} cases: extract {took:.1f} s, bare forward"
            f" of those not blank {bare['seconds']:.1f} s; {1e3 * took / every:.1f} ms and"
            f" {extracted['bytes'] / every:.0f} bytes per slice; waited: {describe_waits(extracted)}",
            flush=True,
        )
    print(f"median over all slices, blank ones too: {statistics.median(ratios_all):.2f}")
    print(f"median to a loop that keeps freed memory: {statistics.median(ratios_kept):.2f}")
    print(f"ratio {statistics.median(ratios):.2f}")


def describe_waits(extracted: dict[str, Any]) -> str:
    """Which stage stood still for what, as shares of the wall time; stages overlap."""
    return ", ".join(f"{name} {part / extracted['seconds']:.1%}" for name, part in sorted(extracted["waits"].items()))


def load(options: argparse.Namespace, weights: Path) -> tuple[Backbone, Recipe]:
    backbone = load_backbone(options.backbone, weights=weights)
    precision = choose_precision(options.precision, torch.device("cpu"), backbone.info)
    return backbone, make_recipe(backbone.info, slices=options.slices, precision=precision)


def time_bare(options: argparse.Namespace, manifest: Path, weights: Path, folder: Path) -> dict[str, Any]:
    """Eager forward passes over slices in memory, one batch before the clock starts."""
    backbone, recipe = load(options, weights)
    images = render_all(group_cases(read_manifest(manifest)), backbone, recipe, options.batch_size, folder)
    time_forward(images[: options.batch_size], backbone, recipe, options.batch_size)
    return {"seconds": time_forward(images, backbone, recipe, options.batch_size), "slices": len(images)}


def time_kept(options: argparse.Namespace, manifest: Path, weights: Path, folder: Path) -> dict[str, Any]:
    """The bare passes in a process that keeps freed memory."""
    keep_freed_memory()
    return time_bare(options, manifest, weights, folder)


def time_extract(options: argparse.Namespace, manifest: Path, weights: Path, folder: Path) -> dict[str, Any]:
    """`extract_cases` in a process that is set up as the program's."""
    keep_freed_memory()
    backbone, recipe = load(options, weights)
    if options.compile:
        backbone, recipe = compiled(options, weights, recipe)
    cases, device = group_cases(read_manifest(manifest)), torch.device("cpu")
    run_backbone(torch.zeros(options.batch_size, 1, *(recipe.image_size,) * 2), backbone, recipe)
    create_cache(folder / "cache", recipe)
    started = time.process_time()
    summary = extract_cases(cases, folder / "cache", backbone, recipe, device=device, batch_size=options.batch_size)
    return {
        "seconds": summary.seconds,
        "processor": time.process_time() - started,
        "slices": summary.slices,
        "blank": summary.blank_slices,
        "waits": summary.waits,
        "bytes": sum(file.stat().st_size for file in (folder / "cache").rglob("*.h5")),
    }


def compiled(options: argparse.Namespace, weights: Path, recipe: Recipe) -> tuple[Backbone, Recipe]:
    """The same backbone with compiled blocks, and its recipe; the compiling is over when the clock starts."""
    backbone = load_backbone(options.backbone, weights=weights)
    recipe = replace(recipe, precision=recipe.precision + COMPILED)
    compile_backbone(backbone)
    started = time.perf_counter()
    require_compiled(backbone, recipe, torch.device("cpu"), batch_size=options.batch_size)
    print(f"compiled in {time.perf_counter() - started:.1f} s")
    return backbone, recipe


def render_all(cases: list[Case], backbone: Backbone, recipe: Recipe, batch_size: int, folder: Path) -> torch.Tensor:
    """The slices that extract sends through the backbone, in memory."""
    device, waits = torch.device("cpu"), Waits()
    parts = [
        part
        for part in render_cases(
            cases,
            read_case,
            recipe,
            backbone,
            batch_size=batch_size,
            workers=1,
            device=device,
            spill=folder,
            waits=waits,
        )
        if isinstance(part, Rendered)
    ]
    return torch.cat([part.images for part in parts])


def time_forward(images: torch.Tensor, backbone: Backbone, recipe: Recipe, batch_size: int) -> float:
    """Seconds of the forward passes alone."""
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

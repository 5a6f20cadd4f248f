"""Seconds to open a cache of 100,000 stacks in 300 shards, and to find out what a resume has left of 100,000 cases.

Usage: python benchmarks/open_cache.py [--stacks N] [--shards N] [--files-per-folder N] [--repeats N]

The cache is synthetic (tiny tokens, one stack per case) and every case has a source file of its own on disk. All is
measured with a warm page cache, each beside a baseline in the same run:

- opening: `open_cache`, over reading the stack and slice tables of all shards with h5py, which checks nothing;
- resuming: `CachedSources` built and asked for every case, over one bare `os.stat` per source file.

The last line is `ratio N.NN`, that of the resume (opening and all) over both baselines together.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np
import polars as pl

from embedkit.cache import StackTokens, create_cache, open_cache, write_shard
from embedkit.folder import list_shards
from embedkit.recipe import Recipe
from embedkit.sources import CachedSources, Case, group_cases

RECIPE = Recipe("toy", "builtin:1", ("cls:2",), 32, (0.5,), (0.25,), preview=0)
SLICES, DIM = 2, 4

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=300)
    parser.add_argument("--files-per-folder", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    started = time.perf_counter()
    manifest = write_sources(folder / "images", options.stacks, options.files_per_folder)
    cache = write_cache(folder / "cache", manifest, options.shards)
    print(f"{options.stacks} stacks in {options.shards} shards written in {time.perf_counter() - started:.0f} s")
    grouping, cases = fastest(lambda: group_cases(manifest), options.repeats)
    files = [os.fspath(path) for case in cases for path in case.images.values()]
    tables, _ = fastest(lambda: read_tables(cache), options.repeats)
    opening, opened = fastest(lambda: open_cache(cache), options.repeats)
    stats, _ = fastest(lambda: [os.stat(file) for file in files], options.repeats)  # noqa: PTH116 - the bare call
    resume, left = fastest(lambda: list_left(opened.stacks, cases), options.repeats)
    if len(left) != 1 or len(opened) != options.stacks:
        raise SystemExit(f"{len(left)} cases are left and {len(opened)} stacks found, expected 1 and {options.stacks}")
    print(f"open: {opening:.2f} s, tables with bare h5py {tables:.2f} s, ratio {opening / tables:.2f}")
    print(f"what is left: {resume:.2f} s, bare os.stat {stats:.2f} s, ratio {resume / stats:.2f}")
    print(f"grouping the manifest into cases: {grouping:.2f} s")
    print(f"ratio {(opening + resume) / (tables + stats):.2f}")


def fastest(work: Callable[[], T], repeats: int) -> tuple[float, T]:
    """Least seconds of some calls, and what the last one returned."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - started)
    return best, result


def list_left(stacks: pl.DataFrame, cases: Sequence[Case]) -> list[Case]:
    """What `embedkit.extraction.extract_cases` does before its first case."""
    sources = CachedSources(stacks, RECIPE)
    sources.require_same_patients(cases)
    sources.require_same_views(cases)
    return [case for case in cases if not sources.holds(case)]


def read_tables(cache: Path) -> int:
    """Bytes of the stack and slice tables of all shards, read by h5py alone."""
    size = 0
    for file in list_shards(cache):
        with h5py.File(file, "r", locking=False) as shard:
            size += shard["stacks"][:].nbytes + shard["slices"][:].nbytes
    return size


def write_sources(folder: Path, cases: int, files_per_folder: int) -> pl.DataFrame:
    """One file of a few bytes per case, and the manifest that names them."""
    paths = [folder / f"{number // files_per_folder:05d}" / f"case-{number:06d}.nii.gz" for number in range(cases)]
    for number, path in enumerate(paths):
        if number % files_per_folder == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(b"image")
    names = [path.name.removesuffix(".nii.gz") for path in paths]
    return pl.DataFrame(
        {"case_id": names, "patient_id": names, "view": ["image"] * cases, "path": [str(path) for path in paths]}
    )


def write_cache(cache: Path, manifest: pl.DataFrame, shards: int) -> Path:
    """A cache that holds every case of the manifest, the last one from a file of another size."""
    create_cache(cache, RECIPE)
    rows = manifest.select("case_id", "path").rows()
    for part in np.array_split(np.arange(len(rows)), shards):
        write_shard(cache, RECIPE, [make_stack(*rows[row], changed=row == len(rows) - 1) for row in part])
    return cache


def make_stack(case_id: str, path: str, *, changed: bool) -> StackTokens:
    status = Path(path).stat()
    return StackTokens(
        case_id=case_id,
        patient_id=case_id,
        view="image",
        plane="axial",
        sources=("image",),
        indices=np.arange(SLICES, dtype=np.int32),
        positions_mm=np.arange(SLICES, dtype=np.float32),
        blank=np.zeros(SLICES, bool),
        plane_shape=(8, 8),
        box=(0, 0, 8, 8),
        source_shape=(SLICES, 8, 8),
        source_affine=np.eye(4),
        source_bytes=status.st_size + changed,
        source_digest=hashlib.sha256(case_id.encode()).hexdigest(),
        tokens={"cls:2": np.ones((SLICES, DIM), np.float16)},
        source_modified_ns=status.st_ctime_ns,
    )


if __name__ == "__main__":
    main()

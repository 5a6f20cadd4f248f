"""Owns the part `change` of search.py: what appending to an index and withdrawing from it take beside building it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from clusters import find_nearest, make_vectors, measure_overlap
from embedkit.index import Index
from embedkit.indextypes import IndexOptions
from embedkit.indexwriting import rewrite_index, write_index
from embedkit.recipe import Recipe
from embedkit.tuning import DEPTH

SHARE = 100
"""One vector of so many is appended or withdrawn."""


@dataclass(frozen=True)
class Way:
    """One way to an index: CPU seconds, and the recall of what it gives, of the ten nearest of 256 queries."""

    index: Index
    seconds: float
    recall: float


def print_changes(sizes: Sequence[int], dim: int, kinds: Sequence[str | None], *, recipe: Recipe) -> float:
    """Prints a row per size and type; what appending takes over building, of the largest size and the last type."""
    print("CPU seconds (recall); a hundredth of the vectors is appended or withdrawn")
    print("| vectors | index | appended | built with these | ratio | withdrawn | built of as many | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    ratio = float("nan")
    for size in sorted(sizes):
        for kind in kinds:
            with tempfile.TemporaryDirectory() as folder:
                ratio = print_row(size, dim, kind, recipe, Path(folder))
    return ratio


def print_row(size: int, dim: int, kind: str | None, recipe: Recipe, folder: Path) -> float:
    few = size // SHARE
    vectors, queries = make_vectors(folder / "vectors.npy", size + few, dim)

    def build(name: str, part: NDArray[np.float32]) -> Index:
        options = IndexOptions(kind=kind)
        return write_index(
            part, name_cases(len(part)), embedding="made up", recipe=recipe, out=folder / name, options=options
        )

    def measure(make: Callable[[], Index], part: NDArray[np.float32]) -> Way:
        started = time.process_time()
        index = make()
        seconds = time.process_time() - started
        return Way(index, seconds, measure_recall(index, part, queries))

    first = vectors[:size]
    changed = measure(lambda: build("changed", first), first)
    known = np.arange(size)
    added = measure(lambda: rewrite_index(changed.index, vectors, name_cases(len(vectors)), kept=known), vectors)
    whole = measure(lambda: build("whole", vectors), vectors)
    last, left = vectors[few:], np.arange(few, len(vectors))
    fewer = measure(lambda: rewrite_index(added.index, last, name_cases(size), kept=left), last)
    row = [f"{size:,}", changed.index.kind]
    for way, other in ((added, whole), (fewer, changed)):
        row += [f"{each.seconds:.2f} ({each.recall:.3f})" for each in (way, other)]
        row.append(f"{way.seconds / other.seconds:.3f}")
    print(f"| {' | '.join(row)} |", flush=True)
    return added.seconds / whole.seconds


def name_cases(count: int) -> pl.DataFrame:
    names = pl.Series([f"case{number:08d}" for number in range(count)])
    return pl.DataFrame({"case_id": names, "patient_id": names})


def measure_recall(index: Index, vectors: NDArray[np.float32], queries: NDArray[np.float32]) -> float:
    found = index.search(queries, DEPTH)
    rows = found["case_id"].str.slice(4).cast(pl.Int64).to_numpy().reshape(len(queries), DEPTH)
    return measure_overlap(rows, find_nearest(vectors, queries))

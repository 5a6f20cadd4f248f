"""Owns the tuning of an approximate index: the least effort that finds the asked share of the true neighbours, and what
share queries find that the tuning did not see. Knows no case and no file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedkit.indextypes import FaissSearcher, Prepare, faiss

__all__ = ["DEPTH", "Tuning", "choose_held_out", "exact_neighbours", "measure_recall", "tune_effort"]

FloatArray = NDArray[np.float32]
Search = Callable[[FloatArray, int, int, int], NDArray[np.int64]]
"""From queries, k, effort and refinement to rows [queries k]."""

DEPTH = 10
"""Recall is the share of the ten nearest that are among the ten found."""

_HELD_OUT = 512
_BATCH = 16_384
_REFINEMENTS = (1, 4, 16, 64)
_SEED = 99


@dataclass(frozen=True)
class Tuning:
    """How an index is searched; as it stands, one that compares every vector.

    Attributes:
        effort: efSearch of ``hnsw``, cells looked into of ``ivf``, ``sq`` and ``ivfpq``; 0 of ``flat``.
        refine: So many times k are found by their codes and then compared exactly; 1 compares nothing again.
        recall: Of the ten nearest, measured on held-out queries.
        queries: How many those were.
    """

    effort: int = 0
    refine: int = 1
    recall: float = 1.0
    queries: int = 0


def choose_held_out(count: int) -> NDArray[np.int64]:
    """Rows of vectors that serve as queries, sorted: 512, or half of all where there are fewer than 1,024."""
    number = min(_HELD_OUT, count // 2)
    return np.sort(np.random.default_rng(_SEED).choice(count, number, replace=False))


def exact_neighbours(vectors: Any, queries: FloatArray, own: NDArray[np.int64], k: int, *, prepare: Prepare) -> Any:
    """Rows of the k nearest of each query among all vectors, itself left out, int64 [queries k]; in bounded memory."""
    best = np.full((len(queries), 0), 0, np.float32)
    rows = np.full((len(queries), 0), -1, np.int64)
    for start in range(0, len(vectors), _BATCH):
        block = prepare(np.asarray(vectors[start : start + _BATCH]))
        flat = faiss.IndexFlatIP(block.shape[1])
        flat.add(block)
        found, places = flat.search(queries, min(k + 1, len(block)))
        best, rows = np.concatenate([best, found], 1), np.concatenate([rows, places + start], 1)
        order = np.argsort(-np.where(rows == own[:, None], -np.inf, best), axis=1, kind="stable")[:, : k + 1]
        best, rows = np.take_along_axis(best, order, 1), np.take_along_axis(rows, order, 1)
    return rows[:, : min(k, len(vectors) - 1)]


def measure_recall(found: NDArray[np.int64], truth: NDArray[np.int64], own: NDArray[np.int64]) -> float:
    """The share of the true neighbours that were found, the query itself left out.

    Args:
        found: [queries k + 1].
        truth: [queries k].
        own: [queries], row of each query.
    """
    hits = 0
    for mine, true, row in zip(found, truth, own, strict=True):
        hits += len(np.intersect1d(mine[mine != row][: len(true)], true))
    return hits / max(truth.size, 1)


def tune_effort(
    searcher: FaissSearcher,
    vectors: Any,
    search: Search,
    *,
    recall: float,
    prepare: Prepare,
) -> Tuning:
    """Finds the least effort with which an index reaches a recall on one half of the held-out queries.

    What the other half then shows is reported, whether it was reached or not.

    Args:
        searcher: The index.
        vectors: As in `embedkit.indextypes.build_faiss`.
        search: How the index is searched.
        recall: Asked for.
        prepare: As in `embedkit.indextypes.build_faiss`.
    """
    if searcher.kind == "flat":
        return Tuning()
    own = choose_held_out(len(vectors))
    queries = prepare(np.asarray(vectors[own]))
    truth = exact_neighbours(vectors, queries, own, DEPTH, prepare=prepare)
    shown, kept = np.arange(len(own)) % 2 == 0, np.arange(len(own)) % 2 == 1

    def measure(part: NDArray[np.bool_], effort: int, refine: int) -> float:
        return measure_recall(search(queries[part], DEPTH + 1, effort, refine), truth[part], own[part])

    efforts = _efforts(searcher)
    refinements = _REFINEMENTS if searcher.kind in ("sq", "ivfpq") else (1,)
    for refine in refinements:
        if measure(shown, efforts[-1], refine) >= recall or refine == refinements[-1]:
            break
    low, high = 0, len(efforts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if measure(shown, efforts[middle], refine) >= recall else (middle + 1, high)
    return Tuning(efforts[low], refine, measure(kept, efforts[low], refine), int(kept.sum()))


def _efforts(searcher: FaissSearcher) -> list[int]:
    """Efforts to try, ascending, each about a fifth more than the one before."""
    least, most = (16, 4096) if searcher.kind == "hnsw" else (1, searcher.most)
    found = {most}
    effort = float(least)
    while effort < most:
        found.add(round(effort))
        effort = max(effort + 1, effort * 1.2)
    return sorted(found)

"""Owns the tuning of an approximate index: the least effort that finds the asked share of the true neighbours, and what
share queries find that neither the index nor the tuning has seen. Knows no case and no file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from embedkit.exactsearch import find_nearest
from embedkit.faissbuilding import Prepare
from embedkit.unitvectors import split_rows

__all__ = ["DEPTH", "HeldOut", "Tuning", "choose_held_out", "find_exactly", "measure_recalls", "tune_effort"]

FloatArray = NDArray[np.float32]
RowArray = NDArray[np.int64]
Search = Callable[[FloatArray, int, int, int], RowArray]
"""From queries, k, effort and refinement to rows [queries k]."""

DEPTH = 10
"""Recall is the share of the ten nearest that are among the ten found."""

_MOST_QUERIES, _SHARE, _LEAST = 1024, 10, 256
_ONE_SIDED, _TWO_SIDED = 0.05, 0.025  # beyond each end of an interval of 95%
_MOST_CANDIDATES = 1024  # of a graph, beyond which looking into cells is the faster way
_REFINEMENTS = (1, 4, 16, 64)
_SEED = 99


@dataclass(frozen=True)
class Tuning:
    """How an index is searched; as it stands, one that compares every vector.

    Attributes:
        effort: efSearch of ``hnsw``, cells looked into of ``ivf``, ``sq`` and ``ivfpq``; 0 of ``flat``.
        refine: So many times k are found by their codes and then compared exactly; 1 compares nothing again.
        recall: Of the ten nearest, the mean over held-out queries that the tuning did not see.
        recall_low: Lower end of its 95% interval over the groups that these queries are of.
        recall_high: Upper end.
        queries: How many those were.
        reached: Whether the recall asked for is reached, with 95% confidence, on the queries that were tuned on.
        vectors: How many there were then.
        changed: How many were added or withdrawn since.
    """

    effort: int = 0
    refine: int = 1
    recall: float = 1.0
    recall_low: float = 1.0
    recall_high: float = 1.0
    queries: int = 0
    reached: bool = True
    vectors: int = 0
    changed: int = 0


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Vectors that an index lacks while it is tuned, whole groups of them.

    Attributes:
        rows: int64 [held], sorted.
        queries: int64 [queries], those of ``rows`` that serve as queries, sorted.
        groups: int64 [queries], the group of each.
    """

    rows: RowArray
    queries: RowArray
    groups: RowArray

    def halve(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which queries are tuned on, and which tell what was reached, bool [queries] each; no group is in both.

        The same twice where there is only one group.
        """
        _, order = np.unique(self.groups, return_inverse=True)
        told = order % 2 == 1
        return (~told, told) if told.any() else (~told, ~told)


def choose_held_out(groups: RowArray) -> HeldOut:
    """Holds out a tenth of the vectors, or 256 where that is more, and draws 1,024 queries of them at most.

    A query of a new patient has no near double in the index; nor must a held-out one, so groups are held out whole, in
    random order, 1,024 at most. Where every group is too large for that, vectors are taken singly.

    Args:
        groups: int64 [vectors], the group of each: its patient.
    """
    count = len(groups)
    budget = max(count // _SHARE, min(_LEAST, count // 2))
    random = np.random.default_rng(_SEED)
    _, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = random.permutation(len(sizes))
    order = order[sizes[order] <= budget]
    chosen = order[np.cumsum(sizes[order]) <= budget][:_MOST_QUERIES]
    if not len(chosen):
        codes = np.arange(count)
        chosen = random.permutation(count)[: min(budget, _MOST_QUERIES)]
    rows = np.flatnonzero(np.isin(codes, chosen))
    queries = rows
    if len(rows) > _MOST_QUERIES:
        queries = np.sort(random.choice(rows, _MOST_QUERIES, replace=False))
    return HeldOut(rows, queries, codes[queries])


def find_exactly(vectors: Any, queries: FloatArray, left_out: RowArray, k: int, *, prepare: Prepare) -> RowArray:
    """Rows of the k nearest of each query among all vectors but some, int64 [queries k]; read in blocks.

    Args:
        vectors: [vectors dim].
        queries: float32 [queries dim], of length 1.
        left_out: Sorted rows that do not count.
        k: No more are given than there are.
        prepare: As in `embedkit.faissbuilding.build_without`.
    """
    kept = np.ones(len(vectors), bool)
    kept[left_out] = False

    def read() -> Iterator[tuple[RowArray, FloatArray]]:
        for part in split_rows(*vectors.shape):
            if kept[part].any():
                yield np.flatnonzero(kept[part]) + part.start, prepare(np.asarray(vectors[part])[kept[part]])

    return find_nearest(queries, read(), min(k, int(kept.sum())))[1]


def measure_recalls(found: RowArray, truth: RowArray) -> NDArray[np.float64]:
    """The share of the true neighbours that were found, float64 [queries]; of rows [queries k] each."""
    hits = [len(np.intersect1d(mine, true)) for mine, true in zip(found, truth, strict=True)]
    return np.asarray(np.array(hits, np.float64) / max(truth.shape[1], 1))


def tune_effort(
    vectors: Any,
    held_out: HeldOut,
    search: Search,
    *,
    kind: str,
    most: int,
    recall: float,
    prepare: Prepare,
) -> Tuning:
    """Finds the least effort with which an index reaches a recall, on one half of the held-out queries.

    Reached is what the lower end of a one-sided 95% interval reaches. What the other half then finds is told.
    Cells that hold less than twice what is asked for are not enough: there an index that lacks some fares otherwise.

    Args:
        vectors: As in `embedkit.faissbuilding.build_without`.
        held_out: What the index lacks.
        search: How the index is searched.
        kind: Of index; not ``flat``.
        most: The greatest effort that changes anything.
        recall: Asked for.
        prepare: As there.
    """
    queries = prepare(np.asarray(vectors[held_out.queries]))
    truth = find_exactly(vectors, queries, held_out.rows, DEPTH, prepare=prepare)
    shown, told = held_out.halve()

    def measure(part: NDArray[np.bool_], effort: int, refine: int) -> NDArray[np.float64]:
        return measure_recalls(search(queries[part], truth.shape[1], effort, refine), truth[part])

    def reaches(effort: int, refine: int) -> bool:
        compared = refine * DEPTH if refine == _REFINEMENTS[-1] else 0
        if effort == most and (kind == "ivf" or compared >= len(vectors)):
            return True  # every vector was compared
        recalls = measure(shown, effort, refine)
        return bound_recall(recalls, held_out.groups[shown], _ONE_SIDED) >= recall

    refinements = _REFINEMENTS if kind in ("sq", "ivfpq") else (1,)
    greatest = min(most, _MOST_CANDIDATES) if kind == "hnsw" else most
    refine = next((each for each in refinements if reaches(greatest, each)), refinements[-1])
    least = 16 if kind == "hnsw" else math.ceil(2 * DEPTH * refine * most / len(vectors))
    efforts = _list_efforts(min(least, greatest), greatest)
    low, high = 0, len(efforts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(efforts[middle], refine) else (middle + 1, high)
    recalls, groups = measure(told, efforts[low], refine), held_out.groups[told]
    return Tuning(
        effort=efforts[low],
        refine=refine,
        recall=float(recalls.mean()),
        recall_low=bound_recall(recalls, groups, _TWO_SIDED),
        recall_high=bound_recall(recalls, groups, 1 - _TWO_SIDED),
        queries=len(recalls),
        reached=reaches(efforts[low], refine),
        vectors=len(vectors),
    )


def bound_recall(recalls: NDArray[np.float64], groups: RowArray, beyond: float) -> float:
    """An end of the interval of a mean recall, 0..1.

    Queries of one group count together: their error is that of the sums over groups (cluster-robust; Liang and Zeger
    1986, Biometrika 73:13), and Student's t has as many degrees of freedom as there are groups, less one. One more
    query that finds nothing is reckoned in below, and one that finds all above, so that a sample in which all alike
    find everything does not pass for certainty.

    Args:
        recalls: float64 [queries], at least one.
        groups: [queries].
        beyond: The chance of a lower value: below .5 for the lower end.
    """
    values = np.append(recalls, float(beyond > 0.5))
    _, codes = np.unique(groups, return_inverse=True)
    codes = np.append(codes, codes.max() + 1)
    mean = values.mean()
    sums = np.bincount(codes, values - mean)
    error = np.sqrt(np.square(sums).sum() * len(sums) / (len(sums) - 1)) / len(values)
    return float(np.clip(mean + stdtrit(len(sums) - 1, beyond) * error, 0, 1))


def _list_efforts(least: int, most: int) -> list[int]:
    """Efforts to try, ascending, each about a fifth more than the one before."""
    found = {most}
    effort = float(least)
    while effort < most:
        found.add(round(effort))
        effort = max(effort + 1, effort * 1.2)
    return sorted(found)

"""Owns the similarity of one case with many at once, as `embedkit.matching` finds it pair by pair; knows no store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from embedkit.matching import CaseSlices, Order, StackSlices, compare_patches, slice_votes

__all__ = ["SimilaritySums", "score_slices"]

FloatArray = NDArray[np.float32]


class SimilaritySums:
    """Sums up, view by view, how alike a query is to each of many cases."""

    def __init__(self, cases: int, order: Order) -> None:
        self._order = order
        self._totals, self._votes = np.zeros(cases), np.zeros(cases)

    def add(self, query: StackSlices, cosines: FloatArray, lengths: NDArray[np.int64]) -> None:
        """Takes one view.

        Args:
            query: The query's slices of the view, at least one.
            cosines: [query-slices other-slices], the slices of all cases side by side; changed in place.
            lengths: [cases], slices of each in the view; 0 for a case that lacks it.
        """
        have = np.flatnonzero(lengths)
        if not len(have):
            return
        votes = slice_votes(query)
        if query.votes is not None:
            cosines *= votes[:, None]
        add_up = _free_sums if self._order == "free" else _ordered_sums
        self._totals[have] += add_up(cosines, lengths[have])
        self._votes[have] += votes.sum()

    def similarities(self) -> FloatArray:
        """The mean over the query's slices by their votes, [cases]; -1 for a case with none of its views."""
        mean = self._totals / np.maximum(self._votes, np.finfo(np.float64).tiny)
        return np.where(self._votes > 0, mean, -1.0).astype(np.float32)


def score_slices(
    query: CaseSlices, others: Sequence[CaseSlices], *, order: Order = "free", by_patch: bool = False
) -> FloatArray:
    """The similarity that `embedkit.matching.match_slices` gives with each of many cases, all at once, float32 [cases].

    A case without any view of the query gets -1.
    """
    sums = SimilaritySums(len(others), order)
    for view, mine in query.items():
        stacks = [other[view] for other in others if view in other]
        if not stacks or not len(mine.rows):
            continue
        if by_patch:
            cosines = np.concatenate([compare_patches(mine, stack) for stack in stacks], axis=1)
        else:
            cosines = mine.vectors @ np.concatenate([stack.vectors for stack in stacks]).T
        sums.add(mine, cosines, np.array([len(other[view].rows) if view in other else 0 for other in others]))
    return sums.similarities()


def _free_sums(cosines: FloatArray, lengths: NDArray[np.int64]) -> FloatArray:
    """The sum over rows of the best of each case's columns, [cases]; the arguments are those of `_ordered_sums`."""
    return cast(FloatArray, np.maximum.reduceat(cosines, lengths.cumsum() - lengths, axis=1).sum(0))


def _ordered_sums(cosines: FloatArray, lengths: NDArray[np.int64]) -> FloatArray:
    """The sum over rows of the best ordered choice within each case's columns, [cases].

    Args:
        cosines: [rows columns], the cases' columns side by side.
        lengths: [cases], columns of each, at least 1.
    """
    places = np.arange(int(lengths.max()))
    columns = (lengths.cumsum() - lengths) + np.minimum(places[:, None], lengths - 1)
    best = np.zeros(columns.shape, np.float32)  # [places cases]; up to each place, over the rows so far
    spare = np.empty_like(best)
    for values in cosines:
        best += values.take(columns)  # a short case repeats its last column, which changes no best choice
        best, spare = _running_maximum(best, spare)
    return cast(FloatArray, best[-1])


def _running_maximum(values: FloatArray, spare: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The greatest so far along the first axis, and the other of the two arrays, which both are overwritten.

    In steps that double (Hillis and Steele 1986), each over all columns at once: several times as fast as
    `numpy.maximum.accumulate`, which takes them one by one.
    """
    step = 1
    while step < len(values):
        spare[:step] = values[:step]
        np.maximum(values[step:], values[:-step], out=spare[step:])
        values, spare = spare, values
        step *= 2
    return values, spare

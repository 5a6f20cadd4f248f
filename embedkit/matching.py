"""Owns matching: which slices and patches of two cases belong together, and how alike the cases are by that.

Late interaction (Khattab and Zaharia 2020, arXiv 2004.12832): every slice of the query takes the slice of the other
case that is most like it, and the similarity is the mean over the query's slices. ``ordered`` takes the best choice in
which the places never run backwards, found exactly by dynamic programming, since two scans of one organ run in the same
order. Two slices are alike by the cosine of their vectors, or patch by patch: the mean over the patches of the query's
slice of the best cosine in the other. Knows no index and no picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from embedkit.errors import SearchError

__all__ = [
    "ORDERS",
    "CaseSlices",
    "Match",
    "Order",
    "SlicePair",
    "StackSlices",
    "compare_patches",
    "has_votes",
    "match_slices",
    "slice_votes",
]

FloatArray = NDArray[np.float32]
Order = Literal["free", "ordered"]
ORDERS: tuple[Order, ...] = ("free", "ordered")
"""How the slices of a query may choose."""


@dataclass(frozen=True, eq=False)
class StackSlices:
    """The slices of one stack that are not blank, ready to be compared.

    Attributes:
        rows: int64 [slices], place in the stack.
        indices: int32 [slices], index along the plane's axis of the canonical volume.
        vectors: float32 [slices dim], centred, whitened if so fitted, of length 1.
        patches: float32 [slices patches dim], centred, of length 1; one patch per slice for class tokens, none where
            only vectors were kept.
        votes: float32 [slices patches], how much each patch counts where patches are compared; None where all count
            alike.
        lengths: float32 [slices patches], of each patch before it was brought to 1, in parts of that of the slice's
            vector; None where only vectors were kept.
        whitening: float32 [dim kept] that the vectors were multiplied with; None where they were not.
    """

    rows: NDArray[np.int64]
    indices: NDArray[np.int32]
    vectors: FloatArray
    patches: FloatArray
    votes: FloatArray | None = None
    lengths: FloatArray | None = None
    whitening: FloatArray | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the patches; (1, patches) where they are no square."""
        side = round(self.patches.shape[1] ** 0.5)
        return (side, side) if side * side == self.patches.shape[1] else (1, self.patches.shape[1])

    def split_cosine(self, row: int, vector: FloatArray) -> FloatArray:
        """What each patch of a slice adds to its cosine with another slice's vector, float32 [patches].

        A slice's vector is its patches side by side, or their mean, and then whitened: in any case a sum over patches.

        Args:
            row: Of ``rows``.
            vector: float32 [kept], of length 1.
        """
        place = int(np.searchsorted(self.rows, row))
        whole = vector if self.whitening is None else self.whitening @ vector
        patches, dim = self.patches.shape[1:]
        toward = np.broadcast_to(whole / patches, (patches, dim)) if len(whole) == dim else whole.reshape(patches, dim)
        lengths = cast(FloatArray, self.lengths)[place]
        return np.asarray(lengths * np.einsum("pd,pd->p", self.patches[place], toward), np.float32)


CaseSlices = Mapping[str, StackSlices]
"""By ``view/plane``, the slices of one case."""


@dataclass(frozen=True)
class SlicePair:
    """A slice of the query and the slice of the other case that it is matched with.

    Attributes:
        view: ``view/plane`` of both.
        query_row, other_row: Places in the two stacks.
        query_slice, other_slice: Indices along the plane's axis of the canonical volumes.
        similarity: Cosine of the two slices, or the mean over patches of the best cosine, -1..1.
        votes: How much the pair counts.
    """

    view: str
    query_row: int
    other_row: int
    query_slice: int
    other_slice: int
    similarity: float
    votes: float = 1.0


@dataclass(frozen=True, eq=False)
class Match:
    """How two cases match.

    Attributes:
        similarity: Mean over the pairs by their votes, -1..1.
        pairs: One for every slice of the query in a view that both cases have, in the order of views and slices.
        query, other: The slices matched.
        by_patch: Whether slices were compared patch by patch.
    """

    similarity: float
    pairs: tuple[SlicePair, ...]
    query: CaseSlices
    other: CaseSlices
    by_patch: bool = False

    def top(self, count: int) -> tuple[SlicePair, ...]:
        """The ``count`` most similar pairs, in the order of the query's slices, no slice of either case twice."""
        chosen: list[SlicePair] = []
        for pair in sorted(self.pairs, key=lambda each: -each.similarity):
            if len(chosen) < count and all(
                pair.view != each.view or pair.other_row != each.other_row for each in chosen
            ):
                chosen.append(pair)
        return tuple(sorted(chosen, key=self.pairs.index))

    def patch_similarities(self, pair: SlicePair) -> FloatArray:
        """Cosines of every patch of the query's slice with every patch of the other's, float32 [patches patches]."""
        query, other = self.query[pair.view], self.other[pair.view]
        mine = query.patches[np.searchsorted(query.rows, pair.query_row)]
        theirs = other.patches[np.searchsorted(other.rows, pair.other_row)]
        return cast(FloatArray, mine @ theirs.T)

    def heat(self, pair: SlicePair) -> tuple[FloatArray, FloatArray]:
        """What made two slices alike, of each patch of the query's slice and of the other's: [height width] each.

        Where slices were compared as wholes, what each patch adds to their cosine, which is the sum over either slice.
        Patch by patch the best cosine in the other slice; of a region only the patches that vote are looked for: the
        query's others are -1.
        """
        query, other = self.query[pair.view], self.other[pair.view]
        if not self.by_patch:
            mine = query.vectors[np.searchsorted(query.rows, pair.query_row)]
            theirs = other.vectors[np.searchsorted(other.rows, pair.other_row)]
            split = query.split_cosine(pair.query_row, theirs), other.split_cosine(pair.other_row, mine)
            return split[0].reshape(query.grid), split[1].reshape(other.grid)
        cosines, voting = self.patch_similarities(pair), self._voting(pair)
        found = np.where(voting, cosines.max(1), np.float32(-1))
        return found.reshape(query.grid), cosines[voting].max(0).reshape(other.grid)

    def locate_region(self, pair: SlicePair) -> NDArray[np.bool_]:
        """The patches of the other slice in which those that vote are best found, bool [height width]."""
        found = np.zeros(self.other[pair.view].patches.shape[1], bool)
        found[self.patch_similarities(pair).argmax(1)[self._voting(pair)]] = True
        return found.reshape(self.other[pair.view].grid)

    def patch_pairs(self, pair: SlicePair, count: int) -> list[tuple[tuple[int, int], tuple[int, int], float]]:
        """The ``count`` patches of the query's slice that vote and are best found in the other slice, best first.

        Returns:
            (row, column) in the query's grid, (row, column) in the other's, and their cosine.
        """
        cosines = self.patch_similarities(pair)
        best = cosines.argmax(1)
        width = self.query[pair.view].grid[1]
        voting = np.flatnonzero(self._voting(pair))
        order = voting[np.argsort(-cosines.max(1)[voting], kind="stable")][:count]
        return [
            (divmod(int(patch), width), divmod(int(best[patch]), width), float(cosines[patch, best[patch]]))
            for patch in order
        ]

    def _voting(self, pair: SlicePair) -> NDArray[np.bool_]:
        """Which patches of the query's slice have a vote, [patches]."""
        stack = self.query[pair.view]
        if stack.votes is None:
            return np.ones(stack.patches.shape[1], bool)
        return np.asarray(stack.votes[np.searchsorted(stack.rows, pair.query_row)] > 0)


def match_slices(query: CaseSlices, other: CaseSlices, *, order: Order = "free", by_patch: bool = False) -> Match:
    """Matches every slice of a query with a slice of another case, view by view.

    Args:
        query, other: Slices of the two cases, of one embedding and centres.
        order: ``free``: each query slice takes the most similar slice; ``ordered``: places never run backwards.
        by_patch: Compare slices patch by patch, wherever in the slice they are; the query's votes count only here.

    Raises:
        SearchError: the cases have no view in common.
    """
    pairs: list[SlicePair] = []
    for view in _common_views(query, other):
        mine, theirs = query[view], other[view]
        cosines = compare_patches(mine, theirs) if by_patch else mine.vectors @ theirs.vectors.T
        columns = cosines.argmax(1) if order == "free" else _ordered_columns(cosines * slice_votes(mine)[:, None])
        pairs += [
            SlicePair(
                view,
                int(mine.rows[row]),
                int(theirs.rows[column]),
                int(mine.indices[row]),
                int(theirs.indices[column]),
                float(cosines[row, column]),
                float(vote),
            )
            for row, (column, vote) in enumerate(zip(columns, slice_votes(mine), strict=True))
        ]
    if not pairs:
        raise SearchError(
            f"the cases have no view in common: {', '.join(query)} and {', '.join(other)}; nothing can be matched"
        )
    similarity = np.average([pair.similarity for pair in pairs], weights=[pair.votes for pair in pairs])
    return Match(float(similarity), tuple(pairs), query, other, by_patch)


def has_votes(slices: CaseSlices) -> bool:
    """Whether some patches of a case count more than others, as those of a region do."""
    return any(stack.votes is not None for stack in slices.values())


def slice_votes(stack: StackSlices) -> FloatArray:
    """How much each slice counts, [slices]: the votes of its patches together, or 1."""
    if stack.votes is None:
        return np.ones(len(stack.rows), np.float32)
    return cast(FloatArray, stack.votes.sum(1))


def compare_patches(query: StackSlices, other: StackSlices) -> FloatArray:
    """[query-slices other-slices]: the mean of each query patch's best cosine in the other slice, by its vote."""
    slices, patches, dim = query.patches.shape
    votes = np.ones((slices, patches), np.float32) if query.votes is None else query.votes
    shares = (votes / np.maximum(votes.sum(1, keepdims=True), np.finfo(np.float32).tiny)).reshape(-1)
    voting = np.flatnonzero(shares)
    chosen = query.patches.reshape(-1, dim)[voting]
    best = chosen @ other.patches[:, 0].T
    for place in range(1, other.patches.shape[1]):  # no array of all pairs of patches
        np.maximum(best, chosen @ other.patches[:, place].T, out=best)
    found = np.zeros((slices, best.shape[1]), np.float32)
    owners, firsts = np.unique(voting // patches, return_index=True)
    found[owners] = np.add.reduceat(shares[voting, None] * best, firsts)
    return found


def _common_views(query: CaseSlices, other: CaseSlices) -> list[str]:
    return [view for view in query if view in other and len(query[view].rows) and len(other[view].rows)]


def _ordered_columns(cosines: FloatArray) -> NDArray[np.int64]:
    """For each row the column of the best choice in which columns never run backwards, [rows]."""
    best = np.empty_like(cosines)
    before = np.zeros(cosines.shape[1], np.float32)
    for row, values in enumerate(cosines):
        best[row] = values + before
        before = np.maximum.accumulate(best[row])
    columns = np.empty(len(cosines), np.int64)
    stop = cosines.shape[1]
    for row in range(len(cosines) - 1, -1, -1):
        columns[row] = best[row, :stop].argmax()
        stop = columns[row] + 1
    return columns

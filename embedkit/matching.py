"""Owns matching: which slices and patches of two cases belong together, and how alike the cases are by that.

Late interaction (Khattab and Zaharia 2020, arXiv 2004.12832): every slice of the query takes the slice of the other
case that is most like it, and the similarity is the mean over the query's slices. ``ordered`` takes the best choice in
which the places never run backwards, found exactly by dynamic programming, since two scans of one organ run in the same
order. Two slices are alike by the cosine of their vectors, or patch by patch: the mean over the patches of the query's
slice of the best cosine in the other. Knows no index and no picture.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from embedkit.cache import Cache
from embedkit.embeddings import Embedding, require_token_set
from embedkit.errors import SearchError
from embedkit.regions import Region

__all__ = [
    "ORDERS",
    "CaseSlices",
    "Match",
    "Order",
    "SlicePair",
    "SliceReader",
    "SliceStore",
    "StackSlices",
    "has_votes",
    "match_slices",
    "measure_centres",
    "pack_slices",
    "sample_slices",
    "score_slices",
]

FloatArray = NDArray[np.float32]
Order = Literal["free", "ordered"]
ORDERS: tuple[Order, ...] = ("free", "ordered")
"""How the slices of a query may choose."""

_SAMPLE = 8_000
_SEED = 11


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
    """

    rows: NDArray[np.int64]
    indices: NDArray[np.int32]
    vectors: FloatArray
    patches: FloatArray
    votes: FloatArray | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the patches; (1, patches) where they are no square."""
        side = round(self.patches.shape[1] ** 0.5)
        return (side, side) if side * side == self.patches.shape[1] else (1, self.patches.shape[1])


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
    """

    similarity: float
    pairs: tuple[SlicePair, ...]
    query: CaseSlices
    other: CaseSlices

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
        """The best cosine of each patch in the other slice, of the query and of the other: [height width] each."""
        cosines = self.patch_similarities(pair)
        grid = self.query[pair.view].grid
        return cosines.max(1).reshape(grid), cosines.max(0).reshape(grid)

    def patch_pairs(self, pair: SlicePair, count: int) -> list[tuple[tuple[int, int], tuple[int, int], float]]:
        """The ``count`` patches of the query's slice that are best found in the other slice, best first.

        Returns:
            (row, column) in the query's grid, (row, column) in the other's, and their cosine.
        """
        cosines = self.patch_similarities(pair)
        best = cosines.argmax(1)
        width = self.query[pair.view].grid[1]
        order = np.argsort(-cosines.max(1), kind="stable")[:count]
        return [
            (divmod(int(patch), width), divmod(int(best[patch]), width), float(cosines[patch, best[patch]]))
            for patch in order
        ]


class SliceReader:
    """Reads the slices of cases from a cache's memory map, centred and scaled to length 1.

    Attributes:
        embedding: What a slice is compared by.
        views: ``view/plane`` names, in the order of ``centres``; others are not read.
    """

    def __init__(
        self,
        cache: Cache,
        embedding: Embedding,
        views: Sequence[str],
        centres: FloatArray,
        whitening: FloatArray | None = None,
    ) -> None:
        """Takes what was fitted on the cache that was indexed.

        Args:
            cache: Where tokens are read.
            embedding: What slices are compared by.
            views: ``view/plane`` names.
            centres: float32 [views patches dim], the mean token of each view, of `measure_centres`.
            whitening: float32 [dim kept], what the vectors of slices are multiplied with; None leaves them.

        Raises:
            SearchError: the cache lacks the token set.
        """
        require_token_set(cache, embedding)
        self.embedding = embedding
        self.views = tuple(views)
        self._cache = cache
        self._whitening = whitening
        self._centres = dict(zip(views, centres, strict=True))
        self._stacks: dict[str, dict[str, int]] = {}
        for stack, case, view, plane in cache.stacks.select("stack", "case_id", "view", "plane").iter_rows():
            if f"{view}/{plane}" in self._centres:
                self._stacks.setdefault(case, {})[f"{view}/{plane}"] = stack

    def holds(self, case_id: str) -> bool:
        """Whether the cache has the case in one of the views."""
        return case_id in self._stacks

    def read(self, case_id: str, *, region: Region | None = None) -> CaseSlices:
        """The slices of a case; with a region those that it touches, each patch voting by its share in it.

        Raises:
            SearchError: the cache has no such case in the views compared, or the region touches none of its patches.
        """
        if case_id not in self._stacks:
            raise SearchError(
                f"cache {self._cache.path} has no case {case_id} in {', '.join(self.views)}; give the cache that was"
                " indexed (--cache)"
            )
        found = {view: self._read_stack(view, stack) for view, stack in self._stacks[case_id].items()}
        if region is None:
            return found
        chosen = {view: self._keep_region(found[view], stack, region) for view, stack in self._stacks[case_id].items()}
        if not any(len(stack.rows) for stack in chosen.values()):
            raise SearchError(
                f"the region touches no patch of {case_id}: it lies outside of what the backbone saw; give a box or"
                " mask in the coordinates of the query's own image"
            )
        return {view: stack for view, stack in chosen.items() if len(stack.rows)}

    def _keep_region(self, slices: StackSlices, stack: int, region: Region) -> StackSlices:
        votes = region.measure_cover(self._cache.record(stack), slices.indices, slices.patches.shape[1])
        kept = votes.sum(1) > 0
        return StackSlices(
            slices.rows[kept], slices.indices[kept], slices.vectors[kept], slices.patches[kept], votes[kept]
        )

    def _read_stack(self, view: str, stack: int) -> StackSlices:
        table = self._cache.slices(stack)
        rows = np.flatnonzero(~table.blank)
        tokens = self._cache.read(stack, self.embedding.token_set)[rows].reshape(len(rows), *self._centres[view].shape)
        centred = np.subtract(tokens, self._centres[view], dtype=np.float32)
        vectors = self.embedding.slice_vectors(centred)
        return StackSlices(
            rows=rows,
            indices=table.indices[rows],
            vectors=_unit(vectors if self._whitening is None else vectors @ self._whitening),
            patches=_unit(centred),
        )


class SliceStore:
    """The vectors of all slices of many cases, as `SliceReader` gives them, packed; patches are not kept."""

    def __init__(self, vectors: NDArray[Any], places: NDArray[np.int32], views: Sequence[str]) -> None:
        """Takes what `pack_slices` gives.

        Args:
            vectors: float16 [slices dim]; may be a memory map.
            places: int32 [slices 4]: case, view, row in the stack, index along the plane's axis; cases in order.
            views: ``view/plane`` names that the second column counts.
        """
        self.vectors, self.places = vectors, places
        self._views = tuple(views)

    def read(self, case: int) -> CaseSlices:
        """The slices of the case of that number; empty where it has none."""
        return self.read_many([case])[0]

    def read_many(self, cases: Sequence[int]) -> list[CaseSlices]:
        """The slices of the cases of these numbers, in their order: one pass over the map, one block of float32."""
        bounds = [(self._find_start(case), self._find_start(case + 1)) for case in cases]
        blocks = [self.vectors[start:stop] for start, stop in bounds]
        gathered = np.concatenate([self.vectors[:0], *blocks])
        vectors = torch.from_numpy(gathered).float().numpy()  # four times as fast as numpy's conversion
        stops = np.cumsum([stop - start for start, stop in bounds], dtype=np.int64).tolist()
        return [
            self._split_views(self.places[start:stop], vectors[end - (stop - start) : end])
            for (start, stop), end in zip(bounds, stops, strict=True)
        ]

    def _find_start(self, case: int) -> int:
        """The first row of a case, by a few reads however many there are: np.searchsorted would copy the column."""
        return bisect_left(cast(Sequence[int], self.places[:, 0]), case)

    def _split_views(self, places: NDArray[np.int32], vectors: FloatArray) -> CaseSlices:
        """The rows of one case, view by view."""
        edges = [0, *(np.flatnonzero(np.diff(places[:, 1])) + 1).tolist(), len(places)]
        return {
            self._views[places[first, 1]]: StackSlices(
                places[first:last, 2].astype(np.int64),
                places[first:last, 3],
                vectors[first:last],
                vectors[first:last, :0, None],
            )
            for first, last in pairwise(edges)
            if last > first
        }


def pack_slices(
    reader: SliceReader, case_ids: Sequence[str], count: int, file: Path
) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
    """Vectors and places of all slices of some cases, as `SliceStore` takes them; the vectors are mapped from a file.

    Args:
        reader: Reads them.
        case_ids: In the order of their numbers; a case without slices in the reader's views has none.
        count: At least as many as there are slices.
        file: To write.
    """
    vectors: NDArray[np.float16] | None = None
    places = np.zeros((count, 4), np.int32)
    stop = 0
    for number, case_id in enumerate(case_ids):
        if not reader.holds(case_id):
            continue
        stacks = reader.read(case_id)
        for place, view in enumerate(reader.views):
            if view not in stacks:
                continue
            stack = stacks[view]
            if vectors is None:
                vectors = np.lib.format.open_memmap(file, "w+", np.float16, (count, stack.vectors.shape[1]))
            start, stop = stop, stop + len(stack.rows)
            vectors[start:stop] = stack.vectors
            places[start:stop, :2] = number, place
            places[start:stop, 2], places[start:stop, 3] = stack.rows, stack.indices
    if vectors is None or not stop:
        raise SearchError("every slice of the cases is blank; there is nothing to compare")
    return vectors[:stop], places[:stop]


def sample_slices(reader: SliceReader, case_ids: Sequence[str]) -> FloatArray:
    """Vectors of slices of evenly chosen cases, some 8,000 at most, float32 [slices dim]: to fit a whitening on."""
    found: list[FloatArray] = []
    known = [case_id for case_id in case_ids if reader.holds(case_id)]
    random = np.random.default_rng(_SEED)
    for place in random.permutation(len(known)):
        found += [stack.vectors for stack in reader.read(known[place]).values()]
        if sum(map(len, found)) >= _SAMPLE:
            break
    return np.concatenate(found)[:_SAMPLE]


def measure_centres(cache: Cache, embedding: Embedding, views: Sequence[str]) -> FloatArray:
    """The mean token of each view and patch place over all slices that are not blank, float32 [views patches dim].

    What all slices share says nothing of which are alike (Mu and Viswanath 2018, arXiv 1702.01417). A view of a single
    case takes the mean over all views: less its own, nothing of it would be left to compare.

    Raises:
        SearchError: the cache lacks the token set.
    """
    require_token_set(cache, embedding)
    shape = cache.token_sets[embedding.token_set].shape
    sums = np.zeros((len(views), *((1, *shape) if len(shape) == 1 else shape)), np.float64)
    slices, cases = np.zeros(len(views)), np.zeros(len(views), np.int64)
    places = {view: place for place, view in enumerate(views)}
    for stack, view, plane in cache.stacks.select("stack", "view", "plane").iter_rows():
        place = places.get(f"{view}/{plane}")
        if place is not None:
            kept = ~cache.slices(stack).blank
            tokens = cache.read(stack, embedding.token_set)[kept]
            sums[place] += tokens.sum(0, dtype=np.float64)
            slices[place] += kept.sum()
            cases[place] += 1
    means = sums / np.maximum(slices, 1)[:, None, None]
    means[cases < 2] = sums.sum(0) / max(slices.sum(), 1) if cases.sum() > 1 else 0.0
    return cast(FloatArray, means.astype(np.float32))


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
        cosines = _compare_patches(mine, theirs) if by_patch else mine.vectors @ theirs.vectors.T
        columns = cosines.argmax(1) if order == "free" else _ordered_columns(cosines * _slice_votes(mine)[:, None])
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
            for row, (column, vote) in enumerate(zip(columns, _slice_votes(mine), strict=True))
        ]
    if not pairs:
        raise SearchError(
            f"the cases have no view in common: {', '.join(query)} and {', '.join(other)}; nothing can be matched"
        )
    similarity = np.average([pair.similarity for pair in pairs], weights=[pair.votes for pair in pairs])
    return Match(float(similarity), tuple(pairs), query, other)


def score_slices(
    query: CaseSlices, others: Sequence[CaseSlices], *, order: Order = "free", by_patch: bool = False
) -> FloatArray:
    """The similarity that `match_slices` gives with each of many cases, all at once, float32 [cases].

    A case without any view of the query gets -1.
    """
    totals, votes = np.zeros(len(others)), np.zeros(len(others))
    for view, mine in query.items():
        have = [number for number, other in enumerate(others) if view in other and len(other[view].rows)]
        if not have or not len(mine.rows):
            continue
        stacks = [others[number][view] for number in have]
        if by_patch:
            cosines = np.concatenate([_compare_patches(mine, stack) for stack in stacks], axis=1)
        else:
            cosines = mine.vectors @ np.concatenate([stack.vectors for stack in stacks]).T
        mine_votes = _slice_votes(mine)
        if mine.votes is not None:
            cosines *= mine_votes[:, None]
        lengths = np.array([len(stack.rows) for stack in stacks])
        sums = _free_sums(cosines, lengths) if order == "free" else _ordered_sums(cosines, lengths)
        totals[have] += sums
        votes[have] += mine_votes.sum()
    return np.where(votes > 0, totals / np.maximum(votes, np.finfo(np.float64).tiny), -1.0).astype(np.float32)


def has_votes(slices: CaseSlices) -> bool:
    """Whether some patches of a case count more than others, as those of a region do."""
    return any(stack.votes is not None for stack in slices.values())


def _slice_votes(stack: StackSlices) -> FloatArray:
    """How much each slice counts, [slices]: the votes of its patches together, or 1."""
    if stack.votes is None:
        return np.ones(len(stack.rows), np.float32)
    return cast(FloatArray, stack.votes.sum(1))


def _compare_patches(query: StackSlices, other: StackSlices) -> FloatArray:
    """[query-slices other-slices]: the mean of each query patch's best cosine in the other slice, by its vote."""
    slices, patches, dim = query.patches.shape
    votes = np.ones((slices, patches), np.float32) if query.votes is None else query.votes
    cosines = query.patches.reshape(-1, dim) @ other.patches.reshape(-1, dim).T
    best = cosines.reshape(slices, patches, *other.patches.shape[:2]).max(3)
    shares = votes / np.maximum(votes.sum(1, keepdims=True), np.finfo(np.float32).tiny)
    return cast(FloatArray, np.einsum("sp,spo->so", shares, best))


def _free_sums(cosines: FloatArray, lengths: NDArray[np.int64]) -> FloatArray:
    """The sum over rows of the best of each case's columns, [cases]; the arguments are those of `_ordered_sums`."""
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    return cast(FloatArray, np.maximum.reduceat(cosines, starts, axis=1).sum(0))


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


def _ordered_sums(cosines: FloatArray, lengths: NDArray[np.int64]) -> FloatArray:
    """The sum over rows of the best ordered choice within each case's columns, [cases].

    Args:
        cosines: [rows columns], the cases' columns side by side.
        lengths: [cases], columns of each.
    """
    places = np.arange(int(lengths.max()))
    columns = (lengths.cumsum() - lengths)[:, None] + np.minimum(places, lengths[:, None] - 1)
    before = np.zeros(columns.shape, np.float32)
    for values in cosines:
        before += values[columns]  # a short case repeats its last column, which changes no best choice
        np.maximum.accumulate(before, axis=1, out=before)
    return before[:, -1]


def _unit(vectors: FloatArray) -> FloatArray:
    """Vectors of length 1 along the last axis; zero where they were zero."""
    lengths = np.sqrt(np.einsum("...i,...i->...", vectors, vectors))
    return cast(FloatArray, vectors / np.maximum(lengths, np.finfo(np.float32).tiny)[..., None])

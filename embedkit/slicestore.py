"""Owns the slices that an index keeps: packing the vectors of all its cases, reading and comparing those of some."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embedkit.errors import SearchError
from embedkit.matching import CaseSlices, Order, StackSlices
from embedkit.slicereading import SliceReader
from embedkit.slicescores import SimilaritySums

__all__ = ["SliceStore", "pack_slices"]

FloatArray = NDArray[np.float32]


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
        places, vectors, _ = self._gather([case])
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

    def score(self, query: CaseSlices, cases: Sequence[int], *, order: Order = "free") -> FloatArray:
        """How alike a query is to each of the cases of these numbers, as `embedkit.slicescores.score_slices`."""
        places, vectors, owners = self._gather(cases)
        sums = SimilaritySums(len(cases), order)
        for number, view in enumerate(self._views):
            chosen = places[:, 1] == number
            if view in query and len(query[view].rows) and chosen.any():
                others = vectors if chosen.all() else vectors[chosen]
                lengths = np.bincount(owners[chosen], minlength=len(cases))
                sums.add(query[view], query[view].vectors @ others.T, lengths)
        return sums.similarities()

    def _gather(self, cases: Sequence[int]) -> tuple[NDArray[np.int32], FloatArray, NDArray[np.int64]]:
        """Places, vectors as float32, and whose among ``cases`` they are, of all slices of some cases, in order."""
        wanted = np.asarray(cases, np.int64)
        starts, stops = self._find_starts(wanted), self._find_starts(wanted + 1)
        bounds = list(zip(starts.tolist(), stops.tolist(), strict=True))
        places = np.concatenate([self.places[:0], *(self.places[start:stop] for start, stop in bounds)])
        stored = np.concatenate([self.vectors[:0], *(self.vectors[start:stop] for start, stop in bounds)])
        vectors = torch.from_numpy(stored).float().numpy()  # four times as fast as numpy's conversion
        return places, vectors, np.repeat(np.arange(len(wanted)), stops - starts)

    def _find_starts(self, cases: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first row of each case, by bisection of all at once: np.searchsorted would copy the whole column."""
        column = self.places[:, 0]
        low, high = np.zeros(len(cases), np.int64), np.full(len(cases), len(column))
        while (open_ := low < high).any():
            middle = (low + high) // 2
            before = np.zeros(len(cases), bool)
            before[open_] = column[middle[open_]] < cases[open_]
            low = np.where(before, middle + 1, low)
            high = np.where(open_ & ~before, middle, high)
        return low


def pack_slices(
    reader: SliceReader, case_ids: Sequence[str], count: int, file: Path
) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
    """Vectors and places of all slices of some cases, as `SliceStore` takes them; both are mapped from files.

    Args:
        reader: Reads them.
        case_ids: In the order of their numbers; a case without slices in the reader's views has none.
        count: At least as many as there are slices.
        file: To write the vectors to; the places go to one beside it.
    """
    vectors: NDArray[np.float16] | None = None
    places = np.lib.format.open_memmap(file.with_suffix(".places.npy"), "w+", np.int32, (count, 4))
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

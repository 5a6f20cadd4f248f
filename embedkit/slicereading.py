"""Owns reading the slices of a case from a cache, ready to be compared; knows no match and no index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from embedkit.cache import Cache
from embedkit.embeddings import Embedding, require_token_set
from embedkit.errors import SearchError
from embedkit.matching import CaseSlices, StackSlices
from embedkit.regions import Region

__all__ = ["SliceReader", "measure_centres", "sample_slices"]

FloatArray = NDArray[np.float32]

_SAMPLE = 8_000
_SEED = 11


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
        *,
        cases: Sequence[str] | None = None,
    ) -> None:
        """Takes what was fitted on the cache that was indexed.

        Args:
            cache: Where tokens are read.
            embedding: What slices are compared by.
            views: ``view/plane`` names.
            centres: float32 [views patches dim], the mean token of each view, of `measure_centres`.
            whitening: float32 [dim kept], what the vectors of slices are multiplied with; None leaves them.
            cases: The only ones that will be read, so that no others are looked for; None is any.

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
        table = cache.stacks.select("stack", "case_id", "view", "plane")
        for stack, case, view, plane in (
            table if cases is None else table.filter(pl.col("case_id").is_in(list(cases)))
        ).iter_rows():
            if f"{view}/{plane}" in self._centres:
                self._stacks.setdefault(case, {})[f"{view}/{plane}"] = stack

    def holds(self, case_id: str) -> bool:
        """Whether the cache has the case in one of the views."""
        return case_id in self._stacks

    def read(self, case_id: str, *, region: Region | None = None, patches_alone: bool = False) -> CaseSlices:
        """The slices of a case; with a region those that it touches, each patch voting by its share in it.

        ``patches_alone`` gives no vectors, which takes half the time: for cases that are compared patch by patch.

        Raises:
            SearchError: the cache has no such case in the views compared, or the region touches none of its patches.
        """
        if case_id not in self._stacks:
            raise SearchError(
                f"cache {self._cache.path} has no case {case_id} in {', '.join(self.views)}; give the cache that was"
                " indexed (--cache)"
            )
        found = {
            view: self._read_stack(view, stack, patches_alone=patches_alone)
            for view, stack in self._stacks[case_id].items()
        }
        if region is None:
            return found
        chosen = {view: self._keep_region(found[view], stack, region) for view, stack in self._stacks[case_id].items()}
        if not any(len(stack.rows) for stack in chosen.values()):
            extent = region.describe_extent(self._cache.record(next(iter(self._stacks[case_id].values()))))
            raise SearchError(
                f"the region touches no patch of {case_id}: it lies outside of what the backbone saw; give a box or"
                f" mask within the query's own image, {extent}"
            )
        return {view: stack for view, stack in chosen.items() if len(stack.rows)}

    def _keep_region(self, slices: StackSlices, stack: int, region: Region) -> StackSlices:
        votes = region.measure_cover(self._cache.record(stack), slices.indices, slices.patches.shape[1])
        kept = votes.sum(1) > 0
        return replace(
            slices,
            rows=slices.rows[kept],
            indices=slices.indices[kept],
            vectors=slices.vectors[kept],
            patches=slices.patches[kept],
            votes=votes[kept],
            lengths=None if slices.lengths is None else slices.lengths[kept],
        )

    def _read_stack(self, view: str, stack: int, *, patches_alone: bool) -> StackSlices:
        table = self._cache.slices(stack)
        rows = np.flatnonzero(~table.blank)
        tokens = self._cache.read(stack, self.embedding.token_set)[rows].reshape(len(rows), *self._centres[view].shape)
        if patches_alone:
            patches = torch.from_numpy(tokens).float().numpy()  # four times as fast as numpy's conversion
            patches -= self._centres[view]
            patches /= _measure_lengths(patches)[..., None]
            return StackSlices(rows, table.indices[rows], np.empty((len(rows), 0), np.float32), patches)
        centred = np.subtract(tokens, self._centres[view], dtype=np.float32)
        vectors = self.embedding.slice_vectors(centred)
        moved = vectors if self._whitening is None else vectors @ self._whitening
        lengths, whole = _measure_lengths(centred), _measure_lengths(moved)
        return StackSlices(
            rows=rows,
            indices=table.indices[rows],
            vectors=moved / whole[..., None],
            patches=centred / lengths[..., None],
            lengths=lengths / whole[..., None],
            whitening=self._whitening,
        )


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


def _measure_lengths(vectors: FloatArray) -> FloatArray:
    """Lengths along the last axis; next to nothing for those of length 0, which then stay zero when divided by it."""
    lengths = np.sqrt(np.einsum("...i,...i->...", vectors, vectors))
    return cast(FloatArray, np.maximum(lengths, np.finfo(np.float32).tiny))

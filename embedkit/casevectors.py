"""Owns the vectors of all cases of a cache, made in bounded memory: stack by stack into a file; knows no index.

`embedkit.embeddings` says what the vector of one stack is; here it becomes one per case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.cache import Cache
from embedkit.embeddings import Embedding, mean_views, require_token_set
from embedkit.errors import SearchError
from embedkit.unitvectors import split_rows

__all__ = ["EmbeddedCases", "embed_new_cases", "join_embeddings"]

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class EmbeddedCases:
    """One vector per case.

    Attributes:
        cases: case_id and patient_id, a row per case.
        views: ``view/plane`` names.
        means: float32 [views dim], the mean of each view that was subtracted.
        vectors: float32 [cases dim]; zero for a case without a usable slice. A memory map where a file was given.
    """

    cases: pl.DataFrame
    views: tuple[str, ...]
    means: FloatArray
    vectors: NDArray[Any]


def join_embeddings(cache: Cache, embeddings: Sequence[Embedding], *, file: Path | None = None) -> EmbeddedCases:
    """One vector per case of a cache: the mean over its views less the view's mean over all cases, part beside part.

    Taking the difference to the view first keeps a case that lacks a sequence comparable with one that has it.

    Args:
        cache: Read once per part, stack by stack.
        embeddings: The parts, side by side; of several each at length 1, so that none drowns others.
        file: Where the vectors are kept; None keeps them in memory.

    Raises:
        SearchError: the cache lacks a token set.
    """
    stacks = cache.stacks.select(pl.concat_str("view", "plane", separator="/"))
    return _embed(cache, embeddings, tuple(sorted(stacks.to_series().unique())), None, file)


def embed_new_cases(
    cache: Cache, embeddings: Sequence[Embedding], views: Sequence[str], means: FloatArray, *, file: Path | None = None
) -> EmbeddedCases:
    """One vector per case of another cache, made as `join_embeddings` made those of which the means are.

    Raises:
        SearchError: the cache lacks a token set, or holds a view that is not among ``views``.
    """
    return _embed(cache, embeddings, tuple(views), means, file)


def _embed(
    cache: Cache, embeddings: Sequence[Embedding], views: tuple[str, ...], means: FloatArray | None, file: Path | None
) -> EmbeddedCases:
    for embedding in embeddings:
        require_token_set(cache, embedding)
    cases = cache.stacks.select("case_id", "patient_id").unique(maintain_order=True)
    sizes = [each.size(cache.token_sets[each.token_set].shape) for each in embeddings]
    edges = np.cumsum([0, *sizes]).tolist()
    parts = [slice(start, stop) for start, stop in pairwise(edges)]
    shape = (len(cases), edges[-1])
    vectors: NDArray[Any] = (
        np.zeros(shape, np.float32) if file is None else np.lib.format.open_memmap(file, "w+", np.float32, shape)
    )
    present = np.zeros((len(cases), len(views)), bool)
    sums = _sum_stacks(
        cache, list(zip(embeddings, parts, strict=True)), views, cases=cases, vectors=vectors, present=present
    )
    if means is None:
        means = mean_views(sums, present.sum(0))
    for rows in split_rows(*shape):
        vectors[rows] = _centre(vectors[rows], present[rows], means, parts)
    return EmbeddedCases(cases, views, means, vectors)


def _sum_stacks(
    cache: Cache,
    parts: Sequence[tuple[Embedding, slice]],
    views: Sequence[str],
    *,
    cases: pl.DataFrame,
    vectors: NDArray[Any],
    present: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Adds up the vectors of each case over its views, notes which it has, and gives the sum of each view.

    Args:
        cache: Read stack by stack.
        parts: What is laid side by side, and in which columns.
        views: ``view/plane`` names.
        cases: A row per case.
        vectors: [cases dim], zero; takes the sums over views.
        present: [cases views], False; takes which views a case has.

    Returns:
        float64 [views dim], the sum over cases.
    """
    stacks = cache.stacks.select("stack", "case_id", view=pl.concat_str("view", "plane", separator="/"))
    if unknown := sorted(set(stacks["view"].unique()) - set(views)):
        raise SearchError(f"{cache.path} has view {', '.join(unknown)}, but the index knows {', '.join(views)}")
    places = {view: place for place, view in enumerate(views)}
    numbers = stacks.join(cases.select("case_id").with_row_index("row"), on="case_id", maintain_order="left")
    sums = np.zeros((len(views), vectors.shape[1]))
    for stack, view, row in numbers.select("stack", "view", "row").iter_rows():
        kept = ~cache.slices(stack).blank
        if not kept.any():
            continue
        for embedding, columns in parts:
            vector = embedding.stack_vector(cache.read(stack, embedding.token_set)[kept])
            vectors[row, columns] += vector
            sums[places[view], columns] += vector
        present[row, places[view]] = True
    return sums


def _centre(sums: FloatArray, present: NDArray[np.bool_], means: FloatArray, parts: Sequence[slice]) -> FloatArray:
    """Sums over views [cases dim] less those of the views' means, by how many there are; several parts at length 1."""
    expected = np.zeros(sums.shape, np.float32)
    for place, mean in enumerate(means):  # added up as the vectors were: a case like the mean is left with nothing
        expected[present[:, place]] += mean
    found = cast(FloatArray, (sums - expected) / np.maximum(present.sum(1), 1).astype(np.float32)[:, None])
    if len(parts) > 1:
        tiny = np.finfo(np.float32).tiny
        for part in parts:
            found[:, part] /= np.maximum(np.linalg.norm(found[:, part], axis=1, keepdims=True), tiny)
    return found

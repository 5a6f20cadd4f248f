"""Owns embeddings: how cached tokens become the vector of a slice and of a case, in words and numbers; knows no index.

An embedding is named ``STATISTIC:TOKEN_SET``; ``A+B`` puts several side by side, each at length 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.cache import Cache
from embedkit.errors import OptionError, SearchError
from embedkit.recipe import TokenSet

__all__ = [
    "CaseVectors",
    "Embedding",
    "Statistic",
    "embed_cases",
    "mean_views",
    "name_layer",
    "parse_embeddings",
    "require_token_set",
]

FloatArray = NDArray[np.float32]
Statistic = Literal["mean", "grid", "aligned"]

_STATISTICS: tuple[Statistic, ...] = ("mean", "grid", "aligned")
_ALIGNED = 8


@dataclass(frozen=True)
class Embedding:
    """How the tokens of one view become one vector.

    Attributes:
        statistic: ``mean`` averages over slices and patches; ``grid`` averages over slices and keeps each patch place;
            ``aligned`` keeps each patch place and where along the stack it was: the mean of each of eight equal parts.
        token_set: Name of the token set, ``cls:12`` or ``patch@4:8``.
    """

    statistic: Statistic
    token_set: str

    def __str__(self) -> str:
        return f"{self.statistic}:{self.token_set}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads ``mean:cls:12``, ``grid:patch@4:8`` or ``aligned:patch@4:8``.

        Raises:
            OptionError: ``text`` does not have that form.
        """
        statistic, _, token_set = text.partition(":")
        if statistic not in _STATISTICS or not token_set:
            raise OptionError(
                f"embedding {text!r} is not mean:TOKEN_SET, grid:TOKEN_SET or aligned:TOKEN_SET; for example"
                " mean:cls:12 or grid:patch@4:8"
            )
        kind = TokenSet.parse(token_set).kind
        if kind not in ("cls", "patch") or (statistic == "grid" and kind != "patch"):
            raise OptionError(
                f"embedding {text!r}: mean and aligned work on cls and patch tokens, grid on patch tokens alone"
            )
        return cls(statistic, token_set)

    def slice_vectors(self, tokens: NDArray[Any]) -> FloatArray:
        """The vector of each slice, float32 [slices dim], of tokens [slices dim] or [slices patches dim].

        ``mean`` takes the mean over patches; ``grid`` and ``aligned`` lay the patches side by side.
        """
        if tokens.ndim == 3 and self.statistic == "mean":
            return cast(FloatArray, tokens.mean(1, dtype=np.float32))
        return cast(FloatArray, np.asarray(tokens, np.float32).reshape(len(tokens), -1))

    def stack_vector(self, tokens: NDArray[Any]) -> FloatArray:
        """The vector of a stack, float32 [dim], of the tokens of its slices that are not blank; at least one."""
        slices = self.slice_vectors(tokens)
        if self.statistic != "aligned":
            return cast(FloatArray, slices.mean(0))
        return cast(FloatArray, (_part_weights(len(slices)) @ slices).reshape(-1))

    def subtract(self, tokens: NDArray[Any], mean: FloatArray) -> FloatArray:
        """Tokens [slices patches dim] less what each must have been for `stack_vector` to give ``mean`` [dim]."""
        if self.statistic == "mean":
            return cast(FloatArray, tokens - mean)
        if self.statistic == "grid":
            return cast(FloatArray, tokens - mean.reshape(tokens.shape[1:]))
        weights = _part_weights(len(tokens))
        shares = weights / weights.sum(0)
        return cast(FloatArray, tokens - np.tensordot(shares.T, mean.reshape(_ALIGNED, *tokens.shape[1:]), 1))

    def size(self, shape: Sequence[int]) -> int:
        """Length of a stack's vector where a slice's tokens have this shape."""
        whole = int(shape[-1]) if self.statistic == "mean" else int(np.prod(shape))
        return whole * (_ALIGNED if self.statistic == "aligned" else 1)


def _part_weights(slices: int) -> FloatArray:
    """float32 [parts slices]: what each slice gives to the mean of each of equal parts of a stack; rows sum to 1."""
    edges = np.linspace(0, slices, _ALIGNED + 1)
    places = np.arange(slices)
    overlap = np.minimum(edges[1:, None], places + 1) - np.maximum(edges[:-1, None], places)
    return np.asarray(np.maximum(overlap, 0) * (_ALIGNED / slices), np.float32)


@dataclass(frozen=True)
class CaseVectors:
    """One vector per case and view; a view is a ``view/plane`` pair.

    Attributes:
        cases: case_id and patient_id, a row per case.
        views: Names along the views axis.
        vectors: float32 [cases views dim]; zero where ``present`` is False.
        present: Bool [cases views].
    """

    cases: pl.DataFrame
    views: tuple[str, ...]
    vectors: FloatArray
    present: NDArray[np.bool_]

    def view_means(self) -> FloatArray:
        """Mean over the cases that have the view, [views dim], as `mean_views` gives it."""
        return mean_views(self.vectors.sum(0), self.present.sum(0))

    def fuse(self, view_means: FloatArray) -> FloatArray:
        """One vector per case, [cases dim]: the mean over its views of the vector's difference to the view's mean.

        Taking the difference first keeps a case that lacks a sequence comparable with one that has it.
        """
        centred = np.where(self.present[..., None], self.vectors - view_means, 0.0)
        counts = np.maximum(self.present.sum(1), 1)
        return cast(FloatArray, (centred.sum(1) / counts[:, None]).astype(np.float32))


def mean_views(sums: NDArray[Any], counts: NDArray[np.int64]) -> FloatArray:
    """The mean vector of each view, float32 [views dim]; a view of one case takes the mean over all views.

    Zeros where there is one vector in all: nothing could be told apart by its difference to itself.

    Args:
        sums: [views dim], over the cases that have the view.
        counts: int64 [views], how many those are.
    """
    if counts.sum() < 2:
        return np.zeros(sums.shape, np.float32)
    means = sums / np.maximum(counts, 1)[:, None]
    means[counts < 2] = sums.sum(0) / counts.sum()
    return cast(FloatArray, means.astype(np.float32))


def embed_cases(cache: Cache, embedding: Embedding, *, views: Sequence[str] | None = None) -> CaseVectors:
    """Reads every stack of a cache once and gives one vector per case and view; blank slices are left out.

    Raises:
        SearchError: the cache lacks the token set, or holds a view that is not among ``views``.
    """
    require_token_set(cache, embedding)
    stacks = cache.stacks.with_columns(bag_view=pl.concat_str("view", "plane", separator="/"))
    names = tuple(views) if views is not None else tuple(sorted(stacks["bag_view"].unique()))
    if unknown := sorted(set(stacks["bag_view"]) - set(names)):
        raise SearchError(f"{cache.path} has view {', '.join(unknown)}, but the index knows {', '.join(names)}")
    cases = stacks.select("case_id", "patient_id").unique(maintain_order=True)
    place = {case: row for row, case in enumerate(cases["case_id"])}
    dim = embedding.size(cache.token_sets[embedding.token_set].shape)
    vectors = np.zeros((len(cases), len(names), dim), np.float32)
    present = np.zeros((len(cases), len(names)), bool)
    for stack, case, view in stacks.select("stack", "case_id", "bag_view").iter_rows():
        row, column = place[case], names.index(view)
        kept = ~cache.slices(stack).blank
        if kept.any():
            vectors[row, column] = embedding.stack_vector(cache.read(stack, embedding.token_set)[kept])
            present[row, column] = True
    return CaseVectors(cases, names, vectors, present)


def parse_embeddings(text: str, cache: Cache) -> tuple[Embedding, ...]:
    """Reads ``A+B``; a token set named without its layer gets the last one cached.

    Raises:
        OptionError: a part does not have the form of an embedding.
        SearchError: the cache holds no layer of a token set.
    """
    return tuple(Embedding.parse(name_layer(part.strip(), cache)) for part in text.split("+"))


def require_token_set(cache: Cache, embedding: Embedding) -> None:
    """Stops where a cache lacks the token set of an embedding.

    Raises:
        SearchError: it does; names those it holds.
    """
    if embedding.token_set not in cache.token_sets:
        raise SearchError(
            f"embedding {embedding} needs token set {embedding.token_set}, but {cache.path} holds"
            f" {', '.join(sorted(cache.token_sets))}; choose one of these or extract with --tokens"
        )


def name_layer(embedding: str, cache: Cache) -> str:
    """``mean:cls`` with the last cached layer of that token set; anything else as it is."""
    statistic, _, name = embedding.partition(":")
    if statistic not in _STATISTICS or not name or ":" in name:
        return embedding
    layers = [kept.layer for kept in cache.recipe.parsed_token_sets() if str(kept).rpartition(":")[0] == name]
    if not layers:
        raise SearchError(
            f"embedding {embedding} needs token set {name}, but {cache.path} holds"
            f" {', '.join(cache.recipe.token_sets)}; choose one of these or extract with --tokens"
        )
    return f"{statistic}:{name}:{max(layers)}"

"""Owns the standardisation of tokens: per-case moments computed once, summed over any training set; knows no task.

Every channel of every view is shifted and scaled by the mean and deviation of the real tokens of the training cases
alone, so that nothing of a test case reaches a head through its input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape, BagStore
from embedkit.errors import CacheError

__all__ = ["Moments", "Standardiser", "compute_moments", "fit_standardiser"]

_CHUNK_BYTES = 64 * 2**20
_LEAST_STD = 1e-4


@dataclass(frozen=True)
class Moments:
    """Sums over the real tokens of one token set, per case and view.

    Attributes:
        counts: float64 [cases views], number of tokens.
        sums: float64 [cases views dim].
        squares: float64 [cases views dim], sums of squares.
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor


def compute_moments(store: BagStore, token_set: str) -> Moments:
    """Sums the tokens of every case once; any training set's mean and deviation follow by addition.

    Raises:
        CacheError: a case holds tokens that are NaN or infinite.
    """
    table, segments = store.table(token_set), store.segments()
    cases, views = len(store), len(store.shape.views)
    _, patches, dim = table.shape
    counts = torch.zeros(cases * views, dtype=torch.float64, device=table.device)
    sums, squares = (counts.new_zeros(cases * views, dim) for _ in range(2))
    step = max(1, _CHUNK_BYTES // (4 * patches * dim))
    for rows, owners in zip(torch.split(table, step), torch.split(segments, step), strict=True):
        real = owners >= 0
        tokens, owner = rows[real].float(), owners[real]
        counts.index_add_(0, owner, torch.full_like(owner, patches, dtype=torch.float64))
        sums.index_add_(0, owner, tokens.sum(1).double())
        squares.index_add_(0, owner, tokens.square_().sum(1).double())
    found = Moments(*(total.view(cases, views, *total.shape[1:]).cpu() for total in (counts, sums, squares)))
    _require_finite(found, store.case_ids, token_set)
    return found


class Standardiser(nn.Module):
    """Shifts and scales the tokens of a bag to mean 0 and deviation 1 per view and channel, in its own dtype."""

    def __init__(self, shape: BagShape, token_sets: Sequence[str]) -> None:
        super().__init__()
        self.token_sets = tuple(token_sets)
        for number, name in enumerate(self.token_sets):
            size = (len(shape.views), 1, 1, shape.token_sets[name][1])
            self.register_buffer(f"mean_{number}", torch.zeros(size))
            self.register_buffer(f"scale_{number}", torch.ones(size))

    def forward(self, bag: Bag) -> Bag:
        """The bag with its token sets standardised and all others left out."""
        tokens = {}
        for number, name in enumerate(self.token_sets):
            mean: Tensor = self.get_buffer(f"mean_{number}")
            tokens[name] = (bag.tokens[name].to(mean.dtype) - mean).mul_(self.get_buffer(f"scale_{number}"))
        return dataclasses.replace(bag, tokens=tokens)


def fit_standardiser(shape: BagShape, moments: Mapping[str, Moments], cases: Sequence[int] | Tensor) -> Standardiser:
    """Fits a standardiser on some cases.

    Args:
        shape: Sizes of the bags.
        moments: Of each token set that the standardiser is for.
        cases: Places of the training cases. A view that none of them has takes the statistics of all views.
    """
    standardiser = Standardiser(shape, tuple(moments))
    places = torch.as_tensor(cases, dtype=torch.int64)
    for number, found in enumerate(moments.values()):
        counts, sums, squares = (total[places].sum(0) for total in (found.counts, found.sums, found.squares))
        absent = counts == 0
        counts[absent], sums[absent], squares[absent] = counts.sum(), sums.sum(0), squares.sum(0)
        mean = sums / counts.clamp(min=1)[:, None]
        deviation = (squares / counts.clamp(min=1)[:, None] - mean.square()).clamp(min=0).sqrt()
        scale = torch.where(deviation > _LEAST_STD, 1 / deviation.clamp(min=_LEAST_STD), 0.0)
        standardiser.get_buffer(f"mean_{number}").copy_(mean[:, None, None])
        standardiser.get_buffer(f"scale_{number}").copy_(scale[:, None, None])
    return standardiser


def _require_finite(moments: Moments, case_ids: Sequence[str], token_set: str) -> None:
    bad = ~torch.isfinite(moments.squares).all((1, 2))
    if bad.any():
        names = [case_ids[int(place)] for place in bad.nonzero()[:, 0]]
        raise CacheError(
            f"{len(names)} cases hold {token_set} tokens that are NaN or infinite ({', '.join(names[:5])}), expected"
            " finite float16; extract them again, with --precision fp32 if it was lower"
        )

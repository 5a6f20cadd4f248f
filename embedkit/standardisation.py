"""Owns the standardisation of tokens: per-case moments computed once, summed over any training set; knows no task.

Every channel of every view is shifted and scaled by the mean and deviation of the real tokens of the training cases
alone, so that nothing of a test case reaches a head through its input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.errors import CacheError
from embedkit.recipe import TokenSet

__all__ = ["MomentSums", "Moments", "Standardiser", "compute_moments", "fit_standardiser"]

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


class MomentSums:
    """Takes the bags of a pass over all cases and sums their tokens."""

    def __init__(self, shape: BagShape, token_sets: Sequence[str]) -> None:
        self._views = len(shape.views)
        self._parts: dict[str, list[Moments]] = {name: [] for name in token_sets}

    def add(self, bag: Bag) -> None:
        """Takes the next cases.

        Raises:
            CacheError: a case holds tokens that are NaN or infinite.
        """
        for name, parts in self._parts.items():
            tokens = bag.tokens[name].float()
            real = bag.mask[..., None, None]
            counts = bag.mask.sum(2).double() * tokens.shape[3]
            tokens = tokens.masked_fill(~real, 0.0)
            sums = tokens.sum(3).sum(2, dtype=torch.float64)
            squares = tokens.square_().sum(3).sum(2, dtype=torch.float64)
            found = Moments(counts.cpu(), sums.cpu(), squares.cpu())
            _require_finite(found, bag.case_ids, name)
            parts.append(found)

    def total(self) -> dict[str, Moments]:
        """Of each token set, the moments of all cases in the order they came."""
        return {
            name: Moments(
                *(torch.cat([getattr(part, each) for part in parts]) for each in ("counts", "sums", "squares"))
            )
            for name, parts in self._parts.items()
        }


def compute_moments(shape: BagShape, bags: Iterable[Bag], token_sets: Sequence[str]) -> dict[str, Moments]:
    """Sums the tokens of every case once; any training set's mean and deviation follow by addition.

    Raises:
        CacheError: a case holds tokens that are NaN or infinite.
    """
    sums = MomentSums(shape, token_sets)
    for bag in bags:
        sums.add(bag)
    return sums.total()


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
    for number, (name, found) in enumerate(moments.items()):
        if TokenSet.parse(name).kind == "cut":  # the blocks that these tokens enter were trained on them as they are
            continue
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

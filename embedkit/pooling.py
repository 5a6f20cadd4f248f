"""Owns pooling under a mask: sums, means, maxima and softmax that no masked value can reach; knows no head.

Statistics are summed in float32 whatever the input, so that half precision neither overflows nor drifts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.errors import HeadError

__all__ = [
    "ViewQuery",
    "join_tokens",
    "joined_grid",
    "joined_size",
    "masked_max",
    "masked_mean",
    "masked_softmax",
    "pool_bag",
    "pool_views",
    "weigh_slices",
]


def joined_size(shape: BagShape, token_sets: Sequence[str]) -> tuple[int, int]:
    """(patches, dim) of `join_tokens`.

    Raises:
        HeadError: no token set, or sets on different patch grids.
    """
    if not token_sets:
        raise HeadError("no token set was given, expected at least one, for example cls:12 or patch@4:8")
    patches = {shape.token_sets[name][0] for name in token_sets} - {1}
    if len(patches) > 1:
        raise HeadError(
            f"token sets {', '.join(token_sets)} have {', '.join(map(str, sorted(patches)))} patches per slice;"
            " one head joins only sets on the same grid (and cls): choose sets of one grid"
        )
    return max(patches, default=1), sum(shape.token_sets[name][1] for name in token_sets)


def joined_grid(shape: BagShape, token_sets: Sequence[str]) -> tuple[int, int]:
    """(height, width) of the patch grid of `join_tokens`, for a head that must know where a patch lies.

    Of cut tokens it is the grid of those that are patches.

    Raises:
        HeadError: as `joined_size`; no patches, or patches that are no square grid.
    """
    patches, _ = joined_size(shape, token_sets)
    grids = [shape.grids[name] for name in token_sets if name in shape.grids]
    if shape.tail is not None:
        grids.append(shape.tail.grid)
    if not grids or grids[0][0] != grids[0][1]:
        raise HeadError(
            f"token sets {', '.join(token_sets)} have {patches} patches per slice, expected a square grid of patches:"
            " choose a token set as patch@8:8, or extract with one"
        )
    return grids[0]


def join_tokens(bag: Bag, token_sets: Sequence[str]) -> Tensor:
    """The token sets side by side, masked slices set to zero whatever they held.

    Returns:
        [batch views slices patches dim], dim being the sum over the sets; ``cls`` is repeated at every patch.
    """
    parts = [bag.tokens[name] for name in token_sets]
    patches = max(part.shape[3] for part in parts)
    joined = parts[0]
    if len(parts) > 1:
        joined = torch.cat([part.expand(-1, -1, -1, patches, -1) for part in parts], dim=-1)
    return joined if bag.zeroed else joined.masked_fill(~bag.mask[..., None, None], 0.0)


def masked_mean(values: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Mean over ``dim`` where ``mask`` is True; 0 where it is nowhere.

    Args:
        values: Any shape.
        mask: Bool, as many axes as ``values``; whole along ``dim``, elsewhere it may be 1 and is broadcast.
        dim: The axis that goes.
    """
    total = values.masked_fill(~mask, 0.0).sum(dim, dtype=torch.float32)
    return (total / mask.sum(dim).clamp(min=1)).to(values.dtype)


def masked_max(values: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Maximum over ``dim`` where ``mask`` (as for `masked_mean`) is True; 0 where it is nowhere."""
    highest = values.masked_fill(~mask, torch.finfo(values.dtype).min).amax(dim)
    return highest.masked_fill(~mask.any(dim), 0.0)


def masked_softmax(scores: Tensor, mask: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Softmax over ``dim`` where ``mask`` (broadcast to ``scores``) is True; masked places get exactly 0.

    Returns:
        float32 of the shape of ``scores``; where the mask is False throughout, zeros.
    """
    scores = scores.float().masked_fill(~mask, torch.finfo(torch.float32).min)
    weights = (scores - scores.detach().amax(dim, keepdim=True)).exp().masked_fill(~mask, 0.0)
    return weights / weights.sum(dim, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def pool_views(bag: Bag, token_sets: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The mean of the tokens of each view over slices and patches, and the share of each view in a mean over views.

    Returns:
        [batch views dim], zeros for a missing view, and [batch views], which sums to 1 over the views present.
    """
    tokens = join_tokens(bag, token_sets).mean(3)
    present = bag.mask.any(2)
    pooled = masked_mean(tokens, bag.mask[..., None], 2)
    return pooled, (present / present.sum(1, keepdim=True).clamp(min=1)).to(pooled.dtype)


def pool_bag(bag: Bag) -> Bag:
    """One token per view and token set, its mean over the real slices and patches, as float32.

    For heads that pool so first: they give the same on this bag, and the mean of standardised tokens is the
    standardised mean, so it may be taken once for a whole training.
    """
    present = bag.mask.any(2, keepdim=True)
    tokens = {
        name: masked_mean(values.float().mean(3), bag.mask[..., None], 2)[:, :, None, None]
        for name, values in bag.tokens.items()
    }
    positions = torch.full(present.shape, 0.5, device=bag.positions.device, dtype=bag.positions.dtype)
    return dataclasses.replace(bag, tokens=tokens, mask=present, positions=positions)


def weigh_slices(weights: Tensor) -> tuple[Tensor, Tensor]:
    """``slice_attention`` and ``token_attention`` of weights over tokens that need not sum to 1 in any one view.

    Args:
        weights: Not negative, 0 on masked slices [batch views slices patches].

    Returns:
        [batch views slices], summing to 1 over each view that has any weight, and the same with the patches apart.
    """
    total = weights.sum((2, 3), keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    attention = weights / total
    return attention.sum(3), attention


class ViewQuery(nn.Module):
    """Fuses the vectors of a case's views by query pooling, leaving out missing views; one view passes unchanged."""

    def __init__(self, dim: int, views: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(dim)) if views > 1 else None

    def forward(self, vectors: Tensor, present: Tensor) -> Tensor:
        """Pools [batch views dim] under ``present`` [batch views] to [batch dim]."""
        return torch.einsum("bv,bvd->bd", self.weigh(vectors, present), vectors)

    def weigh(self, vectors: Tensor, present: Tensor) -> Tensor:
        """The weight of each view [batch views]: 0 where it is missing, else summing to 1."""
        if self.query is None:
            return present.to(vectors.dtype)
        scores = vectors @ self.query / math.sqrt(vectors.shape[-1])
        return masked_softmax(scores, present, 1).to(vectors.dtype)

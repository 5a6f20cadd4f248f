"""Owns products of shared tokens with what is learned, for many heads at once; knows no head.

Heads that are trained side by side (`embedkit.stacks`) look at the same tokens under `torch.vmap`, each with queries
and weights of its own. `torch.einsum` would then multiply head after head, a copy of the tokens for each; here the rows
of all heads become the rows of one matrix, so that the tokens are read once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["project_views", "score_tokens", "weigh_tokens"]


def score_tokens(tokens: Tensor, queries: Tensor) -> Tensor:
    """Inner products of the tokens of each view with the query of that view.

    Args:
        tokens: [batch views slices patches dim].
        queries: [views dim].

    Returns:
        [batch views slices patches].
    """
    by_view = tokens.transpose(0, 1)
    scores = _multiply(queries[:, None], by_view.flatten(1, 3).mT)
    return scores.view(by_view.shape[:-1]).transpose(0, 1)


def weigh_tokens(weights: Tensor, tokens: Tensor) -> Tensor:
    """Sums of the tokens of each view under weights.

    Args:
        weights: [batch views slices patches].
        tokens: [batch views slices patches dim].

    Returns:
        [batch views dim].
    """
    flat = tokens.flatten(2, 3).flatten(0, 1)
    pooled = _multiply(weights.to(tokens.dtype).flatten(2, 3).flatten(0, 1)[:, None], flat)
    return pooled.view(*tokens.shape[:2], -1)


def project_views(vectors: Tensor, weight: Tensor) -> Tensor:
    """A linear layer for each view.

    Args:
        vectors: [batch views dim].
        weight: [views hidden dim].

    Returns:
        [batch views hidden].
    """
    return _multiply(weight, vectors.permute(1, 2, 0)).permute(2, 0, 1)


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Products [n rows columns] of left [n rows inner] and right [n inner columns], in autocast's dtype if it is on."""
    if torch.compiler.is_compiling():
        return torch.bmm(left, right)
    if torch.is_autocast_enabled(left.device.type):
        dtype = torch.get_autocast_dtype(left.device.type)
        left, right = left.to(dtype), right.to(dtype)
    product: Tensor = _Product.apply(left, right)
    return product


class _Product(torch.autograd.Function):
    """`torch.bmm` that under `torch.vmap` takes the rows of all, where the right side is shared, as rows of one."""

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], _output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        first = _Product.apply(slopes[0], right.mT) if ctx.needs_input_grad[0] else None
        return first, _Product.apply(left.mT, slopes[0]) if ctx.needs_input_grad[1] else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], left: Tensor, right: Tensor) -> tuple[Tensor, int]:
        many, (place, other) = info.batch_size, in_dims
        if other is None and place is not None:
            rows = left.movedim(place, 1).flatten(1, 2)
            return _Product.apply(rows, right).unflatten(1, (many, -1)), 1
        sides = [
            side.expand(many, *side.shape) if at is None else side.movedim(at, 0)
            for side, at in ((left, place), (right, other))
        ]
        return _Product.apply(*(side.flatten(0, 1) for side in sides)).unflatten(0, (many, -1)), 0

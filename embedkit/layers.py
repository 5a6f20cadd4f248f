"""Owns the first linear layer of a head that reads several layers of the backbone, and what it makes of each of them.

Token sets that differ in their layer alone (``patch@4:4``, ``patch@4:8``) say the same of a place at several depths, in
channels that a residual stream keeps in order. As ELMo mixes the layers of its language model (Peters et al., "Deep
contextualized word representations", arXiv 1802.05365, equation 1) they are mixed by softmax weights and go through
one map. All were standardised, so the weights are on one scale and tell which layer a head leaned on. Sets that differ
otherwise each have a map of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedkit.bags import BagShape
from embedkit.pooling import joined_size
from embedkit.recipe import TokenSet

__all__ = ["LayeredLinear", "ViewLinear", "first_linear", "layer_weights"]

_GAIN = 10.0  # how fast weights move: AdamW takes equal steps whatever the slope, and some hundred steps must suffice


def first_linear(shape: BagShape, token_sets: Sequence[str], width: int, *, per_view: bool = False) -> nn.Module:
    """A linear layer on what `embedkit.pooling.join_tokens` gives, with learned layer weights where there are layers.

    Args:
        shape: Of the bags.
        token_sets: What is joined.
        width: Of the output.
        per_view: Whether each view has weights of its own.

    Raises:
        HeadError: as `embedkit.pooling.joined_size`.
    """
    _, dim = joined_size(shape, token_sets)
    views = len(shape.views) if per_view else None
    if len(_group_layers(shape, token_sets)) < len(token_sets):
        return LayeredLinear(shape, token_sets, width, views=views)
    return nn.Linear(dim, width) if views is None else ViewLinear(dim, width, views=views)


def layer_weights(head: nn.Module) -> dict[str, float]:
    """Token set -> its weight among the layers of its kind, summing to 1 over these; empty where a head mixes none."""
    found: dict[str, float] = {}
    for module in head.modules():
        if isinstance(module, LayeredLinear):
            for layers, shares in module.shares():
                found |= dict(zip(layers, shares.tolist(), strict=True))
    return found


class ViewLinear(nn.Module):
    """A linear layer of its own for every view, on [batch views ... dim]."""

    def __init__(self, dim: int, width: int, *, views: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_draw(dim, views, width, dim))
        self.bias = nn.Parameter(_draw(dim, views, width))

    def forward(self, values: Tensor) -> Tensor:
        return _apply(values, self.weight, self.bias)


class LayeredLinear(nn.Module):
    """One linear map of the softmax-weighted mean of layers; as many maps, added up, as there are kinds of token set.

    The mean is never made: its weights go into the map, so that tokens shared by many fits stay shared.
    """

    def __init__(self, shape: BagShape, token_sets: Sequence[str], width: int, *, views: int | None = None) -> None:
        """Takes for ``views`` how many have weights of their own; None where all share them."""
        super().__init__()
        self.token_sets = tuple(token_sets)
        self.groups = _group_layers(shape, token_sets)
        dims = [shape.token_sets[layers[0]][1] for layers in self.groups]
        lead = () if views is None else (views,)
        self.maps = nn.ParameterList(_draw(sum(dims), *lead, width, dim) for dim in dims)
        self.bias = nn.Parameter(_draw(sum(dims), *lead, width))
        self.scores = nn.ParameterList(torch.zeros(len(layers)) for layers in self.groups if len(layers) > 1)

    def forward(self, joined: Tensor) -> Tensor:
        """Maps [batch views ... dim], the token sets side by side, to [batch views ... width]."""
        parts = dict(zip((layers[0] for layers in self.groups if len(layers) == 1), self._single_maps(), strict=True))
        for layers, shares in self.shares():
            shared = self.maps[self.groups.index(layers)]
            parts |= {name: share * shared for name, share in zip(layers, shares, strict=True)}
        return _apply(joined, torch.cat([parts[name] for name in self.token_sets], -1), self.bias)

    def shares(self) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """Token sets that are mixed with each other, and their weights [layers], which sum to 1."""
        several = (layers for layers in self.groups if len(layers) > 1)
        return ((layers, (_GAIN * scores).softmax(0)) for layers, scores in zip(several, self.scores, strict=True))

    def _single_maps(self) -> list[Tensor]:
        return [weight for layers, weight in zip(self.groups, self.maps, strict=True) if len(layers) == 1]


def _group_layers(shape: BagShape, token_sets: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Together the token sets that differ in their layer alone."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in token_sets:
        parsed = TokenSet.parse(name)
        groups.setdefault((parsed.kind, parsed.grid, shape.token_sets[name]), []).append(name)
    return tuple(map(tuple, groups.values()))


def _apply(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer by weight [width dim], or on [batch views ... dim] by [views width dim]."""
    if weight.ndim == 2:
        return F.linear(values, weight, bias)
    rows = values.transpose(0, 1).flatten(1, -2)
    mapped = torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2))
    return mapped.reshape(values.shape[1], values.shape[0], *values.shape[2:-1], weight.shape[1]).transpose(0, 1)


def _draw(fan: int, *size: int) -> Tensor:
    """Initial numbers, as `torch.nn.Linear` draws them."""
    bound = 1 / math.sqrt(fan)
    return torch.empty(size).uniform_(-bound, bound)

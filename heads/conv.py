"""Owns the head ``conv``: the token grid of all slices as a small volume, through depthwise 3D convolutions.

A light form of the networks that put a 3D convolution on the features of a 2D one: channels first mixed at every place,
then each convolved on its own in 3x3x3 (depthwise separable convolution: Chollet, "Xception", arXiv 1610.02357) within
a residual block (He et al., arXiv 1512.03385). Real slices are moved together first and masked ones set to zero before
every convolution, so that they are no more than the border. Mean and maximum over the slices keep the places apart, as
in ``grid``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedkit.attention import order_slices
from embedkit.bags import Bag, BagShape
from embedkit.layers import first_linear
from embedkit.places import ChannelDropout, small_linear
from embedkit.plugins import HeadOutput, SliceOrder, TokenPreference
from embedkit.pooling import join_tokens, joined_size, masked_max, masked_mean

__all__ = ["ConvHead"]


class ConvHead(nn.Module):
    """Depthwise 3D convolutions over slices and grid places, mean and maximum per place, one linear layer."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    prefers: ClassVar[TokenPreference] = TokenPreference("patch", depth=2 / 3, grid=4)
    fit_defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-3}
    slice_order: ClassVar[SliceOrder] = "sequence"

    def __init__(
        self,
        shape: BagShape,
        token_sets: Sequence[str],
        outputs: int,
        *,
        width: int = 24,
        depth: int = 1,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.token_sets = tuple(token_sets)
        patches, _ = joined_size(shape, token_sets)
        self.grid = next((grid for grid in shape.grids.values() if grid[0] * grid[1] == patches), (1, patches))
        self.dropout = ChannelDropout(dropout)
        self.project = first_linear(shape, token_sets, width)
        self.blocks = nn.ModuleList(ConvBlock(width) for _ in range(depth))
        self.classify = small_linear(len(shape.views) * patches * 2 * width, outputs)

    def forward(self, bag: Bag) -> HeadOutput:
        tokens = self.project(self.dropout(join_tokens(bag, self.token_sets)))
        order = order_slices(bag.mask, dtype=tokens.dtype)
        filled = (order.sum(3) > 0)[..., None, None]
        volume = (order @ tokens.flatten(3)).unflatten(3, tokens.shape[3:])
        for block in self.blocks:
            volume = block(volume, filled, self.grid)
        pooled = torch.cat([masked_mean(volume, filled, 2), masked_max(volume, filled, 2)], -1)
        logits = self.classify(self.dropout(pooled).flatten(1))
        return HeadOutput(logits, embedding=pooled.flatten(1))


class ConvBlock(nn.Module):
    """Features plus what a masked depthwise convolution of 3x3x3 and a mix of channels make of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, 3, 3, 3).normal_(std=27**-0.5))
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)

    def forward(self, volume: Tensor, filled: Tensor, grid: tuple[int, int]) -> Tensor:
        """[batch views slices patches width] -> the same; ``filled`` [batch views slices 1 1] tells real slices."""
        shown = F.gelu(volume).masked_fill(~filled, 0.0)
        cube = shown.flatten(0, 1).permute(0, 3, 1, 2).unflatten(3, grid)
        mixed = F.conv3d(cube, self.weight.to(cube.dtype), padding=1, groups=len(self.weight))
        mixed = mixed.flatten(3).permute(0, 2, 3, 1).unflatten(0, volume.shape[:2])
        return volume + self.mix(F.gelu(self.norm(mixed)))

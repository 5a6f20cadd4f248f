"""Owns the head ``conv``: the token grid of all slices as a small volume, through depthwise 3D convolutions.

A light form of the networks that put a 3D convolution on the features of a 2D one: channels first mixed at every place,
then each convolved on its own in 3x3x3 (depthwise separable convolution: Chollet, "Xception", arXiv 1610.02357) within
a residual block (He et al., arXiv 1512.03385), see `embedkit.tokenvolume`. Mean and maximum over the slices keep the
places apart, as in ``grid``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from embedkit.bags import Bag, BagShape
from embedkit.layers import first_linear
from embedkit.places import ChannelDropout, small_linear
from embedkit.plugins import HeadOutput, SliceOrder, TokenPreference
from embedkit.pooling import join_tokens, joined_size, masked_max, masked_mean
from embedkit.tokenvolume import ConvBlock, TokenVolume
from embedkit.viewfusion import MapFusion

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
        views: str = "joint",
    ) -> None:
        """Takes, of its own options, ``views``: ``joint``, ``late`` (convolutions are shared) or ``early`` (each within
        its view), see `embedkit.viewfusion`.
        """
        super().__init__()
        self.token_sets = tuple(token_sets)
        patches, _ = joined_size(shape, token_sets)
        self.grid = next((grid for grid in shape.grids.values() if grid[0] * grid[1] == patches), (1, patches))
        self.dropout = ChannelDropout(dropout)
        self.fuse = MapFusion("conv", views, views=len(shape.views), places=patches, channels=2 * width)
        self.project = first_linear(shape, token_sets, width, per_view=views == "late")
        self.blocks = nn.ModuleList(ConvBlock(width) for _ in range(depth))
        self.classify = small_linear(math.prod(self.fuse.size), outputs)

    def forward(self, bag: Bag) -> HeadOutput:
        tokens = self.project(self.dropout(join_tokens(bag, self.token_sets)))
        lined = TokenVolume(bag.mask, tokens.dtype)
        volume = lined.gather(tokens)
        for block in self.blocks:
            volume = block(volume, lined.filled, self.grid)
        volume, filled = self.fuse.merge(volume, lined.filled)
        pooled = torch.cat([masked_mean(volume, filled, 2), masked_max(volume, filled, 2)], -1)
        pooled = self.fuse(pooled, filled.flatten(2).any(2))
        logits = self.classify(self.dropout(pooled).flatten(1))
        return HeadOutput(logits, embedding=pooled.flatten(1))

"""Owns what heads on token grids share: dropout of whole channels and a last layer that starts small; knows no head.

With tens to hundreds of cases and a weight for every place, both regularise better than dropping single numbers: whole
channels go (Tompson et al., "Efficient object localization using convolutional networks", arXiv 1411.4280), one draw
per case, at next to no cost.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ChannelDropout", "small_linear"]


class ChannelDropout(nn.Module):
    """Drops whole channels (the last axis) of each item of the batch in training, and scales up the rest."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return values
        size = (len(values), *[1] * (values.ndim - 2), values.shape[-1])
        return values * torch.nn.functional.dropout(values.new_ones(size), self.rate)


def small_linear(features: int, outputs: int) -> nn.Linear:
    """A linear layer whose weights start at a tenth of torch's usual ones and whose bias starts at 0."""
    layer = nn.Linear(features, outputs)
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.bias.zero_()
    return layer

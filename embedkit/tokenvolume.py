"""Owns the token volume: the features of all slices as a small volume, its masked 3D convolution, and masks from it.

Real slices are moved together first and masked ones set to zero before every convolution, so that they are no more than
the border. Knows no head and no loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedkit.attention import order_slices

__all__ = ["ConvBlock", "MaskDecoder", "TokenVolume"]

_RARE = -2.0  # log odds of a patch at the start: most of an image is not what is looked for


class TokenVolume:
    """Where the real slices of a bag go when they are moved together.

    Attributes:
        filled: Bool [batch views slices 1 1], which slices of the volume are real.
    """

    def __init__(self, mask: Tensor, dtype: torch.dtype) -> None:
        """Takes the bag's mask [batch views slices] and the type of what is to be moved."""
        self._order = order_slices(mask, dtype=dtype)
        self.filled = (self._order.sum(3) > 0)[..., None, None]

    def gather(self, tokens: Tensor) -> Tensor:
        """Tokens [batch views slices patches dim] of a bag as a volume of the same size."""
        return (self._order @ tokens.flatten(3)).reshape(tokens.shape)

    def scatter(self, volume: Tensor) -> Tensor:
        """A volume with its slices at their places in the bag again; zeros on masked slices."""
        return (self._order.transpose(2, 3) @ volume.flatten(3)).reshape(volume.shape)


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
        width = volume.shape[4]
        cube = shown.flatten(0, 1).permute(0, 3, 1, 2).reshape(-1, width, volume.shape[2], *grid)
        mixed = F.conv3d(cube, self.weight.to(cube.dtype), padding=1, groups=width)
        mixed = mixed.flatten(3).permute(0, 2, 3, 1).reshape(volume.shape)
        added: Tensor = self.mix(F.gelu(self.norm(mixed)))
        return volume + added


class MaskDecoder(nn.Module):
    """A light 3D decoder: one `ConvBlock` and a linear layer per token, to be run only where a mask is asked for.

    AnyMC3D (arXiv 2512.12887) trains its decoder beside the classification and leaves it away at prediction.
    """

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        """Takes the width of the features and (height, width) of their patch grid."""
        super().__init__()
        self.grid = grid
        self.mix = ConvBlock(width)
        self.cover = nn.Linear(width, 1)
        nn.init.constant_(self.cover.bias, _RARE)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Log odds [batch views slices patches] of features [batch views slices patches width] of a bag."""
        volume = TokenVolume(mask, features.dtype)
        return self.read(self.refine(volume.gather(features), volume))

    def refine(self, gathered: Tensor, volume: TokenVolume) -> Tensor:
        """Features of a bag [batch views slices patches width]: those of its volume, mixed with their neighbours."""
        return volume.scatter(self.mix(gathered, volume.filled, self.grid))

    def read(self, features: Tensor) -> Tensor:
        """Log odds [...] of refined features [... width]."""
        odds: Tensor = self.cover(features)[..., 0]
        return odds

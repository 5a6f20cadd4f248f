"""Owns dropout of single numbers at a tenth of the usual cost on a CPU; knows no head.

Dropout (Srivastava et al., JMLR 15, 2014) draws a random number for every value. On a CPU that takes longer than the
matrix product before it: torch draws one value after the other. Here one draw of 64 bits serves eight values, a byte
each, so that the rate is met to 1/256; the rest is arithmetic on bytes, which torch does many at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Dropout"]

_LEVELS = 256  # of a byte


class Dropout(nn.Module):
    """As `torch.nn.Dropout`, at a rate that is a multiple of 1/256 on a CPU."""

    def __init__(self, rate: float) -> None:
        """Takes the part of the values to drop, from 0 to below 1.

        Raises:
            ValueError: another rate.
        """
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"dropout is {rate}, expected from 0 to below 1")
        self.rate = rate

    def forward(self, values: Tensor) -> Tensor:
        """Sets values of any shape to zero at random in training, and scales up the rest so that the mean stays."""
        if not self.training or self.rate == 0:
            return values
        if values.device.type != "cpu":
            return nn.functional.dropout(values, self.rate)
        dropped = min(round(self.rate * _LEVELS), _LEVELS - 1)
        first_kept = dropped - _LEVELS // 2  # of a byte as a number from -128 to 127
        count = values.numel()
        drawn = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = drawn.view(torch.int8)[:count].view(values.shape).clamp(first_kept - 1, first_kept) - (first_kept - 1)
        return values * kept.to(values.dtype).mul_(_LEVELS / (_LEVELS - dropped))

    def extra_repr(self) -> str:
        return str(self.rate)

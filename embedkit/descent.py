"""Owns the descent of many fits at once: AdamW on stacked parameters, a rate for each fit; knows no head or loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["StackedAdamW", "one_cycle"]

_RISE = 0.2  # part of the steps in which the rate rises
_FIRST, _LAST = 1 / 25, 1 / 25e4  # the rate at both ends, as a part of its peak
_MOMENTUM = (0.95, 0.85)  # first moment's decay at the ends and at the peak
_SECOND, _EPS = 0.999, 1e-8
_AT_ONCE = 2**17  # numbers updated together, so that they stay in the processor's own memory between the passes


def one_cycle(step: int, steps: int) -> tuple[float, float]:
    """The one-cycle policy of Smith and Topin (arXiv 1708.07120) with cosine arcs, as torch's `OneCycleLR` has it.

    Args:
        step: From 0.
        steps: In the whole schedule.

    Returns:
        Learning rate as a part of its peak, and the decay of the first moment.
    """
    top, end = _RISE * steps - 1, steps - 1
    if step <= top:
        return _arc(_FIRST, 1, step, top), _arc(*_MOMENTUM, step, top)
    return _arc(1, _LAST, step - top, end - top), _arc(*_MOMENTUM[::-1], step - top, end - top)


def _arc(start: float, end: float, at: float, length: float) -> float:
    """From ``start`` to ``end`` along half a cosine."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * (at / length if length > 0 else 1)))


class StackedAdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on rows of numbers, one row per fit.

    Every number is updated as `torch.optim.AdamW` would, so a row does not depend on the rows beside it.
    """

    def __init__(self, values: Tensor, rates: Tensor, decays: Tensor) -> None:
        """Takes values [fits numbers], which `step` changes in place, and peak rates and weight decays [fits]."""
        self.values = values
        self.rates = rates[:, None]
        self.decays = decays[:, None]
        self.first = torch.zeros_like(values)
        self.second = torch.zeros_like(values)
        self.steps = 0

    @torch.no_grad()
    def step(self, slopes: Tensor, rate: float, momentum: float) -> None:
        """One update.

        Args:
            slopes: [fits numbers].
            rate: Part of the peak rates.
            momentum: Decay of the first moment.
        """
        self.steps += 1
        first_scale = 1 - momentum**self.steps
        second_scale = math.sqrt(1 - _SECOND**self.steps)
        rows = max(1, _AT_ONCE // max(1, self.values.shape[1]))
        for start in range(0, len(self.values), rows):
            part = slice(start, start + rows)
            values, slope, first, second = self.values[part], slopes[part], self.first[part], self.second[part]
            rates = self.rates[part] * rate
            values.mul_(1 - rates * self.decays[part])
            first.lerp_(slope, 1 - momentum)
            second.mul_(_SECOND).addcmul_(slope, slope, value=1 - _SECOND)
            spread = second.sqrt().div_(second_scale).add_(_EPS)
            values.addcmul_(first / spread, -rates / first_scale)

    def keep(self, rows: Tensor) -> None:
        """Leaves only these rows, in this order."""
        for name in ("values", "rates", "decays", "first", "second"):
            setattr(self, name, getattr(self, name)[rows].contiguous())

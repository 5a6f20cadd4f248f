"""Owns the descent of many fits at once: AdamW on stacked parameters, a rate for each fit; knows no head or loss."""

from __future__ import annotations

import math
from collections.abc import Mapping

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
        """Takes values [fits numbers], which `update` changes in place, and peak rates and weight decays [fits]."""
        self.values = values
        self.rates = rates[:, None]
        self.decays = decays[:, None]
        self.first = torch.zeros_like(values)
        self.second = torch.zeros_like(values)
        self.steps = 0

    def begin_step(self, rate: float, momentum: float) -> None:
        """Starts a step, in which every row is to be updated once.

        Args:
            rate: Part of the peak rates.
            momentum: Decay of the first moment.
        """
        self.steps += 1
        self._rate, self._momentum = rate, momentum

    @torch.no_grad()
    def update(self, rows: slice | list[int], slopes: Mapping[tuple[int, int], Tensor]) -> None:
        """Updates some rows.

        Args:
            rows: Which; a slice has its bounds given.
            slopes: Of the numbers from one place to another, [rows ...]; together of all.
        """
        state = [self.values, self.first, self.second, self.rates, self.decays]
        own = [each[rows] for each in state]  # views where the rows are a slice
        for (start, stop), slope in slopes.items():
            columns = [each[:, start:stop] for each in own[:3]]
            most = max(1, _AT_ONCE // max(1, stop - start))
            for top in range(0, len(slope), most):
                part = slice(top, top + most)
                self._update(slope[part].flatten(1), *(each[part] for each in (*columns, *own[3:])))
        if not isinstance(rows, slice):
            for whole, changed in zip(state[:3], own[:3], strict=True):
                whole[rows] = changed

    def _update(self, slopes: Tensor, *state: Tensor) -> None:
        """Updates values and both moments, of the shape of slopes [rows numbers], by rates and decays [rows 1]."""
        values, first, second, rates, decays = state
        rates = rates * self._rate
        values.mul_(1 - rates * decays)
        first.lerp_(slopes, 1 - self._momentum)
        second.mul_(_SECOND).addcmul_(slopes, slopes, value=1 - _SECOND)
        spread = second.sqrt().div_(math.sqrt(1 - _SECOND**self.steps)).add_(_EPS)
        values.addcmul_(first / spread, -rates / (1 - self._momentum**self.steps))

    def keep(self, rows: Tensor) -> None:
        """Leaves only these rows, in this order."""
        for name in ("values", "rates", "decays", "first", "second"):
            setattr(self, name, getattr(self, name)[rows].contiguous())

"""Owns the descent of many fits at once: AdamW on stacked parameters, a rate for each fit; knows no head or loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["Descent", "StackedAdamW", "one_cycle"]

_RISE = 0.2  # part of the steps in which the rate rises
_FIRST, _LAST = 1 / 25, 1 / 25e4  # the rate at both ends, as a part of its peak
_MOMENTUM = (0.95, 0.85)  # first moment's decay at the ends and at the peak
_SECOND, _EPS = 0.999, 1e-8
_AT_ONCE = 2**17  # numbers updated together, so that they stay in the processor's own memory between the passes
_FUSED_FROM = 2**13  # numbers of a row from which one pass over memory outweighs a call for every rate


@dataclass(frozen=True)
class Descent:
    """Where a descent is.

    Attributes:
        step: From 1.
        rate: Learning rate as a part of its peak.
        momentum: Decay of the first moment.
    """

    step: int
    rate: float
    momentum: float


def one_cycle(step: int, steps: int) -> Descent:
    """The one-cycle policy of Smith and Topin (arXiv 1708.07120) with cosine arcs, as torch's `OneCycleLR` has it.

    Args:
        step: From 0.
        steps: In the whole schedule.
    """
    top, end = _RISE * steps - 1, steps - 1
    if step <= top:
        return Descent(step + 1, _arc(_FIRST, 1, step, top), _arc(*_MOMENTUM, step, top))
    after, rest = step - top, end - top
    return Descent(step + 1, _arc(1, _LAST, after, rest), _arc(*_MOMENTUM[::-1], after, rest))


def _arc(start: float, end: float, at: float, length: float) -> float:
    """From ``start`` to ``end`` along half a cosine."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * (at / length if length > 0 else 1)))


class StackedAdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on rows of numbers, one row per fit.

    Every number is updated as `torch.optim.AdamW` would, so a row does not depend on the rows beside it. Long rows go
    through torch's fused kernel, which reads and writes each number once; short ones of many rates all at once.
    """

    def __init__(self, values: Tensor, rates: Tensor, decays: Tensor) -> None:
        """Takes values [fits numbers], which `update` changes in place, and peak rates and weight decays [fits]."""
        self.values = values
        self.rates = rates[:, None]
        self.decays = decays[:, None]
        self.first = torch.zeros_like(values)
        self.second = torch.zeros_like(values)
        self._rates = list(zip(rates.tolist(), decays.tolist(), strict=True))

    @torch.no_grad()
    def update(self, rows: slice | list[int], slopes: Mapping[tuple[int, int], Tensor], at: Descent) -> None:
        """Updates some rows.

        Args:
            rows: Which; a slice has its bounds given.
            slopes: Of the numbers from one place to another, [rows ...]; together of all.
            at: Where in their descent these rows are.
        """
        state = [self.values, self.first, self.second]
        own = [each[rows] for each in state]  # views where the rows are a slice
        if self.values.shape[1] >= _FUSED_FROM and self.values.device.type == "cpu":
            self._update_fused(rows, [slopes[where] for where in sorted(slopes)], at, *own)
        else:
            own_rates = [self.rates[rows], self.decays[rows]]
            for (start, stop), slope in slopes.items():
                columns = [each[:, start:stop] for each in own]
                most = max(1, _AT_ONCE // max(1, stop - start))
                for top in range(0, len(slope), most):
                    part = slice(top, top + most)
                    self._update(at, slope[part].flatten(1), *(each[part] for each in (*columns, *own_rates)))
        if not isinstance(rows, slice):
            for whole, changed in zip(state, own, strict=True):
                whole[rows] = changed

    def _update_fused(self, rows: slice | list[int], slopes: Sequence[Tensor], at: Descent, *state: Tensor) -> None:
        """Updates values and both moments [rows numbers] in one pass over memory, neighbours of one rate together."""
        whole = torch.cat([slope.flatten(1) for slope in slopes], 1)
        rates = self._rates[rows] if isinstance(rows, slice) else [self._rates[row] for row in rows]
        start = 0
        for (rate, decay), alike in itertools.groupby(rates):
            part = slice(start, start := start + len(list(alike)))
            values, first, second = ([each[part]] for each in state)
            adamw(
                values,
                [whole[part]],
                first,
                second,
                [],
                [torch.tensor(float(at.step - 1))],
                fused=True,
                amsgrad=False,
                beta1=at.momentum,
                beta2=_SECOND,
                lr=rate * at.rate,
                weight_decay=decay,
                eps=_EPS,
                maximize=False,
            )

    @staticmethod
    def _update(at: Descent, slopes: Tensor, *state: Tensor) -> None:
        """Updates values and both moments, of the shape of slopes [rows numbers], by rates and decays [rows 1]."""
        values, first, second, rates, decays = state
        rates = rates * at.rate
        values.mul_(1 - rates * decays)
        first.lerp_(slopes, 1 - at.momentum)
        second.mul_(_SECOND).addcmul_(slopes, slopes, value=1 - _SECOND)
        spread = second.sqrt().div_(math.sqrt(1 - _SECOND**at.step)).add_(_EPS)
        values.addcmul_(first / spread, -rates / (1 - at.momentum**at.step))

    def keep(self, rows: Tensor) -> None:
        """Leaves only these rows, in this order."""
        for name in ("values", "rates", "decays", "first", "second"):
            setattr(self, name, getattr(self, name)[rows].contiguous())
        self._rates = [self._rates[row] for row in rows.tolist()]

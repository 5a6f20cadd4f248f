"""Owns the loss of several targets on one head, each on the cases that have it; knows no token and how none is weighed.

How the losses of the targets become one to descend on is the head's affair: `combine` of a joint head.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embedkit.losses import StackedLoss, TaskLoss
from embedkit.stopping import SHARPNESS

__all__ = ["JointLoss", "StackedJointLoss"]

_UNSCALED = int(SHARPNESS.log().abs().argmin())


class JointLoss:
    """Losses of several targets.

    Attributes:
        kind: ``joint``.
        weights, unit: Nothing: those of the targets count.
        parts: The loss of each target, which knows all cases.
        columns: Where in the logits each target's are.
        labelled: bool [cases targets].
        chance: [targets], mean loss of each on its training cases where all logits are 0.
        judge: The loss of held-out cases.
    """

    kind = "joint"
    weights = None
    unit = (0.0, 1.0)

    def __init__(
        self,
        parts: Sequence[TaskLoss],
        columns: Sequence[slice],
        labelled: NDArray[np.bool_],
        training: NDArray[np.bool_],
    ) -> None:
        """Takes the targets' losses, and which cases have which label and which train, bool [cases]."""
        self.parts = tuple(parts)
        self.columns = tuple(columns)
        self.labelled = torch.from_numpy(labelled).to(parts[0].targets.device)
        self.chance = torch.stack(
            [
                _lose_at_nothing(part, where, np.flatnonzero(labelled[:, place] & training))
                for place, (part, where) in enumerate(zip(parts, columns, strict=True))
            ]
        )
        self.judge: JointLoss = copy.copy(self)
        self.judge.judge = self.judge
        self.judge.parts = tuple(part.judge for part in parts)

    def stack(self, losses: Sequence[Any]) -> StackedJointLoss:
        """Those of several fits, taken at once."""
        return StackedJointLoss(losses)


class StackedJointLoss:
    """Losses of several fits of the same targets, taken at once.

    Attributes:
        kind: ``joint``.
    """

    kind = "joint"

    def __init__(self, losses: Sequence[JointLoss]) -> None:
        """Takes the loss of each fit."""
        self.columns = losses[0].columns
        self._parts = [StackedLoss(parts) for parts in zip(*(loss.parts for loss in losses), strict=True)]
        self._same = all(loss is losses[0] for loss in losses)
        self._labelled = torch.stack([loss.labelled for loss in losses[: 1 if self._same else None]])
        self._chance = torch.stack([loss.chance for loss in losses])

    def each(
        self, logits: Tensor, cases: Tensor, rows: Sequence[int] | None = None, *, real: Tensor | None = None
    ) -> Tensor:
        """What held-out cases are judged by: the sum over targets of the losses [fits factors batch].

        Every target is taken at the factor that suits it best, a regression as it is, so all factors look alike.

        Args:
            logits: [fits factors batch outputs], at each factor of `embedkit.stopping.SHARPNESS`.
            cases: [fits batch].
            rows: Which fits these are; None for all.
            real: bool [fits batch], which cases are no padding; None for all.

        Returns:
            Losses of which the mean over the cases that are real is the sum over targets of the mean loss where the
            label is.
        """
        there = self._find_labelled(cases, rows)
        real = torch.ones_like(there[..., 0]) if real is None else real
        total = torch.zeros_like(logits[..., 0])
        for part, where, has in zip(self._parts, self.columns, (there & real[..., None]).unbind(-1), strict=True):
            losses = part.each(logits[..., where], cases, rows, real=real).float() * has[:, None]
            share = real.sum(1) / has.sum(1).clamp(min=1)
            best = losses.sum(-1).argmin(1)
            if part.kind == "regression":
                best = torch.full_like(best, _UNSCALED)
            total += losses[torch.arange(len(losses)), best][:, None] * share[:, None, None]
        return total

    def total(
        self, logits: Tensor, cases: Tensor, rows: Sequence[int], head: nn.Module, leaves: Mapping[str, Tensor]
    ) -> Tensor:
        """What is descended on, summed over fits; arguments as in `StackedLoss.total`."""
        there = self._find_labelled(cases, rows)
        losses = [
            (part.each(logits[..., where], cases, rows) * has).sum(1) / has.sum(1).clamp(min=1)
            for part, where, has in zip(self._parts, self.columns, there.unbind(-1), strict=True)
        ]
        chance = self._chance[torch.tensor(list(rows), device=self._chance.device)]
        combined: Tensor = cast(Any, head).combine(torch.stack(losses, 1), chance, leaves)
        return combined.sum()

    def _find_labelled(self, cases: Tensor, rows: Sequence[int] | None) -> Tensor:
        """bool [fits batch targets]."""
        if self._same:
            return self._labelled[0, cases]
        asked = torch.arange(len(cases)) if rows is None else torch.tensor(list(rows))
        return self._labelled[asked.to(cases.device)[:, None], cases]


def _lose_at_nothing(part: TaskLoss, where: slice, cases: NDArray[np.int64]) -> Tensor:
    """The mean loss of logits that are all 0."""
    device = part.targets.device
    return part(torch.zeros(len(cases), where.stop - where.start, device=device), torch.from_numpy(cases).to(device))

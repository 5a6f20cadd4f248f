"""Owns the loss of a task on its training cases: what a head is fitted to, case by case; knows no head and no token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from embedkit.targets import TaskKind

__all__ = ["StackedLoss", "TaskLoss", "target_unit"]


class TaskLoss:
    """The loss of a task on some of its cases, with the class weights or the unit of its training cases.

    Attributes:
        kind: Of the task.
        unit: Mean and deviation of a regression's training targets, in which its logits count; (0, 1) otherwise.
        weights: Binary and multilabel: weight of the positives [outputs]; multiclass: weights [classes]; None for
            equal weights and for a regression.
    """

    def __init__(
        self,
        kind: TaskKind,
        targets: NDArray[Any],
        training: NDArray[np.bool_],
        *,
        class_weights: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        """Takes targets as `Task.targets` and which of the cases train, bool [cases]."""
        self.kind = kind
        self.unit = target_unit(kind, targets[training])
        self.weights: Tensor | None = None
        if kind == "regression":
            targets = (targets - self.unit[0]) / self.unit[1]
        elif class_weights:
            self.weights = _class_weights(kind, targets[training]).to(device)
        dtype = torch.int64 if kind == "multiclass" else torch.float32
        self.targets = torch.as_tensor(targets, dtype=dtype, device=device)

    def __call__(self, logits: Tensor, cases: Tensor) -> Tensor:
        """Mean loss of logits [batch outputs] for cases [batch]."""
        return self.each(logits, cases).mean()

    def each(self, logits: Tensor, cases: Tensor) -> Tensor:
        """Losses [... batch] of logits [... batch outputs] for cases [batch]."""
        return self.compare(logits, self.targets[cases], self.weights)

    def compare(self, logits: Tensor, truth: Tensor, weights: Tensor | None) -> Tensor:
        """Losses [... batch] of logits [... batch outputs] for rows of ``targets`` and for ``weights``.

        It depends on nothing but its arguments and the kind of task, so that losses of one kind can be stacked.
        """
        truth = truth.expand(logits.shape if truth.ndim == 2 else logits.shape[:-1])
        if self.kind == "regression":
            return F.smooth_l1_loss(logits[..., 0], truth, reduction="none")
        if self.kind == "multiclass":
            losses = F.cross_entropy(logits.flatten(0, -2), truth.flatten(), weights, reduction="none")
            return losses.view(truth.shape)
        truth = truth[..., None] if self.kind == "binary" else truth
        losses = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=weights, reduction="none")
        return losses.mean(-1)


class StackedLoss:
    """Losses of several fits, of one kind and weighted alike, taken at once.

    Attributes:
        kind: Of the tasks.
    """

    def __init__(self, losses: Sequence[TaskLoss]) -> None:
        """Takes the loss of each fit."""
        self.kind = losses[0].kind
        self._first = losses[0]
        self._same = all(loss is losses[0] for loss in losses)
        most = max(len(loss.targets) for loss in losses)
        self._targets, self._weights = losses[0].targets[None], losses[0].weights
        if not self._same:
            self._targets = torch.stack([_lengthen(loss.targets, most) for loss in losses])
            weights = [loss.weights for loss in losses if loss.weights is not None]
            self._weights = torch.stack(weights) if weights else None

    def each(self, logits: Tensor, cases: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Losses [fits ... batch] of logits [fits ... batch outputs] for cases [fits batch] of each fit's task.

        Args:
            logits, cases: Of some fits.
            rows: Which fits these are; None for all.
        """
        weights = self._weights
        if self._same:
            truth = self._targets[0, cases]
        else:
            asked = torch.arange(len(cases)) if rows is None else torch.tensor(rows)
            asked = asked.to(cases.device)
            truth = self._targets[asked[:, None], cases]
            weights = None if weights is None else weights[asked]
        axes = (0, 0, None if self._same or weights is None else 0)
        found: Tensor = torch.vmap(self._first.compare, in_dims=axes)(logits, truth, weights)
        return found


def _lengthen(values: Tensor, length: int) -> Tensor:
    """Values [cases ...] with rows of zeros after them, up to ``length``."""
    return torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])


def target_unit(kind: TaskKind, targets: NDArray[Any]) -> tuple[float, float]:
    """Mean and deviation of a regression's training targets, (0, 1) for other kinds."""
    return (float(targets.mean()), float(targets.std()) or 1.0) if kind == "regression" else (0.0, 1.0)


def _class_weights(kind: TaskKind, targets: NDArray[Any]) -> Tensor:
    """Binary and multilabel: weight of the positives [outputs]; multiclass: weights [classes]."""
    if kind == "multiclass":
        counts = np.bincount(targets)
        return torch.as_tensor(len(targets) / (np.count_nonzero(counts) * counts.clip(min=1)), dtype=torch.float32)
    positives = targets.reshape(len(targets), -1).sum(0)
    return torch.as_tensor((len(targets) - positives).clip(min=1) / positives.clip(min=1), dtype=torch.float32)

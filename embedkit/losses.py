"""Owns the loss of a task on its training cases: what a head is fitted to, case by case; knows no head and no token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from embedkit.targets import TaskKind

__all__ = ["TaskLoss", "target_unit"]


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
        truth = self.targets[cases]
        truth = truth.expand(logits.shape if truth.ndim == 2 else logits.shape[:-1])
        if self.kind == "regression":
            return F.smooth_l1_loss(logits[..., 0], truth, reduction="none")
        if self.kind == "multiclass":
            losses = F.cross_entropy(logits.flatten(0, -2), truth.flatten(), self.weights, reduction="none")
            return losses.view(truth.shape)
        truth = truth[..., None] if self.kind == "binary" else truth
        losses = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=self.weights, reduction="none")
        return losses.mean(-1)


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

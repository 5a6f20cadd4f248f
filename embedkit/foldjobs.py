"""Owns the unit of cross-fitting: one plan on one fold of one task, its splits and the choice among candidates.

Fits nothing and knows no token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from embedkit.fitting import FitReport
from embedkit.headplans import HeadPlan
from embedkit.losses import TaskLoss
from embedkit.members import Member
from embedkit.plugins import survival_likelihood
from embedkit.tasks import Task, inner_split

__all__ = ["FoldJob", "FoldedTask", "make_job", "rank"]

_CLOSED_FORM_SPLITS = 5
_SWEEP_SPLITS = 3


@dataclass(frozen=True, eq=False)
class FoldedTask:
    """A task and the fold of each of its cases, int64 [cases], -1 for those that are never tested."""

    task: Task
    folds: NDArray[np.int64]

    @property
    def tested(self) -> list[int]:
        """The folds that are tested, sorted."""
        return sorted(set(self.folds.tolist()) - {-1})


@dataclass(frozen=True, eq=False)
class FoldJob:
    """One fold of one task for one plan, and what came of it so far.

    Attributes:
        plan: Head and candidates.
        target: The task.
        fold: Its cases are tested, the others train.
        seed: Of weights and splits.
        splits: Each bool [cases], training cases held out to choose by.
        loss: Of the task on all training cases.
        fitted: The members and how their fits went.
    """

    plan: HeadPlan
    target: FoldedTask
    fold: int
    seed: int
    splits: tuple[NDArray[np.bool_], ...]
    loss: TaskLoss
    fitted: list[tuple[Member, FitReport]] = field(default_factory=list)

    @property
    def task(self) -> Task:
        return self.target.task

    @property
    def training(self) -> NDArray[np.bool_]:
        """bool [cases]."""
        training: NDArray[np.bool_] = self.target.folds != self.fold
        return training

    @property
    def tested(self) -> NDArray[np.int64]:
        """Numbers of the tested cases."""
        return np.flatnonzero(self.target.folds == self.fold)


def make_job(plan: HeadPlan, target: FoldedTask, fold: int, *, seed: int, device: torch.device) -> FoldJob:
    """Splits the training cases of a fold: once for a single candidate, three times for a choice among several.

    Raises:
        TaskError: they cannot be split.
    """
    seed += 1000 * (fold + 1)
    training, task = target.folds != fold, target.task
    several = _SWEEP_SPLITS if len(plan.candidates) > 1 else 1
    splits = tuple(
        inner_split(task, training, fraction=plan.fit.holdout, seed=seed + number)
        for number in range(several if plan.by_gradient else _CLOSED_FORM_SPLITS)
    )
    on = device if plan.by_gradient else "cpu"
    loss = TaskLoss(
        task.kind,
        task.targets,
        training,
        class_weights=plan.fit.class_weights,
        likelihood=survival_likelihood(plan.head),
        device=on,
    )
    return FoldJob(plan, target, fold, seed, splits, loss)


def rank(losses: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """Candidates and their mean held-out losses, the best first; those that diverged (NaN) come last."""
    order = sorted(range(len(losses)), key=lambda place: math.inf if math.isnan(losses[place]) else losses[place])
    return tuple((place, losses[place]) for place in order)

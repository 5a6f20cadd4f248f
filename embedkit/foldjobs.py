"""Owns the unit of cross-fitting: one plan on one fold of one task, its splits and the choice among candidates.

Fits nothing and knows no token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from embedkit.bags import BagShape
from embedkit.errors import TaskError
from embedkit.fitting import FitReport
from embedkit.headplans import HeadPlan
from embedkit.jointlosses import JointLoss
from embedkit.jointtasks import JointTask
from embedkit.losses import FitLoss, TaskLoss
from embedkit.members import Member, build_member
from embedkit.plugins import survival_likelihood
from embedkit.sweeps import Candidate
from embedkit.tasks import Task, TaskKind, inner_split

__all__ = ["FoldJob", "FoldedTask", "make_job", "make_task_loss", "rank"]

_CLOSED_FORM_SPLITS = 5
_SWEEP_SPLITS = 3


@dataclass(frozen=True, eq=False)
class FoldedTask:
    """A task and how its cases are dealt into folds.

    Attributes:
        task: The task.
        folds: int64 [repeats cases], a row per deal, -1 for cases that are never tested; no two deals share a number.
        joint: The joint task, with folds, of the targets that have folds and inner splits in common, of which this task
            is one; None where it was dealt alone.
    """

    task: Task
    folds: NDArray[np.int64]
    joint: FoldedTask | None = None
    _held_out: dict[tuple[int, float, int], NDArray[np.bool_]] = field(default_factory=dict, repr=False)

    @property
    def tested(self) -> list[int]:
        """The folds that are tested, sorted."""
        return sorted(set(self.folds.flatten().tolist()) - {-1})

    def find_tested(self, fold: int) -> NDArray[np.bool_]:
        """bool [cases], which cases a fold tests; the others train."""
        return np.asarray((self.folds == fold).any(axis=0))

    def hold_out(self, fold: int, *, fraction: float, seed: int) -> NDArray[np.bool_]:
        """bool [cases], training cases of a fold to choose by: an `inner_split`, or its part of that of all targets.

        Raises:
            TaskError: they cannot be split, or the split of all targets holds out none that this one has.
        """
        asked = fold, fraction, seed
        if asked not in self._held_out:
            if self.joint is None:
                held = inner_split(self.task, ~self.find_tested(fold), fraction=fraction, seed=seed)
            else:
                whole = self.joint.hold_out(fold, fraction=fraction, seed=seed)
                held = whole[cast(JointTask, self.joint.task).find_rows(self.task)]
                if not held.any():
                    raise TaskError(
                        f"target {self.task.name}: of the cases held out of fold {fold} for all targets together, none"
                        " has a label; deal it alone, or label more cases"
                    )
            self._held_out[asked] = held
        return self._held_out[asked]

    def find_repeat(self, fold: int) -> int:
        """The deal that a fold belongs to."""
        return int(np.flatnonzero((self.folds == fold).any(axis=1))[0])


@dataclass(frozen=True, eq=False)
class FoldJob:
    """One fold of one task for one plan, and what came of it so far.

    Attributes:
        plan: Head and candidates.
        target: The task.
        fold: Its cases are tested, the others train.
        seed: Of weights and splits.
        splits: Each bool [cases], training cases held out to choose by.
        loss: Of the task on all training cases; of a joint task that of its targets together.
        fitted: The members and how their fits went.
    """

    plan: HeadPlan
    target: FoldedTask
    fold: int
    seed: int
    splits: tuple[NDArray[np.bool_], ...]
    loss: FitLoss
    fitted: list[tuple[Member, FitReport]] = field(default_factory=list)

    @property
    def task(self) -> Task:
        return self.target.task

    @property
    def training(self) -> NDArray[np.bool_]:
        """bool [cases]."""
        return ~self.target.find_tested(self.fold)

    @property
    def tested(self) -> NDArray[np.int64]:
        """Numbers of the tested cases."""
        return np.flatnonzero(self.target.find_tested(self.fold))

    def build_member(self, shape: BagShape, candidate: Candidate) -> Member:
        """A member that is yet to be fitted, on bags of a shape."""
        return build_member(
            self.plan.head,
            shape,
            outputs=self.plan.outputs(self.task),
            kind=self.task.kind,
            options=candidate.options,
            times=self.task.times,
        )


def make_job(plan: HeadPlan, target: FoldedTask, fold: int, *, seed: int, device: torch.device) -> FoldJob:
    """Splits the training cases of a fold as often as the fits ask, for a choice among several three times or more.

    Heads in closed form have five splits, the same first.

    Raises:
        TaskError: they cannot be split.
    """
    seed += 1000 * (fold + 1)
    several = max(plan.fit.inner_splits, _SWEEP_SPLITS if len(plan.candidates) > 1 else 1)
    splits = tuple(
        target.hold_out(fold, fraction=plan.fit.holdout, seed=seed + number)
        for number in range(several if plan.by_gradient else _CLOSED_FORM_SPLITS)
    )
    on = device if plan.by_gradient else torch.device("cpu")
    return FoldJob(plan, target, fold, seed, splits, _make_loss(plan, target.task, ~target.find_tested(fold), on))


def _make_loss(plan: HeadPlan, task: Task, training: NDArray[np.bool_], device: torch.device) -> FitLoss:
    if isinstance(task, JointTask):
        parts = [
            make_task_loss(plan, part.kind, task.spread(place, part.targets), training & has, device)
            for place, (part, has) in enumerate(zip(task.parts, task.labelled.T, strict=True))
        ]
        return JointLoss(parts, task.columns, task.labelled, training)
    return make_task_loss(plan, task.kind, task.targets, training, device)


def make_task_loss(
    plan: HeadPlan, kind: TaskKind, targets: NDArray[Any], training: NDArray[np.bool_], device: torch.device
) -> TaskLoss:
    """The loss of a head on targets of a kind, those of the training cases bool [cases] giving weights or unit."""
    return TaskLoss(
        kind,
        targets,
        training,
        class_weights=plan.fit.class_weights,
        likelihood=survival_likelihood(plan.head),
        gamma=plan.fit.gamma if plan.fit.loss == "focal" else 0.0,
        balanced=plan.fit.sampling == "balanced",
        device=device,
    )


def rank(losses: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """Candidates and their mean held-out losses, the best first; those that diverged (NaN) come last."""
    order = sorted(range(len(losses)), key=lambda place: math.inf if math.isnan(losses[place]) else losses[place])
    return tuple((place, losses[place]) for place in order)

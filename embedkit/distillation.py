"""Owns the task and the loss of a head that learns a target and keeps the answers of an old run; knows no token.

The answers are kept as "dark experience replay" keeps them (Buzzega et al. 2020, arXiv 2004.07211): on a buffer of
exemplars the head's logits for the old target are held to those of the old run, by their mean squared difference. An
exemplar counts as much as a case of the new target. No label of the old target is asked for. That a network that is
trained on task after task should be held so to what it was, on a small buffer of fitting cases, is MedSeqFT's idea
(arXiv 2509.06096) for whole networks.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embedkit.losses import StackedLoss, TaskLoss, lengthen
from embedkit.tasks import Task

__all__ = ["Buffer", "KeepingLoss", "KeepingTask", "join_buffer"]


@dataclass(frozen=True, eq=False)
class Buffer:
    """The exemplars of one fold and what the old run says of them.

    Attributes:
        case_ids, patient_ids: Of each.
        answers: float32 [cases outputs], logits.
    """

    case_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    answers: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class KeepingTask(Task):
    """The cases of a new task and the exemplars of a buffer together; a case may be both.

    Attributes:
        targets: Nothing; labels are those of ``own``.
        own: The new task.
        width: Of its logits; those of the old target follow.
        rows: int64 [cases of own], where these are among all.
        labelled: bool [cases], which are of ``own``.
        exemplar: bool [cases], which are of the buffer.
        answers: float32 [cases outputs], the old run's logits; 0 where a case is no exemplar.
    """

    own: Task = field(kw_only=True)
    width: int = field(kw_only=True)
    rows: NDArray[np.int64] = field(kw_only=True)
    labelled: NDArray[np.bool_] = field(kw_only=True)
    exemplar: NDArray[np.bool_] = field(kw_only=True)
    answers: NDArray[np.float32] = field(kw_only=True)

    @property
    def outputs(self) -> int:
        """Width of the logits of both targets side by side."""
        return self.width + int(self.answers.shape[1])

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values [cases of own ...] over all cases, 0 where a case is not of ``own``."""
        spread = np.zeros((len(self.case_ids), *values.shape[1:]), values.dtype)
        spread[self.rows] = values
        return spread

    def hold_out(self, held: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """bool [cases]: held-out cases of ``own``, and all exemplars of their patients."""
        patients = {self.own.patient_ids[case] for case in np.flatnonzero(held)}
        others = np.array([patient in patients for patient in self.patient_ids], bool)
        return self.spread(held) | (others & ~self.labelled)


def join_buffer(own: Task, width: int, buffer: Buffer) -> KeepingTask:
    """A task, whose logits have a width, together with the exemplars of a buffer."""
    patients = dict(zip(own.case_ids, own.patient_ids, strict=True))
    patients = dict(zip(buffer.case_ids, buffer.patient_ids, strict=True)) | patients
    ids = tuple(sorted(patients))
    names = np.asarray(ids)
    rows, places = (
        np.searchsorted(names, np.asarray(each)).astype(np.int64) for each in (own.case_ids, buffer.case_ids)
    )
    labelled, exemplar = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
    labelled[rows], exemplar[places] = True, True
    answers = np.zeros((len(ids), buffer.answers.shape[1]), np.float32)
    answers[places] = buffer.answers
    return KeepingTask(
        name=own.name,
        kind="multilabel",
        classes=(),
        case_ids=ids,
        patient_ids=tuple(patients[case] for case in ids),
        targets=np.zeros((len(ids), 0), np.int64),
        own=dataclasses.replace(own),
        width=width,
        rows=rows,
        labelled=labelled,
        exemplar=exemplar,
        answers=answers,
    )


class KeepingLoss:
    """The loss of a new target, and beside it how far the answers for the old one are from the old run's.

    Attributes:
        kind, unit, weights: Those of the new target's loss.
        own: That loss, which knows all cases.
        labelled, exemplar: bool [cases], which have the new label and which are in the buffer.
        answers: [cases outputs], the old run's logits.
        weight: What the second part counts.
        judge: The loss of held-out cases, that of the new target alone.
    """

    def __init__(self, own: TaskLoss, task: KeepingTask, weight: float) -> None:
        """Takes the new target's loss on the cases of a task, and what keeping the old answers counts beside it."""
        device = own.targets.device
        self.own = own
        self.kind, self.unit, self.weights = own.kind, own.unit, own.weights
        self.labelled, self.exemplar = (torch.from_numpy(each).to(device) for each in (task.labelled, task.exemplar))
        self.answers = torch.from_numpy(task.answers).to(device)
        self.weight = weight
        self.judge: KeepingLoss = copy.copy(self)
        self.judge.judge, self.judge.own = self.judge, own.judge

    def stack(self, losses: Sequence[Any]) -> StackedKeepingLoss:
        """Those of several fits, taken at once."""
        return StackedKeepingLoss(losses)


class StackedKeepingLoss:
    """Losses of several fits of one new and one old target, taken at once.

    Attributes:
        kind: Of the new target.
    """

    def __init__(self, losses: Sequence[KeepingLoss]) -> None:
        """Takes the loss of each fit."""
        self.kind = losses[0].kind
        self.weight = losses[0].weight
        self._own = StackedLoss([loss.own for loss in losses])
        most = max(len(loss.labelled) for loss in losses)
        self._labelled, self._exemplar, self._answers = (
            torch.stack([lengthen(getattr(loss, name), most) for loss in losses])
            for name in ("labelled", "exemplar", "answers")
        )

    @property
    def _width(self) -> int:
        """Of the old target's logits, which come last."""
        return self._answers.shape[-1]

    def each(
        self, logits: Tensor, cases: Tensor, rows: Sequence[int] | None = None, *, real: Tensor | None = None
    ) -> Tensor:
        """What held-out cases are judged by: losses [fits factors batch] of the new target alone.

        Their mean over the cases that are real is the mean over those of them that have the label.

        Args:
            logits: [fits factors batch outputs].
            cases: [fits batch].
            rows: Which fits these are; None for all.
            real: bool [fits batch], which cases are no padding; None for all.
        """
        real = torch.ones_like(cases, dtype=torch.bool) if real is None else real
        there = self._find(self._labelled, cases, rows) & real
        losses = self._own.each(logits[..., : -self._width], cases, rows, real=there)
        share = real.sum(1) / there.sum(1).clamp(min=1)
        return torch.where(there[:, None], losses, 0.0) * share[:, None, None]

    def total(
        self,
        logits: Tensor,
        cases: Tensor,
        rows: Sequence[int],
        head: nn.Module,  # noqa: ARG002 - for losses that the head weighs
        leaves: Mapping[str, Tensor],  # noqa: ARG002
    ) -> Tensor:
        """What is descended on: a case has either part or both, all cases count alike; summed over fits.

        Arguments as in `StackedLoss.total`.
        """
        there, kept = self._find(self._labelled, cases, rows), self._find(self._exemplar, cases, rows)
        losses = self._own.each(logits[..., : -self._width], cases, rows, real=there)
        apart = (logits[..., -self._width :] - self._find(self._answers, cases, rows)).square().mean(-1)
        both = torch.where(there, losses, 0.0) + self.weight * torch.where(kept, apart, 0.0)
        return both.mean(1).sum()

    @staticmethod
    def _find(values: Tensor, cases: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Values [fits batch ...] of the cases [fits batch] of some fits."""
        asked = torch.arange(len(cases)) if rows is None else torch.tensor(list(rows))
        return values[asked.to(cases.device)[:, None], cases]

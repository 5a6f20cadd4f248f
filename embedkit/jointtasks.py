"""Owns the joint task: several targets of the same cases that one head learns together; knows no head and no token.

A case need not have every label. Splits are of patients over the cases of all targets, so that whoever is tested for
one target trains for none.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from embedkit.errors import TaskError
from embedkit.tasks import Task

__all__ = ["JointTask", "join_tasks"]


@dataclass(frozen=True, eq=False)
class JointTask(Task):
    """Targets as one task, whose ``kind`` is multilabel as splits see it: a case is in a state of each of its targets.

    Attributes:
        parts: The targets.
        case_ids: Sorted; each has one label or more.
        targets: Nothing; labels are those of the parts.
    """

    parts: tuple[Task, ...] = ()

    @property
    def outputs(self) -> int:
        """Width of the logits of all targets side by side."""
        return sum(self.widths)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the logits of each target."""
        return tuple(part.outputs for part in self.parts)

    @property
    def columns(self) -> tuple[slice, ...]:
        """Where in the logits each target's are."""
        ends = np.cumsum((0, *self.widths)).tolist()
        return tuple(slice(start, stop) for start, stop in itertools.pairwise(ends))

    @cached_property
    def rows(self) -> tuple[NDArray[np.int64], ...]:
        """Per target, where each of its cases is among those of the joint task."""
        return tuple(map(self.find_rows, self.parts))

    def find_rows(self, task: Task) -> NDArray[np.int64]:
        """int64 [cases], where the cases of a task are among those of this one, which has all of them."""
        return np.searchsorted(np.asarray(self.case_ids), np.asarray(task.case_ids)).astype(np.int64)

    @cached_property
    def states(self) -> tuple[str, ...]:
        """Those of all targets, in words; of a regression the halves."""
        halves = ("the lower half", "the upper half")
        return tuple(
            f"{word} of {part.name}"
            for part in self.parts
            for word in (tuple(map(part.word_state, part.states)) or halves)
        )

    @cached_property
    def membership(self) -> NDArray[np.bool_]:
        """bool [cases states]; False where a case lacks the label."""
        found = [
            self.spread(place, part.membership if part.states else _halve(part.targets))
            for place, part in enumerate(self.parts)
        ]
        return np.hstack(found)

    def word_state(self, state: str) -> str:
        """One of `states`, which are words."""
        return state

    def spread(self, place: int, values: NDArray[Any]) -> NDArray[Any]:
        """Values [cases of a target ...] over the cases of all, 0 where a case lacks the label."""
        spread = np.zeros((len(self.case_ids), *values.shape[1:]), values.dtype)
        spread[self.rows[place]] = values
        return spread

    @cached_property
    def labelled(self) -> NDArray[np.bool_]:
        """bool [cases targets]."""
        each = [self.spread(place, np.ones(len(part.case_ids), bool)) for place, part in enumerate(self.parts)]
        return cast(NDArray[np.bool_], np.stack(each, 1))

    def find_numbers(self, place: int, cases: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of some of the cases, those that a target has: their places among the given, and their numbers in it."""
        numbers = np.full(len(self.case_ids), -1)
        numbers[self.rows[place]] = np.arange(len(self.rows[place]))
        there = np.flatnonzero(numbers[cases] >= 0)
        return there, numbers[cases[there]]


def join_tasks(parts: Sequence[Task]) -> JointTask:
    """Several targets as one task.

    Raises:
        TaskError: a case is of different patients in two of them.
    """
    patients: dict[str, str] = {}
    for part in parts:
        for case, patient in zip(part.case_ids, part.patient_ids, strict=True):
            if patients.setdefault(case, patient) != patient:
                raise TaskError(f"case {case} is of patient {patients[case]} and of {patient}, expected one patient")
    ids = tuple(sorted(patients))
    return JointTask(
        name=" + ".join(part.name for part in parts),
        kind="multilabel",
        classes=(),
        case_ids=ids,
        patient_ids=tuple(patients[case] for case in ids),
        targets=np.zeros((len(ids), 0), np.int64),
        parts=tuple(dataclasses.replace(part) for part in parts),
    )


def _halve(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """bool [cases 2]: the lower and the upper half of a regression's targets, ties parted by order."""
    upper = np.zeros(len(values), bool)
    upper[np.argsort(values, kind="stable")[len(values) // 2 :]] = True
    return np.stack([~upper, upper], 1)

"""Owns which options of a training go together, and with which targets; trains nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embedkit.errors import OptionError
from embedkit.headplans import HeadPlan
from embedkit.targets import TaskKind
from embedkit.tasks import Task

__all__ = ["check_events", "check_folds", "check_imbalance", "check_runs", "part_task_options"]


def check_runs(*, resume: bool, overwrite: bool, seeds: int) -> None:
    """Stops where runs are to be kept and replaced at once, or nothing is to be fitted.

    Raises:
        OptionError: they are.
    """
    if resume and overwrite:
        raise OptionError("resume keeps the runs that exist and overwrite replaces them; choose one of the two")
    if seeds < 1:
        raise OptionError(f"seeds is {seeds}, expected 1 or more members per fold")


def check_folds(*, repeats: int, split: str | None, group_by: str | None, same: bool, starts: bool) -> None:
    """Stops where folds are asked for in two ways at once.

    Raises:
        OptionError: they are.
    """
    if same and starts:
        raise OptionError("a head that starts from a run keeps its folds; leave the same folds for all targets away")
    if split is not None and group_by is not None:
        raise OptionError(
            f"folds from both split {split} and group_by {group_by} were asked for; choose one of the two"
        )
    if repeats > 1 and (column := split or group_by) is not None:
        raise OptionError(
            f"{repeats} repeats were asked for with the folds of column {column}, which are the same every time;"
            " leave one of the two away"
        )


def check_imbalance(plans: Sequence[HeadPlan], tasks: Sequence[Task]) -> None:
    """Stops where a way to treat rare classes is asked for that a task is not made for.

    Raises:
        OptionError: it is.
    """
    for fit in (plan.fit for plan in plans if plan.by_gradient):
        for task in tasks:
            if fit.loss == "focal" and not task.classes:
                raise OptionError(f"focal loss belongs to classes, but target {task.name} is a {task.kind} task")
            if fit.sampling == "balanced" and task.kind not in ("binary", "multiclass"):
                raise OptionError(
                    f"balanced sampling belongs to a binary or multiclass task, but target {task.name} is {task.kind};"
                    " train it in a call of its own, with sampling shuffled"
                )


def check_events(targets: Sequence[str], event: str | Mapping[str, str] | None) -> None:
    """Stops where an event column was given for what is no target.

    Raises:
        OptionError: it was.
    """
    if isinstance(event, Mapping) and (strangers := sorted(set(event) - set(targets))):
        raise OptionError(f"event columns were given for {', '.join(strangers)}, but targets are {', '.join(targets)}")


def part_task_options(
    target: str,
    *,
    kind: TaskKind | None,
    classes: Sequence[str] | None,
    event: str | Mapping[str, str] | None,
    times: Sequence[float] | None,
) -> dict[str, Any]:
    """The options of `make_task` for one of several targets: a mapping of events parts them into two sorts."""
    if not isinstance(event, Mapping):
        return {"kind": kind, "classes": classes, "event": event, "times": times}
    if target in event:
        return {"event": event[target], "times": times}
    return {"kind": kind, "classes": classes}

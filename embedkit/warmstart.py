"""Owns the warm start: what a new training takes over from an old run, and from which member; fits nothing.

Taken over are the standardisation and every parameter that all outputs of the head share; what grows with their number
(the classifier) begins anew. No patient who is tested by a new head may have trained the old one that it started from:
where the old run knows patients of the new target, its folds are kept, and a new fold starts from the member of the
same fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from torch import nn

from embedkit.bags import list_views
from embedkit.cache import Cache
from embedkit.errors import HeadError, OptionError, RunError
from embedkit.foldjobs import FoldedTask
from embedkit.members import Member
from embedkit.plugins import create_head, is_joint, load_head
from embedkit.runs import Run, check_cache, open_run
from embedkit.standardisation import Standardiser
from embedkit.tasks import Task, folds_from_column
from embedkit.trunks import find_output_axes

__all__ = ["WarmStart", "open_start", "plan_start", "require_fresh"]

TokenChoice = Mapping[str, Sequence[str]]


class WarmStart:
    """An old run as the beginning of a new one.

    Attributes:
        run: The old run.
        axes: Parameter or buffer of its head -> the axes that grow with the number of outputs.
        keeps: Whether the new head has the outputs of the old one too, after its own.
    """

    def __init__(self, run: Run, axes: Mapping[str, tuple[int, ...]], *, keeps: bool = False) -> None:
        self.run = run
        self.axes = axes
        self.keeps = keeps
        self._folds = sorted({int(each["fold"]) for each in run.record.members})

    @property
    def head(self) -> str:
        """Name of the head that it is for."""
        return self.run.head

    @property
    def taken(self) -> tuple[str, ...]:
        """Parameters and buffers that are taken over: those that all outputs share."""
        return tuple(name for name, grows in self.axes.items() if not grows)

    @property
    def note(self) -> str:
        """What the reader of the new run should know."""
        return (
            f"started from run {self.run.name} (weights {self.run.digest[:12]}): {len(self.taken)} tensors of the head"
            " and the standardisation were taken over"
        )

    def load(self, head: nn.Module, fold: int, number: int) -> None:
        """Fills a new head of a fold, the ``number``-th of its members, with what is taken over.

        Raises:
            RunError: a tensor has another shape.
        """
        members = self.members(fold)
        old = members[number % len(members)].head.state_dict()
        new = head.state_dict()
        for name in self.taken:
            if name not in new or new[name].shape != old[name].shape:
                found = "not there" if name not in new else f"{list(new[name].shape)}"
                raise RunError(
                    f"{name} of head {self.head!r} is {list(old[name].shape)} in run {self.run.name} and {found} now;"
                    " leave out the options of the head, which are then those of the run"
                )
        with torch.no_grad():
            head.load_state_dict({**new, **{name: old[name] for name in self.taken}})
            for name, axes in self.axes.items() if self.keeps else ():
                for axis in axes:  # one, as keeping requires
                    size = old[name].shape[axis]
                    head.state_dict()[name].narrow(axis, new[name].shape[axis] - size, size).copy_(old[name])

    def standardiser(self, fold: int) -> Standardiser:
        """That of the member which the heads of a fold start from."""
        return cast(Standardiser, self.members(fold)[0].standardiser)

    def old_fold(self, fold: int) -> int:
        """The fold of the old run whose members the heads of a fold start from."""
        return self._folds[fold % len(self._folds)]

    def members(self, fold: int) -> list[Member]:
        """The members of the old run that the heads of a fold start from."""
        pairs = zip(self.run.record.members, self.run.members, strict=True)
        return [member for each, member in pairs if each["fold"] == self.old_fold(fold)]

    def deal(self, task: Task, *, column: str | None = None) -> FoldedTask | None:
        """The folds of the old run, where it knows patients of the task; None where any folds will do.

        Patients that are new to it are dealt to its folds in turn.

        Args:
            task: The new target.
            column: Of the labels, that folds were asked to come from.

        Raises:
            TaskError: a class is absent from the training part of a fold.
            OptionError: the folds of the run must be kept, but a column was given.
        """
        fold_of: dict[str, str] = {}
        for patient, fold in self.run.predictions.select("patient_id", "fold").iter_rows():
            fold_of.setdefault(patient, str(fold))
        untested = set(self.run.record.cases.get("untested_patients", ()))
        if not set(task.patient_ids) & (fold_of.keys() | untested):
            return None
        if column is not None:
            raise OptionError(
                f"folds from column {column} were asked for, but run {self.run.name} was trained on patients of target"
                f" {task.name}, so its folds must be kept; leave the column out, or start from a run on other patients"
            )
        if untested:
            values = ["test" if patient in fold_of else "train" for patient in task.patient_ids]
        else:
            strangers = sorted(set(task.patient_ids) - fold_of.keys())
            order = np.random.default_rng(0).permutation(len(strangers)).tolist()
            turns = sorted(set(fold_of.values()), key=int)
            fold_of |= {strangers[place]: turns[turn % len(turns)] for turn, place in enumerate(order)}
            values = [fold_of[patient] for patient in task.patient_ids]
        name = f"fold of run {self.run.name}"
        table = pl.DataFrame({"case_id": task.case_ids, name: values})
        folds = folds_from_column(task, table, name)
        if not untested:  # a fold of which no patient is in the task has no number in those, but keeps its own here
            folds = np.array([self._folds.index(int(value)) for value in values], np.int64)
        return FoldedTask(task, folds[None])


def open_start(run: Run | Path | str, cache: Cache, options: Mapping[str, Any], *, keeps: bool = False) -> WarmStart:
    """Opens an old run to start from.

    Args:
        run: The run or its folder.
        cache: That the new training reads.
        options: Of the run's head, as the user gave them.
        keeps: As `WarmStart` has it.

    Raises:
        RunError: its head is fitted in closed form or learns several targets, shares nothing between its outputs, was
            chosen by a sweep or on repeated folds, or has other sizes by these options; the cache has other views or
            lacks token sets; or answers are to be kept of a head that mixes its outputs.
        RecipeError: the cache has another recipe.
    """
    opened = run if isinstance(run, Run) else open_run(run)
    record = opened.record
    why = ""
    if load_head(record.head).fit_by != "gradient":
        why = f"head {record.head!r} is fitted in closed form and has no weights to start from"
    elif is_joint(record.head):
        why = f"head {record.head!r} learned several targets at once"
    elif record.sweep is not None:
        why = "its members were chosen by a sweep and need not be alike"
    elif record.repeats > 1:
        why = f"its folds were dealt {record.repeats} times, so that every patient trained some member of each fold"
    if why:
        raise RunError(
            f"run {record.name} is no start for another: {why}; choose a run of one head trained without that"
        )
    check_cache(record, cache)
    if (views := list_views(cache)) != record.shape.views:
        raise RunError(
            f"run {record.name} was trained on the views {', '.join(record.shape.views)}, but cache {cache.path} holds"
            f" {', '.join(views)}; a start needs the same"
        )
    kept = {**record.head_options, **options}
    axes = find_output_axes(record.head, record.shape, record.token_sets, record.outputs, options=kept)
    if all(axes.values()):
        raise RunError(
            f"run {record.name} is no start for another: all of head {record.head!r} belongs to its outputs; choose a"
            " head with layers before its last, as mlp or abmil"
        )
    if keeps and (mixed := [name for name, grows in axes.items() if len(grows) > 1]):
        raise RunError(
            f"the answers of run {record.name} cannot be kept: {mixed[0]} of head {record.head!r} mixes its outputs;"
            " choose a run of a head whose outputs are apart, as abmil or grid, or keep nothing"
        )
    start = WarmStart(opened, axes, keeps=keeps)
    outputs = record.outputs * (2 if keeps else 1)
    with torch.random.fork_rng(devices=[]):
        start.load(create_head(record.head, record.shape, record.token_sets, outputs, options=kept), 0, 0)
    return start


def plan_start(
    run: Run | Path | str,
    cache: Cache,
    heads: Sequence[str] | None,
    head_options: Mapping[str, Mapping[str, Any]],
    *,
    keeps: bool = False,
) -> tuple[WarmStart, Sequence[str], TokenChoice, Mapping[str, Mapping[str, Any]]]:
    """Opens an old run to start from, and says which heads are then trained, on which token sets, with which options.

    Raises:
        HeadError: other heads were asked for.
        RunError, RecipeError: as `open_start`.
    """
    opened = run if isinstance(run, Run) else open_run(run)
    head = opened.head
    if heads is not None and head not in heads:
        raise HeadError(
            f"run {opened.name} can start head {head!r} alone, but heads are {', '.join(heads)}; add --head {head}, or"
            " leave the heads out"
        )
    given = head_options.get(head, {})
    start = open_start(opened, cache, given, keeps=keeps)
    options = {**head_options, head: {**opened.record.head_options, **given}}
    return start, [head] if heads is None else heads, {head: opened.record.token_sets}, options


def require_fresh(*, sweep: str | None, repeats: int, resume: bool, token_sets: object) -> None:
    """Stops where a start from another run is asked for together with what it cannot be had with.

    Raises:
        OptionError: it is.
    """
    for given, why in (
        (sweep is not None, "a sweep: candidates differ in size, and an old run fits one"),
        (repeats > 1, "repeats: in other folds an old run has trained on the patients that are tested"),
        (resume, "resume: a run that is there does not tell what it started from"),
        (token_sets is not None, "token sets: they are those of the old run"),
    ):
        if given:
            raise OptionError(f"a start from another run cannot be had together with {why}; leave one of the two out")

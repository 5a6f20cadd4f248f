"""Owns tasks: a target column of the labelled cases as numbers that a head can learn.

How values become codes is in `embedkit.targets` and `embedkit.followup`, splits are in `embedkit.folds` and offered
here too. Knows no cache, no token and no head.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.errors import OptionError, TaskError
from embedkit.folds import folds_from_column, folds_from_groups, inner_split, make_folds, repeat_folds
from embedkit.followup import choose_times, encode_followup, require_within_followup
from embedkit.targets import (
    KINDS,
    TaskKind,
    constant_target,
    count_noun,
    encode_classes,
    encode_numbers,
    encode_sets,
    infer_kind,
    is_multilabel,
    list_some,
)

__all__ = [
    "Task",
    "TaskKind",
    "TaskReport",
    "encode_targets",
    "folds_from_column",
    "folds_from_groups",
    "infer_kind",
    "inner_split",
    "make_folds",
    "make_task",
    "repeat_folds",
]


@dataclass(frozen=True, eq=False)
class Task:
    """One target of the labelled cases, as numbers.

    Attributes:
        name: The target column.
        kind: binary, multiclass, multilabel, regression or survival.
        classes: Names in the order of the targets' codes; empty for regression and survival. Sorted (as numbers
            where all are numbers) unless given. For binary the last is the positive class: ``1`` of 0/1, ``yes`` of
            no/yes, ``malignant`` of benign/malignant.
        case_ids: Labelled cases, in the order of the case table.
        patient_ids: Patient of each case.
        targets: binary: int64 [cases] 0 or 1; multiclass: int64 [cases], place in ``classes``; multilabel: int64
            [cases classes] 0 or 1; regression: float64 [cases]; survival: float64 [cases 2], the time followed and
            1 where it ended with the event, 0 where it was censored.
        event: Column of the events of a survival task, else empty.
        times: At which the survival of each case is stated, rising; empty for other kinds.
    """

    name: str
    kind: TaskKind
    classes: tuple[str, ...]
    case_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    targets: NDArray[Any]
    event: str = ""
    times: tuple[float, ...] = ()

    @property
    def outputs(self) -> int:
        """Width of a head's logits: one per class for multiclass and multilabel, else 1."""
        return len(self.classes) if self.kind in ("multiclass", "multilabel") else 1

    @cached_property
    def states(self) -> tuple[str, ...]:
        """What a split must keep on both sides: each class; for multilabel each label and its absence; an event."""
        if self.kind == "survival":
            return ("an event",)
        if self.kind == "multilabel":
            return (*self.classes, *(f"without {name}" for name in self.classes))
        return self.classes

    @cached_property
    def membership(self) -> NDArray[np.bool_]:
        """bool [cases states]: which of `states` each case is in; there is no state for regression."""
        if self.kind == "regression":
            return np.zeros((len(self.case_ids), 0), dtype=bool)
        if self.kind == "multilabel":
            return np.hstack([self.targets == 1, self.targets == 0])
        if self.kind == "survival":
            return np.asarray(self.targets[:, 1:] == 1)
        return cast(NDArray[np.bool_], self.targets[:, None] == np.arange(len(self.classes)))

    @cached_property
    def patients_per_state(self) -> tuple[int, ...]:
        """Number of patients with at least one case in each of `states`."""
        patients = np.asarray(self.patient_ids)
        return tuple(len(np.unique(patients[column])) for column in self.membership.T)

    def word_state(self, state: str) -> str:
        """One of `states` in words: ``class NAME``, or ``an event``."""
        return state if self.kind == "survival" else f"class {state}"


@dataclass(frozen=True)
class TaskReport:
    """What a task leaves aside, for the user to see.

    Attributes:
        unlabelled: Cases of the case table that have no label, in its order.
        unknown: Cases that have a label but are not in the case table, in the order of the labels.
        left_out: Cases whose label is none of the classes asked for, in the order of the case table.
    """

    unlabelled: tuple[str, ...]
    unknown: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def make_task(
    labels: pl.DataFrame,
    target: str,
    cases: pl.DataFrame,
    *,
    kind: TaskKind | None = None,
    classes: Sequence[str] | None = None,
    event: str | None = None,
    times: Sequence[float] | None = None,
) -> tuple[Task, TaskReport]:
    """Makes a task that can be learned: `encode_targets`, then a check that every class has patients enough.

    Args:
        labels: One row per ``case_id``; any other column is a target, an empty cell an unknown label. A ``patient_id``
            must be that of ``cases`` wherever it is given, since splits keep the patients of ``cases`` whole.
        target: Column to learn.
        cases: ``case_id`` and ``patient_id``; a case may stand in several rows.
        kind: As `infer_kind` says if not given.
        classes: Values to learn, in this order (the last is positive for binary); cases with another value are left
            out and reported. All values, sorted, if not given.
        event: Makes it a survival task: the target is how long a case was followed, above 0, and this column is 1
            where that ended with the event and 0 where it was censored. A case that lacks either is without label.
        times: At which a survival task's survival is stated, rising; None for deciles of the times of events.

    Raises:
        TaskError: as `encode_targets`; also a constant target, or a class (or an event) that fewer than two patients
            have: it cannot be learned from one and tested on another.
        OptionError: as `encode_targets`.
    """
    task, report = encode_targets(labels, target, cases, kind=kind, classes=classes, event=event, times=times)
    if task.kind == "regression" and len(np.unique(task.targets)) < 2:
        raise constant_target(target, f"{task.targets[0]:g}", len(task.case_ids))
    if task.kind == "survival" and times is not None:
        require_within_followup(target, task.times, task.targets)
    for state, patients, inside in zip(task.states, task.patients_per_state, task.membership.T, strict=True):
        if patients < 2:
            found = [task.case_ids[case] for case in np.flatnonzero(inside)]
            way_out = "leave it out by naming the classes to learn, merge it with another class in the label table, or "
            raise TaskError(
                f"target {target}: {task.word_state(state)} has {count_noun(len(found), 'case')}{list_some(found)} of"
                f" {count_noun(patients, 'patient')}, but learning and testing it take at least 2 patients;"
                f" {way_out if task.classes else ''}add cases"
            )
    return task, report


def encode_targets(
    labels: pl.DataFrame,
    target: str,
    cases: pl.DataFrame,
    *,
    kind: TaskKind | None = None,
    classes: Sequence[str] | None = None,
    event: str | None = None,
    times: Sequence[float] | None = None,
) -> tuple[Task, TaskReport]:
    """Makes a task without asking whether it can be learned: for judging a trained head on any labelled cases.

    Text is stripped of surrounding blanks, and blank text is an unknown label. Booleans become ``false`` and ``true``,
    whole numbers lose their decimals (``1.0`` is class ``1``). A multilabel cell lists its labels between ``;`` (or
    ``|`` where no cell has ``;``), or is a list; a lone separator or an empty list means none of the labels. In a
    multilabel task ``classes`` picks the labels and leaves no case out.

    Args:
        labels, target, cases, kind, classes, event, times: As in `make_task`.

    Raises:
        TaskError: a column is missing, a case has two labels or two patients, the tables name different patients of a
            case, no case has a label, a label is NaN or infinite, all labels are equal and ``classes`` is not given,
            or the values do not fit ``kind``.
        OptionError: ``kind`` is unknown or does not go with ``event``, ``times`` are not rising from above 0, or
            ``classes`` is empty, repeats itself or comes with regression or survival.
    """
    kind = "survival" if kind is None and event is not None else kind
    _check_options(kind, classes, target, event, times)
    known, unknown = _join_labels(labels, target, cases, event)
    labelled = known.drop_nulls("value")
    case_ids = labelled["case_id"].to_list()
    if not case_ids:
        raise TaskError(
            f"target {target}: none of the {count_noun(known.height, 'case')} has a label, and"
            f" {count_noun(len(unknown), 'label')}{list_some(unknown)} belong to unknown cases; check that the label"
            " table writes case_id as the manifest does"
        )
    values = labelled["value"]
    _check_finite(target, values, case_ids)
    kind = kind or _implied_kind(values, target, classes)
    names: tuple[str, ...] = ()
    targets: NDArray[Any]
    kept = np.ones(len(case_ids), dtype=bool)
    stated: tuple[float, ...] = ()
    if kind == "regression":
        targets = encode_numbers(target, values, case_ids)
    elif kind == "survival":
        targets = encode_followup(target, values, str(event), labelled["happened"], case_ids)
        stated = choose_times(target, targets, times)
    elif kind == "multilabel":
        names, targets = encode_sets(target, values, classes)
    else:
        names, targets = encode_classes(target, values, kind, classes)
        kept = targets >= 0
    if not kept.any():
        found = values.unique(maintain_order=True).cast(pl.String).to_list()
        raise TaskError(
            f"target {target}: no case has a label among {', '.join(names)}; labels found{list_some(found)}"
        )
    patients = np.array(labelled["patient_id"].to_list(), dtype=object)[kept]
    ids = np.array(case_ids, dtype=object)
    unlabelled = known.filter(pl.col("value").is_null())["case_id"].to_list()
    task = Task(target, kind, names, tuple(ids[kept]), tuple(patients), targets[kept], event or "", stated)
    return task, TaskReport(tuple(unlabelled), tuple(unknown), tuple(ids[~kept]))


def _check_options(
    kind: str | None, classes: Sequence[str] | None, target: str, event: str | None, times: Sequence[float] | None
) -> None:
    if kind is not None and kind not in KINDS:
        raise OptionError(f"task kind {kind!r} is unknown; expected one of {', '.join(KINDS)}")
    if kind == "survival" and event is None:
        raise OptionError(
            f"target {target} is to be a survival task, but no event column was named; name the column that is 1 where"
            " the time ended with the event and 0 where it was censored"
        )
    if kind != "survival" and (event is not None or times is not None):
        given = f"event column {event}" if event is not None else "times of survival"
        raise OptionError(f"{given} given for target {target}, which is no survival task ({kind}); leave it away")
    if classes is None:
        return
    if kind in ("regression", "survival"):
        raise OptionError(f"classes {', '.join(classes)} were named for a {kind} task, which has none; leave them away")
    if not classes or len(set(classes)) < len(classes):
        raise OptionError(f"classes are {', '.join(classes) or 'none'}; expected one or more, each named once")


def _implied_kind(values: pl.Series, target: str, classes: Sequence[str] | None) -> TaskKind:
    """As `infer_kind`, but named classes are classes even of numbers, and two of them make it binary."""
    if classes is None:
        return infer_kind(values, target)
    if is_multilabel(values):
        return "multilabel"
    return "binary" if len(classes) == 2 else "multiclass"


def _join_labels(
    labels: pl.DataFrame, target: str, cases: pl.DataFrame, event: str | None
) -> tuple[pl.DataFrame, list[str]]:
    """The cases with their label as column ``value``, in the order of the case table; and the unknown cases.

    With an event column also ``happened``; ``value`` is null where that is.
    """
    for column in ("case_id", target, *([] if event is None else [event])):
        _require_column(labels, column, "label table")
    for column in ("case_id", "patient_id"):
        _require_column(cases, column, "case table")
    known = cases.select(pl.col("case_id", "patient_id").cast(pl.String)).unique(maintain_order=True)
    given = labels.select(pl.col("case_id").cast(pl.String), _cleaned(labels[target]).alias("value"))
    if event is not None:
        given = given.with_columns(_cleaned(labels[event]).alias("happened")).with_columns(
            pl.when(pl.col("happened").is_not_null()).then(pl.col("value"))
        )
    for table, what in ((known, "patients"), (given, "rows in the label table")):
        twice = table.filter(pl.col("case_id").is_duplicated())["case_id"].unique(maintain_order=True).to_list()
        if twice:
            raise TaskError(
                f"{count_noun(len(twice), 'case')}{list_some(twice)} with several {what}, expected one each"
            )
    if "patient_id" in labels.columns:
        _check_patients(labels, known)
    unknown = given.drop_nulls("value").join(known, on="case_id", how="anti", maintain_order="left")
    return known.join(given, on="case_id", how="left", maintain_order="left"), unknown["case_id"].to_list()


def _check_patients(labels: pl.DataFrame, known: pl.DataFrame) -> None:
    """Stops where the label table names another patient of a case than the case table; null or blank says nothing."""
    claimed = labels.select(
        pl.col("case_id").cast(pl.String), pl.col("patient_id").cast(pl.String).str.strip_chars().alias("claimed")
    ).filter(pl.col("claimed") != "")
    differ = known.join(claimed, on="case_id", maintain_order="left").filter(
        pl.col("claimed") != pl.col("patient_id").str.strip_chars()
    )
    if differ.is_empty():
        return
    case, patient, other = differ.row(0)
    more = f" (and {count_noun(differ.height - 1, 'case')} more)" if differ.height > 1 else ""
    raise TaskError(
        f"case {case} is of patient {other} in the label table but of {patient} in the cache{more}, expected one"
        " patient, whom no split may part; put patient_id into the manifest and extract again to a new --out, or drop"
        " the column patient_id from the label table"
    )


def _require_column(table: pl.DataFrame, column: str, what: str) -> None:
    if column in table.columns:
        return
    lower = {name.lower(): name for name in table.columns}
    near = [lower[name] for name in difflib.get_close_matches(column.lower(), lower, n=3)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise TaskError(f"the {what} has no column {column}; {hint}it has {', '.join(table.columns)}")


def _cleaned(values: pl.Series) -> pl.Series:
    """Text stripped and blank text null; categories as text; decimals as floats."""
    if isinstance(values.dtype, pl.Categorical | pl.Enum):
        values = values.cast(pl.String)
    if isinstance(values.dtype, pl.Decimal):
        return values.cast(pl.Float64)
    if values.dtype != pl.String:
        return values
    return values.to_frame("value").select(pl.col("value").str.strip_chars().replace("", None))["value"]


def _check_finite(target: str, values: pl.Series, case_ids: Sequence[str]) -> None:
    if not values.dtype.is_float():
        return
    bad = [case for case, fine in zip(case_ids, values.is_finite().to_list(), strict=True) if not fine]
    if bad:
        raise TaskError(
            f"target {target} is NaN or infinite in {count_noun(len(bad), 'case')}{list_some(bad)}, expected finite"
            " numbers; leave the cell empty where the label is unknown"
        )

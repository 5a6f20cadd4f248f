"""Owns subgroups: the scores of the cases that share a value of a column, small groups flagged; draws nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from embedkit.bootstrap import Interval
from embedkit.errors import RunError
from embedkit.metrics import METRICS, compute_metrics
from embedkit.outcomes import Outcomes
from embedkit.targets import TaskKind, count_noun, list_some

__all__ = ["Subgroup", "judge_subgroups", "shown_metrics"]

_MOST_VALUES = 8
_FEWEST_PATIENTS = 20
_FEWEST_OF_A_CLASS = 5
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Subgroup:
    """Cases that share a value.

    Attributes:
        column, value: Which.
        cases, patients: How many.
        metrics: As `compute_metrics` gives them for these cases alone; those undefined there are NaN.
        small: Fewer than 20 patients, or fewer than 5 of a class that the task has: too few to conclude from.
    """

    column: str
    value: str
    cases: int
    patients: int
    metrics: dict[str, Interval]
    small: bool


def judge_subgroups(
    outcomes: Outcomes, labels: pl.DataFrame, column: str, *, resamples: int = 2000, seed: int = 0
) -> list[Subgroup]:
    """The scores by value of a column; numbers of more than eight values are parted into thirds.

    Args:
        outcomes: What was judged.
        labels: ``case_id`` and ``column``; a case without a value is in the group ``unknown``.
        column: Not the target itself.
        resamples, seed: Of the bootstrap over patients.

    Raises:
        RunError: no such column, no value for any case, a case with two, or text with more than 50 values.
    """
    values = _name_values(outcomes, labels, column)
    found = []
    for value in sorted(set(values), key=lambda name: (name[0] == _LAST, name)):
        inside = np.array([each == value for each in values])
        part = outcomes.select(inside)
        metrics = compute_metrics(
            part.kind,
            part.targets,
            part.scores,
            part.patient_ids,
            repeated=True,
            times=part.times,
            resamples=resamples,
            seed=seed,
        )
        patients = len(set(part.patient_ids))
        small = patients < _FEWEST_PATIENTS or _rarest(outcomes, part) < _FEWEST_OF_A_CLASS
        found.append(Subgroup(column, value[1], len(part.case_ids), patients, metrics, small))
    return found


def shown_metrics(kind: TaskKind) -> tuple[str, ...]:
    """The metrics of the kind that fit into a table of subgroups: those that a small group still has some say on."""
    return tuple(name for name in METRICS[kind] if name in ("auroc", "balanced_accuracy", "brier", "mae", "c_index"))


_LAST = 1e300
"""Sorts after every number."""

_Name = tuple[float, str]
"""Place in the order, and the name."""


def _rarest(outcomes: Outcomes, part: Outcomes) -> int:
    """Patients of the rarest class of the task within a part; all where there are no classes."""
    patients = np.asarray(part.patient_ids)
    if not outcomes.classes:
        return len(np.unique(patients))
    targets = part.targets.reshape(len(patients), -1).T
    codes = np.unique(outcomes.targets)
    return min(len(np.unique(patients[column == code])) for column in targets for code in codes)


def _name_values(outcomes: Outcomes, labels: pl.DataFrame, column: str) -> list[_Name]:
    """The group of each case."""
    for name in ("case_id", column):
        if name not in labels.columns:
            raise RunError(f"no column {name} to form subgroups by; the label table has {', '.join(labels.columns)}")
    wanted = pl.DataFrame({"case_id": list(outcomes.case_ids)})
    given = labels.select(pl.col("case_id").cast(pl.String), pl.col(column).alias("value")).unique(maintain_order=True)
    if twice := given.filter(pl.col("case_id").is_duplicated())["case_id"].unique(maintain_order=True).to_list():
        raise RunError(
            f"column {column} gives {count_noun(len(twice), 'case')}{list_some(twice)} two values, expected one"
        )
    series = wanted.join(given, on="case_id", how="left", maintain_order="left")["value"]
    if series.null_count() == len(series):
        raise RunError(
            f"column {column} has no value for any of the {count_noun(len(series), 'case')} judged; check that the"
            " label table writes case_id as the manifest does"
        )
    if series.dtype.is_numeric() and series.n_unique() > _MOST_VALUES:
        return _name_thirds(series.cast(pl.Float64))
    if series.n_unique() > 50:
        raise RunError(
            f"column {column} has {series.n_unique()} different texts, expected 50 or fewer to form groups by"
        )
    numeric = series.dtype.is_numeric()
    return [
        (_LAST, _UNKNOWN)
        if value is None
        else (float(value) if numeric else 0.0, f"{value:g}" if numeric else str(value))
        for value in series.to_list()
    ]


def _name_thirds(series: pl.Series) -> list[_Name]:
    known = series.drop_nulls().drop_nans().to_numpy()
    low, high = np.quantile(known, [1 / 3, 2 / 3])
    names: list[_Name] = [(0.0, f"up to {low:.4g}"), (1.0, f"{low:.4g} to {high:.4g}"), (2.0, f"above {high:.4g}")]
    return [
        (_LAST, _UNKNOWN) if value is None or np.isnan(value) else names[int(value > low) + int(value > high)]
        for value in series.to_list()
    ]

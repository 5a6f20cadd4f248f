"""Owns `evaluate`: a run judged on its out-of-fold scores or on new cases, with all that a report of it tells.

Draws nothing and prints nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.bootstrap import Interval
from embedkit.cache import Cache, open_originals
from embedkit.calibration import (
    CalibrationMethod,
    Reliability,
    debiased_calibration_error,
    measure_reliability,
    top_confidence,
)
from embedkit.delong import delong_interval, estimate_aurocs
from embedkit.errors import OptionError, RunError
from embedkit.manifest import read_labels
from embedkit.metrics import compute_metrics
from embedkit.outcomes import Outcomes, encode_truth, read_outcomes
from embedkit.runs import Run, open_run, predict
from embedkit.subgroups import Subgroup, judge_subgroups
from embedkit.tasks import encode_targets
from embedkit.thresholds import Goal, OperatingPoint, choose_threshold, measure_threshold

__all__ = ["Calibration", "Evaluation", "evaluate"]


@dataclass(frozen=True, eq=False)
class Calibration:
    """How far scores are from how often they come true.

    Attributes:
        metrics: ``ece``, ``ece_adaptive`` and ``brier``.
        debiased: Root mean squared error less what chance adds (`debiased_calibration_error`).
        reliability: The curve.
    """

    metrics: dict[str, Interval]
    debiased: float
    reliability: Reliability


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        run: As judged: calibrated where that was asked for.
        outcomes: What was judged.
        held_out: Whether the scores are out of fold; else those of all members on new cases.
        metrics: As `compute_metrics`.
        delong: The AUROC of a binary task with DeLong's interval, over patients; else None.
        method: How the scores were calibrated; None for as the run gives them.
        calibration: Of the scores as the run gives them, then of the calibrated ones where there are such; empty where
            the task has no probabilities.
        operating_points: One per goal.
        subgroups: One per value of every column asked for.
    """

    run: Run
    outcomes: Outcomes
    held_out: bool
    metrics: dict[str, Interval]
    delong: Interval | None
    method: CalibrationMethod | None
    calibration: tuple[Calibration, ...]
    operating_points: tuple[OperatingPoint, ...]
    subgroups: tuple[Subgroup, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: every metric under its name, and what else was asked for under a name of its own."""
        outcomes = self.outcomes
        found: dict[str, Any] = {name: dataclasses.asdict(each) for name, each in self.metrics.items()}
        found |= {
            "run": self.run.name,
            "scores": "out of fold" if self.held_out else "new cases",
            "cases": len(outcomes.case_ids),
            "patients": len(set(outcomes.patient_ids)),
            "repeats": len(outcomes.scores),
        }
        if self.delong is not None:
            found["auroc_delong"] = dataclasses.asdict(self.delong)
        if self.method is not None:
            found["calibration"] = {
                "method": self.method,
                **{
                    when: {name: dataclasses.asdict(value) for name, value in each.metrics.items()}
                    | {"debiased_error": each.debiased}
                    for when, each in zip(("before", "after"), self.calibration, strict=True)
                },
            }
        points = [dataclasses.asdict(point) | {"goal": str(point.goal)} for point in self.operating_points]
        groups = [dataclasses.asdict(group) for group in self.subgroups]
        return found | ({"operating_points": points} if points else {}) | ({"subgroups": groups} if groups else {})


def evaluate(
    run: Run | Path | str,
    cache: Cache | Path | str | None = None,
    labels: pl.DataFrame | Path | str | None = None,
    *,
    calibrate: CalibrationMethod | None = None,
    at: Sequence[str] = (),
    subgroups: Sequence[str] = (),
    device: str = "auto",
    resamples: int = 2000,
    seed: int = 0,
) -> Evaluation:
    """Judges a run on its out-of-fold scores or, with a cache, on labelled cases of patients it was not trained on.

    Args:
        run: A run or its folder.
        cache: New cases, as in `predict`; None for the scores that the run keeps of its own cases, each by the member
            that was not trained on the patient.
        labels: Table with ``case_id`` and the run's target, or its file; cases of the cache without a label are left
            out. Without a cache it is needed for ``subgroups`` alone.
        calibrate: Map the scores first, as `Run.calibrated` does.
        at: Goals of operating points of a binary task, such as ``sensitivity=0.95``. Thresholds are chosen on the inner
            splits of each fold; a new case is held against their mean.
        subgroups: Columns of ``labels``: the scores of the cases of each value.
        device: Where the heads run.
        resamples: Of the bootstrap over patients.
        seed: Of the bootstrap.

    Raises:
        RunError: a labelled case is of a patient of the training, or has no usable slice; a subgroup column has no
            value for any case; or as `predict`.
        TaskError: the labels do not fit the run's task.
        RecipeError: the cache has another recipe.
        OptionError: an option means nothing for this run, or a cache or subgroups without labels.
    """
    opened = run if isinstance(run, Run) else open_run(run)
    kind = opened.record.kind
    goals = [Goal.parse(text) for text in at]
    if goals and kind != "binary":
        raise OptionError(f"operating points belong to a binary task, but run {opened.name} is {kind}; leave them away")
    table = read_labels(labels) if isinstance(labels, Path | str) else labels
    if table is None and (cache is not None or subgroups):
        raise OptionError("new cases and subgroups take a label table; give one (--labels)")
    judged = opened if calibrate is None else opened.calibrated(calibrate)
    source = None if cache is None else open_originals(cache)

    def read(which: Run) -> Outcomes:
        if source is None or table is None:
            return read_outcomes(kind, which.record.classes, which.predictions)
        return _score_new_cases(which, source, table, device)

    outcomes = read(judged)
    every = [outcomes] if calibrate is None else [read(opened), outcomes]
    how = {"resamples": resamples, "seed": seed}
    return Evaluation(
        run=judged,
        outcomes=outcomes,
        held_out=source is None,
        metrics=_metrics(outcomes, **how),
        delong=_delong(outcomes),
        method=calibrate,
        calibration=tuple(_measure_calibration(each, **how) for each in every) if kind in _PROBABLE else (),
        operating_points=tuple(_operate(judged, outcomes, goal) for goal in goals),
        subgroups=tuple(
            group
            for column in subgroups
            if table is not None
            for group in judge_subgroups(outcomes, table, column, **how)
        ),
    )


_PROBABLE = ("binary", "multiclass", "multilabel")
"""Kinds whose scores are probabilities."""


def _metrics(outcomes: Outcomes, *, resamples: int, seed: int) -> dict[str, Interval]:
    return compute_metrics(
        outcomes.kind,
        outcomes.targets,
        outcomes.scores,
        outcomes.patient_ids,
        repeated=True,
        times=outcomes.times,
        resamples=resamples,
        seed=seed,
    )


def _score_new_cases(run: Run, cache: Cache, labels: pl.DataFrame, device: str) -> Outcomes:
    """The scores of all labelled cases of the cache, none of whose patients the run may have seen."""
    record = run.record
    cases = cache.stacks.select("case_id", "patient_id").unique(maintain_order=True)
    task, _ = encode_targets(
        labels,
        record.target,
        cases,
        kind=record.kind,
        classes=record.classes or None,
        event=record.event or None,
        times=record.times or None,
    )
    known = run.training_patients
    pairs = zip(task.case_ids, task.patient_ids, strict=True)
    if seen := [case for case, patient in pairs if patient in known]:
        raise RunError(
            f"{len(seen)} of the labelled cases are of patients that run {run.name} was trained on"
            f" ({', '.join(seen[:5])}), expected others; its own cases are judged out of fold, without a cache"
        )
    answers = predict(run, cache, case_ids=task.case_ids, device=device)
    scores = answers.select(record.score_columns)
    if blank := answers.filter(pl.col(scores.columns[0]).is_null())["case_id"].to_list():
        raise RunError(
            f"{len(blank)} labelled cases have no usable slice ({', '.join(blank[:5])}); leave their labels empty"
        )
    values = record.score_array(scores.to_numpy())
    folds = np.full((1, len(task.case_ids)), -1)
    return Outcomes(
        record.kind, record.classes, task.case_ids, task.patient_ids, task.targets, values[None], folds, record.times
    )


def _delong(outcomes: Outcomes) -> Interval | None:
    if outcomes.kind != "binary" or len(np.unique(outcomes.targets)) < 2:
        return None
    found = estimate_aurocs(outcomes.targets, outcomes.scores, outcomes.patient_ids).average([len(outcomes.scores)])
    return delong_interval(float(found.values[0]), float(found.covariance[0, 0]))


def _measure_calibration(outcomes: Outcomes, *, resamples: int, seed: int) -> Calibration:
    metrics = _metrics(outcomes, resamples=resamples, seed=seed)
    pairs = [top_confidence(outcomes.kind, outcomes.targets, scores) for scores in outcomes.scores]
    labels = len(pairs[0][0]) // len(outcomes.case_ids)  # of a multilabel task: each case comes once per label
    confidence, right = (np.concatenate(each) for each in zip(*pairs, strict=True))
    return Calibration(
        {name: metrics[name] for name in ("ece", "ece_adaptive", "brier")},
        float(np.mean([debiased_calibration_error(*pair) for pair in pairs])),
        measure_reliability(confidence, right, outcomes.patient_ids * (labels * len(pairs))),
    )


def _operate(run: Run, outcomes: Outcomes, goal: Goal) -> OperatingPoint:
    """What the thresholds of a run's inner splits achieve on other cases; repeats count as cases of their patients."""
    record = run.record
    thresholds = {
        int(fold): choose_threshold(
            encode_truth(record.kind, record.classes, part) == 1, part["score"].to_numpy(), goal
        )
        for (fold,), part in run.inner.partition_by("fold", as_dict=True, maintain_order=True).items()
    }
    if (outcomes.folds < 0).all():
        thresholds = {-1: float(np.mean(list(thresholds.values())))}
    limits = np.array([[thresholds[fold] for fold in row] for row in outcomes.folds.tolist()])
    called: NDArray[np.bool_] = (outcomes.scores >= limits).ravel()
    positive = np.tile(outcomes.targets == 1, len(outcomes.scores))
    groups = outcomes.patient_ids * len(outcomes.scores)
    return measure_threshold(goal, list(thresholds.values()), positive, called, groups)

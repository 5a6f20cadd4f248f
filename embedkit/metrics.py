"""Owns the metrics of a task's scores, each with an interval over patients; knows no head and no cache.

Intervals come from a bootstrap that resamples patients, never single cases: cases of one patient are not independent.

Out-of-fold scores are pooled: the scores of all folds are taken as one set, though each fold's head differs. Where the
heads of two folds differ in level, pooled AUROC and AUPRC compare scores that were never meant to be compared, and are
a little pessimistic (Airola et al. 2011; Forman and Scholz 2010). The interval then speaks of which patients were
seen, for the heads as they were trained; not of how a new training or another deal of folds would vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embedkit.bootstrap import Floats, Interval, Statistic, bootstrap_values, form_interval
from embedkit.errors import OptionError, TaskError
from embedkit.formulas import (
    average_statistics,
    weigh_adaptive_calibration_error,
    weigh_auroc,
    weigh_average_precision,
    weigh_balanced_accuracy,
    weigh_calibration_error,
    weigh_f1,
    weigh_mean,
    weigh_r2,
    weigh_spearman,
)
from embedkit.survival import weigh_concordance, weigh_integrated_brier, weigh_ipcw_concordance
from embedkit.targets import KINDS, TaskKind

__all__ = [
    "HIGHER_IS_BETTER",
    "METRICS",
    "Interval",
    "check_scores",
    "compute_metrics",
    "compute_weighted_metrics",
    "metric_statistics",
    "paired_difference",
    "require_metric",
]

_CLASSIFICATION = ("auroc", "auprc", "balanced_accuracy", "accuracy", "f1", "brier", "ece", "ece_adaptive")

METRICS: dict[TaskKind, tuple[str, ...]] = {
    "binary": _CLASSIFICATION,
    "multiclass": _CLASSIFICATION,
    "multilabel": _CLASSIFICATION,
    "regression": ("mae", "r2", "spearman"),
    "survival": ("c_index", "c_index_ipcw", "integrated_brier"),
}
"""Names of the metrics of each kind of task; the first is the usual headline, of a regression ``r2``."""

_LOWER_IS_BETTER = ("brier", "ece", "ece_adaptive", "mae", "integrated_brier")
HIGHER_IS_BETTER = {name: name not in _LOWER_IS_BETTER for names in METRICS.values() for name in names}


def compute_metrics(
    task_kind: TaskKind,
    targets: ArrayLike,
    scores: ArrayLike,
    groups: Sequence[str],
    *,
    repeated: bool = False,
    times: Sequence[float] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Every metric of the kind of task, with its 95% interval from a bootstrap over patients.

    - ``auroc``, ``auprc`` (average precision): multiclass as the mean of each class against the rest.
    - ``balanced_accuracy``, ``accuracy``, ``f1``: at probability 0.5 or more, or the most probable class; ``f1`` of
      the positive class for binary, the mean over classes for multiclass.
    - ``brier``: mean squared error of the probability, 0..1; multiclass: summed over classes, 0..2 (Brier 1950).
    - ``ece``: 15 bins of equal width; of the positive class's probability for binary (Naeini et al. 2015), of the most
      probable class's for multiclass (Guo et al. 2017). Too high in small samples and more so in resamples, so its
      interval lies high and may even miss the value. ``ece_adaptive``: the same over 15 bins of equal weight.
    - multilabel: each of these per label as if binary, then their mean; ``accuracy`` is thus 1 - Hamming loss.
    - ``mae``, ``r2``, ``spearman`` for regression.
    - survival: ``c_index`` (Harrell's), ``c_index_ipcw`` (Uno's, for events before the last stated time), and
      ``integrated_brier``, the mean of the Brier score under IPCW from the first to the last stated time. Stated times
      beyond which none of these cases was followed are left out; without any left both are undefined.

    Classes that the targets lack are left out of the means of ``auroc``, ``auprc``, ``balanced_accuracy`` and ``f1``.
    Resamples that lack a class which the targets have are left out for these four, and counted in the interval.

    Args:
        task_kind: binary, multiclass, multilabel, regression or survival.
        targets: As `Task.targets`: [cases], [cases classes] for multilabel, [cases 2] for survival.
        scores: Probabilities: [cases] of the positive class; multiclass [cases classes], rows summing to 1; multilabel
            [cases classes]. Regression: predictions [cases]. Survival: [cases 1+times], the risk, then the chance to be
            without the event at each of ``times``.
        groups: Patient of each case.
        repeated: ``scores`` have an axis of repeats (repeated folds) in front: each metric is the mean of what it is in
            every repeat. The scores are not averaged, which would judge an ensemble of heads.
        times: Of a survival task, as `Task.times`.
        resamples: Of the bootstrap; 0 leaves the limits NaN.
        seed: Of the bootstrap.

    Raises:
        TaskError: shapes that do not fit each other, no cases, NaN, or scores that are no probabilities.
        OptionError: unknown kind, or ``resamples`` below 0.
    """
    statistics = metric_statistics(
        task_kind, targets, scores, groups, repeated=repeated, times=times, resamples=resamples
    )
    resampled = bootstrap_values(statistics, groups, resamples=resamples, seed=seed)
    plain = np.ones((1, len(groups)))
    return {
        name: form_interval(float(statistic(plain)[0]), resampled[name], groups)
        for name, statistic in statistics.items()
    }


def metric_statistics(
    task_kind: TaskKind,
    targets: ArrayLike,
    scores: ArrayLike,
    groups: Sequence[str],
    *,
    repeated: bool = False,
    times: Sequence[float] = (),
    resamples: int = 0,
) -> dict[str, Statistic]:
    """Every metric of the kind of task as a function of case weights, by name; checked as `compute_metrics` does.

    Args:
        task_kind, targets, scores, groups, repeated, times, resamples: As in `compute_metrics`.

    Raises:
        TaskError, OptionError: as `compute_metrics`.
    """
    repeats = np.asarray(scores) if repeated else [np.asarray(scores)]
    each = [
        _statistics(task_kind, *check_scores(task_kind, targets, part, groups, resamples, times=times), times)
        for part in repeats
    ]
    if len(each) == 1:
        return each[0]
    return {name: average_statistics([statistics[name] for statistics in each]) for name in METRICS[task_kind]}


def compute_weighted_metrics(
    task_kind: TaskKind, targets: ArrayLike, scores: ArrayLike, weights: ArrayLike, *, times: Sequence[float] = ()
) -> dict[str, Floats]:
    """Every metric of the kind of task under many weightings of the cases, as in `compute_metrics`.

    Args:
        task_kind, targets, scores, times: As in `compute_metrics`.
        weights: [weightings cases], 0 or above.

    Returns:
        float64 [weightings] by name, NaN where a metric is undefined.

    Raises:
        TaskError, OptionError: as `compute_metrics`.
    """
    weights = np.atleast_2d(np.asarray(weights, dtype=np.float64))
    statistics = _statistics(task_kind, *check_scores(task_kind, targets, scores, weights[0], 0, times=times), times)
    return {name: statistic(weights) for name, statistic in statistics.items()}


def paired_difference(
    task_kind: TaskKind,
    targets: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    groups: Sequence[str],
    *,
    metric: str,
    times: Sequence[float] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """A metric of ``scores_a`` less that of ``scores_b`` on the same cases, with its 95% interval.

    Both are computed on each resample of patients, so what makes cases easy or hard for both cancels.

    Args:
        task_kind, targets, groups, times, resamples, seed: As in `compute_metrics`.
        scores_a, scores_b: Each as ``scores`` in `compute_metrics`.
        metric: One of `METRICS` of the kind.

    Raises:
        TaskError, OptionError: as `compute_metrics`; OptionError also for a metric that the kind does not have.
    """
    both = [
        metric_statistics(task_kind, targets, scores, groups, times=times, resamples=resamples)
        for scores in (scores_a, scores_b)
    ]
    require_metric(task_kind, metric)
    first, second = (statistics[metric] for statistics in both)
    resampled = bootstrap_values({"a": first, "b": second}, groups, resamples=resamples, seed=seed)
    plain = np.ones((1, len(groups)))
    value = float(first(plain)[0] - second(plain)[0])
    return form_interval(value, resampled["a"] - resampled["b"], groups)


def require_metric(task_kind: TaskKind, metric: str) -> None:
    """Stops at a metric that the kind of task does not have.

    Raises:
        OptionError: it has none of that name.
    """
    if metric not in METRICS[task_kind]:
        raise OptionError(f"a {task_kind} task has no metric {metric}; expected one of {', '.join(METRICS[task_kind])}")


def _statistics(
    task_kind: TaskKind, targets: NDArray[Any], scores: Floats, times: Sequence[float] = ()
) -> dict[str, Statistic]:
    if task_kind == "survival":
        return _survival_statistics(targets[:, 0], targets[:, 1] == 1, scores, np.asarray(times, dtype=np.float64))
    if task_kind == "regression":
        return {
            "mae": weigh_mean(np.abs(targets - scores)),
            "r2": weigh_r2(targets, scores),
            "spearman": weigh_spearman(targets, scores),
        }
    if task_kind == "binary":
        return _binary_statistics(targets == 1, scores)
    if task_kind == "multiclass":
        return _multiclass_statistics(targets, scores)
    labels = [_binary_statistics(truth == 1, column) for truth, column in zip(targets.T, scores.T, strict=True)]
    varying = [label for label, truth in zip(labels, targets.T, strict=True) if 0 < truth.sum() < len(truth)]
    whole = ("accuracy", "brier", "ece", "ece_adaptive")
    return {
        name: average_statistics([label[name] for label in (labels if name in whole else varying)])
        for name in METRICS[task_kind]
    }


def _survival_statistics(
    followed: Floats, happened: NDArray[np.bool_], scores: Floats, times: Floats
) -> dict[str, Statistic]:
    concordance = weigh_concordance(followed, happened, scores[:, 0])
    known = times < followed.max()
    if not known.any():
        return {"c_index": concordance} | dict.fromkeys(("c_index_ipcw", "integrated_brier"), average_statistics([]))
    at, chances = times[known], scores[:, 1:][:, known]
    return {
        "c_index": concordance,
        "c_index_ipcw": weigh_ipcw_concordance(followed, happened, scores[:, 0], until=float(at[-1])),
        "integrated_brier": weigh_integrated_brier(followed, happened, chances, at),
    }


def _binary_statistics(positive: NDArray[np.bool_], scores: Floats) -> dict[str, Statistic]:
    called = scores >= 0.5
    both, both_called = np.stack([~positive, positive], axis=1), np.stack([~called, called], axis=1)
    return {
        "auroc": weigh_auroc(positive, scores),
        "auprc": weigh_average_precision(positive, scores),
        "balanced_accuracy": weigh_balanced_accuracy(both, both_called),
        "accuracy": weigh_mean(np.asarray(called == positive, dtype=np.float64)),
        "f1": weigh_f1(positive[:, None], called[:, None]),
        "brier": weigh_mean((scores - positive) ** 2),
        "ece": weigh_calibration_error(scores, positive),
        "ece_adaptive": weigh_adaptive_calibration_error(scores, positive),
    }


def _multiclass_statistics(targets: NDArray[Any], scores: Floats) -> dict[str, Statistic]:
    everyone = np.arange(scores.shape[1])
    true, called = targets[:, None] == everyone, scores.argmax(axis=1)[:, None] == everyone
    there = np.flatnonzero(true.any(axis=0))
    right = (true & called).any(axis=1)
    confidence = np.clip(scores.max(axis=1), 0, 1)
    return {
        "auroc": average_statistics([weigh_auroc(true[:, each], scores[:, each]) for each in there]),
        "auprc": average_statistics([weigh_average_precision(true[:, each], scores[:, each]) for each in there]),
        "balanced_accuracy": weigh_balanced_accuracy(true[:, there], called[:, there]),
        "accuracy": weigh_mean(right.astype(np.float64)),
        "f1": weigh_f1(true[:, there], called[:, there]),
        "brier": weigh_mean(((scores - true) ** 2).sum(axis=1)),
        "ece": weigh_calibration_error(confidence, right),
        "ece_adaptive": weigh_adaptive_calibration_error(confidence, right),
    }


def check_scores(
    task_kind: TaskKind,
    targets: ArrayLike,
    scores: ArrayLike,
    groups: Sequence[str] | NDArray[Any],
    resamples: int,
    *,
    times: Sequence[float] = (),
) -> tuple[NDArray[Any], Floats]:
    """Targets, and scores as float64, once they fit the kind of task and each other.

    Args:
        task_kind, targets, scores, groups, resamples, times: As in `compute_metrics`.

    Raises:
        TaskError, OptionError: as `compute_metrics`.
    """
    if task_kind not in KINDS:
        raise OptionError(f"task kind {task_kind!r} is unknown; expected one of {', '.join(KINDS)}")
    if resamples < 0:
        raise OptionError(f"{resamples} resamples were asked for, expected 0 or more")
    targets, scores = np.asarray(targets), np.asarray(scores, dtype=np.float64)
    wide = task_kind in ("multiclass", "multilabel", "survival")
    expected = "[cases classes]" if wide else "[cases]"
    fits = scores.shape[:1] == targets.shape[:1] and scores.ndim == 1 + wide
    if task_kind == "survival":
        expected = f"[cases {1 + len(times)}], targets [cases 2]"
        fits = fits and len(times) > 0 and scores.shape[1] == 1 + len(times) and targets.shape[1:] == (2,)
    if not fits or len(groups) != len(scores) or targets.ndim != 1 + (task_kind in ("multilabel", "survival")):
        raise TaskError(
            f"{task_kind} targets {targets.shape}, scores {scores.shape} and {len(groups)} groups do not fit each"
            f" other; expected scores {expected} and one target and one group for each case"
        )
    if task_kind == "multilabel" and targets.shape != scores.shape:
        raise TaskError(f"multilabel targets {targets.shape} and scores {scores.shape} differ; expected one shape")
    if not len(scores):
        raise TaskError("no case to compute metrics on; expected one or more")
    _check_values(task_kind, targets, scores)
    return targets, scores


def _check_values(task_kind: TaskKind, targets: NDArray[Any], scores: Floats) -> None:
    if not np.isfinite(scores).all() or not np.isfinite(targets).all():
        bad = int((~np.isfinite(scores)).sum() + (~np.isfinite(targets)).sum())
        raise TaskError(f"{bad} scores or targets are NaN or infinite, expected finite numbers; did training diverge?")
    if task_kind == "survival":
        _check_followup(targets)
        scores = scores[:, 1:]
    if task_kind == "regression":
        return
    if scores.min() < 0 or scores.max() > 1:
        raise TaskError(
            f"scores lie in {scores.min():g}..{scores.max():g}, expected probabilities; apply sigmoid or softmax first"
        )
    if task_kind == "survival":
        return
    classes = scores.shape[1] if task_kind == "multiclass" else 2
    if not np.isin(targets, np.arange(classes)).all():
        raise TaskError(f"{task_kind} targets are not all whole numbers in 0..{classes - 1}; expected codes of classes")
    sums = scores.sum(axis=1) if task_kind == "multiclass" else np.ones(1)
    if np.abs(sums - 1).max() > 0.01:
        raise TaskError(
            f"scores of a case sum to {sums[np.abs(sums - 1).argmax()]:g}, expected 1; apply softmax over the classes"
        )


def _check_followup(targets: NDArray[Any]) -> None:
    if targets[:, 0].min() <= 0 or not np.isin(targets[:, 1], (0, 1)).all():
        raise TaskError(
            f"survival targets begin with {targets[0, 0]:g} and {targets[0, 1]:g}; expected of every case a time above"
            " 0, then 1 for an event or 0 for censored"
        )

"""Owns ROC curves, each with a band over patients; knows no head and no cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embedkit.bootstrap import Floats, draw_weights
from embedkit.errors import TaskError
from embedkit.metrics import check_scores

__all__ = ["RocCurve", "compute_roc", "roc_points"]

_BAND_POINTS = 101


@dataclass(frozen=True, eq=False)
class RocCurve:
    """A ROC curve with a pointwise 95% bootstrap band over patients.

    Attributes:
        false_positive_rate, true_positive_rate: float64 [points], rising from (0, 0) to (1, 1).
        grid: float64 [101], the false positive rates 0, 0.01, ..., 1 of the band.
        low, high: float64 [101], 2.5th and 97.5th percentile of the true positive rate there; NaN where no resample
            has both classes.
    """

    false_positive_rate: Floats
    true_positive_rate: Floats
    grid: Floats
    low: Floats
    high: Floats


def roc_points(targets: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    """False and true positive rates of a binary task at every threshold, from (0, 0) to (1, 1); equal scores are one.

    Args:
        targets: [cases], 0 or 1.
        scores: [cases], higher for the positive class.

    Raises:
        TaskError: as `compute_metrics`, or a class is absent.
    """
    positive, values = check_scores("binary", targets, scores, np.asarray(targets), 0)
    if positive.all() or not positive.any():
        raise TaskError("a ROC curve takes cases of both classes, but all targets are equal; add cases of the other")
    false_rates, true_rates = _roc_rates(positive, values, np.ones((1, len(values))))
    return false_rates[0], true_rates[0]


def compute_roc(
    targets: ArrayLike, scores: ArrayLike, groups: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> RocCurve:
    """The ROC curve of a binary task with a band that holds 95% of the resamples' curves at each false positive rate.

    Between thresholds curves run straight, as the area under them assumes.

    Args:
        targets, scores, groups, resamples, seed: As in `compute_metrics`.

    Raises:
        TaskError: as `roc_points`.
    """
    positive, values = check_scores("binary", targets, scores, groups, resamples)
    false_rate, true_rate = roc_points(positive, values)
    grid = np.linspace(0, 1, _BAND_POINTS)
    curves = [
        np.interp(grid, false_rates, true_rates)
        for weights in draw_weights(groups, resamples=resamples, seed=seed)
        for false_rates, true_rates in zip(*_roc_rates(positive, values, weights), strict=True)
    ]
    if not curves:
        return RocCurve(false_rate, true_rate, grid, np.full_like(grid, np.nan), np.full_like(grid, np.nan))
    low, high = np.quantile(np.stack(curves), [0.025, 0.975], axis=0)
    return RocCurve(false_rate, true_rate, grid, low, high)


def _roc_rates(targets: NDArray[Any], scores: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """False and true positive rates [resamples points] of those weightings that have both classes."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(-1, np.flatnonzero(np.diff(scores[order], append=-np.inf))) + 1
    ordered = np.take(weights, order, axis=1)
    counts = [
        np.pad(np.cumsum(ordered * (targets[order] == code), axis=1), ((0, 0), (1, 0)))[:, ends] for code in (0, 1)
    ]
    whole = (counts[0][:, -1] > 0) & (counts[1][:, -1] > 0)
    false_rates, true_rates = (count[whole] / count[whole, -1:] for count in counts)
    return false_rates, true_rates

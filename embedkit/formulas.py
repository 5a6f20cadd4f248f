"""Owns the formulas of the metrics as functions of case weights, many weightings at once; knows no task and no patient.

Each function prepares what depends on the data alone (sorting, ties) and returns a `Statistic`, which maps weights
[resamples cases] to values [resamples]. Weights of 1 give the plain metric. A value is NaN where it is undefined.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from embedkit.bootstrap import Floats, Statistic

__all__ = [
    "Ties",
    "average_statistics",
    "weigh_adaptive_calibration_error",
    "weigh_auroc",
    "weigh_average_precision",
    "weigh_balanced_accuracy",
    "weigh_calibration_error",
    "weigh_f1",
    "weigh_mean",
    "weigh_r2",
    "weigh_spearman",
]

_Bools = NDArray[np.bool_]

_ECE_BINS = 15


class Ties:
    """The cases in rising order of a value, equal values as one group.

    Attributes:
        order: int64 [cases], the cases from the lowest value up.
        distinct: [groups], the values there are, rising.
        group: int64 [cases], each case's place in ``distinct``.
        starts: int64 [groups], where each group begins in ``order``.
    """

    def __init__(self, values: Floats) -> None:
        self.order = np.argsort(values, kind="stable")
        self.distinct, self.group = np.unique(values, return_inverse=True)
        self.starts = np.flatnonzero(np.diff(self.group[self.order], prepend=-1))
        self.all_differ = len(self.distinct) == len(values)

    def sums(self, ordered: Floats) -> Floats:
        """[resamples groups]: the weight in each group, from weights [resamples cases] taken in ``order``."""
        return ordered if self.all_differ else np.add.reduceat(ordered, self.starts, axis=1)

    def midranks(self, weights: Floats) -> Floats:
        """[resamples cases]: the weight below each case plus half of its group's weight."""
        sums = self.sums(np.take(weights, self.order, axis=1))
        return np.asarray((np.cumsum(sums, axis=1) - sums / 2).take(self.group, axis=1))


def weigh_mean(values: Floats) -> Statistic:
    """The mean of a value per case: accuracy, Brier score, mean absolute error."""

    def statistic(weights: Floats) -> Floats:
        return np.asarray(weights @ values / weights.sum(axis=1))

    return statistic


def average_statistics(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of several statistics; NaN where one of them is, or where there are none."""

    def statistic(weights: Floats) -> Floats:
        if not statistics:
            return np.full(len(weights), np.nan)
        return np.asarray(sum((each(weights) for each in statistics), np.zeros(len(weights))) / len(statistics))

    return statistic


def weigh_auroc(positive: _Bools, scores: Floats) -> Statistic:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Undefined where either class is absent.
    """
    ties = Ties(scores)
    mask = positive[ties.order].astype(np.float64)

    def statistic(weights: Floats) -> Floats:
        ordered = np.take(weights, ties.order, axis=1)
        everyone, positives = ties.sums(ordered), ties.sums(ordered * mask)
        negatives = everyone - positives
        below = np.cumsum(negatives, axis=1)
        wins = np.einsum("ij,ij->i", positives, below - negatives / 2)
        return _divide(wins, positives.sum(axis=1) * below[:, -1])

    return statistic


def weigh_average_precision(positive: _Bools, scores: Floats) -> Statistic:
    """Average precision: precision at each threshold, weighted by the recall gained there, without interpolation.

    Equals scikit-learn's ``average_precision_score``. Undefined where no case is positive.
    """
    ties = Ties(-scores)
    mask = positive[ties.order].astype(np.float64)

    def statistic(weights: Floats) -> Floats:
        ordered = np.take(weights, ties.order, axis=1)
        everyone, positives = ties.sums(ordered), ties.sums(ordered * mask)
        found, taken = np.cumsum(positives, axis=1), np.cumsum(everyone, axis=1)
        precision = found / np.maximum(taken, np.finfo(np.float64).tiny)  # 0 while nothing is taken
        return _divide(np.einsum("ij,ij->i", positives, precision), found[:, -1])

    return statistic


def weigh_balanced_accuracy(true: _Bools, predicted: _Bools) -> Statistic:
    """Mean recall over classes; undefined where a class is absent.

    Args:
        true: bool [cases classes].
        predicted: bool [cases classes].
    """
    members = true.astype(np.float64)
    hits = (true & predicted).astype(np.float64)

    def statistic(weights: Floats) -> Floats:
        return np.asarray(_divide(weights @ hits, weights @ members).mean(axis=1))

    return statistic


def weigh_f1(true: _Bools, predicted: _Bools) -> Statistic:
    """Mean over classes of 2TP / (2TP + FP + FN); undefined where a class is absent.

    Args:
        true: bool [cases classes].
        predicted: bool [cases classes].
    """
    members = true.astype(np.float64)
    both = members + predicted
    hits = 2.0 * (true & predicted)

    def statistic(weights: Floats) -> Floats:
        values = _divide(weights @ hits, weights @ both)
        values[weights @ members == 0] = np.nan
        return np.asarray(values.mean(axis=1))

    return statistic


def weigh_calibration_error(confidence: Floats, right: _Bools) -> Statistic:
    """Expected calibration error over 15 bins of equal width (low, high], the first with 0 (Guo et al. 2017, eq. 3).

    Args:
        confidence: [cases], 0..1.
        right: bool [cases], whether what it is the confidence of came true.
    """
    edges = np.linspace(0, 1, _ECE_BINS + 1)
    bins = np.searchsorted(edges[1:-1], confidence, side="left")
    gaps = (bins[:, None] == np.arange(_ECE_BINS)) * (right - confidence)[:, None]

    def statistic(weights: Floats) -> Floats:
        return np.asarray(np.abs(weights @ gaps).sum(axis=1) / weights.sum(axis=1))

    return statistic


def weigh_adaptive_calibration_error(confidence: Floats, right: _Bools) -> Statistic:
    """Calibration error over 15 bins of equal weight, so that none is nearly empty (Nguyen and O'Connor 2015, 3.2).

    In each resample anew; equal confidences stay together, in the bin that holds the middle of their weight.

    Args:
        confidence, right: As in `weigh_calibration_error`.
    """
    ties, gaps = Ties(confidence), right - confidence

    def statistic(weights: Floats) -> Floats:
        total = weights.sum(axis=1)
        bins = np.minimum((_ECE_BINS * ties.midranks(weights) / total[:, None]).astype(np.int64), _ECE_BINS - 1)
        places = bins + _ECE_BINS * np.arange(len(weights))[:, None]
        sums = np.bincount(places.ravel(), (weights * gaps).ravel(), minlength=_ECE_BINS * len(weights))
        return np.asarray(np.abs(sums).reshape(len(weights), _ECE_BINS).sum(axis=1) / total)

    return statistic


def weigh_r2(targets: Floats, predictions: Floats) -> Statistic:
    """Coefficient of determination; undefined where the targets are constant."""
    centred = targets - targets.mean()
    columns = np.stack([(targets - predictions) ** 2, centred**2, centred], axis=1)

    def statistic(weights: Floats) -> Floats:
        residual, square, total = (weights @ columns).T
        spread = square - total**2 / weights.sum(axis=1)
        return np.asarray(1 - _divide(residual, np.where(_is_constant(targets, weights), 0, spread)))

    return statistic


def weigh_spearman(targets: Floats, predictions: Floats) -> Statistic:
    """Spearman's rank correlation, equal values sharing their mean rank; undefined where either is constant."""
    sides = Ties(targets), Ties(predictions)

    def statistic(weights: Floats) -> Floats:
        total = weights.sum(axis=1, keepdims=True)
        first, second = (side.midranks(weights) - total / 2 for side in sides)  # midranks have mean total / 2
        weighted = first * weights
        covariance = np.einsum("ij,ij->i", weighted, second)
        spread = np.einsum("ij,ij->i", weighted, first) * np.einsum("ij,ij,ij->i", weights, second, second)
        constant = _is_constant(targets, weights) | _is_constant(predictions, weights)
        return np.asarray(np.clip(_divide(covariance, np.where(constant, 0, np.sqrt(spread))), -1, 1))

    return statistic


def _is_constant(values: Floats, weights: Floats) -> _Bools:
    """bool [resamples]: whether all cases of any weight share one value."""
    drawn = weights > 0
    highest = np.where(drawn, values, -np.inf).max(axis=1)
    lowest = np.where(drawn, values, np.inf).min(axis=1)
    return np.asarray(highest == lowest)


def _divide(above: Floats, below: Floats) -> Floats:
    """above / below, NaN where below is 0."""
    return np.asarray(np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below != 0))

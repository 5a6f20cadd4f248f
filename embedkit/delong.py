"""Owns DeLong's variance of AUROCs and what follows from it: an interval, and a paired test of two; knows no task.

DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating characteristic
curves" (Biometrics 1988), with the midranks of Sun and Xu, "Fast implementation of DeLong's algorithm" (IEEE Signal
Processing Letters 2014). Where patients have several cases, these are not independent, and sums over patients take the
place of cases: Obuchowski, "Nonparametric analysis of clustered ROC curve data" (Biometrics 1997), which with one case
per patient is DeLong's to the last digit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata

from embedkit.bootstrap import LEVEL, Floats, Interval
from embedkit.errors import TaskError

__all__ = ["Aurocs", "compare_aurocs", "delong_interval", "estimate_aurocs"]

_Z = float(norm.ppf((1 + LEVEL) / 2))
_NOTHING = 1e-12
"""A variance below this is rounding about 0."""


@dataclass(frozen=True, eq=False)
class Aurocs:
    """AUROCs of several scores of the same cases.

    Attributes:
        values: float64 [scores].
        covariance: float64 [scores scores], of the values; NaN where a class has fewer than two patients.
    """

    values: Floats
    covariance: Floats

    def average(self, sizes: Sequence[int]) -> Aurocs:
        """The means of consecutive runs of scores (of the repeats of one head, say), ``sizes`` of them each."""
        rows = np.repeat(np.arange(len(sizes)), sizes)
        weights = (rows == np.arange(len(sizes))[:, None]) / np.asarray(sizes, dtype=np.float64)[:, None]
        return Aurocs(weights @ self.values, weights @ self.covariance @ weights.T)


def estimate_aurocs(targets: ArrayLike, scores: ArrayLike, groups: Sequence[str]) -> Aurocs:
    """AUROCs of scores with their covariance over patients.

    Args:
        targets: [cases], 0 or 1.
        scores: [cases], or [scores cases]; higher for the positive class, equal ones count half.
        groups: Patient of each case.

    Raises:
        TaskError: a class is absent, or the shapes do not fit each other.
    """
    positive, values = np.asarray(targets) == 1, np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if not positive.shape == values.shape[1:] == (len(groups),):
        raise TaskError(
            f"targets {positive.shape}, scores {values.shape} and {len(groups)} groups do not fit each other; expected"
            " one target and one group for each case"
        )
    if positive.all() or not positive.any():
        raise TaskError("an AUROC takes cases of both classes, but all targets are equal; add cases of the other")
    wins = np.stack([_placements(positive, row) for row in values])
    aurocs = wins[:, positive].mean(axis=1)
    patient = np.unique(np.asarray(groups), return_inverse=True)[1]
    sides = [_patient_sums(wins - aurocs[:, None], side, patient) for side in (positive, ~positive)]
    counts = [int(positive.sum()), int((~positive).sum())]
    present = [len(np.unique(patient[side])) for side in (positive, ~positive)]
    if min(present) < 2:
        return Aurocs(aurocs, np.full((len(aurocs), len(aurocs)), np.nan))
    covariance = sum(
        side @ side.T * owners / (owners - 1) / count**2
        for side, owners, count in zip(sides, present, counts, strict=True)
    )
    patients = patient.max() + 1
    between = sides[0] @ sides[1].T * patients / (patients - 1) / (counts[0] * counts[1])
    return Aurocs(aurocs, np.asarray(covariance + between + between.T))


def delong_interval(value: float, variance: float) -> Interval:
    """The 95% interval of an AUROC, symmetric on the logit scale, so that it stays within 0..1.

    Pepe, "The statistical evaluation of medical tests for classification and prediction" (2003), section 5.2.5. Without
    limits where the AUROC is 0 or 1: no pair is out of order then, and the variance estimated from such pairs is 0,
    which says nothing.
    """
    if not 0 < value < 1 or math.isnan(variance):
        return Interval(value, math.nan, math.nan)
    centre, reach = math.log(value / (1 - value)), _Z * math.sqrt(max(0.0, variance)) / (value * (1 - value))
    low, high = (1 / (1 + math.exp(-limit)) for limit in (centre - reach, centre + reach))
    return Interval(value, low, high)


def compare_aurocs(aurocs: Aurocs, first: int, second: int) -> tuple[Interval, float]:
    """The difference of two AUROCs of the same cases.

    Returns:
        First less second with its 95% interval, and the two-sided p-value of no difference. The p-value is 1 where the
        two order every pair alike; it is NaN, with the limits, where the variance is unknown or 0 despite a difference.
    """
    difference = float(aurocs.values[first] - aurocs.values[second])
    spread = aurocs.covariance
    variance = float(spread[first, first] + spread[second, second] - 2 * spread[first, second])
    if abs(variance) < _NOTHING and abs(difference) < _NOTHING:
        return Interval(difference, difference, difference), 1.0
    if math.isnan(variance) or variance < _NOTHING:
        return Interval(difference, math.nan, math.nan), math.nan
    error = math.sqrt(variance)
    interval = Interval(difference, difference - _Z * error, difference + _Z * error)
    return interval, float(2 * norm.sf(abs(difference) / error))


def _placements(positive: NDArray[np.bool_], scores: Floats) -> Floats:
    """float64 [cases]: for a positive the share of negatives below it, for a negative that of positives above it."""
    everyone, own = rankdata(scores), np.empty(len(scores))
    for side in (positive, ~positive):
        own[side] = rankdata(scores[side])
    below = (everyone - own) / np.where(positive, (~positive).sum(), positive.sum())
    return np.asarray(np.where(positive, below, 1 - below))


def _patient_sums(values: Floats, side: NDArray[np.bool_], patient: NDArray[np.int64]) -> Floats:
    """float64 [scores patients]: the sum of ``values`` [scores cases] over each patient's cases of one class."""
    patients = int(patient.max()) + 1
    return np.stack([np.bincount(patient[side], row[side], minlength=patients) for row in values])

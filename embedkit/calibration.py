"""Owns calibration: maps that make scores agree with how often they come true, and how far off they are.

A map is fitted on scores of cases that no head of the fold was fitted on (the inner splits of a run), and judged on
others. It is plain numbers. Knows no run.

A head trained by gradient comes with a temperature of its own (its ``sharpness``, chosen with the number of epochs),
which is part of its scores. The temperature here multiplies it: the same correction, fitted once more with the
training length settled. Neither can mend a level that class weights shifted; ``platt`` can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, logit, softmax
from sklearn.isotonic import IsotonicRegression

from embedkit.bootstrap import Floats, Interval
from embedkit.errors import OptionError, TaskError
from embedkit.proportions import proportion_interval
from embedkit.targets import TaskKind

__all__ = [
    "METHODS",
    "CalibrationMethod",
    "Calibrator",
    "Reliability",
    "debiased_calibration_error",
    "fit_calibrator",
    "measure_reliability",
    "top_confidence",
]

CalibrationMethod = Literal["temperature", "platt", "isotonic"]
METHODS: tuple[CalibrationMethod, ...] = get_args(CalibrationMethod)

_CLOSEST = 1e-6
"""Probabilities are kept this far from 0 and 1 before a logarithm."""
_MOST_BINS = 10
_BIN_CASES = 8
_STEEPEST = 5.0
"""Bound of the slope's logarithm: 150 times sharper or flatter."""

_Knots = tuple[Floats, Floats]


@dataclass(frozen=True, eq=False)
class Calibrator:
    """A map from scores to scores.

    Attributes:
        kind: Of the task.
        method: ``temperature`` multiplies the logits (Guo et al. 2017); ``platt`` also shifts them, per class (Platt
            1999); ``isotonic`` is any rising step function, joined by lines (Zadrozny and Elkan 2002).
        slope: Factor on the logits, one over the temperature; 1 for isotonic.
        shifts: float64 [outputs], added to the logits; zeros but for ``platt``.
        knots: Of isotonic, per output: scores in rising order and what they become.
    """

    kind: TaskKind
    method: CalibrationMethod
    slope: float
    shifts: Floats
    knots: tuple[_Knots, ...] = ()

    def apply(self, scores: ArrayLike) -> Floats:
        """Scores [cases] or [cases classes] as `compute_metrics` takes them, mapped; multiclass rows sum to 1."""
        values = np.asarray(scores, dtype=np.float64)
        if self.knots:
            columns = values.reshape(len(values), -1).T
            mapped = np.stack([np.interp(x, *knots) for x, knots in zip(columns, self.knots, strict=True)], axis=1)
            if self.kind == "multiclass":
                mapped /= mapped.sum(axis=1, keepdims=True)
            return mapped.reshape(values.shape)
        moved = self.slope * _logits(self.kind, values) + self.shifts
        return np.asarray(softmax(moved, axis=1) if self.kind == "multiclass" else expit(moved).reshape(values.shape))


@dataclass(frozen=True, eq=False)
class Reliability:
    """How often scores come true, in bins of about equal numbers of cases.

    Attributes:
        predicted: float64 [bins], mean score in each.
        observed: Share that came true in each, with its interval.
        counts: Cases in each.
    """

    predicted: Floats
    observed: tuple[Interval, ...]
    counts: tuple[int, ...]


def fit_calibrator(
    kind: TaskKind,
    targets: ArrayLike,
    scores: ArrayLike,
    *,
    method: CalibrationMethod,
    weights: ArrayLike | None = None,
) -> Calibrator:
    """Fits a map on scores of cases that the head was not fitted on.

    The targets are drawn a little towards the middle, as Platt (1999) does: among n cases one more of each class is
    imagined. Else a few cases in perfect order would ask for certainty.

    Args:
        kind: Of the task; a regression has no probabilities.
        targets: As `Task.targets`.
        scores: As `compute_metrics` takes them.
        method: See `Calibrator`. Isotonic wants some hundreds of cases; with fewer it learns their noise.
        weights: [cases], such that a case that was held out several times counts once; None for equal ones.

    Raises:
        OptionError: unknown method, or a regression.
        TaskError: no case.
    """
    if method not in METHODS:
        raise OptionError(f"no calibration is called {method!r}; expected one of {', '.join(METHODS)}")
    if kind not in ("binary", "multiclass", "multilabel"):
        raise OptionError(f"a {kind} gives no probabilities, so there is nothing to calibrate; leave it away")
    truth, values = np.asarray(targets), np.asarray(scores, dtype=np.float64)
    if not len(values):
        raise TaskError("no held-out case to calibrate on; train with a larger inner split")
    weigh = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    if method == "isotonic":
        return _fit_isotonic(kind, truth, values, weigh)
    return _fit_logits(kind, truth, values, weigh, shifted=method == "platt")


def top_confidence(kind: TaskKind, targets: ArrayLike, scores: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    """What a calibration is judged on: confidences in 0..1 and whether each came true.

    Binary: the probability of the positive class; multiclass: of the most probable one; multilabel: of every label, one
    after the other.
    """
    truth, values = np.asarray(targets), np.asarray(scores, dtype=np.float64)
    if kind == "multiclass":
        return np.clip(values.max(axis=1), 0, 1), values.argmax(axis=1) == truth
    return values.T.ravel(), truth.T.ravel() == 1


def measure_reliability(confidence: Floats, right: NDArray[np.bool_], groups: Sequence[str]) -> Reliability:
    """The reliability curve: at most ten bins, of eight cases or more each where there are so many.

    Args:
        confidence, right: As `top_confidence` gives them.
        groups: Patient of each.
    """
    patients = np.asarray(groups)
    bins = _equal_bins(confidence)
    return Reliability(
        np.array([confidence[each].mean() for each in bins]),
        tuple(proportion_interval(right[each], patients[each].tolist()) for each in bins),
        tuple(len(each) for each in bins),
    )


def debiased_calibration_error(confidence: Floats, right: NDArray[np.bool_]) -> float:
    """Root mean squared calibration error in bins of equal size, less what chance adds; 0 where chance explains it all.

    Kumar, Liang and Ma, "Verified uncertainty calibration" (NeurIPS 2019), section 5. The usual ECE of a perfectly
    calibrated head is well above 0 with few cases; this is not.
    """
    total = 0.0
    for each in _equal_bins(confidence):
        rate = float(right[each].mean())
        noise = rate * (1 - rate) / (len(each) - 1) if len(each) > 1 else 0.0
        total += len(each) / len(confidence) * ((rate - float(confidence[each].mean())) ** 2 - noise)
    return float(np.sqrt(max(0.0, total)))


def _equal_bins(confidence: Floats) -> list[NDArray[np.int64]]:
    """The cases in order of confidence, in parts of about equal size."""
    count = max(1, min(_MOST_BINS, len(confidence) // _BIN_CASES))
    return [part for part in np.array_split(np.argsort(confidence, kind="stable"), count) if len(part)]


def _logits(kind: TaskKind, scores: Floats) -> Floats:
    """[cases outputs]: what sigmoid or softmax makes these scores of."""
    kept = np.clip(scores, _CLOSEST, 1 - _CLOSEST)
    return np.log(kept) if kind == "multiclass" else np.asarray(logit(kept)).reshape(len(scores), -1)


def _soft_targets(kind: TaskKind, truth: NDArray[Any], weights: Floats, outputs: int) -> Floats:
    """[cases outputs], drawn towards the middle by one imagined case of each class."""
    if kind == "multiclass":
        hard = (truth[:, None] == np.arange(outputs)).astype(np.float64)
        number = (weights @ hard)[truth] + outputs
        return np.asarray(hard * (1 - outputs / number)[:, None] + 1 / number[:, None])
    hard = truth.reshape(len(truth), -1).astype(np.float64)
    positives, negatives = weights @ hard, weights @ (1 - hard)
    return np.asarray(hard * (positives + 1) / (positives + 2) + (1 - hard) / (negatives + 2))


def _fit_logits(kind: TaskKind, truth: NDArray[Any], scores: Floats, weights: Floats, *, shifted: bool) -> Calibrator:
    given = _logits(kind, scores)
    outputs = given.shape[1]
    wanted = _soft_targets(kind, truth, weights, outputs)
    share = weights / weights.sum()

    def loss(parameters: Floats) -> float:
        moved = np.exp(parameters[0]) * given + (parameters[1:] if shifted else 0.0)
        if kind == "multiclass":
            return float(share @ -(wanted * log_softmax(moved, axis=1)).sum(axis=1))
        return float(share @ (np.logaddexp(0, moved) - wanted * moved).sum(axis=1))

    start = np.zeros(1 + outputs * shifted)
    bounds = [(-_STEEPEST, _STEEPEST)] + [(-30.0, 30.0)] * (outputs * shifted)
    found = minimize(loss, start, method="L-BFGS-B", bounds=bounds).x
    shifts = found[1:] if shifted else np.zeros(outputs)
    return Calibrator(kind, "platt" if shifted else "temperature", float(np.exp(found[0])), np.asarray(shifts))


def _fit_isotonic(kind: TaskKind, truth: NDArray[Any], scores: Floats, weights: Floats) -> Calibrator:
    columns = scores.reshape(len(scores), -1)
    wanted = _soft_targets(kind, truth, weights, columns.shape[1])
    knots = []
    for output in range(columns.shape[1]):
        fit = IsotonicRegression(y_min=0.0, y_max=1.0).fit(columns[:, output], wanted[:, output], sample_weight=weights)
        knots.append((np.asarray(fit.X_thresholds_, np.float64), np.asarray(fit.y_thresholds_, np.float64)))
    return Calibrator(kind, "isotonic", 1.0, np.zeros(columns.shape[1]), tuple(knots))

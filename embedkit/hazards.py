"""Owns the proportional-hazards model in closed form: its penalised fit by Newton's method and its baseline hazard.

Cox, "Regression models and life-tables" (JRSS B 34:187, 1972): the hazard of a case is exp(eta) times a baseline that
all share, and the partial likelihood asks at each event which of the cases still at risk had it. Ties as Efron (JASA
72:557, 1977): of d events at one time the r-th (from 0) sees the tied cases at 1 - r/d. Knows no head and no token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

__all__ = ["estimate_log_baseline", "fit_hazards", "partial_likelihood"]

Floats = NDArray[np.float64]

_STEPS = 100
_HALVINGS = 40
_TOLERANCE = 1e-10


def fit_hazards(features: Floats, targets: Floats, *, strength: float) -> Floats:
    """Weights [features] of the log hazard that maximise the partial likelihood less half their square / ``strength``.

    Convex; Newton's method, the step halved until the objective falls.

    Args:
        features: [cases features].
        targets: [cases 2], time and event (1 or 0).
        strength: Inverse penalty, as scikit-learn's ``C``; lifelines' ``penalizer`` is 1 / (cases * strength) on
            standardised features, scikit-survival's ``alpha`` is 1 / strength.
    """
    log_shares, penalty = _log_risk_shares(targets), 1 / strength
    happened = targets[:, 1] == 1
    weights = np.zeros(features.shape[1])
    loss = _negative(log_shares, features @ weights, happened)
    for _ in range(_STEPS):
        chances = softmax(log_shares + features @ weights, axis=1)  # at each event, of each case to be who has it
        expected = chances.sum(axis=0)
        gradient = features.T @ (expected - happened) + penalty * weights
        means = chances @ features
        curvature = (features.T * expected) @ features - means.T @ means
        curvature[np.diag_indices_from(curvature)] += penalty
        step = np.linalg.solve(curvature, gradient)
        decrement = float(gradient @ step)
        if decrement < _TOLERANCE:
            break
        for halving in range(_HALVINGS):
            moved = weights - step * 0.5**halving
            new = _negative(log_shares, features @ moved, happened) + penalty / 2 * float(moved @ moved)
            if new < loss:
                break
        else:
            break  # as low as the arithmetic can tell
        weights, loss = moved, new
    return weights


def partial_likelihood(eta: Floats, targets: Floats) -> float:
    """The log partial likelihood of log hazards [cases], summed over events; 0 without an event."""
    return -_negative(_log_risk_shares(targets), eta, targets[:, 1] == 1)


def estimate_log_baseline(eta: Floats, targets: Floats, times: Floats) -> Floats:
    """Log of the cumulative baseline hazard at some times, [times]: -inf before the first event.

    The sum over the events so far of one over the hazard of those at risk (Breslow 1972).

    Args:
        eta: [cases], log hazards.
        targets: [cases 2], time and event (1 or 0).
        times: [times].
    """
    followed, happened = targets[:, 0], targets[:, 1] == 1
    order = np.argsort(-followed, kind="stable")
    at_risk = np.logaddexp.accumulate(eta[order])
    last = np.searchsorted(-followed[order], -followed[happened], side="right") - 1
    with np.errstate(divide="ignore"):
        log_past = np.log(followed[happened] <= times[:, None])
    return np.asarray(logsumexp(log_past - at_risk[last], axis=1))


def _log_risk_shares(targets: Floats) -> Floats:
    """[events cases], the log of: 1 for who is at risk at an event, 1 - r/d for the d that have it then, else 0."""
    followed, happened = targets[:, 0], targets[:, 1] == 1
    times = followed[happened]
    tied = times[:, None] == times
    before = np.tril(tied, -1).sum(axis=1) / tied.sum(axis=1)
    at_risk = (followed >= times[:, None]).astype(np.float64)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(at_risk - before[:, None] * ((followed == times[:, None]) & happened)))


def _negative(log_shares: Floats, eta: Floats, happened: NDArray[np.bool_]) -> float:
    """Minus the log partial likelihood."""
    return float(logsumexp(log_shares + eta, axis=1).sum() - eta[happened].sum())

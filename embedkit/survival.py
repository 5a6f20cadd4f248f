"""Owns the formulas of time to event as functions of case weights: concordance, Brier scores, Kaplan-Meier, log-rank.

Of each case it is known how long it was followed and whether that ended with the event or was censored. As in
`embedkit.formulas`, a function prepares what depends on the data alone and returns a `Statistic`. Knows no task, no
patient and no head.

What was censored is made up for by inverse probability of censoring weights (IPCW): each event counts as one over G,
the Kaplan-Meier estimate of being still uncensored at its time, from the cases themselves under the same weights. At
equal times events come before censoring. An event at which G is 0 weighs nothing: nobody is left to stand for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import chdtrc, ndtri

from embedkit.bootstrap import Floats, Statistic
from embedkit.formulas import Ties

__all__ = [
    "KaplanMeier",
    "compute_log_rank",
    "estimate_survival",
    "weigh_brier",
    "weigh_concordance",
    "weigh_integrated_brier",
    "weigh_ipcw_concordance",
]

_Bools = NDArray[np.bool_]
_Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class KaplanMeier:
    """Share of cases without the event over time, with a pointwise 95% band; steps down at each time.

    Attributes:
        times: float64 [times], 0 and then every distinct time of the cases, rising.
        survival, low, high: float64 [times], from each time until before the next.
        at_risk: float64 [times], cases followed up to this time or longer.
    """

    times: Floats
    survival: Floats
    low: Floats
    high: Floats
    at_risk: Floats


def estimate_survival(times: Floats, events: _Bools) -> KaplanMeier:
    """The Kaplan-Meier estimate (1958) with Greenwood's variance on the scale of log(-log S), which keeps to 0..1.

    The band follows Kalbfleisch and Prentice, "The statistical analysis of failure time data" (1980); it has no width
    while nobody has had the event, and none is left (NaN) once nobody is.

    Args:
        times: [cases], above 0.
        events: bool [cases], False where censored.
    """
    ties = Ties(times)
    died, at_risk = (counts[0] for counts in _count(ties, events, np.ones((1, len(times)))))
    survival = np.cumprod(1 - died / at_risk)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.cumsum(died / (at_risk * (at_risk - died)))
        spread = ndtri(0.975) * np.sqrt(variance) / np.log(survival)
        low, high = (np.where(survival == 1, 1.0, survival ** np.exp(sign * spread)) for sign in (-1, 1))
    start = np.ones(1)
    return KaplanMeier(
        np.append(0.0, ties.distinct),
        np.append(start, survival),
        np.append(start, low),
        np.append(start, high),
        np.append(float(len(times)), at_risk),
    )


def compute_log_rank(times: Floats, events: _Bools, groups: ArrayLike) -> tuple[float, float]:
    """The log-rank test that all groups have one survival curve (Mantel 1966; Peto and Peto 1972).

    Args:
        times: [cases].
        events: bool [cases].
        groups: [cases], any values.

    Returns:
        Chi-squared with one degree of freedom less than there are groups, and its p-value; NaN both where there is no
        event, or one group.
    """
    ties = Ties(times)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    weights = (member == np.arange(len(names))[:, None]).astype(np.float64)
    died, at_risk = _count(ties, events, weights)
    everyone, deaths = at_risk.sum(axis=0), died.sum(axis=0)
    share = at_risk / everyone
    excess = (died - share * deaths).sum(axis=1)[1:]
    spread = deaths * (everyone - deaths) / np.maximum(everyone - 1, 1)
    covariance = (np.diag((share * spread).sum(axis=1)) - (share * spread) @ share.T)[1:, 1:]
    if len(names) < 2 or not covariance.any():
        return float("nan"), float("nan")
    statistic = float(excess @ np.linalg.pinv(covariance) @ excess)
    return statistic, float(chdtrc(len(names) - 1, statistic))


def weigh_concordance(times: Floats, events: _Bools, risks: Floats) -> Statistic:
    """Harrell's C (Harrell et al. 1996): of two cases, the chance that the one with the earlier event has more risk.

    Pairs count whose earlier time is an event; of equal times those of one event and one censored. Equal risks count
    half. Undefined without such a pair.

    Args:
        times: [cases].
        events: bool [cases].
        risks: [cases], higher for an earlier event.
    """
    pairs = _Pairs(times, events, risks)
    return lambda weights: pairs.share(weights * events, weights)


def weigh_ipcw_concordance(times: Floats, events: _Bools, risks: Floats, *, until: float) -> Statistic:
    """Uno's C (Uno et al. 2011, Statistics in Medicine 30:1105): Harrell's with each pair times 1 / G^2 of its event.

    It does not drift with the amount of censoring, as Harrell's does. Events at ``until`` and later start no pair.
    """
    pairs, ties = _Pairs(times, events, risks), Ties(times)
    counted = events & (times < until)

    def statistic(weights: Floats) -> Floats:
        inverse = _invert(_uncensored(ties, events, weights)).take(ties.group, axis=1)
        return pairs.share(weights * counted * inverse**2, weights)

    return statistic


def weigh_brier(times: Floats, events: _Bools, survival: Floats, at: float) -> Statistic:
    """Mean squared error of the predicted survival at one time under IPCW (Graf et al. 1999).

    Args:
        times: [cases].
        events: bool [cases].
        survival: [cases], predicted chance to be without the event at ``at``.
        at: The time.
    """
    scores = _brier_over_time(times, events, survival[:, None], np.array([at]))
    return lambda weights: scores(weights)[:, 0]


def weigh_integrated_brier(times: Floats, events: _Bools, survival: Floats, at: Floats) -> Statistic:
    """The mean of `weigh_brier` over time from the first to the last of ``at``, by the trapezoid rule.

    Args:
        times: [cases].
        events: bool [cases].
        survival: [cases times], predicted.
        at: [times], rising; of a single one the Brier score there.
    """
    scores = _brier_over_time(times, events, survival, at)
    if len(at) == 1:
        return lambda weights: scores(weights)[:, 0]
    return lambda weights: np.asarray(np.trapezoid(scores(weights), at, axis=1) / (at[-1] - at[0]))


def _brier_over_time(times: Floats, events: _Bools, survival: Floats, at: Floats) -> Callable[[Floats], Floats]:
    """Brier scores [resamples times] of survival [cases times] as a function of weights [resamples cases]."""
    ties = Ties(times)
    gone = survival**2 * ((times[:, None] <= at) & events[:, None])
    there = (1 - survival) ** 2 * (times[:, None] > at)
    last = np.searchsorted(ties.distinct, at, side="right")

    def scores(weights: Floats) -> Floats:
        inverse = np.pad(_invert(_uncensored(ties, events, weights)), ((0, 0), (1, 0)), constant_values=1.0)
        gone_errors = (weights * inverse[:, 1:].take(ties.group, axis=1)) @ gone
        return np.asarray((gone_errors + weights @ there * inverse[:, last]) / weights.sum(axis=1, keepdims=True))

    return scores


def _count(ties: Ties, events: _Bools, weights: Floats) -> tuple[Floats, Floats]:
    """Weight of the events at each distinct time and of the cases at risk there, each [resamples times]."""
    ordered = np.take(weights, ties.order, axis=1)
    at_risk = np.cumsum(ties.sums(ordered)[:, ::-1], axis=1)[:, ::-1]
    return ties.sums(ordered * events[ties.order]), at_risk


def _uncensored(ties: Ties, events: _Bools, weights: Floats) -> Floats:
    """G: the chance to be uncensored after each distinct time, [resamples times]."""
    censored, _ = _count(ties, ~events, weights)
    died, at_risk = _count(ties, events, weights)
    left = at_risk - died  # who has the event is no longer there to be censored
    return np.cumprod(1 - np.divide(censored, left, out=np.zeros_like(left), where=left > 0), axis=1)


def _invert(values: Floats) -> Floats:
    """1 / values, 0 where those are 0."""
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > 0)


@dataclass(frozen=True, eq=False)
class _Level:
    """The pairs whose ranks first differ in one bit: cases sorted by risk within groups of equal higher bits.

    Attributes:
        order: [cases].
        later: bool [cases], in that order: the bit is 1.
        first: Cases with an event whose bit is 0; for each of them in ``later`` as sums up to a place:
        begin, low, high: where its group begins, and the run of risks equal to its own.
    """

    order: _Ints
    later: _Bools
    first: _Ints
    begin: _Ints
    low: _Ints
    high: _Ints


class _Pairs:
    """Sums over all pairs of an event and a later case, in cases x log(times) steps instead of cases x cases.

    Ranks are given by time, events before censored at equal times, so that case j is later than event i exactly where
    its rank is higher; then the binary forms of both agree up to one bit that is 0 for i and 1 for j.
    """

    def __init__(self, times: Floats, events: _Bools, risks: Floats) -> None:
        moment = np.unique(times, return_inverse=True)[1] * 2 + ~events
        self.ties = Ties(moment.astype(np.float64))
        rank, level = self.ties.group, np.unique(risks, return_inverse=True)[1]
        bits = int(rank.max(initial=0)).bit_length()
        self.levels = [_sort_level(rank, level, events, bit) for bit in range(bits)]

    def share(self, first: Floats, second: Floats) -> Floats:
        """Weight of the pairs in the right order over that of all: [resamples], each pair weighs first_i * second_j."""
        total = np.zeros(len(first))
        for level in self.levels:
            sums = np.pad(np.cumsum(second[:, level.order] * level.later, axis=1), ((0, 0), (1, 0)))
            lower = (sums[:, level.low] + sums[:, level.high]) / 2 - sums[:, level.begin]
            total += np.einsum("ij,ij->i", first[:, level.first], lower)
        sums = self.ties.sums(np.take(second, self.ties.order, axis=1))
        later = (sums.sum(axis=1, keepdims=True) - np.cumsum(sums, axis=1)).take(self.ties.group, axis=1)
        pairs = np.einsum("ij,ij->i", first, later)
        return np.asarray(np.divide(total, pairs, out=np.full(len(first), np.nan), where=pairs > 0))


def _sort_level(rank: _Ints, risk: _Ints, events: _Bools, bit: int) -> _Level:
    group, later = rank >> (bit + 1), (rank >> bit & 1).astype(bool)
    order = np.lexsort((risk, group))
    sorted_group, sorted_risk = group[order], risk[order]
    new_group = np.diff(sorted_group, prepend=-1) != 0
    new_run = new_group | (np.diff(sorted_risk, prepend=-1) != 0)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    begins, runs = np.flatnonzero(new_group), np.append(np.flatnonzero(new_run), len(order))
    first = np.flatnonzero(events & ~later)
    run = np.searchsorted(runs, place[first], side="right") - 1
    begin = begins[np.searchsorted(begins, place[first], side="right") - 1]
    return _Level(order, later[order], first, begin, runs[run], runs[run + 1])

"""Owns the bootstrap over patients: resampled weights, and intervals of any statistic of weighted cases.

A resample draws as many patients as there are, with replacement; it is held as how often each case was drawn. Knows no
metric and no task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LEVEL",
    "Floats",
    "Interval",
    "Statistic",
    "bootstrap_values",
    "draw_weights",
    "form_interval",
    "two_sided_p",
]

Floats = NDArray[np.float64]

Statistic = Callable[[Floats], Floats]
"""Maps weights [resamples cases] to values [resamples], NaN where the statistic is undefined."""

_BLOCK_ELEMENTS = 1 << 14
"""Weights held at a time: 128 KiB, which stay in the processor's cache; eight times as many take four times as long."""

LEVEL = 0.95
"""Of every interval."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval: percentile bootstrap over patients (Efron and Tibshirani 1993, chapter 13).

    Where it comes from somewhere else (DeLong, Wilson), what returns it says so.

    Attributes:
        value: On the data as they are; NaN where it is undefined (a class is absent).
        low, high: The 2.5th and 97.5th percentile over the resamples in which it is defined; NaN without any, or with
            fewer than two patients.
        undefined: Number of resamples left out because it is undefined in them.
    """

    value: float
    low: float
    high: float
    undefined: int = 0


def bootstrap_values(
    statistics: Mapping[str, Statistic], groups: Sequence[str], *, resamples: int, seed: int
) -> dict[str, Floats]:
    """The value of each statistic in each resample; all see the same resamples.

    Args:
        statistics: By name.
        groups: Patient of each case.
        resamples: Their number; 0 gives empty arrays.
        seed: Same seed, groups and number: same resamples.

    Returns:
        float64 [resamples] by name.
    """
    blocks: dict[str, list[Floats]] = {name: [] for name in statistics}
    for weights in draw_weights(groups, resamples=resamples, seed=seed):
        for name, statistic in statistics.items():
            blocks[name].append(statistic(weights))
    return {name: np.concatenate(values) if values else np.empty(0) for name, values in blocks.items()}


def draw_weights(groups: Sequence[str], *, resamples: int, seed: int) -> Iterator[Floats]:
    """Blocks of float64 [resamples-of-the-block cases]: how often each resample drew each case's patient."""
    names, patient = np.unique(np.asarray(groups), return_inverse=True)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_ELEMENTS // max(1, len(patient)))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(len(names), size=(rows, len(names))) + len(names) * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * len(names)).reshape(rows, len(names))
        yield np.take(counts.astype(np.float64), patient, axis=1)


def form_interval(value: float, resampled: Floats, groups: Sequence[str]) -> Interval:
    """The percentile interval of the resampled values in which the statistic is defined."""
    defined = resampled[~np.isnan(resampled)]
    undefined = len(resampled) - len(defined)
    if not len(defined) or len(set(groups)) < 2 or np.isnan(value):
        return Interval(value, float("nan"), float("nan"), undefined)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), undefined)


def two_sided_p(resampled: Floats) -> float:
    """The p-value of a difference being 0, from its resampled values: the level at which the interval just holds 0.

    Twice the smaller share of resamples on either side of 0, one that is 0 counted on both; one resample is added to
    each side, so that it is never 0 (Davison and Hinkley, "Bootstrap methods and their application" 1997, section 4.4).
    NaN where the difference is defined in no resample.
    """
    defined = resampled[~np.isnan(resampled)]
    if not len(defined):
        return float("nan")
    tail = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    return min(1.0, 2 * (1 + tail) / (1 + len(defined)))

"""Owns the interval of a proportion (sensitivity, precision, a rate in a bin) where cases belong to patients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from embedkit.bootstrap import LEVEL, Interval

__all__ = ["proportion_interval"]

_Z = float(norm.ppf((1 + LEVEL) / 2))


def proportion_interval(hits: NDArray[Any], groups: Sequence[str]) -> Interval:
    """The share of cases that are hits, with the 95% score interval of Wilson (1927) at the effective number of cases.

    Cases of one patient are not independent: the number of cases is divided by how much they inflate the variance (Rao
    and Scott, "A simple method for the analysis of clustered binary data", Biometrics 1992), never by less than 1.
    Where all cases are hits, or none, that cannot be told, and each patient counts once. With one case per patient this
    is Wilson's interval, which, unlike a bootstrap, has a width at 0 and 1 too.

    Args:
        hits: bool [cases].
        groups: Patient of each case.

    Returns:
        NaN throughout without a case.
    """
    count = len(hits)
    if not count:
        return Interval(math.nan, math.nan, math.nan)
    names, patient = np.unique(np.asarray(groups), return_inverse=True)
    share = float(np.mean(hits))
    number = count / _inflation(np.asarray(hits, dtype=np.float64), patient, len(names), share)
    centre = (share + _Z**2 / (2 * number)) / (1 + _Z**2 / number)
    reach = _Z / (1 + _Z**2 / number) * math.sqrt(share * (1 - share) / number + _Z**2 / (4 * number**2))
    return Interval(share, max(0.0, centre - reach), min(1.0, centre + reach))


def _inflation(hits: NDArray[np.float64], patient: NDArray[np.int64], patients: int, share: float) -> float:
    """How many times the variance of independent cases the share has; 1 or more."""
    if share in (0.0, 1.0) or patients < 2:
        return len(hits) / patients
    excess = np.bincount(patient, hits - share, minlength=patients)
    variance = float(excess @ excess) / len(hits) ** 2
    return max(1.0, variance / (share * (1 - share) / len(hits)))

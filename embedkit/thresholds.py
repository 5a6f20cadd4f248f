"""Owns operating points: the threshold that reaches a wanted sensitivity or specificity, and what it then achieves.

A threshold is chosen on the scores of inner splits, which no test case is among, fold by fold; what it achieves is
told of the test cases. The two differ, and that is the point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from embedkit.bootstrap import Floats, Interval
from embedkit.errors import OptionError, TaskError
from embedkit.proportions import proportion_interval

__all__ = ["Goal", "OperatingPoint", "choose_threshold", "measure_threshold"]

_Side = Literal["sensitivity", "specificity"]
_SIDES: tuple[_Side, ...] = get_args(_Side)


@dataclass(frozen=True)
class Goal:
    """What a threshold shall reach: ``sensitivity`` or ``specificity`` of at least ``level``."""

    side: _Side
    level: float

    def __str__(self) -> str:
        return f"{self.side}={self.level:g}"

    @classmethod
    def parse(cls, text: str) -> Goal:
        """Reads ``sensitivity=0.95`` or ``specificity=0.9``.

        Raises:
            OptionError: another name, or a level that is not above 0 and at most 1.
        """
        side, _, level = text.partition("=")
        try:
            value = float(level)
        except ValueError:
            value = math.nan
        for known in _SIDES:
            if side.strip() == known and 0 < value <= 1:
                return cls(known, value)
        raise OptionError(
            f"operating point {text!r} means nothing; expected sensitivity=LEVEL or specificity=LEVEL with a level"
            " above 0 and at most 1, for example sensitivity=0.95"
        )


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold achieves on test cases, with 95% intervals that allow for several cases of a patient.

    Attributes:
        goal: That it was chosen for.
        thresholds: One per fold; of new cases, their mean alone.
        sensitivity, specificity, ppv, npv: Each NaN where no case is of the kind that it is a share of.
        called: Share of all cases at or above their threshold.
    """

    goal: Goal
    thresholds: tuple[float, ...]
    sensitivity: Interval
    specificity: Interval
    ppv: Interval
    npv: Interval
    called: Interval


def choose_threshold(positive: NDArray[np.bool_], scores: Floats, goal: Goal) -> float:
    """The threshold that gives most of the other side among those that reach the goal; a case at it is called positive.

    Halfway between the scores that it parts, so that it does not lean on one case.

    Args:
        positive: bool [cases].
        scores: [cases], higher for positives.
        goal: To reach on these cases.

    Raises:
        TaskError: there is no case of the class that the goal is about.
    """
    wanted = positive if goal.side == "sensitivity" else ~positive
    if not wanted.any():
        what = "positive" if goal.side == "sensitivity" else "negative"
        raise TaskError(f"no {what} case among the inner held-out ones, so no threshold reaches {goal}; use more cases")
    needed = math.ceil(goal.level * wanted.sum() - 1e-9)
    distinct = np.unique(scores)
    if goal.side == "sensitivity":
        last = np.sort(scores[wanted])[::-1][needed - 1]  # the lowest score that is still called positive
        place = int(np.searchsorted(distinct, last))
        below = distinct[place - 1] if place else distinct[place] - 1e-9
        return float((below + distinct[place]) / 2)
    last = np.sort(scores[wanted])[needed - 1]  # the highest score that is still called negative
    place = int(np.searchsorted(distinct, last))
    above = distinct[place + 1] if place + 1 < len(distinct) else distinct[place] + 1e-9
    return float((distinct[place] + above) / 2)


def measure_threshold(
    goal: Goal,
    thresholds: Sequence[float],
    positive: NDArray[np.bool_],
    called: NDArray[np.bool_],
    groups: Sequence[str],
) -> OperatingPoint:
    """What calling these cases positive achieves.

    Args:
        goal, thresholds: That led to it.
        positive: bool [cases].
        called: bool [cases], at or above the threshold of the case's fold.
        groups: Patient of each case.
    """

    patients = np.asarray(groups)

    def share(right: NDArray[np.bool_], among: NDArray[np.bool_]) -> Interval:
        return proportion_interval(right[among], patients[among].tolist())

    return OperatingPoint(
        goal,
        tuple(thresholds),
        sensitivity=share(called, positive),
        specificity=share(~called, ~positive),
        ppv=share(positive, called),
        npv=share(~positive, ~called),
        called=proportion_interval(called, groups),
    )

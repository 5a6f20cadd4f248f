"""Owns the sanity check of heatmaps: what is left of a map when all that the head learned is undone; draws no picture.

Adebayo et al., "Sanity checks for saliency maps" (arXiv 1810.03292): a map that stays as it is, or turns over as a
whole, when the fitted numbers of a head are shuffled tells of images and method, and not of what was learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from embedkit.attribution import Method, randomise_member
from embedkit.cache import Cache
from embedkit.runs import Evidence, Run
from embedkit.targets import count_noun

__all__ = ["SHUFFLES", "Sanity", "check_sanity", "shuffle_run"]

SHUFFLES = 5
"""Shuffled heads that a map is compared with unless said otherwise."""
_MOST_ALIKE = 0.5  # a choice of this project: the paper draws no line
_FEWEST = 24  # scores: by chance the mean magnitude is about .8 / sqrt(scores - 1), .16 of so many

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Sanity:
    """What became of one map.

    Attributes:
        correlations: Spearman's rank correlation of the map with that of each shuffled head; 0 where either is flat.
        obstacle: Why they tell nothing, in words; empty where they do.
    """

    correlations: tuple[float, ...]
    obstacle: str = ""

    @property
    def alike(self) -> float:
        """The mean magnitude of the correlations: of maps of n scores that have nothing in common some .8 / sqrt(n)."""
        return float(np.mean(np.abs(self.correlations)))

    @property
    def passed(self) -> bool | None:
        """Whether less than half of the order of the patches is left; None where that cannot be told."""
        return None if self.obstacle else self.alike < _MOST_ALIKE

    def __str__(self) -> str:
        if self.obstacle:
            return f"cannot be told: {self.obstacle}"
        verdict = (
            "passed: the map depends on what the head learned"
            if self.passed
            else "FAILED: much of the map is the same without what the head learned, so it is no reason for the answer;"
            " choose another method or head"
        )
        each = ", ".join(f"{value:.2f}" for value in self.correlations)
        return f"{verdict} (rank correlation with the maps of shuffled heads {each}; mean magnitude {self.alike:.2f})"


def check_sanity(
    run: Run,
    cache: Cache,
    case_id: str,
    evidence: Evidence,
    *,
    method: Method = "contribution",
    held_out: bool = False,
    shuffles: int = SHUFFLES,
) -> Sanity:
    """Compares a map with those of the same run with the numbers of every fitted tensor in another order.

    Args:
        run, cache, case_id, method, held_out: As for the map, see `embedkit.runs.Run.find_evidence`.
        evidence: The map.
        shuffles: How many shuffled runs, one or more.

    Raises:
        HeadError, RunError, RecipeError, OptionError: as `Run.find_evidence`.
    """
    how: dict[str, Any] = {"method": method, "class_name": evidence.class_name, "held_out": held_out}
    real = {view: ~cache.slices(stack).blank for view, stack in cache.find_stacks(case_id, evidence.scores).items()}
    own = _line_up(evidence.scores, real)
    found = [
        _line_up(shuffle_run(run, seed=seed).find_evidence(cache, case_id, **how).scores, real)
        for seed in range(shuffles)
    ]
    return Sanity(tuple(_correlate(own, other) for other in found), _find_obstacle(own))


def _find_obstacle(scores: FloatArray) -> str:
    if len(scores) < _FEWEST:
        return f"a map of {count_noun(len(scores), 'score')} can be like another by chance, expected {_FEWEST} or more"
    return "the map is the same everywhere" if np.ptp(scores) == 0 else ""


def shuffle_run(run: Run, *, seed: int) -> Run:
    """The run with what each of its members learned undone, see `embedkit.attribution.randomise_member`."""
    return dataclasses.replace(run, members=tuple(randomise_member(member, seed=seed) for member in run.members))


def _line_up(scores: Mapping[str, FloatArray], real: Mapping[str, NDArray[np.bool_]]) -> FloatArray:
    """The scores of all patches of the slices that are not blank, view after view."""
    return np.concatenate([scores[view][rows].ravel() for view, rows in real.items()])


def _correlate(first: FloatArray, second: FloatArray) -> float:
    if len(first) == 0 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(spearmanr(first, second).statistic)

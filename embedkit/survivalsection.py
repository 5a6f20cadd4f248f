"""Owns what the report of an evaluation says of survival alone: curves by predicted risk and the Brier score over time.

Judges by the formulas of `embedkit.survival`; knows no head and no cache.
"""

from __future__ import annotations

import numpy as np

from embedkit.bootstrap import Floats, bootstrap_values, form_interval
from embedkit.charts import BrierLine, plot_brier, plot_survival
from embedkit.outcomes import Outcomes
from embedkit.report import Cell, Figure, Section, Table
from embedkit.survival import KaplanMeier, compute_log_rank, estimate_survival, weigh_brier

__all__ = ["survival_section"]

_THIRDS = ("low risk", "middle risk", "high risk")
_RESAMPLES = 1000


def survival_section(outcomes: Outcomes, target: str, *, seed: int) -> Section:
    """Kaplan-Meier curves of thirds of the cases by predicted risk, and the Brier score at each stated time.

    Of repeated folds the first is shown. The thirds are of the cases judged, so they are no thresholds to use; the
    log-rank test takes every case for a patient of its own. Beside the Brier score stands that of the Kaplan-Meier
    curve of the same cases, which says the same of everyone.

    Args:
        outcomes: Of a survival task.
        target: Name of the column of times.
        seed: Of the intervals.
    """
    followed, happened = outcomes.targets[:, 0], outcomes.targets[:, 1] == 1
    scores = outcomes.scores[0]
    third = _deal_thirds(scores[:, 0])
    curves = {
        f"{name} ({int((third == place).sum())} cases)": estimate_survival(
            followed[third == place], happened[third == place]
        )
        for place, name in enumerate(_THIRDS)
        if (third == place).any()
    }
    chi, p = compute_log_rank(followed, happened, third)
    tested = "" if np.isnan(p) else f" Log-rank: chi-squared {chi:.2f}, p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}."
    lines = _judge_over_time(outcomes, estimate_survival(followed, happened), seed=seed)
    figures = [Figure(plot_survival(curves, name=target), f"Bands: 95%, pointwise.{tested}", "Kaplan-Meier curves")]
    if len(lines[0].times) > 1:
        caption = "Band: 95%, by bootstrap over patients. 0.25 is a coin."
        figures.append(Figure(plot_brier(lines, name=target), caption, "Brier score over time"))
    own, plain = lines
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (f"{time:g}", own.intervals[place], float(plain.values[place])) for place, time in enumerate(own.times)
    )
    return Section(
        "Survival by predicted risk",
        "Thirds of these cases by the risk that was predicted for them; the test counts cases, not patients. The Brier"
        " score at each stated time is weighted for censoring; the Kaplan-Meier curve of all is the same for everyone.",
        tuple(figures),
        Table((f"Time ({target})", "Brier ↓", "Brier of the Kaplan-Meier curve ↓"), rows),
    )


def _deal_thirds(risks: Floats) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """int64 [cases], 0 to 2 by rising risk; equal risks stay together."""
    low, high = np.quantile(risks, [1 / 3, 2 / 3])
    return np.asarray((risks > low).astype(np.int64) + (risks > high))


def _judge_over_time(outcomes: Outcomes, everyone: KaplanMeier, *, seed: int) -> tuple[BrierLine, BrierLine]:
    """Brier scores at the stated times within follow-up: as predicted, and of the curve of everyone."""
    followed, happened = outcomes.targets[:, 0], outcomes.targets[:, 1] == 1
    stated = np.asarray(outcomes.times)
    places = np.flatnonzero(stated < followed.max())
    own = {
        str(place): weigh_brier(followed, happened, outcomes.scores[0][:, 1 + place], stated[place]) for place in places
    }
    drawn = bootstrap_values(own, outcomes.patient_ids, resamples=_RESAMPLES, seed=seed)
    once = np.ones((1, len(followed)))
    intervals = tuple(form_interval(float(own[name](once)[0]), drawn[name], outcomes.patient_ids) for name in own)
    shares = everyone.survival[np.searchsorted(everyone.times, stated, side="right") - 1]
    plain = [
        weigh_brier(followed, happened, np.full(len(followed), shares[place]), stated[place])(once)[0]
        for place in places
    ]
    return (
        BrierLine("predicted", stated[places], np.array([each.value for each in intervals]), intervals),
        BrierLine("Kaplan-Meier of all", stated[places], np.array(plain)),
    )

"""Owns the report of a comparison: what stands in it; compares nothing itself."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from embedkit.canvas import describe_interval
from embedkit.comparison import Comparison
from embedkit.evaluationpage import roc_line
from embedkit.headplans import BASELINES
from embedkit.metrics import HIGHER_IS_BETTER
from embedkit.outcomes import read_outcomes
from embedkit.plots import Score, plot_roc, plot_scores
from embedkit.report import Cell, Figure, Report, Section, Table, metric_title, score_table, write_report

__all__ = ["write_comparison"]

_LEVEL = 0.05


def write_comparison(path: str | os.PathLike[str], comparison: Comparison, *, seed: int = 0) -> Path:
    """Writes the report of a comparison as one HTML file.

    Args:
        path: Of the file.
        comparison: What is told.
        seed: Of the curves' bands.

    Returns:
        The path.

    Raises:
        RunError: the file cannot be written.
    """
    record = comparison.runs[0].record
    baselines = [name for name, run in zip(comparison.names, comparison.runs, strict=True) if run.head in BASELINES]
    order = _ranked(comparison)
    title = metric_title(comparison.metric)
    best = f"{order[0]}, {describe_interval(comparison.scores[order[0]])}"
    page = Report(
        title=f"{record.target}: {len(comparison.names)} runs compared",
        lead=f"{'Highest' if HIGHER_IS_BETTER[comparison.metric] else 'Lowest'} {title.rstrip(' ↓')}: {best}.",
        sections=(
            _score_section(comparison, order, baselines),
            _contrast_section(comparison),
            *_curve_section(comparison, order, baselines, seed),
        ),
        facts=(
            ("target", record.target),
            ("cases", f"{comparison.cases:,} of {comparison.patients:,} patients"),
            ("metric", title),
        ),
        footer="P-values ask whether the heads as they were trained differ on patients like these.",
    )
    return write_report(path, page)


def _ranked(comparison: Comparison) -> list[str]:
    sign = -1 if HIGHER_IS_BETTER[comparison.metric] else 1
    return sorted(comparison.names, key=lambda name: sign * comparison.scores[name].value)


def _score_section(comparison: Comparison, order: list[str], baselines: Collection[str]) -> Section:
    title = metric_title(comparison.metric)
    metrics = {name: run.record.metrics for name, run in zip(comparison.names, comparison.runs, strict=True)}
    panel = [Score(name, comparison.scores[name], name in baselines) for name in order]
    chance = 0.5 if comparison.metric in ("auroc", "c_index") else None
    picture = plot_scores({comparison.runs[0].record.target: panel}, metric=title, chance=chance)
    return Section(
        "Scores",
        "Out of fold, each run by itself. That two intervals overlap does not mean that the runs are alike: what makes"
        " a patient hard for both widens each of them. The differences below are paired.",
        (Figure(picture, "Hollow: baselines.", title),),
        score_table({name: metrics[name] for name in order}, baselines=baselines),
    )


def _contrast_section(comparison: Comparison) -> Section:
    tested = [each for each in comparison.contrasts if each.p_holm < _LEVEL]
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (f"{each.first} − {each.second}", each.difference, each.p_bootstrap, each.p_delong, each.p_holm, each.p_bh)
        for each in comparison.contrasts
    )
    found = (
        f"{len(tested)} of {len(rows)} differ with Holm's p below {_LEVEL:g}."
        if tested
        else f"None of {len(rows)} differs with Holm's p below {_LEVEL:g}; that is no proof that they are alike."
    )
    return Section(
        "Differences",
        "\n\n".join((found, *comparison.notes)),
        table=Table(
            ("Difference", metric_title(comparison.metric), "p bootstrap", "p DeLong", "Holm", "Benjamini-Hochberg"),
            rows,
            caption="Intervals by paired bootstrap over patients. Holm and Benjamini-Hochberg correct DeLong's p, or"
            " the bootstrap's where there is none, for the number of differences.",
            strong=tuple((row, 0) for row, each in enumerate(comparison.contrasts) if each.p_holm < _LEVEL),
        ),
    )


def _curve_section(
    comparison: Comparison, order: list[str], baselines: Collection[str], seed: int
) -> tuple[Section, ...]:
    if comparison.runs[0].record.kind != "binary":
        return ()
    runs = dict(zip(comparison.names, comparison.runs, strict=True))
    lines = [
        roc_line(
            read_outcomes("binary", runs[name].record.classes, runs[name].predictions),
            name,
            runs[name].record.metrics.get("auroc"),
            seed=seed,
            baseline=name in baselines,
        )
        for name in order
    ]
    return (Section("ROC", "", (Figure(plot_roc(lines), "Band: 95%, of the first head.", "ROC curves"),)),)

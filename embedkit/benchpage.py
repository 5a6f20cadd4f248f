"""Owns the report of a suite: what stands in it; runs nothing itself."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from embedkit.benching import Bench
from embedkit.benchtable import Score
from embedkit.bootstrap import Interval
from embedkit.canvas import describe_interval
from embedkit.report import Cell, Report, Section, Table, metric_title, write_report

__all__ = ["write_bench"]

_SORTS = (
    ("Classification", ("binary", "multiclass", "multilabel")),
    ("Regression", ("regression",)),
    ("Survival", ("survival",)),
    ("Retrieval", ("retrieval",)),
)


def write_bench(path: str | os.PathLike[str], found: Bench) -> Path:
    """Writes the report of a suite as one HTML file.

    Args:
        path: Of the file.
        found: What is told.

    Returns:
        The path.

    Raises:
        RunError: the file cannot be written.
    """
    suite = found.suite
    seconds = found.table["seconds"].sum() if found.scores else 0.0
    reading = sum(row["seconds"] for row in found.extractions.iter_rows(named=True))
    page = Report(
        title=f"Suite {suite.name}",
        lead=" ".join(part for part in (suite.description, _lead(found)) if part),
        sections=(
            *((_rank_section(found),) if found.scores else ()),
            *(section for title, kinds in _SORTS for section in _score_section(title, kinds, found.scores)),
            *_published_section(found),
            *((_run_section(found.scores),) if found.scores else ()),
            _extract_section(found),
            *_failure_section(found),
        ),
        facts=(
            ("tasks", f"{len(suite.tasks)}"),
            ("folds", f"{suite.folds}, grouped by patient, unless a task has its own split"),
            ("members per fold", f"{suite.seeds}"),
            ("sweep", suite.sweep or "none"),
            ("seed", f"{suite.seed}"),
            ("extraction", f"{reading:,.0f} s"),
            ("training and search", f"{seconds:,.0f} s"),
        ),
        footer="Intervals: 95%, bootstrap over patients. Each case is judged by heads that saw nothing of its patient.",
    )
    return write_report(path, page)


def _lead(found: Bench) -> str:
    heads = found.methods.filter(~found.methods["retrieval"]) if found.scores else found.methods
    if heads.is_empty():
        return "No head has a score."
    best = heads.row(0, named=True)
    if best["mean_rank"] is None:
        return "No head has a rank."
    return (
        f"Lowest mean rank: {best['head']} on {best['backbone']}, {best['mean_rank']:.2f} over {best['tasks']} tasks."
    )


def _rank_section(found: Bench) -> Section:
    rows: list[tuple[Cell, ...]] = []
    quiet = []
    for place, row in enumerate(found.methods.iter_rows(named=True)):
        name = f"{row['head']} (baseline)" if row["baseline"] else row["head"]
        ranked = f"{row['tasks']} of {row['of']}"
        rows.append((row["backbone"], name, row["mean_rank"], ranked, row["parameters"], round(row["seconds"], 1)))
        quiet += [place] if row["baseline"] else []
    return Section(
        "Mean rank",
        "Within a task the best has rank 1 and equal scores share theirs. Ranks do not say how far apart scores are,"
        " the intervals do. Searches are ranked among themselves.",
        table=Table(
            ("Backbone", "Head", "Mean rank", "Tasks", "Parameters", "Seconds"), tuple(rows), quiet=tuple(quiet)
        ),
    )


def _score_section(title: str, kinds: Sequence[str], scores: Sequence[Score]) -> tuple[Section, ...]:
    """Methods down, tasks across; the best of each task bold."""
    mine = [each for each in scores if each.kind in kinds]
    if not mine:
        return ()
    tasks = list(dict.fromkeys(each.task for each in mine))
    methods = list(dict.fromkeys((each.backbone, each.head, each.baseline) for each in mine))
    by_place = {(each.backbone, each.head, each.task): each for each in mine}
    metrics = {each.task: each.metric for each in mine}
    rows: list[tuple[Cell, ...]] = []
    for backbone, head, baseline in methods:
        cells = [_cell(by_place.get((backbone, head, task))) for task in tasks]
        rows.append((backbone, f"{head} (baseline)" if baseline else head, *cells))
    return (
        Section(
            title,
            table=Table(
                ("Backbone", "Head", *(f"{task}, {metric_title(metrics[task])}" for task in tasks)),
                tuple(rows),
                quiet=tuple(place for place, (_, _, baseline) in enumerate(methods) if baseline),
                strong=tuple(
                    (methods.index((best.backbone, best.head, best.baseline)), column)
                    for column, task in enumerate(tasks, 2)
                    for best in _best([each for each in mine if each.task == task])
                ),
            ),
        ),
    )


def _cell(score: Score | None) -> Interval | None:
    return None if score is None else Interval(score.value, score.low, score.high)


def _best(scores: Sequence[Score]) -> list[Score]:
    """All that share the best score of a task."""
    signed = [each.value if each.higher_is_better else -each.value for each in scores]
    defined = [value for value in signed if not math.isnan(value)]
    return [each for each, value in zip(scores, signed, strict=True) if defined and value == max(defined)]


def _published_section(found: Bench) -> tuple[Section, ...]:
    """What others found, and below it every head of ours, on the same tasks and metrics."""
    if not found.suite.published:
        return ()
    columns = list(
        dict.fromkeys(
            (task, metric)
            for each in found.suite.published
            for task, values in each.scores.items()
            for metric in values
        )
    )
    rows: list[tuple[Cell, ...]] = [
        (each.method, each.source, *(each.scores.get(task, {}).get(metric) for task, metric in columns))
        for each in found.suite.published
    ]
    by_place = {(each.backbone, each.head, each.task): each for each in found.scores}
    ours = list(dict.fromkeys((each.backbone, each.head) for each in found.scores if each.kind != "retrieval"))
    for backbone, head in ours:
        cells = [_metric(by_place.get((backbone, head, task)), metric) for task, metric in columns]
        rows.append((f"{head} on {backbone}", "here", *cells))
    return (
        Section(
            "Beside published figures",
            "Figures of others are as they were published, mostly at other image sizes and with networks trained from"
            " pixels; none was run here.",
            table=Table(
                ("Method", "Source", *(f"{task}, {metric_title(metric)}" for task, metric in columns)), tuple(rows)
            ),
        ),
    )


def _metric(score: Score | None, metric: str) -> Interval | None:
    return None if score is None else score.metrics.get(metric)


def _run_section(scores: Sequence[Score]) -> Section:
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            each.task, each.backbone, each.head, each.tokens, metric_title(each.metric), describe_interval(
                Interval(each.value, each.low, each.high)
            ), each.parameters, round(each.seconds, 1),
        )
        for each in scores
    )  # fmt: skip
    columns = ("Task", "Backbone", "Head", "Tokens", "Metric", "Score", "Parameters", "Seconds")
    return Section("Every run", table=Table(columns, rows))


def _extract_section(found: Bench) -> Section:
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (row["backbone"], row["dataset"], row["cases"], round(row["seconds"], 1))
        for row in found.extractions.iter_rows(named=True)
    )
    return Section(
        "Extraction",
        "Once per backbone and data set; seconds of all calls that it took.",
        table=Table(("Backbone", "Data set", "Cases", "Seconds"), rows),
    )


def _failure_section(found: Bench) -> tuple[Section, ...]:
    if not found.failures:
        return ()
    rows: tuple[tuple[Cell, ...], ...] = tuple((each.what, each.backbone, each.reason) for each in found.failures)
    return (Section("Not done", "", table=Table(("What", "Backbone", "Why"), rows)),)

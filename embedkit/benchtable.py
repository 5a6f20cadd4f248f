"""Owns the table of a suite: a row per task, backbone and head, ranks within tasks, and their means; scores nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import polars as pl

from embedkit.bootstrap import Interval

__all__ = ["Score", "rank_methods", "tabulate_scores"]


@dataclass(frozen=True)
class Score:
    """What a head (or the search) of a backbone reached on a task.

    Attributes:
        metric, value, low, high: The headline, with its 95% interval over patients.
        higher_is_better: Of that metric.
        metrics: All of them by name.
        seconds: Of training with its share of reading, or of the search.
        path: Its run, or the index.
    """

    task: str
    dataset: str
    kind: str
    backbone: str
    head: str
    baseline: bool
    metric: str
    value: float
    low: float
    high: float
    higher_is_better: bool
    metrics: dict[str, Interval]
    tokens: str
    parameters: int
    seconds: float
    path: str


def tabulate_scores(scores: Sequence[Score]) -> pl.DataFrame:
    """A row per score in the order given, with ``rank`` among the scores of its task: 1 is the best, ties share.

    A score that is undefined has no rank.
    """
    rows = [{name: value for name, value in asdict(each).items() if name != "metrics"} for each in scores]
    table = pl.DataFrame(rows, infer_schema_length=None)
    if table.is_empty():
        return table
    signed = pl.when(pl.col("higher_is_better")).then(-pl.col("value")).otherwise(pl.col("value"))
    return table.with_columns(signed.fill_nan(None).rank("average").over("task").alias("rank"))


def rank_methods(table: pl.DataFrame) -> pl.DataFrame:
    """A row per backbone and head: ``mean_rank`` over the tasks that rank it, ``tasks``, ``parameters``, ``seconds``.

    Sorted by mean rank; searches stand apart from heads, since they answer other tasks. ``of`` is how many tasks there
    are of that sort: a mean over fewer says less.
    """
    retrieval = (pl.col("kind") == "retrieval").alias("retrieval")
    grouped = (
        table.with_columns(retrieval)
        .group_by("retrieval", "backbone", "head", "baseline", maintain_order=True)
        .agg(
            mean_rank=pl.col("rank").mean(),
            tasks=pl.col("rank").count(),
            parameters=pl.col("parameters").max(),
            seconds=pl.col("seconds").sum(),
        )
    )
    totals = table.with_columns(retrieval).group_by("retrieval").agg(of=pl.col("task").n_unique())
    return grouped.join(totals, on="retrieval", maintain_order="left").sort(
        "retrieval", "mean_rank", nulls_last=True, maintain_order=True
    )

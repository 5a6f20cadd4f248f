"""Owns how a search is scored on a ground truth: the place of the first right case, with intervals over patients."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.bootstrap import Interval, bootstrap_values, form_interval
from embedkit.formulas import weigh_mean
from embedkit.index import Index
from embedkit.plots import describe_interval
from embedkit.searchevaluation import evaluate_search
from retrieval_truths import Truth

RERANKS = ("none", "free", "ordered", "both")
DEFAULT_RERANK = "ordered"


def judge(index: Index, truth: Truth, rerank: str, *, by_patch: bool = False) -> dict[str, Interval]:
    """How often a case that is relevant comes first and among the first five, and the mean reciprocal rank."""
    return summarise(list_firsts(index, truth, rerank, by_patch=by_patch))


def list_firsts(index: Index, truth: Truth, rerank: str, *, by_patch: bool = False) -> pl.DataFrame:
    """A row per query with the place of the first relevant case."""
    found = evaluate_search(
        index,
        relevant=truth.relevant,
        k=(1, 5),
        exclude_same=truth.exclude_same,
        rerank=rerank,
        by_patch=by_patch,
        resamples=0,
    )
    groups = index.cases.select("case_id", group=truth.group)
    return found.queries.select("case_id", place=pl.col("first").fill_null(10**9)).join(
        groups, on="case_id", maintain_order="left"
    )


def summarise(firsts: pl.DataFrame) -> dict[str, Interval]:
    places = firsts["place"]
    values = {"top-1": places <= 1, "top-5": places <= 5, "MRR": 1 / places}
    return {name: bound(value.cast(pl.Float64).to_numpy(), firsts["group"]) for name, value in values.items()}


def bound(values: NDArray[np.float64], groups: pl.Series) -> Interval:
    """The mean of a value per query with its interval over the groups, patients as a rule."""
    named = groups.to_list()
    resampled = bootstrap_values({"mean": weigh_mean(values)}, named, resamples=2000, seed=0)
    return form_interval(float(values.mean()), resampled["mean"], named)


def print_line(backbone: str, level: str, rerank: str, scores: dict[str, Interval]) -> None:
    shown = " | ".join(describe_interval(scores[name]) for name in ("top-1", "top-5", "MRR"))
    print(f"| {backbone} | {level} | {rerank} | {shown} |", flush=True)

"""Owns the retrieval tasks of a suite: an index per cache and task, judged once and kept; trains nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import polars as pl

from embedkit.benchtable import Score
from embedkit.bootstrap import Interval
from embedkit.cache import Cache
from embedkit.errors import SuiteError
from embedkit.indexbuilding import build_index
from embedkit.searchevaluation import evaluate_search
from embedkit.suiteentries import SuiteTask
from embedkit.suitefile import Suite
from embedkit.suitestate import write_json

__all__ = ["judge_search"]


def judge_search(
    folder: Path, cache: Cache, labels: pl.DataFrame, task: SuiteTask, *, backbone: str, suite: Suite
) -> Score:
    """The score of a retrieval task: that of an index with all defaults.

    The index is built anew, and searched, only where cases, labels or the task are others than those that the kept
    scores are of.

    Args:
        folder: Of the results.
        cache: Of the data set.
        labels: Of the data set.
        task: A retrieval task.
        backbone: Name for the table.
        suite: Says seed and resamples.

    Raises:
        SearchError: no two cases share a value, or as `build_index`.
        SuiteError: the result cannot be written, or is damaged.
    """
    place = f"{cache.path.name}.{task.name}"
    index, kept = folder / "indexes" / place, folder / "searches" / f"{place}.json"
    key = _identify(cache, labels, task, suite)
    found = _read_kept(kept)
    if found is None or found["key"] != key or not index.is_dir():
        started = time.perf_counter()
        shutil.rmtree(index, ignore_errors=True)
        built = build_index(cache.path, index, labels=labels)
        scores = evaluate_search(
            built,
            relevant=task.target,
            exclude_same=task.exclude_same,
            where=task.where,
            resamples=suite.resamples,
            seed=suite.seed,
        )
        measures = {row["measure"]: [row[name] for name in ("value", "low", "high")] for row in scores.table.to_dicts()}
        found = {
            "key": key,
            "embedding": built.embedding,
            "seconds": time.perf_counter() - started,
            "measures": measures,
        }
        write_json(kept, found)
    metrics = {name: Interval(*values) for name, values in found["measures"].items()}
    if task.metric not in metrics:
        raise SuiteError(f"task {task.name}: its searches have no {task.metric}; they have {', '.join(metrics)}")
    best = metrics[task.metric]
    return Score(
        task=task.name,
        dataset=task.dataset,
        kind="retrieval",
        backbone=backbone,
        head="search",
        baseline=False,
        metric=task.metric,
        value=best.value,
        low=best.low,
        high=best.high,
        higher_is_better=True,
        metrics=metrics,
        tokens=found["embedding"],
        parameters=0,
        seconds=round(found["seconds"], 3),
        path=str(index),
    )


def _identify(cache: Cache, labels: pl.DataFrame, task: SuiteTask, suite: Suite) -> str:
    """SHA-256 of all that decides a search: tokens, cases, labels, task, bootstrap."""
    cases = cache.stacks.select("case_id", "patient_id", "view", "plane", "source_digest").sort(pl.all())
    said: list[Any] = [cache.recipe.fingerprint, cases.rows(), labels.columns, labels.rows(), suite.seed]
    said += [suite.resamples, task.target, task.exclude_same, task.where]
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()


def _read_kept(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SuiteError(f"{path} is damaged ({error}); delete it, and the search is judged again") from error
    if not isinstance(found, dict) or not {"key", "embedding", "seconds", "measures"} <= set(found):
        raise SuiteError(f"{path} is damaged (keys are missing); delete it, and the search is judged again")
    return found

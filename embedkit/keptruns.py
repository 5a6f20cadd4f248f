"""Owns an old run as it is once its head has learned another target too: its scores, out of fold, and its record.

Fits nothing; how old answers are kept is in `embedkit.keeping`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from embedkit.bags import stream_bags
from embedkit.cache import Cache
from embedkit.crossfitting import score_logits
from embedkit.members import Member
from embedkit.metrics import METRICS, Interval, compute_metrics
from embedkit.outcomes import encode_truth
from embedkit.runfolder import RunRecord
from embedkit.runs import Run
from embedkit.targets import count_noun

__all__ = ["list_known", "tell_kept"]


def list_known(run: Run, usable: pl.DataFrame) -> pl.DataFrame:
    """The cases of a table (``case_id``, ``patient_id``) that a run was trained or tested on, sorted."""
    tested = pl.col("case_id").is_in(run.predictions["case_id"].implode())
    untested = pl.col("patient_id").is_in(run.record.cases.get("untested_patients", []))
    return usable.select(pl.col("case_id", "patient_id").cast(pl.String)).filter(tested | untested).sort("case_id")


def tell_kept(
    run: Run,
    source: Cache,
    members: Sequence[Member],
    folds: Sequence[int],
    epochs: Sequence[int],
    *,
    known: pl.DataFrame,
    how: str,
    seed: int,
    seconds: float,
    resamples: int,
) -> tuple[RunRecord, pl.DataFrame]:
    """The record of an old run as it is now, and what it says of the cases that the cache holds, out of fold.

    Args:
        run: As it was.
        source: Holds the cases.
        members: As they are now.
        folds: Of each, the fold of the run that it must not have seen.
        epochs: That each was trained for.
        known: As `list_known` gives it.
        how: In words, how it was kept.
        seed: Of the training.
        seconds: That the fits took.
        resamples: Of the bootstrap for the intervals.
    """
    there = pl.col("case_id").is_in(known["case_id"].implode())
    before = run.predictions.filter(there & pl.col("fold").is_in(sorted(set(folds))))
    after = _answer_again(run, source, before, members, folds)
    metrics, once = (_judge(run, table, seed=seed, resamples=resamples) for table in (after, before))
    name = METRICS[run.record.kind][0]
    note = (
        f"{how}; its {name} was {_word(once[name])} and is {_word(metrics[name])} on {count_noun(len(before), 'case')},"
        " out of fold; its scores of inner splits, and with them thresholds and calibration, are those of the old run"
    )
    tested = dict(before.group_by("fold").len().iter_rows())
    described = [
        {
            **next(each for each in run.record.members if each["fold"] == fold),
            "tested": tested.get(fold, 0),
            "epochs": count,
        }
        for fold, count in zip(folds, epochs, strict=True)
    ]
    record = dataclasses.replace(
        run.record,
        metrics=metrics,
        members=tuple(described),
        seed=seed,
        seconds=round(seconds, 3),
        notes=(*run.record.notes, note),
        sha256={},
    )
    return record, after


def _answer_again(
    run: Run, source: Cache, asked: pl.DataFrame, members: Sequence[Member], folds: Sequence[int]
) -> pl.DataFrame:
    """Predictions of a run with the scores that the members of each fold, together, give its cases now."""
    record = run.record
    found: dict[str, NDArray[np.float64]] = {}
    for fold in sorted(set(folds)):
        own = [member for each, member in zip(folds, members, strict=True) if each == fold]
        ids = asked.filter(pl.col("fold") == fold)["case_id"].to_list()
        for bag in stream_bags(source, ids, record.token_sets, views=record.views):
            with torch.no_grad():
                mean = np.mean([score_logits(member, member(bag).logits) for member in own], axis=0)
            found |= dict(zip(bag.case_ids, mean, strict=True))
    scores = np.array([found[case] for case in asked["case_id"]]).reshape(len(asked), -1)
    return asked.with_columns(
        pl.Series(name, column) for name, column in zip(record.score_columns, scores.T, strict=True)
    )


def _judge(run: Run, table: pl.DataFrame, **judged: Any) -> dict[str, Interval]:
    """The metrics of a table of predictions of a run."""
    record = run.record
    scores = record.score_array(table.select(record.score_columns).to_numpy())
    truth = encode_truth(record.kind, record.classes, table)
    return compute_metrics(record.kind, truth, scores, table["patient_id"].to_list(), times=record.times, **judged)


def _word(found: Interval) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"

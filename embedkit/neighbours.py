"""Owns the nearest-neighbour probe: how well like cases tell a target, with nothing trained; writes no run.

The plainest measure of an embedding: each case gets the answer of the most similar cases of other folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.answers import score_array
from embedkit.bootstrap import Floats, Interval
from embedkit.cache import Cache, open_originals
from embedkit.casemap import choose_embedding
from embedkit.embeddings import CaseVectors, Embedding, embed_cases
from embedkit.manifest import read_labels
from embedkit.metrics import compute_metrics
from embedkit.targets import TaskKind
from embedkit.tasks import Task, inner_split, make_folds, make_task

__all__ = ["NeighbourProbe", "probe_neighbours"]

_COUNTS = (1, 3, 5, 9, 15, 25)
_INNER_SPLITS = 3
_HOLDOUT = 0.2


@dataclass(frozen=True, eq=False)
class NeighbourProbe:
    """What `probe_neighbours` found.

    Attributes:
        target: What was asked.
        embedding: What similarity was taken of.
        neighbours: How many were asked, per fold, chosen on its inner splits.
        metrics: Out of fold, pooled, as `compute_metrics`.
        cases, patients: How many.
    """

    target: str
    embedding: str
    neighbours: tuple[int, ...]
    metrics: dict[str, Interval]
    cases: int
    patients: int


@dataclass(frozen=True, eq=False)
class _Cases:
    """The cases of a task: answers float64 [cases outputs], vectors [cases views dim], present bool [cases views]."""

    task: Task
    answers: Floats
    vectors: Floats
    present: NDArray[np.bool_]


def probe_neighbours(
    cache: Cache | Path | str,
    labels: pl.DataFrame | Path | str,
    *,
    target: str,
    embedding: str | None = None,
    classes: Sequence[str] | None = None,
    folds: int = 5,
    resamples: int = 2000,
    seed: int = 0,
) -> NeighbourProbe:
    """Answers each case by its most similar cases of other folds: the vote, or the mean of a regression.

    Similarity is the cosine of the pooled vectors, each view centred on the training cases, a missing one at the
    centre. A vote among k is drawn towards the classes' shares in training as one more neighbour would draw it, so that
    no probability is 0 or 1. How many neighbours to ask is chosen in each fold by its inner splits.

    Args:
        cache: A cache or its path.
        labels: Table with ``case_id`` and the target, or its file.
        target: A column with classes, labels or numbers.
        embedding: As `Embedding.parse`; None is the mean of the first token set with vectors.
        classes: Values to learn, as in `make_task`.
        folds: Patient-grouped, stratified folds.
        resamples: Of the bootstrap over patients.
        seed: Of folds, inner splits and bootstrap.

    Raises:
        TaskError: the target cannot be learned, or not in so many folds.
        OptionError: an option means nothing.
        SearchError: the cache lacks the token set.
    """
    source = open_originals(cache)
    table = read_labels(labels) if isinstance(labels, Path | str) else labels
    chosen = choose_embedding(list(source.token_sets)) if embedding is None else Embedding.parse(embedding)
    usable = source.stacks.filter(pl.col("count") > pl.col("blank_count")).select("case_id", "patient_id").unique()
    task, _ = make_task(table, target, usable.sort("case_id"), classes=classes)
    vectors, present = _take(embed_cases(source, chosen), task)
    cases = _Cases(task, _answer_matrix(task), vectors, present)
    dealt = make_folds(task, folds, seed=seed)
    scores = np.zeros(cases.answers.shape)
    asked = []
    for fold in range(folds):
        training = dealt != fold
        asked.append(_choose_count(cases, training, seed=seed + 1000 * (fold + 1)))
        scores[~training] = _ask(cases, training, ~training, asked[-1])
    metrics = compute_metrics(
        task.kind,
        task.targets,
        score_array(task.kind, scores),
        task.patient_ids,
        resamples=resamples,
        seed=seed,
    )
    return NeighbourProbe(target, str(chosen), tuple(asked), metrics, len(task.case_ids), len(set(task.patient_ids)))


def _take(found: CaseVectors, task: Task) -> tuple[Floats, NDArray[np.bool_]]:
    """Vectors [cases views dim] and presence [cases views] of the task's cases."""
    rows = {case: row for row, case in enumerate(found.cases["case_id"])}
    places = np.array([rows[case] for case in task.case_ids])
    return found.vectors[places].astype(np.float64), found.present[places]


def _answer_matrix(task: Task) -> Floats:
    """float64 [cases outputs]: what a case tells of itself; a column per class of a multiclass task."""
    if task.kind == "multiclass":
        return np.asarray(task.membership, dtype=np.float64)
    return np.asarray(task.targets, dtype=np.float64).reshape(len(task.case_ids), -1)


def _choose_count(cases: _Cases, training: NDArray[np.bool_], *, seed: int) -> int:
    """How many neighbours do best on inner splits of the training cases."""
    splits = [
        inner_split(cases.task, training, fraction=_HOLDOUT, seed=seed + number) for number in range(_INNER_SPLITS)
    ]
    losses = [sum(_loss(cases, training & ~held, held, count) for held in splits) for count in _COUNTS]
    return _COUNTS[int(np.argmin(losses))]


def _ask(cases: _Cases, training: NDArray[np.bool_], asking: NDArray[np.bool_], count: int) -> Floats:
    """float64 [asking outputs]: what the nearest training cases tell."""
    return _vote(_similarity(cases, training, asking), cases.answers[training], count, cases.task.kind)


def _similarity(cases: _Cases, training: NDArray[np.bool_], asking: NDArray[np.bool_]) -> Floats:
    """float64 [asking training]: cosines, centred on the training cases."""
    there = cases.present[training][..., None]
    means = (cases.vectors[training] * there).sum(axis=0) / np.maximum(there.sum(axis=0), 1)
    centred = np.where(cases.present[..., None], cases.vectors - means, 0.0).reshape(len(cases.vectors), -1)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    scaled = centred / np.where(lengths > 0, lengths, 1.0)
    return np.asarray(scaled[asking] @ scaled[training].T)


def _vote(similar: Floats, known: Floats, count: int, kind: TaskKind) -> Floats:
    """float64 [asking outputs] from similarities [asking training] and answers [training outputs]."""
    nearest = np.argsort(-similar, axis=1, kind="stable")[:, :count]
    told = known[nearest].mean(axis=1)
    if kind == "regression":
        return np.asarray(told)
    asked = nearest.shape[1]
    return np.asarray((asked * told + known.mean(axis=0)) / (asked + 1))


def _loss(cases: _Cases, training: NDArray[np.bool_], held: NDArray[np.bool_], count: int) -> float:
    """Log loss, or squared error of a regression, on the cases held out."""
    told, truth = _ask(cases, training, held, count), cases.answers[held]
    if cases.task.kind == "regression":
        return float(np.square(told - truth).mean())
    kept = np.clip(told, 1e-9, 1 - 1e-9)
    losses = truth * np.log(kept)
    if cases.task.kind != "multiclass":
        losses = losses + (1 - truth) * np.log(1 - kept)
    return float(-losses.sum(axis=1).mean())

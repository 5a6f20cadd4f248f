"""Owns the few-shot curve: how well heads in closed form do with a few training patients per class; writes no run.

In each fold of an ordinary cross-validation a few patients of every class are drawn from the training part, several
times over, and the fold's test cases are scored by a head fitted on these alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedkit.answers import score_array
from embedkit.bags import bag_shape, stream_bags
from embedkit.bootstrap import Floats, Interval, Statistic, bootstrap_values, form_interval
from embedkit.cache import Cache, open_originals
from embedkit.errors import HeadError, OptionError
from embedkit.manifest import read_labels
from embedkit.members import Member, build_member, complete_options
from embedkit.metrics import metric_statistics, require_metric
from embedkit.plugins import choose_token_set, load_head
from embedkit.recipe import TokenSet
from embedkit.tasks import Task, inner_split, make_folds, make_task

__all__ = ["FewShot", "few_shot"]

_PENALTY_SPLITS = 3
_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class FewShot:
    """What `few_shot` found.

    Attributes:
        target, metric: What was learned, and the score.
        curves: By head, (patients per class, score), rising.
        full: By head, the score with all training patients, on the same folds.
        draws: How often the patients of each point were drawn.
    """

    target: str
    metric: str
    curves: dict[str, tuple[tuple[int, Interval], ...]]
    full: dict[str, Interval]
    draws: int

    @property
    def table(self) -> pl.DataFrame:
        """A row per head and point: head, shots (null for all patients), value, low, high."""
        rows = [
            {"head": head, "shots": shot, "value": found.value, "low": found.low, "high": found.high}
            for head, points in self.curves.items()
            for shot, found in (*points, (None, self.full[head]))
        ]
        return pl.DataFrame(rows, schema_overrides={"shots": pl.Int64})


@dataclass(frozen=True, eq=False)
class _Probe:
    """A head in closed form with the features of the task's cases, [cases features]."""

    member: Member
    features: Tensor


def few_shot(
    cache: Cache | Path | str,
    labels: pl.DataFrame | Path | str,
    *,
    target: str,
    shots: Sequence[int] = (1, 2, 5, 10),
    heads: Sequence[str] = ("logistic",),
    draws: int = 10,
    folds: int = 5,
    classes: Sequence[str] | None = None,
    metric: str = "auroc",
    resamples: int = 1000,
    seed: int = 0,
) -> FewShot:
    """Scores heads that were fitted on a few patients per class.

    A score is the mean over draws of the mean over folds: the heads of two folds know different patients, so their
    scores are never ranked against each other. The interval is of a bootstrap over both test patients and draws. The
    penalty is chosen within the few patients, by inner splits; of one patient per class it is the middle one.

    Args:
        cache: A cache or its path.
        labels: Table with ``case_id`` and the target, or its file.
        target: A binary or multiclass column.
        shots: Patients per class, drawn from the training part of each fold.
        heads: Registered heads in closed form; each reads the token set it prefers.
        draws: Of each number of patients.
        folds: Patient-grouped, stratified folds.
        classes: Values to learn, as in `make_task`.
        metric: One of the kind's.
        resamples: Of the bootstrap.
        seed: Of folds, draws and bootstrap.

    Raises:
        OptionError: shots that are not rising from 1, draws below 1, no heads, more patients per class than a training
            part has, a regression or multilabel target, or an unknown metric.
        HeadError: a head that is unknown, is fitted by gradient or can read nothing of the cache.
        TaskError: the target cannot be learned.
    """
    if not shots or list(shots) != sorted(set(shots)) or shots[0] < 1:
        raise OptionError(
            f"shots are {', '.join(map(str, shots)) or 'none'}; expected rising numbers from 1 on: 1,2,5,10"
        )
    if draws < 1 or not heads:
        raise OptionError(f"{draws} draws and {len(heads)} heads were asked for, expected one or more of each")
    source = open_originals(cache)
    table = read_labels(labels) if isinstance(labels, Path | str) else labels
    cases = source.stacks.filter(pl.col("count") > pl.col("blank_count")).select("case_id", "patient_id").unique()
    task, _ = make_task(table, target, cases.sort("case_id"), classes=classes)
    if task.kind not in ("binary", "multiclass"):
        raise OptionError(
            f"target {target} is {task.kind}, but shots are patients per class; name a target with classes"
        )
    require_metric(task.kind, metric)
    dealt = make_folds(task, folds, seed=seed)
    _check_shots(task, dealt, shots[-1])
    curves, full = {}, {}
    for name in dict.fromkeys(heads):
        probe = _open_probe(source, name, task)

        def judge(shot: int | None, count: int, probe: _Probe = probe) -> Interval:
            found = [_score(probe, task, dealt, shot, np.random.default_rng([seed, draw])) for draw in range(count)]
            return _average(task, dealt, found, metric, resamples=resamples, seed=seed)

        curves[name] = tuple((shot, judge(shot, draws)) for shot in shots)
        full[name] = judge(None, 1)
    return FewShot(target, metric, curves, full, draws)


def _check_shots(task: Task, folds: _Ints, most: int) -> None:
    patients = np.asarray(task.patient_ids)
    for fold in range(int(folds.max()) + 1):
        for name, column in zip(task.states, task.membership.T, strict=True):
            there = len(np.unique(patients[column & (folds != fold)]))
            if there < most:
                raise OptionError(
                    f"{most} patients per class were asked for, but without fold {fold} class {name} has {there}; ask"
                    " for fewer shots or more folds"
                )


def _open_probe(cache: Cache, name: str, task: Task) -> _Probe:
    if load_head(name).fit_by != "closed form":
        raise HeadError(
            f"head {name!r} is fitted by gradient, and a few-shot curve takes hundreds of fits; name heads in"
            " closed form, such as logistic or raptor"
        )
    sets = (str(choose_token_set(name, [TokenSet.parse(text) for text in cache.token_sets])),)
    options = complete_options(name, {})
    member = build_member(name, bag_shape(cache, sets), outputs=task.outputs, kind=task.kind, options=options)
    head = cast(Any, member.head)
    with torch.no_grad():
        bags = stream_bags(cache, task.case_ids, sets)
        return _Probe(member, torch.cat([head.features(member.prepare(bag)) for bag in bags]))


def _score(probe: _Probe, task: Task, folds: _Ints, shot: int | None, rng: np.random.Generator) -> Floats:
    """Scores of all cases, each by a head that knows a few patients of the other folds; all of them without a shot."""
    scores = np.zeros((len(folds), task.outputs))
    for fold in range(int(folds.max()) + 1):
        training = folds != fold
        chosen = training if shot is None else _draw(task, training, shot, rng)
        split_seed = int(rng.integers(2**31))
        fraction = 0.2 if shot is None else max(0.2, 1 / shot)
        splits = 0 if shot == 1 else _PENALTY_SPLITS
        holdouts = [
            inner_split(task, chosen, fraction=fraction, seed=split_seed + number)[chosen] for number in range(splits)
        ]
        head = cast(Any, probe.member.head)
        head.fit(
            probe.features[torch.from_numpy(chosen)],
            task.targets[chosen],
            kind=task.kind,
            holdouts=holdouts,
            class_weights=True,
        )
        with torch.no_grad():
            logits = head.read_out(probe.features[torch.from_numpy(~training)])
        scores[~training] = probe.member.scores(logits).reshape(len(logits), -1).double().numpy()
    return score_array(task.kind, scores)


def _draw(task: Task, training: NDArray[np.bool_], shot: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """bool [cases]: of each class the cases of ``shot`` patients, drawn from those that may train."""
    patients = np.asarray(task.patient_ids)
    chosen = np.zeros(len(patients), dtype=np.bool_)
    for column in task.membership.T:
        names = np.unique(patients[column & training])
        chosen |= column & training & np.isin(patients, rng.choice(names, shot, replace=False))
    return chosen


def _average(task: Task, folds: _Ints, draws: Sequence[Floats], metric: str, *, resamples: int, seed: int) -> Interval:
    """The mean over draws of the mean over folds, resampled over patients and over draws."""
    statistics = {str(number): _per_fold(task, folds, scores, metric) for number, scores in enumerate(draws)}
    plain = np.ones((1, len(folds)))
    value = float(np.mean([statistic(plain)[0] for statistic in statistics.values()]))
    each = bootstrap_values(statistics, task.patient_ids, resamples=resamples, seed=seed)
    values = np.stack(list(each.values()))
    taken = np.random.default_rng(seed).integers(len(draws), size=values.shape)
    return form_interval(value, np.take_along_axis(values, taken, axis=0).mean(axis=0), task.patient_ids)


def _per_fold(task: Task, folds: _Ints, scores: Floats, metric: str) -> Statistic:
    """The mean of a metric over folds; a fold where a resample leaves it undefined is left out of that resample."""
    parts = []
    for fold in range(int(folds.max()) + 1):
        rows = np.flatnonzero(folds == fold)
        groups = [task.patient_ids[row] for row in rows]
        parts.append((rows, metric_statistics(task.kind, task.targets[rows], scores[rows], groups)[metric]))

    def statistic(weights: Floats) -> Floats:
        values = np.full((len(parts), len(weights)), np.nan)
        for place, (rows, own) in enumerate(parts):
            there = weights[:, rows].sum(axis=1) > 0
            values[place, there] = own(weights[there][:, rows])
        known = ~np.isnan(values)
        counts = known.sum(axis=0)
        total = np.where(known, values, 0.0).sum(axis=0)
        return np.asarray(np.where(counts > 0, total / np.maximum(counts, 1), np.nan))

    return statistic

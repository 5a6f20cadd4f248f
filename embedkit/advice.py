"""Owns `advise`: tries a ladder of settings within a time budget, judges each inside the folds, recommends one."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from embedkit.answers import score_array
from embedkit.bootstrap import Interval
from embedkit.cache import Cache, open_originals
from embedkit.crossfitting import CrossFit, cross_fit
from embedkit.errors import CacheError, OptionError
from embedkit.foldjobs import FoldedTask
from embedkit.headplans import plan_heads
from embedkit.ladder import Setting, list_settings, list_wanting
from embedkit.manifest import read_labels
from embedkit.metrics import METRICS, compute_metrics
from embedkit.planning import choose_device
from embedkit.plugins import load_head
from embedkit.preparation import Preparation
from embedkit.targets import TaskKind
from embedkit.tasks import Task, folds_from_column, make_folds, make_task

__all__ = ["Advice", "AdviceProgress", "Trial", "advise"]

_SPLITS = 3
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class AdviceProgress:
    """Where `advise` stands: settings done or left out, of how many, and the next one."""

    done: int
    total: int
    setting: str


@dataclass(frozen=True)
class Trial:
    """What became of one setting.

    Attributes:
        setting: The setting.
        inner: Mean metric on the inner splits of the training cases of all folds: what it is chosen by.
        score: Metric out of fold, with its interval over patients. Of the best among several it is optimistic.
        seconds: Time that its fits took.
    """

    setting: Setting
    inner: float
    score: Interval
    seconds: float


@dataclass(frozen=True)
class Advice:
    """What `advise` found.

    Attributes:
        target, metric: What is learned, and the score.
        trials: In the order tried, cheapest first.
        recommended: The setting that did best on inner splits.
        score: Of choosing so: in each fold the setting that did best on its own inner splits answers its test cases,
            which had no part in the choice. What to expect of the advice.
        chosen: By fold, the setting that this took.
        command: `embedkit train` with the recommended setting.
        untried: What was left out, each with the reason and the way to have it tried.
        seconds: Time that all took.
    """

    target: str
    metric: str
    trials: tuple[Trial, ...]
    recommended: Setting
    score: Interval
    chosen: dict[int, Setting]
    command: str
    untried: tuple[str, ...]
    seconds: float

    @property
    def table(self) -> pl.DataFrame:
        """A row per trial: head, tokens, options, inner, value, low, high, seconds, recommended."""
        rows = [
            {
                "head": each.setting.head,
                "tokens": ",".join(each.setting.token_sets),
                "options": ",".join(f"{name}={value}" for name, value in each.setting.options.items()),
                "inner": each.inner,
                "value": each.score.value,
                "low": each.score.low,
                "high": each.score.high,
                "seconds": each.seconds,
                "recommended": each.setting == self.recommended,
            }
            for each in self.trials
        ]
        return pl.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class _Found:
    """A trial with what the choice in each fold is made of: the inner metric by fold, and scores [cases columns]."""

    trial: Trial
    inner: dict[int, float]
    scores: Floats


def advise(
    cache: Cache | Path | str,
    labels: pl.DataFrame | Path | str,
    *,
    target: str,
    budget_s: float = 600.0,
    kind: TaskKind | None = None,
    classes: Sequence[str] | None = None,
    event: str | None = None,
    folds: int = 5,
    split: str | None = None,
    seed: int = 0,
    device: str = "auto",
    resamples: int = 2000,
    on_progress: Callable[[AdviceProgress], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Advice:
    """Recommends head, token sets and options for a target, by trying a ladder of settings (`list_settings`).

    Every setting is cross-fitted on the same patient-grouped folds. It is judged by the metric of the kind's table
    (AUROC, R2, C-index) on three inner splits of each fold's training cases, the same for all settings, and never by a
    test case. A setting whose first fold shows that all would not fit into the budget is left out and said so, and so
    are those that are no faster. The first setting is always tried; the budget may be passed by one fold.

    Args:
        cache: A cache or its path.
        labels: Table with ``case_id`` and the target, or its file.
        target: The column to learn.
        budget_s: Time to spend, in seconds.
        kind, classes, event: As in `embedkit.train`.
        folds: Number of patient-grouped, stratified folds.
        split: Column of ``labels`` that holds the folds instead.
        seed: Of folds, inner splits, weights and batches.
        device: ``auto``, ``cpu``, ``cuda``, ...
        resamples: Of the bootstrap for the intervals.
        on_progress: Called before every setting.
        clock: Reads seconds.

    Raises:
        OptionError: a budget that is not above 0, or another option that means nothing.
        TaskError: the target cannot be learned.
        CacheError: the cache is damaged or holds no stack.
    """
    if not budget_s > 0:
        raise OptionError(f"the budget is {budget_s:g} s, expected above 0")
    started = clock()
    source = open_originals(cache)
    if not source.token_sets:
        raise CacheError(f"cache {source.path} holds no stack yet; extract some cases first")
    table = read_labels(labels)
    cases = source.stacks.filter(pl.col("count") > pl.col("blank_count")).select("case_id", "patient_id").unique()
    task, _ = make_task(table, target, cases.sort("case_id"), kind=kind, classes=classes, event=event)
    dealt = make_folds(task, folds, seed=seed) if split is None else folds_from_column(task, table, split)
    trier = _Trier(source, FoldedTask(task, dealt[None]), choose_device(device), seed, resamples=resamples, clock=clock)
    found, untried = _climb(trier, list_settings(source, task.kind), started + budget_s, on_progress)
    best = max(found, key=lambda each: _rank(each.trial.inner))
    chosen = _choose_inside(found, trier.folded.tested)
    given: dict[str, Any] = {
        "kind": kind,
        "classes": None if classes is None else ",".join(classes),
        "event": event,
        "split": split,
    }
    given |= {"folds": None if folds == 5 or split else folds, "seed": seed or None}
    return Advice(
        target=target,
        metric=trier.metric,
        trials=tuple(each.trial for each in found),
        recommended=best.trial.setting,
        score=trier.judge(_answer_by(chosen, trier.folded)),
        chosen={fold: each.trial.setting for fold, each in chosen.items()},
        command=_write_command(source, labels, target, best.trial.setting, given),
        untried=(*untried, *list_wanting(source, task.kind)),
        seconds=clock() - started,
    )


class _Trier:
    """Tries settings on one task with its folds."""

    def __init__(
        self,
        source: Cache,
        folded: FoldedTask,
        device: torch.device,
        seed: int,
        *,
        resamples: int,
        clock: Callable[[], float],
    ) -> None:
        self.source = source
        self.folded = folded
        self.device = device
        self.seed = seed
        self.resamples = resamples
        self.clock = clock
        kind = folded.task.kind
        self.metric = "r2" if kind == "regression" else METRICS[kind][0]

    @property
    def task(self) -> Task:
        return self.folded.task

    def attempt(self, setting: Setting, left_s: float) -> _Found | float:
        """What became of it; or the seconds that all folds would take, told from the first one, if too many."""
        started = self.clock()
        names = {setting.head: setting.token_sets}
        options = {setting.head: setting.options}
        plans = plan_heads(self.source, [setting.head], names, options, {"inner_splits": _SPLITS})
        plan = next(each for each in plans if each.head == setting.head)
        preparation = Preparation(self.source, [plan], sorted(self.task.case_ids), self.device, seed=self.seed)
        first, *others = self.folded.tested
        parts = []
        for folds in ([first], others):
            if not folds:
                continue
            dealt = np.where(np.isin(self.folded.folds, folds), self.folded.folds, -1)
            part = FoldedTask(self.task, dealt)
            parts += cross_fit(preparation, [(plan, part)], seed=self.seed)
            spent = self.clock() - started
            if folds == [first] and (seconds := spent * (1 + len(others))) > left_s:
                return seconds
        scores = np.where(np.isnan(parts[0].scores[0]), parts[-1].scores[0], parts[0].scores[0])
        inner = {fold: self._judge_inner(parts, fold) for fold in self.folded.tested}
        known = [value for value in inner.values() if not math.isnan(value)]
        seconds = round(self.clock() - started, 3)
        mean = float(np.mean(known)) if known else math.nan
        return _Found(Trial(setting, mean, self.judge(scores), seconds), inner, scores)

    def judge(self, scores: Floats) -> Interval:
        """The metric of scores [cases columns] out of fold."""
        tested = np.flatnonzero(self.folded.folds[0] >= 0)
        return self._measure(tested, scores[tested], self.resamples)

    def _judge_inner(self, parts: Sequence[CrossFit], fold: int) -> float:
        """The mean over the inner splits of a fold, without those in which it is undefined; NaN where in all."""
        splits = [each for part in parts for each in part.inner if each.fold == fold and each.split < _SPLITS]
        values = [self._measure(each.cases, each.scores, 0).value for each in splits]
        known = [value for value in values if not math.isnan(value)]
        return float(np.mean(known)) if known else math.nan

    def _measure(self, cases: NDArray[np.int64], scores: Floats, resamples: int) -> Interval:
        task = self.task
        return compute_metrics(
            task.kind,
            task.targets[cases],
            score_array(task.kind, scores),
            [task.patient_ids[case] for case in cases],
            times=task.times,
            resamples=resamples,
            seed=self.seed,
        )[self.metric]


def _climb(
    trier: _Trier,
    settings: Sequence[Setting],
    ends: float,
    on_progress: Callable[[AdviceProgress], None] | None,
) -> tuple[list[_Found], list[str]]:
    """Tries settings in turn until the clock reads ``ends``; the first one whatever it takes.

    Returns:
        What was found, at least one, and what was left out with the reason.
    """
    found, untried = list[_Found](), list[str]()
    paces: dict[str, tuple[int, float]] = {}  # of each head: numbers per slice that it read, seconds of all folds
    for number, setting in enumerate(settings):
        if on_progress is not None:
            on_progress(AdviceProgress(number, len(settings), str(setting)))
        left = ends - trier.clock() if found else math.inf
        size = setting.count_numbers(trier.source)
        least, seconds = paces.get(setting.head, (0, 0.0))
        if seconds < left or size < least:  # what reads as much, or has more blocks, is no faster
            outcome = trier.attempt(setting, left)
            if isinstance(outcome, _Found):
                found.append(outcome)
                paces[setting.head] = size, outcome.trial.seconds
                continue
            paces[setting.head] = size, outcome
        why = f"takes about {paces[setting.head][1]:.0f} s, {left:.0f} s were left" if left > 0 else "no time was left"
        untried.append(f"{setting}: {why}; give a larger --budget")
    if on_progress is not None:
        on_progress(AdviceProgress(len(settings), len(settings), ""))
    return found, untried


def _choose_inside(found: Sequence[_Found], folds: Sequence[int]) -> dict[int, _Found]:
    """In each fold what did best on its inner splits; of equals the cheaper one."""
    return {fold: max(found, key=lambda each: _rank(each.inner[fold])) for fold in folds}


def _answer_by(chosen: Mapping[int, _Found], folded: FoldedTask) -> Floats:
    """Scores [cases columns] of every fold's test cases by what was chosen there."""
    scores = np.full_like(next(iter(chosen.values())).scores, np.nan)
    for fold, each in chosen.items():
        tested = folded.find_tested(fold)
        scores[tested] = each.scores[tested]
    return scores


def _rank(value: float) -> float:
    """Every metric here is better when higher; an undefined one comes last."""
    return -math.inf if math.isnan(value) else value


def _write_command(
    source: Cache, labels: pl.DataFrame | Path | str, target: str, setting: Setting, given: Mapping[str, Any]
) -> str:
    place = "labels.csv" if isinstance(labels, pl.DataFrame) else str(labels)
    parts = ["embedkit", "train", str(source.path), "--labels", place, "--target", target, *setting.list_flags()]
    for name, value in given.items():
        parts += [] if value is None else [f"--{name}", str(value)]
    if load_head(setting.head).fit_by == "gradient":
        parts += ["--inner-splits", str(_SPLITS)]
    return shlex.join([*parts, "-o", "runs"])

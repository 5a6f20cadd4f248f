"""Owns `bench`: the tasks, heads and backbones of a suite, extracted, trained, searched and put in one table.

What is finished is not done again: `extract` and `train` resume by themselves, and a search is kept with what it was
of. Reads no suite file itself and fits nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from embedkit.backbones import require_backbone
from embedkit.benchtable import Score, rank_methods, tabulate_scores
from embedkit.cache import Cache, open_cache
from embedkit.errors import DifferentRunError, HeadError, SearchError, SuiteError, TaskError
from embedkit.extraction import extract
from embedkit.headplans import BASELINES
from embedkit.metrics import HIGHER_IS_BETTER
from embedkit.plugins import learned_kinds, load_head
from embedkit.runs import Run
from embedkit.suitedata import SuiteTables, read_tables, require_columns
from embedkit.suiteentries import SuiteBackbone, SuiteTask
from embedkit.suitefile import Suite, read_suite
from embedkit.suitereader import choose_nearest
from embedkit.suitesearch import judge_search
from embedkit.suitestate import SuiteState, open_state
from embedkit.targets import TaskKind, infer_kind
from embedkit.training import train

__all__ = ["Bench", "BenchProgress", "bench"]


@dataclass(frozen=True)
class BenchProgress:
    """Where a suite stands, in steps: an extraction, a training of tasks of one sort, or a search."""

    done: int
    total: int
    doing: str


@dataclass(frozen=True)
class Failure:
    """What could not be done, and why; the rest was."""

    what: str
    backbone: str
    reason: str


@dataclass(frozen=True, eq=False)
class Bench:
    """What `bench` found.

    Attributes:
        suite: As read, with the heads and backbones that were asked for.
        scores: Of every task, backbone and head.
        table: As `tabulate_scores`.
        methods: As `rank_methods`.
        extractions: A row per backbone and data set: ``backbone``, ``dataset``, ``cases``, ``seconds`` (of all calls).
        failures: Cases without tokens, and tasks that cannot be learned.
    """

    suite: Suite
    scores: tuple[Score, ...]
    table: pl.DataFrame
    methods: pl.DataFrame
    extractions: pl.DataFrame
    failures: tuple[Failure, ...]

    def __str__(self) -> str:
        return str(self.methods)


def bench(
    suite: Suite | Path | str,
    out: Path | str,
    *,
    data: Path | str | None = None,
    tasks: Sequence[str] = (),
    heads: Sequence[str] = (),
    backbones: Sequence[str] = (),
    weights: Mapping[str, Path | str] | None = None,
    device: str = "auto",
    on_progress: Callable[[BenchProgress], None] | None = None,
) -> Bench:
    """Runs every task of a suite with every backbone and head, and ranks them.

    Args:
        suite: A suite, its file, or the name of one that comes with embedkit.
        out: Folder of caches, runs and indexes; one that holds results of this suite is resumed.
        data: Where the paths of the suite begin; as in `read_suite`.
        tasks: Names of those to run; all if empty.
        heads: In place of the suite's; baselines are always there.
        backbones: In place of the suite's; a name that the suite has brings its options.
        weights: Backbone -> file, before those of the suite.
        device: ``auto``, ``cpu``, ``cuda``, ...
        on_progress: Called before every step and within it.

    Raises:
        SuiteError: the suite means nothing, a file of it is absent (weights are asked for whatever is finished), or
            ``out`` holds results of another one.
        HeadError, BackboneError: no such head or backbone, before anything runs; or as `extract` and `train`.
        RecipeError, CacheError, RunError: as `extract` and `train`; what is finished stays.
    """
    opened = suite if isinstance(suite, Suite) else read_suite(suite, data=data)
    opened = _narrow(opened, tasks, heads, backbones, weights or {})
    _require_parts(opened)
    folder = Path(out)
    chosen = list(dict.fromkeys(task.dataset for task in opened.tasks))
    tables = {name: read_tables(opened.datasets[name], folder / "datasets") for name in chosen}
    for task in opened.tasks:
        require_columns(task, tables[task.dataset])
    work = _Work(opened, folder, open_state(folder, opened), tables, device=device, on_progress=on_progress)
    for name in chosen:
        work.failures += [Failure(name, "", f"left out: {reason}") for reason in tables[name].skipped]
        for backbone in opened.backbones:
            work.run_dataset(name, backbone)
    order = {task.name: place for place, task in enumerate(opened.tasks)}
    scores = sorted(work.scores, key=lambda each: order[each.task])
    table = tabulate_scores(scores)
    methods = rank_methods(table) if scores else table
    return Bench(opened, tuple(scores), table, methods, pl.DataFrame(work.extractions), tuple(work.failures))


def _narrow(
    suite: Suite,
    tasks: Sequence[str],
    heads: Sequence[str],
    backbones: Sequence[str],
    weights: Mapping[str, Path | str],
) -> Suite:
    """The part of a suite that was asked for."""
    known = {task.name: task for task in suite.tasks}
    for name in tasks:
        if name not in known:
            raise SuiteError(f"suite {suite.name} has no task {name!r}{choose_nearest(name, known)}")
    listed = {each.name: each for each in suite.backbones}
    taken = [listed.get(name, SuiteBackbone(name, None, {})) for name in dict.fromkeys(backbones)]
    taken = taken or list(suite.backbones)
    names = [each.name for each in taken]
    for name in weights:
        if name not in names:
            raise SuiteError(f"weights are given for {name!r}, which is no backbone here{choose_nearest(name, names)}")
    return replace(
        suite,
        tasks=tuple(known[name] for name in dict.fromkeys(tasks)) or suite.tasks,
        heads=tuple(heads) or suite.heads,
        backbones=tuple(
            replace(each, weights=Path(weights[each.name])) if each.name in weights else each for each in taken
        ),
    )


def _require_parts(suite: Suite) -> None:
    """Raises for a head or backbone that is not installed, and for weights that are not there."""
    for head in dict.fromkeys((*suite.heads, *(head for task in suite.tasks for head in task.heads))):
        load_head(head)
    for each in suite.backbones:
        require_backbone(each.name)
        if each.weights is not None and not each.weights.is_file():
            raise SuiteError(f"weights {each.weights} of {each.name} are not there; check the suite and --weights")


class _Work:
    """Does the steps of a suite and keeps what they gave."""

    def __init__(
        self,
        suite: Suite,
        folder: Path,
        state: SuiteState,
        tables: Mapping[str, SuiteTables],
        *,
        device: str,
        on_progress: Callable[[BenchProgress], None] | None,
    ) -> None:
        self.suite = suite
        self.folder = folder
        self.state = state
        self.tables = tables
        self.device = device
        self.on_progress = on_progress
        self.scores: list[Score] = []
        self.failures: list[Failure] = []
        self.extractions: list[dict[str, Any]] = []
        self.groups = {name: _group_tasks(suite, name, table) for name, table in tables.items()}
        self.done = 0
        self.total = sum(1 + len(groups) for groups in self.groups.values()) * len(suite.backbones)

    def run_dataset(self, name: str, backbone: SuiteBackbone) -> None:
        """One extraction, then all tasks on its cache."""
        cache = self.extract(name, backbone)
        for options, tasks in self.groups[name]:
            if tasks[0].kind == "retrieval":
                self.search(cache, tasks[0], backbone)
            else:
                self.train(cache, dict(options), tasks, backbone)
            self.done += 1

    def tell(self, doing: str) -> None:
        if self.on_progress is not None:
            self.on_progress(BenchProgress(self.done, self.total, doing))

    def extract(self, name: str, backbone: SuiteBackbone) -> Cache:
        """The cache of a data set; cases that failed are noted."""
        place = f"{name}.{_as_file(backbone.name)}"
        doing = f"extract {name} with {backbone.name}"
        self.tell(doing)
        summary = extract(
            self.tables[name].manifest,
            self.folder / "caches" / place,
            backbone=backbone.name,
            weights=backbone.weights,
            device=self.device,
            on_progress=lambda at: self.tell(f"{doing}: case {at.cases_before + at.cases_done} of {at.cases}"),
            **{**self.suite.datasets[name].extract, **backbone.extract},
        )
        if summary.cases_done:
            self.state.extract_seconds[place] = self.state.extract_seconds.get(place, 0.0) + summary.seconds
            self.state.save()
        self.failures += [
            Failure(f"case {each.case_id} of {name}", backbone.name, each.reason) for each in summary.failures
        ]
        self.failures += [
            Failure(f"file beside {', '.join(each.beside)} of {name}", backbone.name, each.reason)
            for each in summary.strays
        ]
        cases, seconds = summary.cases_before + summary.cases_done, self.state.extract_seconds.get(place, 0.0)
        self.extractions.append({"backbone": backbone.name, "dataset": name, "cases": cases, "seconds": seconds})
        self.done += 1
        return open_cache(self.folder / "caches" / place)

    def train(
        self, cache: Cache, options: Mapping[str, Any], tasks: Sequence[SuiteTask], backbone: SuiteBackbone
    ) -> None:
        """Tasks that are trained in one call; where they cannot all be learned, one by one."""
        suite, targets = self.suite, list(dict.fromkeys(task.target for task in tasks))
        doing = f"train {', '.join(task.name for task in tasks)} on {backbone.name}"
        self.tell(doing)
        sort = "-".join([options["kind"], *map(str, options.get("classes") or ()), *_words(options)])
        try:
            trained = train(
                cache,
                self.tables[tasks[0].dataset].labels,
                targets=targets,
                out=self.folder / "runs" / cache.path.name / _as_file(sort),
                heads=_choose_heads(suite, tasks[0], options["kind"]),
                folds=suite.folds,
                seed=suite.seed,
                seeds=suite.seeds,
                sweep=suite.sweep,
                resamples=suite.resamples,
                device=self.device,
                resume=True,
                on_progress=lambda at: self.tell(f"{doing}: {at.head}, fit {at.done} of {at.total}"),
                **options,
            )
        except (TaskError, HeadError) as error:
            if len(targets) == 1:
                self.failures += [Failure(task.name, backbone.name, str(error)) for task in tasks]
                return
            for target in targets:
                self.train(cache, options, [task for task in tasks if task.target == target], backbone)
            return
        except DifferentRunError as error:
            raise SuiteError(
                f"{error.difference}; choose another --out, or remove the folder of that run, which is then made anew"
            ) from error
        for task in tasks:
            runs = [run for run in trained.runs if run.record.target == task.target]
            self.scores += [_score_run(task, backbone.name, run) for run in runs]

    def search(self, cache: Cache, task: SuiteTask, backbone: SuiteBackbone) -> None:
        """A retrieval task."""
        self.tell(f"search {task.name} with {backbone.name}")
        labels = self.tables[task.dataset].labels
        try:
            self.scores.append(judge_search(self.folder, cache, labels, task, backbone=backbone.name, suite=self.suite))
        except SearchError as error:
            self.failures.append(Failure(task.name, backbone.name, str(error)))


def _group_tasks(suite: Suite, dataset: str, tables: SuiteTables) -> list[tuple[dict[str, Any], list[SuiteTask]]]:
    """The tasks of a data set, those together that one call trains: alike in kind, classes, event, split and heads."""
    groups: list[tuple[dict[str, Any], list[SuiteTask]]] = []
    for task in suite.tasks:
        if task.dataset != dataset:
            continue
        options = _train_options(task, tables.labels)
        alike = [found for other, found in groups if other == options and found[0].heads == task.heads]
        if alike and task.kind != "retrieval":
            alike[0].append(task)
        else:
            groups.append((options, [task]))
    return groups


def _train_options(task: SuiteTask, labels: pl.DataFrame) -> dict[str, Any]:
    """Options of `train` that a task decides."""
    options: dict[str, Any] = {"kind": _resolve_kind(task, labels), "classes": task.classes or None}
    options |= {"event": task.event} if task.event is not None else {}
    return options | ({"split": task.split} if task.split is not None else {})


def _resolve_kind(task: SuiteTask, labels: pl.DataFrame) -> str:
    """The kind of a classification by its classes or labels; numbers are classes too."""
    if task.kind != "classification":
        return task.kind
    if task.classes:
        return "binary" if len(task.classes) == 2 else "multiclass"
    kind: TaskKind = infer_kind(labels[task.target], task.target)
    return "multiclass" if kind == "regression" else kind


def _choose_heads(suite: Suite, task: SuiteTask, kind: str) -> Sequence[str] | None:
    """The task's own heads, else those of the suite that learn its kind; None where neither names any."""
    if task.heads or not suite.heads:
        return task.heads or None
    return [head for head in suite.heads if kind in learned_kinds(head)]


def _words(options: Mapping[str, Any]) -> list[str]:
    return [str(options[key]) for key in ("event", "split") if key in options]


def _as_file(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"[^\w.-]", "-", name)


def _score_run(task: SuiteTask, backbone: str, run: Run) -> Score:
    record, metrics = run.record, run.metrics
    found = metrics[task.metric]
    return Score(
        task=task.name,
        dataset=task.dataset,
        kind=record.kind,
        backbone=backbone,
        head=record.head,
        baseline=record.head in BASELINES,
        metric=task.metric,
        value=found.value,
        low=found.low,
        high=found.high,
        higher_is_better=HIGHER_IS_BETTER[task.metric],
        metrics=dict(metrics),
        tokens=",".join(record.token_sets),
        parameters=record.parameters,
        seconds=record.seconds,
        path=str(run.path),
    )

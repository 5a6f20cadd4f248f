"""Owns `train`: many targets x heads x folds in one pass over a cache, each ending as a run; fits no head itself."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from embedkit.answers import score_columns
from embedkit.bags import list_views
from embedkit.cache import Cache, open_originals
from embedkit.copies import Copies
from embedkit.errors import OptionError
from embedkit.foldjobs import FoldedTask
from embedkit.headplans import BASELINES, DEFAULT_HEADS, HeadPlan, TokenChoice, match_heads, plan_heads
from embedkit.jointfitting import deal_jointly, deal_together
from embedkit.keeping import Keeper, require_keepable
from embedkit.manifest import read_labels
from embedkit.planning import choose_device
from embedkit.resuming import is_finished
from embedkit.rounds import Work
from embedkit.runfolder import require_absent
from embedkit.runs import Run, open_run
from embedkit.storage import Storage
from embedkit.supervision import Supervision
from embedkit.targets import TaskKind
from embedkit.tasks import Task, folds_from_column, folds_from_groups, make_task, repeat_folds
from embedkit.trainingoptions import check_events, check_folds, check_imbalance, check_runs, part_task_options
from embedkit.trainingrecords import (
    TrainedTarget,
    describe_sweep,
    list_fit_options,
    tabulate_scores,
)
from embedkit.warmstart import WarmStart, plan_start, require_fresh

__all__ = ["BASELINES", "DEFAULT_HEADS", "Training", "TrainingProgress", "train"]


@dataclass(frozen=True)
class TrainingProgress:
    """Where a training stands, in fits: one is one head on one target without one fold."""

    target: str
    head: str
    fold: int
    done: int
    total: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Training:
    """What `train` made.

    Attributes:
        runs: In the order of targets, then heads.
        table: One row per run: target, head, tokens, parameters, seconds, path, and value, low and high per metric
            (``auroc``, ``auroc_low``, ``auroc_high``, ...).
    """

    runs: tuple[Run, ...]
    table: pl.DataFrame

    def __str__(self) -> str:
        return str(self.table)


def train(
    cache: Cache | Path | str,
    labels: pl.DataFrame | Path | str | None = None,
    *,
    targets: Sequence[str] | str = (),
    out: Path | str,
    masks: pl.DataFrame | Path | str | None = None,
    copies: Cache | Path | str | None = None,
    heads: Sequence[str] | None = None,
    token_sets: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    views: Sequence[str] | None = None,
    kind: TaskKind | None = None,
    classes: Sequence[str] | None = None,
    event: str | Mapping[str, str] | None = None,
    times: Sequence[float] | None = None,
    folds: int = 5,
    repeats: int = 1,
    split: str | None = None,
    group_by: str | None = None,
    same_folds: bool = False,
    sweep: str | None = None,
    seed: int = 0,
    seeds: int = 1,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    head_options: Mapping[str, Mapping[str, Any]] | None = None,
    fit_options: Mapping[str, Any] | None = None,
    resamples: int = 2000,
    storage: Storage = "auto",
    start: Run | Path | str | None = None,
    keep_old: int | None = None,
    keep_weight: float = 1.0,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> Training:
    """Trains heads on the cached tokens of labelled cases and writes one run folder ``OUT/TARGET.HEAD`` each.

    Every fold's patients are tested by a head that saw nothing of them: standardisation, penalty, number of epochs and
    sharpness are fitted on the other folds alone. A run keeps the heads of all folds and predicts with their mean.

    Args:
        cache: A cache or its path.
        labels: Table with ``case_id`` and the targets, or its file; None learns masks without any label, beside their
            own volume as the target ``mask_ml``, which needs no table.
        targets: One or more columns.
        out: Folder of the run folders.
        masks: Manifest with a column ``mask``, as read_manifest takes it. Heads that learn masks (``grid``, ``tail``,
            ``segment``) learn them beside the label, from the cases that have one; ``mask_weight`` of ``fit_options``
            says how much that counts. Their metrics then have ``dice``, out of fold, on the grid of tokens.
        copies: A cache of altered copies of the cases, made by `embedkit.extract` with ``augment`` and the options of
            ``cache``; of token sets it need hold those alone that heads trained by gradient read. Such heads are shown
            the copies of a fold's training cases beside these, in fewer epochs, so that there are about as many steps.
            Baselines see no copy; and no copy is held out, tested, standardised on or scored, nor seen while a case of
            its patient is. A mask is moved as its copy is.
        heads: Names; None for `DEFAULT_HEADS` (those that can read this cache). `BASELINES` are always trained too.
        token_sets: What all heads read (each those that it can), or per head; None for what each head prefers.
        views: What heads see, each as ``flair`` or ``flair/axial``; None for all. Cases without any are left aside.
        kind: Of all targets; None infers it per target.
        classes: Values to learn, as in `make_task`.
        event: Column that says whether the time in the target ended with the event (1) or was censored (0): all targets
            are survival tasks. Or target -> column, which makes those survival tasks.
        times: At which the survival of those is stated, as in `make_task`.
        folds: Number of patient-grouped, stratified folds.
        repeats: Times that the folds are dealt anew. Each metric is the mean of what it is in each deal: mean scores
            over deals would be those of an ensemble that nobody gets, and better than what is told of one training.
            The interval draws patients, each with all its scores. New cases are predicted by the mean of all members.
        split: Column of ``labels`` that holds the folds instead, as in `folds_from_column`: a published split.
        group_by: Column of ``labels``, each value of which is left out in turn, as in `folds_from_groups`: a site.
        same_folds: Deal the cases once for all targets, so that whoever is tested for one is in training for none, and
            hold out the same cases to choose by. Each class of each target is in every fold still. Targets that the
            same cases have are then fitted as candidates of a sweep are, in a part of the time.
        sweep: ``small`` (dozens) or ``large`` (hundreds of candidates): learning rate, weight decay, dropout, size and
            token set of every head are chosen anew in each fold, by three inner splits of its training cases alone;
            baselines are tried on every token set.
        seed: Of folds, initial weights, batches and dropout; equal seeds give equal runs on one device.
        seeds: Members per fold, each from other initial weights and with other dropout, whose mean is the score.
        device: ``auto``, ``cpu``, ``cuda``, ...
        overwrite: Replace runs that exist.
        resume: Keep runs that exist, if they are what this training would make, and train the others.
        head_options: Head -> its own options.
        fit_options: Fields of `FitOptions` for all heads trained by gradient.
        resamples: Of the bootstrap for the intervals.
        storage: Where tokens that are read every epoch lie: ``device``, ``memory``, or ``stream``, block by block from
            the cache; ``auto`` takes the first that holds them. The results are the same.
        start: A run whose head the new one of the same name starts from, see `embedkit.warmstart`; ``heads`` are then
            that one unless given, its options and token sets those of the run. Where the run knows patients of a
            target, its folds are kept.
        keep_old: Most exemplars per fold on which the head is held to the answers of ``start``, see
            `embedkit.keeping`; its run as it is then is written too, ``OUT/OLD_TARGET.HEAD``. None keeps nothing.
        keep_weight: What that counts beside the loss of the new target.
        on_progress: Called after every fit.

    Raises:
        TaskError: a target cannot be learned (before anything is trained).
        HeadError: unknown head, or one that cannot read the cache or breaks its contract.
        RunError: a run folder exists, or cannot be written.
        CacheError: the cache is damaged, holds no stack or lacks a token set or view, or holds copies.
        RecipeError, ManifestError: the copies are not of this cache, as `embedkit.copies.Copies`.
        OptionError: an option means nothing.
    """
    source = open_originals(cache)
    source = source if views is None else source.only_views(views)
    supervision = Supervision(source, masks)
    labels, targets, heads = supervision.stand_in(labels, targets, heads)
    table = read_labels(labels)
    names = [targets] if isinstance(targets, str) else list(dict.fromkeys(targets))
    if not names:
        raise OptionError("no target was given, expected one or more columns of the label table")
    check_events(names, event)
    chosen = choose_device(device)
    check_runs(resume=resume, overwrite=overwrite, seeds=seeds)
    check_folds(repeats=repeats, split=split, group_by=group_by, same=same_folds, starts=start is not None)
    keeps = keep_old is not None
    if keep_old is not None:
        require_keepable(
            keep_old,
            keep_weight,
            starts=start is not None,
            targets=names,
            masks=masks is not None,
            copies=copies is not None,
        )
    asked: dict[str, Any] = {"heads": heads, "token_sets": token_sets, "head_options": head_options or {}}
    begun, heads, token_sets, head_options = _begin(
        start,
        source,
        supervision,
        **asked,
        fresh={"sweep": sweep, "repeats": repeats, "resume": resume},
        keeps=keeps,
    )
    plans = plan_heads(source, heads, token_sets, head_options, fit_options or {}, sweep=sweep, seed=seed)
    shown = None if copies is None else Copies(source, copies)
    folders = _plan_folders(Path(out), names, plans, kept=begun if keeps else None, overwrite=overwrite or resume)
    usable, blank = _split_usable(source)
    made = [
        make_task(table, name, usable, **part_task_options(name, kind=kind, classes=classes, event=event, times=times))
        for name in names
    ]
    tasks = [task for task, _ in made]
    plans = plans if shown is None else shown.plan(plans, {case for task in tasks for case in task.case_ids})
    check_imbalance(plans, tasks)
    matched = match_heads(plans, tasks, heads)
    deal = partial(
        _deal, table=table, begun=begun, split=split, group_by=group_by, folds=folds, repeats=repeats, seed=seed
    )
    together = deal_together(tasks, deal) if same_folds else {}
    joint = deal_jointly(matched, tasks, deal, together)
    dealt = [joint.parts.get(task.name) or together.get(task.name) or deal(task) for task in tasks]
    prepared = tuple(
        TrainedTarget(each, split or group_by or len(each.tested) // len(each.folds), report, blank)
        for each, (_, report) in zip(dealt, made, strict=True)
    )
    keeper = None
    if begun is not None and keep_old is not None:
        (plan,) = (plan for plan in plans if plan.head == begun.head)
        keeper = Keeper(begun, source, plan, dealt[0], usable=usable, count=keep_old, weight=keep_weight)
    exemplars = () if keeper is None else keeper.case_ids
    case_ids = sorted({*exemplars, *(case for task in tasks for case in task.case_ids)})
    supervision.measure(plans, case_ids, copies=None if shown is None else shown.cache.recipe)
    given: dict[str, Any] = {"folds": split or group_by or folds, "repeats": repeats, "sweep": sweep, "seed": seed}
    wanted = [(plan, target) for plan in plans for target in prepared if plan in matched[target.task.name]]
    work = Work(
        source, joint, supervision, folders, begun=begun, keeper=keeper, copies=shown, device=chosen, storage=storage
    )
    pending = [pair for pair in wanted if not resume or not _is_done(work, *pair, given=given, seeds=seeds)]
    account = _Account(wanted, pending, on_progress)
    how: dict[str, Any] = {"sweep": sweep, "seed": seed, "seeds": seeds, "resamples": resamples}
    work.run(pending, case_ids, overwrite=overwrite, on_fold=account.after_fold, **how)
    written = [(target.task.name, plan.head) for target in prepared for plan in matched[target.task.name]]
    if keeper is not None:
        written.append((keeper.start.run.record.target, keeper.start.head))
    runs = [open_run(folders[each]) for each in written]
    return Training(tuple(runs), _tabulate_runs(runs))


def _begin(
    start: Run | Path | str | None,
    source: Cache,
    supervision: Supervision,
    *,
    heads: Sequence[str] | None,
    token_sets: TokenChoice,
    head_options: Mapping[str, Mapping[str, Any]],
    fresh: Mapping[str, Any],
    keeps: bool,
) -> tuple[WarmStart | None, Sequence[str] | None, TokenChoice, Mapping[str, Mapping[str, Any]]]:
    """What heads start from, which are trained, on which token sets and with which options."""
    if start is None:
        return None, heads, token_sets, supervision.ask(DEFAULT_HEADS if heads is None else heads, head_options)
    require_fresh(token_sets=token_sets, **fresh)
    opened = start if isinstance(start, Run) else open_run(start)
    asked = supervision.ask(heads or [opened.head], head_options)
    return plan_start(opened, source, heads, asked, keeps=keeps)


def _deal(
    task: Task,
    *,
    table: pl.DataFrame,
    begun: WarmStart | None,
    split: str | None,
    group_by: str | None,
    folds: int,
    repeats: int,
    seed: int,
) -> FoldedTask:
    """The folds of a task; the options are those of `train`."""
    if begun is not None and (kept := begun.deal(task, column=split or group_by)) is not None:
        return kept
    if split is not None:
        return FoldedTask(task, folds_from_column(task, table, split)[None])
    if group_by is not None:
        return FoldedTask(task, folds_from_groups(task, table, group_by)[None])
    return FoldedTask(task, repeat_folds(task, folds, repeats=repeats, seed=seed))


class _Account:
    """Counts the fits that are done and tells the caller."""

    def __init__(
        self,
        wanted: Sequence[tuple[HeadPlan, TrainedTarget]],
        pending: Sequence[tuple[HeadPlan, TrainedTarget]],
        on_progress: Callable[[TrainingProgress], None] | None,
    ) -> None:
        self.total = sum(len(target.folded.tested) for _, target in wanted)
        self.done = self.total - sum(len(target.folded.tested) for _, target in pending)
        self.on_progress = on_progress
        self.started = time.perf_counter()

    def after_fold(self, plan: HeadPlan, target: FoldedTask, fold: int) -> None:
        """To be called after every fold of a run."""
        self.done += 1
        if self.on_progress is not None:
            seconds = time.perf_counter() - self.started
            self.on_progress(TrainingProgress(target.task.name, plan.head, fold, self.done, self.total, seconds))


def _is_done(work: Work, plan: HeadPlan, target: TrainedTarget, *, given: Mapping[str, Any], seeds: int) -> bool:
    """Whether a run is there that this training need not make again.

    Raises:
        RunError: another one is there.
    """
    task, source = target.task, work.source
    folder, masks = work.folders[task.name, plan.head], work.supervision.count(plan, task)
    plan = work.joint.place(plan, task)
    members = len(target.folded.tested) * (seeds if plan.by_gradient else 1)
    fields = {
        "target": task.name,
        "kind": task.kind,
        "classes": task.classes,
        "head": plan.head,
        "head_options": plan.options,
        "copies": None if work.copies is None else work.copies.describe(plan, task),
        "fit_options": list_fit_options(plan, plan.candidates[0]),
        "folds": given["folds"],
        "repeats": given["repeats"],
        "seed": given["seed"],
        "sweep": describe_sweep(plan, given["sweep"]),
        "fingerprint": source.recipe.fingerprint,
        "views": list_views(source),
        "event": task.event,
        "times": task.times,
        "member_count": members,
        "masks": masks,
        "folded_with": target.folded_with,
    }
    if given["sweep"] is None:
        fields["token_sets"] = plan.token_sets
    nothing = np.zeros((*target.folds.shape, len(score_columns(task.kind, task.classes, task.times))))
    return is_finished(folder, fields, tabulate_scores(target, nothing).select("case_id", "fold", "target"))


def _plan_folders(
    out: Path, targets: Sequence[str], plans: Sequence[HeadPlan], *, kept: WarmStart | None, overwrite: bool
) -> dict[tuple[str, str], Path]:
    """The run folder of each target and head, an old run that is kept among them; free before anything is trained."""
    wanted = [(target, plan.head) for target in targets for plan in plans]
    if kept is not None:
        wanted.append((kept.run.record.target, kept.head))
    folders: dict[tuple[str, str], Path] = {}
    for target, head in wanted:
        safe = re.sub(r"[^\w.-]", "_", target).lstrip(".") or "_"
        path = out / f"{safe}.{head}"
        if path in folders.values():
            raise OptionError(f"two targets would both write to {path}; rename the column {target!r}")
        if kept is not None and path.resolve() == kept.run.path.resolve():
            raise OptionError(
                f"run {kept.run.name} would be written over where it lies, {path}; choose another --out, so that it can"
                " be compared with what training made of it"
            )
        require_absent(path, overwrite=overwrite)
        folders[target, head] = path
    return folders


def _split_usable(source: Cache) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """Cases (case_id, patient_id) with a slice that is not blank, and the ids of those without."""
    cases = source.stacks.group_by("case_id", "patient_id", maintain_order=True).agg(
        real=(pl.col("count") - pl.col("blank_count")).sum()
    )
    blank = cases.filter(pl.col("real") == 0)["case_id"].to_list()
    return cases.filter(pl.col("real") > 0).select("case_id", "patient_id"), tuple(blank)


def _tabulate_runs(runs: Sequence[Run]) -> pl.DataFrame:
    rows = []
    for run in runs:
        record = run.record
        row: dict[str, Any] = {
            "target": record.target,
            "head": record.head,
            "baseline": record.head in BASELINES,
            "tokens": ",".join(record.token_sets),
            "parameters": record.parameters,
            "seconds": record.seconds,
        }
        for name, found in record.metrics.items():
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        rows.append(row | {"path": str(run.path)})
    return pl.DataFrame(rows, infer_schema_length=None)

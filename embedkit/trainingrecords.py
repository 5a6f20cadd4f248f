"""Owns what a training tells of each run: its record, its scores out of fold and those of its inner splits, as tables.

Fits nothing and writes no file.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from embedkit.answers import score_array, score_columns
from embedkit.cache import Cache
from embedkit.crossfitting import CrossFit, InnerScores
from embedkit.fitting import FitReport
from embedkit.foldjobs import FoldedTask
from embedkit.headplans import HeadPlan
from embedkit.jointtasks import JointTask
from embedkit.layers import layer_weights
from embedkit.members import Member, count_parameters
from embedkit.metrics import compute_metrics
from embedkit.plugins import list_heads
from embedkit.recipe import TokenSet
from embedkit.runfolder import RunRecord
from embedkit.slices import PLANES
from embedkit.sweeps import Candidate
from embedkit.tasks import Task, TaskReport

__all__ = ["TrainedTarget", "describe_sweep", "list_fit_options", "make_record", "tabulate_inner", "tabulate_scores"]


@dataclass(frozen=True, eq=False)
class TrainedTarget:
    """A task with its folds and what was left aside.

    Attributes:
        folded: The task and its folds.
        split: The column that the folds came from; else how many there are in a deal.
        report: Which labels could not be used.
        blank: Cases without a slice that is not blank.
    """

    folded: FoldedTask
    split: int | str
    report: TaskReport
    blank: tuple[str, ...]

    @property
    def task(self) -> Task:
        return self.folded.task

    @property
    def folds(self) -> NDArray[np.int64]:
        return self.folded.folds

    @property
    def folded_with(self) -> tuple[str, ...]:
        """Other targets that have its folds and inner splits too."""
        if self.folded.joint is None:
            return ()
        return tuple(part.name for part in cast(JointTask, self.folded.joint.task).parts if part.name != self.task.name)


def make_record(
    source: Cache,
    plan: HeadPlan,
    target: TrainedTarget,
    fitted: CrossFit,
    *,
    sweep: str | None,
    seed: int,
    seconds: float,
    resamples: int,
    more: Sequence[str] = (),
) -> RunRecord:
    """The record of a run.

    Args:
        source: What it was trained on.
        plan: Of its head.
        target: What it learned.
        fitted: What came of it.
        sweep: Name of the sweep, if any.
        seed: Of the training.
        seconds: That its fits took.
        resamples: Of the bootstrap for the intervals.
        more: Notes for the reader, beside those that follow from the rest.
    """
    task = target.task
    tested = np.flatnonzero(target.folds[0] >= 0)
    patients = [task.patient_ids[case] for case in tested]
    scores = np.stack([score_array(task.kind, each[tested]) for each in fitted.scores])
    judged: dict[str, Any] = {"repeated": True, "times": task.times, "resamples": resamples, "seed": seed}
    return RunRecord(
        name=f"{task.name}.{plan.head}",
        target=task.name,
        kind=task.kind,
        classes=task.classes,
        head=plan.head,
        head_options=plan.options,
        outputs=plan.outputs(task),
        shape=fitted.shape,
        recipe=source.recipe,
        event=task.event,
        times=task.times,
        metrics=compute_metrics(task.kind, task.targets[tested], scores, patients, **judged),
        members=tuple(
            _describe_member(plan, int((target.folds == fold).sum()), fold, report, member)
            for fold, report, member in zip(fitted.folds, fitted.reports, fitted.members, strict=True)
        ),
        fit_options=list_fit_options(plan, plan.candidates[0]),
        folds=target.split,
        folded_with=target.folded_with,
        repeats=len(target.folds),
        seed=seed,
        parameters=max(count_parameters(member) for member in fitted.members),
        seconds=round(seconds, 3),
        versions=_versions(plan.head),
        cases={
            "trained": len(task.case_ids),
            "patients": len(set(task.patient_ids)),
            "untested_patients": sorted({task.patient_ids[case] for case in np.flatnonzero(target.folds[0] < 0)}),
            "unlabelled": list(target.report.unlabelled),
            "unknown": list(target.report.unknown),
            "left_out": list(target.report.left_out),
            "without_usable_slice": list(target.blank),
        },
        sweep=describe_sweep(plan, sweep),
        notes=(*_notes(plan, fitted.shape.views), *_tell_layers(plan, fitted.members), *fitted.notes, *more),
    )


def _describe_member(plan: HeadPlan, tested: int, fold: int, report: FitReport, member: Member) -> dict[str, Any]:
    candidate = plan.candidates[report.candidate]
    described = {
        "fold": fold,
        "tested": tested,
        "token_sets": list(candidate.token_sets),
        "head_options": candidate.options,
        "epochs": report.epochs,
        "held_out_loss": report.held_out_loss,
        "choices": report.choices,
    }
    if weights := layer_weights(member.head):
        described["layer_weights"] = {name: round(weight, 4) for name, weight in weights.items()}
    return described | ({"candidate": report.candidate, "ranking": report.ranking} if report.ranking else {})


def describe_sweep(plan: HeadPlan, sweep: str | None) -> dict[str, Any] | None:
    """The candidates of a sweep as a record keeps them; None where there was none."""
    if sweep is None:
        return None
    candidates = [
        {"token_sets": list(each.token_sets), "head_options": each.options, "fit_options": list_fit_options(plan, each)}
        for each in plan.candidates
    ]
    return {"name": sweep, "candidates": candidates}


def list_fit_options(plan: HeadPlan, candidate: Candidate) -> dict[str, Any]:
    """The fit options of a candidate that count for its head."""
    return asdict(candidate.fit) if plan.by_gradient else {"class_weights": candidate.fit.class_weights}


def _versions(head: str) -> dict[str, str]:
    entry = list_heads()[head]
    return {
        "embedkit": importlib.metadata.version("embedkit"),
        "head": f"{entry.distribution} {entry.version}",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": importlib.metadata.version("scikit-learn"),
        "python": platform.python_version(),
    }


def _notes(plan: HeadPlan, views: Sequence[str]) -> tuple[str, ...]:
    """Where a baseline is not what its paper has."""
    if plan.head != "raptor":
        return ()
    notes = []
    if absent := [plane for plane in PLANES if not any(view.endswith(f"/{plane}") for view in views)]:
        notes.append(f"Raptor is defined on three planes; this cache lacks {' and '.join(absent)}")
    kinds = [TokenSet.parse(name) for name in plan.token_sets]
    if not any(found.kind == "patch" for found in kinds):
        notes.append("Raptor is defined on patch tokens; this cache holds none, so it read class tokens")
    elif any(found.grid is not None for found in kinds):
        notes.append(f"Raptor is defined on the full patch grid; here it read {', '.join(plan.token_sets)}")
    return tuple(notes)


def _tell_layers(plan: HeadPlan, members: Sequence[Member]) -> tuple[str, ...]:
    """How heavy each layer is to the members that mix some, and between which bounds."""
    found: dict[str, list[float]] = {}
    for member in members:
        for name, weight in layer_weights(member.head).items():
            found.setdefault(name, []).append(weight)
    if not found:
        return ()
    told = sorted(found, key=lambda name: -float(np.mean(found[name])))
    shares = [f"{name} {np.mean(found[name]):.2f} [{min(found[name]):.2f}, {max(found[name]):.2f}]" for name in told]
    return (f"{plan.head} weighs its layers {', '.join(shares)}: mean and range over its members",)


def tabulate_scores(target: TrainedTarget, scores: NDArray[np.float64]) -> pl.DataFrame:
    """Out-of-fold predictions [repeats cases columns] of the cases that are in a fold, one deal after the other."""
    tested = np.flatnonzero(target.folds[0] >= 0)
    tables = [
        _tabulate_cases(target.task, tested, each[tested]).insert_column(2, pl.Series("fold", folds[tested]))
        for folds, each in zip(target.folds, scores, strict=True)
    ]
    return pl.concat(tables)


def tabulate_inner(task: Task, inner: Sequence[InnerScores]) -> pl.DataFrame:
    """Scores of held-out training cases: fold, split, then the columns of `_tabulate_cases`."""
    parts = [
        _tabulate_cases(task, each.cases, each.scores).select(
            pl.lit(each.fold, pl.Int64).alias("fold"), pl.lit(each.split, pl.Int64).alias("split"), pl.all()
        )
        for each in inner
    ]
    return pl.concat(parts)


def _tabulate_cases(task: Task, cases: NDArray[np.int64], scores: NDArray[np.float64]) -> pl.DataFrame:
    """``case_id``, ``patient_id``, ``target``, for survival ``event``, and the scores [cases columns] of some cases."""
    if task.kind == "survival":
        truth: list[Any] = task.targets[:, 0].tolist()
    elif task.kind == "regression":
        truth = task.targets.tolist()
    elif task.kind == "multilabel":
        truth = [";".join(name for name, has in zip(task.classes, row, strict=True) if has) for row in task.targets]
    else:
        truth = [task.classes[code] for code in task.targets]
    return pl.DataFrame(
        {
            "case_id": [task.case_ids[case] for case in cases],
            "patient_id": [task.patient_ids[case] for case in cases],
            "target": [truth[case] for case in cases],
            **({"event": task.targets[cases, 1].astype(np.int64)} if task.kind == "survival" else {}),
            **dict(zip(score_columns(task.kind, task.classes, task.times), scores.T, strict=True)),
        }
    )

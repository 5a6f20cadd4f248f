"""Owns cross-fitting: heads fitted without each fold's cases and scored on them; reads no label and writes no file.

First every candidate is fitted on each inner split, with some training patients held out, which tells how many epochs
help and which candidate does best. That one is then fitted on all training cases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedkit.answers import score_columns
from embedkit.bags import BagShape, bag_shape
from embedkit.fitting import FitReport, fit_closed_form
from embedkit.foldjobs import FoldedTask, FoldJob, make_job, rank
from embedkit.gradientfits import GradientFitter, HeadStart
from embedkit.headplans import HeadPlan
from embedkit.losses import TaskLoss
from embedkit.members import Member
from embedkit.preparation import Preparation
from embedkit.sweeps import Candidate

__all__ = ["CrossFit", "InnerScores", "cross_fit", "gather_fits", "isolated_generators", "score_logits"]

OnFold = Callable[[HeadPlan, FoldedTask, int], None]


@dataclass(frozen=True, eq=False)
class InnerScores:
    """What a fold's choices were made by: scores of training cases that were held out once.

    Attributes:
        fold: Whose training cases they are.
        split: Number of the inner split within the fold.
        cases: int64 [held], numbers of the held-out cases in the task.
        scores: float64 [held columns].
    """

    fold: int
    split: int
    cases: NDArray[np.int64]
    scores: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CrossFit:
    """The heads of all folds of one task.

    Attributes:
        shape: Of the bags that they read, together.
        folds: Of each member.
        members: One per fold and seed.
        reports: One per member.
        scores: float64 [repeats cases columns], each case in each deal of the folds by the mean of the members of the
            fold that tested it; NaN where in no fold.
        inner: Of every fold and inner split.
        notes: What the user should know of how they were trained.
        kept: One per member where the answers of an old run are kept: for its target, with the same layers.
    """

    shape: BagShape
    folds: tuple[int, ...]
    members: tuple[Member, ...]
    reports: tuple[FitReport, ...]
    scores: NDArray[np.float64]
    inner: tuple[InnerScores, ...]
    notes: tuple[str, ...] = ()
    kept: tuple[Member, ...] = ()


def cross_fit(
    preparation: Preparation,
    wanted: Sequence[tuple[HeadPlan, FoldedTask]],
    *,
    seed: int,
    seeds: int = 1,
    start: HeadStart | None = None,
    on_fold: OnFold | None = None,
) -> list[CrossFit]:
    """Fits heads on every fold of some tasks, those by gradient in common passes over the tokens.

    Args:
        preparation: What they share.
        wanted: Plans and tasks of the preparation.
        seed: Of splits, weights, batches and dropout.
        seeds: Members per fold, of heads fitted by gradient.
        start: What the fits of its head start from.
        on_fold: Called with every fold that is done.

    Returns:
        One per plan and task.

    Raises:
        HeadError: a head breaks its contract or diverges.
        TaskError: a fold cannot be split further.
    """
    device = preparation.device
    jobs = [[make_job(*pair, fold, seed=seed, device=device) for fold in pair[1].tested] for pair in wanted]
    gradient = [job for each in jobs for job in each if job.plan.by_gradient]
    fitter = GradientFitter(preparation, seed, seeds=seeds, start=start)

    def tell(job: FoldJob) -> None:
        if on_fold is not None:
            on_fold(job.plan, job.target, job.fold)

    with isolated_generators(device):
        fitter.fit(gradient, on_done=tell)
        for each in jobs:
            for job in each:
                if not job.plan.by_gradient:
                    _fit_closed_form(preparation, job)
                    tell(job)
        answers = [
            fitter.answer(each) if each[0].plan.by_gradient else [_answer_closed_form(preparation, job) for job in each]
            for each in jobs
        ]
    return [
        _collect(preparation, each, found, fitter.notes(each[0].plan.head))
        for each, found in zip(jobs, answers, strict=True)
    ]


def _fit_closed_form(preparation: Preparation, job: FoldJob) -> None:
    """Fits every candidate and keeps the one that does best on the inner splits."""
    training, weights = job.training, job.plan.fit.class_weights
    held = [each[training] for each in job.splits]
    found: list[tuple[Member, FitReport]] = []
    for candidate in job.plan.candidates:
        torch.manual_seed(job.seed)
        member = job.build_member(preparation.shape(candidate), candidate)
        features = _features(preparation, job, candidate)[torch.from_numpy(training)]
        report = fit_closed_form(member, features, job.task.targets[training], held, class_weights=weights)
        found.append((member, report))
    ranking = rank([_inner_loss(job, report) for _, report in found])
    best, loss = ranking[0]
    member, report = found[best]
    ranked = ranking if len(ranking) > 1 else ()
    job.fitted.append((member, dataclasses.replace(report, held_out_loss=loss, candidate=best, ranking=ranked)))


def _inner_loss(job: FoldJob, report: FitReport) -> float:
    """Mean over the inner splits of the loss on the cases held out."""
    pairs, judge = zip(job.splits, report.inner, strict=True), cast(TaskLoss, job.loss).judge
    return float(
        np.mean([float(judge(logits.float(), torch.from_numpy(np.flatnonzero(held)))) for held, logits in pairs])
    )


def _answer_closed_form(preparation: Preparation, job: FoldJob) -> list[Tensor]:
    """Logits of the tested cases, by the one member."""
    member, report = job.fitted[0]
    features = _features(preparation, job, job.plan.candidates[report.candidate])
    with torch.no_grad():
        return [cast(Any, member.head).read_out(features[torch.from_numpy(job.tested)])]


def _features(preparation: Preparation, job: FoldJob, candidate: Candidate) -> Tensor:
    """Features [cases features] of the task's cases."""
    return preparation.features(job.plan, candidate)[torch.from_numpy(preparation.places(job.task))]


def _collect(
    preparation: Preparation, jobs: Sequence[FoldJob], answers: Sequence[Sequence[Tensor]], notes: tuple[str, ...]
) -> CrossFit:
    """The members of all folds and their scores."""
    plan, task = jobs[0].plan, jobs[0].task
    target, columns = jobs[0].target, score_columns(task.kind, task.classes, task.times)
    scores = np.full((*target.folds.shape, len(columns)), np.nan)
    inner: list[InnerScores] = []
    for job, found in zip(jobs, answers, strict=True):
        members = [member for member, _ in job.fitted]
        scores[target.find_repeat(job.fold), job.tested] = np.mean(
            [score_logits(*pair) for pair in zip(members, found, strict=True)], axis=0
        )
        inner += [
            InnerScores(job.fold, split, np.flatnonzero(held), score_logits(members[0], logits))
            for split, (held, logits) in enumerate(zip(job.splits, job.fitted[0][1].inner, strict=True))
        ]
    fitted = [(job.fold, member, report) for job in jobs for member, report in job.fitted]
    return gather_fits(preparation, plan, fitted, scores, inner, notes=notes)


def gather_fits(
    preparation: Preparation,
    plan: HeadPlan,
    fitted: Sequence[tuple[int, Member, FitReport]],
    scores: NDArray[np.float64],
    inner: Sequence[InnerScores],
    *,
    notes: tuple[str, ...] = (),
) -> CrossFit:
    """The members of all folds, each with its fold and how its fit went, with their scores as `CrossFit` has them."""
    chosen = [plan.candidates[report.candidate].token_sets for _, _, report in fitted]
    return CrossFit(
        shape=bag_shape(preparation.source, list(dict.fromkeys(name for names in chosen for name in names))),
        folds=tuple(fold for fold, _, _ in fitted),
        members=tuple(member for _, member, _ in fitted),
        reports=tuple(report for _, _, report in fitted),
        scores=scores,
        inner=tuple(inner),
        notes=notes,
    )


def score_logits(member: Member, logits: Tensor) -> NDArray[np.float64]:
    """Scores [cases columns] of logits [cases outputs]."""
    scores: NDArray[np.float64] = member.scores(logits).reshape(len(logits), -1).double().cpu().numpy()
    return scores


@contextmanager
def isolated_generators(device: torch.device) -> Iterator[None]:
    """Lets torch's generators be seeded for a while; afterwards they are as they were."""
    cuda = device.type == "cuda"
    devices = [torch.cuda.current_device() if device.index is None else device.index] if cuda else []
    with torch.random.fork_rng(devices=devices):
        yield

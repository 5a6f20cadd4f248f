"""Owns the training that keeps an old run's answers while its head learns a new target; writes no run.

The head has the outputs of both targets; it starts from the old run, learns the new one, and is held to the old answers
on exemplars (`embedkit.distillation`). Afterwards it is parted into two heads that share all but their last layer, so
that a run of either target looks like any other. In every fold exemplars are of the old run's training cases, and of no
patient that either target tests there: so the old run's score, out of fold, can be told again.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedkit.answers import score_columns
from embedkit.bags import Bag, bag_shape, stream_bags
from embedkit.cache import Cache
from embedkit.crossfitting import CrossFit, InnerScores, gather_fits, isolated_generators, score_logits
from embedkit.distillation import Buffer, KeepingLoss, KeepingTask, join_buffer
from embedkit.errors import OptionError, RunError
from embedkit.exemplars import choose_exemplars
from embedkit.fitting import FitReport
from embedkit.foldjobs import FoldedTask, FoldJob, make_job, make_task_loss
from embedkit.gradientfits import GradientFitter
from embedkit.headplans import HeadPlan
from embedkit.keptruns import list_known, tell_kept
from embedkit.members import Member, build_member
from embedkit.plugins import create_head
from embedkit.preparation import Preparation
from embedkit.runfolder import RunRecord
from embedkit.targets import count_noun
from embedkit.tasks import Task
from embedkit.warmstart import WarmStart

__all__ = ["Keeper", "require_keepable"]

OnFold = Callable[[HeadPlan, FoldedTask, int], None]


def require_keepable(
    exemplars: int, weight: float, *, starts: bool, targets: Sequence[str], masks: bool, copies: bool
) -> None:
    """Stops where old answers are to be kept in a way that means nothing.

    Raises:
        OptionError: there is no old run, not one target, no exemplar, a weight below 0, or masks or copies
            are learned from too.
    """
    problem = ""
    if not starts:
        problem = "no old run was given to start from, with --from"
    elif len(targets) != 1:
        problem = f"targets are {', '.join(targets)}, expected one: train each in a call of its own"
    elif exemplars < 1:
        problem = f"{count_noun(exemplars, 'exemplar')} per fold to keep them on, expected 1 or more"
    elif not weight >= 0:
        problem = f"keeping is weighed by {weight:g}, expected 0 or above"
    elif masks:
        problem = "masks are learned too: leave them out"
    elif copies:
        problem = "altered copies are learned from too: leave them out"
    if problem:
        raise OptionError(f"old answers cannot be kept: {problem}")


class Keeper:
    """Keeps the answers of an old run.

    Attributes:
        start: The old run.
        known: The cases of the cache that it was trained or tested on: ``case_id`` and ``patient_id``, sorted.
        buffers: Fold of the new target -> its exemplars.
        weight: What keeping the answers counts beside the new target's loss.
    """

    def __init__(
        self,
        start: WarmStart,
        source: Cache,
        plan: HeadPlan,
        folded: FoldedTask,
        *,
        usable: pl.DataFrame,
        count: int,
        weight: float,
    ) -> None:
        """Asks the old run about its cases in the cache, and chooses exemplars among them.

        Args:
            start: From the old run, with `WarmStart.keeps`.
            source: What is trained on.
            plan: Of the head.
            folded: The new target and its folds.
            usable: ``case_id`` and ``patient_id`` of cases with a slice to read.
            count: Most exemplars per fold.
            weight: What keeping the answers counts beside the new target's loss.

        Raises:
            OptionError: the new target is a survival task, or batches are to be balanced.
            RunError: the cache holds no case that the old run was tested on, or in some fold none to keep answers on;
                or the head mixes its outputs.
        """
        self.start = start
        self.weight = weight
        self._source = source
        task = folded.task
        if task.kind == "survival":
            raise OptionError(
                f"old answers cannot be kept beside a survival target, as {task.name} is; leave keeping away"
            )
        if plan.fit.sampling == "balanced":
            raise OptionError("old answers cannot be kept in balanced batches: exemplars have no class; leave one out")
        self.known = list_known(start.run, usable)
        if not set(self.known["case_id"]) & set(start.run.predictions["case_id"]):
            raise RunError(
                f"old answers cannot be kept: cache {source.path} holds no case that run {start.run.name} was tested"
                " on, so nobody could tell what became of its score; extract some of them into this cache, or keep"
                " nothing"
            )
        self.buffers = self._fill(folded, count)
        self._require_apart(plan, plan.outputs(task))

    @property
    def case_ids(self) -> tuple[str, ...]:
        """All exemplars."""
        return tuple(sorted({case for buffer in self.buffers.values() for case in buffer.case_ids}))

    def fit(
        self,
        preparation: Preparation,
        plan: HeadPlan,
        folded: FoldedTask,
        *,
        seed: int,
        seeds: int,
        on_fold: OnFold | None = None,
    ) -> CrossFit:
        """As `embedkit.crossfitting.cross_fit` of one plan and task; `CrossFit.kept` answers for the old target."""
        jobs = [self._make_job(preparation, plan, folded, fold, seed=seed) for fold in folded.tested]
        fitter = GradientFitter(preparation, seed, seeds=seeds, start=self.start)

        def tell(job: FoldJob) -> None:
            if on_fold is not None:
                on_fold(plan, folded, job.fold)

        with isolated_generators(preparation.device):
            fitter.fit(jobs, on_done=tell)
            answers = fitter.answer(jobs)
        fits = self._part(preparation, folded, jobs, answers)
        return dataclasses.replace(fits, notes=fitter.notes(plan.head))

    def tell(
        self, fitted: CrossFit, *, name: str, seed: int, seconds: float, resamples: int
    ) -> tuple[RunRecord, pl.DataFrame]:
        """The old run as it is now, once ``fit`` has made run ``name`` of the new target, as `tell_kept` has it."""
        run = self.start.run
        sizes = ", ".join(str(len(buffer.case_ids)) for buffer in self.buffers.values())
        return tell_kept(
            run,
            self._source,
            fitted.kept,
            [self.start.old_fold(fold) for fold in fitted.folds],
            [report.epochs for report in fitted.reports],
            known=self.known,
            how=f"kept while run {name}, which shares all but the last layer, was trained from run {run.name} (weights"
            f" {run.digest[:12]}), on {sizes} exemplars in its folds, weighed by {self.weight:g}",
            seed=seed,
            seconds=seconds,
            resamples=resamples,
        )

    def _fill(self, folded: FoldedTask, count: int) -> dict[int, Buffer]:
        """The buffer of each fold, from one pass over the old run's cases in the cache."""
        ids, patients = (self.known[name].to_list() for name in ("case_id", "patient_id"))
        allowed = {fold: self._find_allowed(folded, fold, ids, patients) for fold in folded.tested}
        found: dict[int, list[tuple[Tensor, Tensor]]] = {fold: [] for fold in folded.tested}
        record = self.start.run.record
        for bag in stream_bags(self._source, ids, record.token_sets, views=record.views):
            for fold, parts in found.items():
                parts.append(_ask(self.start.members(fold), bag))
        buffers = {}
        for fold, parts in found.items():
            vectors, answers = (torch.cat(each).numpy()[allowed[fold]] for each in zip(*parts, strict=True))
            places = np.sort(allowed[fold][choose_exemplars(vectors, count)])
            own = np.searchsorted(allowed[fold], places)
            buffers[fold] = Buffer(
                tuple(ids[place] for place in places), tuple(patients[place] for place in places), answers[own]
            )
        return buffers

    def _find_allowed(
        self, folded: FoldedTask, fold: int, ids: Sequence[str], patients: Sequence[str]
    ) -> NDArray[np.int64]:
        """Which of the old run's cases may be exemplars of a fold: those whose patients neither target tests there."""
        run, task = self.start.run, folded.task
        old = run.predictions.filter(pl.col("fold") == self.start.old_fold(fold))["patient_id"].to_list()
        tested = {*old, *(task.patient_ids[case] for case in np.flatnonzero(folded.find_tested(fold)))}
        allowed = np.array([place for place, patient in enumerate(patients) if patient not in tested], np.int64)
        if not len(allowed):
            raise RunError(
                f"old answers cannot be kept: cache {self._source.path} holds {count_noun(len(ids), 'case')} that run"
                f" {run.name} was trained on, none of which may be an exemplar in fold {fold}; extract more of its"
                " cases into this cache, or keep nothing"
            )
        return allowed

    def _require_apart(self, plan: HeadPlan, width: int) -> None:
        """Stops where one target's logits depend on the other's numbers, so that the head could not be parted."""
        record = self.start.run.record
        shape, sets, options = bag_shape(self._source, plan.token_sets), plan.token_sets, plan.options
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            both = create_head(plan.head, shape, sets, width + record.outputs, options=options).eval()
            bag = next(iter(stream_bags(self._source, self.known["case_id"].to_list()[:2], sets)))
            bag = self.start.members(0)[0].prepare(bag)
            whole = both(bag).logits
            for where in (slice(0, width), slice(width, width + record.outputs)):
                part = create_head(plan.head, shape, sets, where.stop - where.start, options=options).eval()
                part.load_state_dict(_take(both.state_dict(), self.start.axes, where))
                if not torch.allclose(part(bag).logits, whole[:, where], rtol=1e-4, atol=1e-5):
                    raise RunError(
                        f"old answers cannot be kept: what head {plan.head!r} says of one target depends on the other,"
                        " so it cannot be parted; choose a run of another head, as abmil or grid, or keep nothing"
                    )

    def _make_job(
        self, preparation: Preparation, plan: HeadPlan, folded: FoldedTask, fold: int, *, seed: int
    ) -> FoldJob:
        """The job of a fold on the new target's cases and the exemplars."""
        alone = make_job(plan, folded, fold, seed=seed, device=preparation.device)
        task = join_buffer(folded.task, plan.outputs(folded.task), self.buffers[fold])
        folds = np.full(len(task.case_ids), -1, np.int64)
        folds[task.rows] = folded.folds[0]
        training = (folds != fold) & task.labelled
        loss = make_task_loss(plan, folded.task.kind, task.spread(folded.task.targets), training, preparation.device)
        return FoldJob(
            plan,
            FoldedTask(task, folds[None]),
            fold,
            alone.seed,
            tuple(task.hold_out(held) for held in alone.splits),
            KeepingLoss(loss, task, self.weight),
        )

    def _part(
        self,
        preparation: Preparation,
        folded: FoldedTask,
        jobs: Sequence[FoldJob],
        answers: Sequence[Sequence[Tensor]],
    ) -> CrossFit:
        """The members of both targets and the new target's scores."""
        plan, task = jobs[0].plan, folded.task
        width = plan.outputs(task)
        scores = np.full((1, len(task.case_ids), len(score_columns(task.kind, task.classes))), np.nan)
        fitted: list[tuple[int, Member, FitReport]] = []
        kept: list[Member] = []
        inner: list[InnerScores] = []
        for job, found in zip(jobs, answers, strict=True):
            members = [self._make_member(plan, task, each) for each, _ in job.fitted]
            old = self.start.members(job.fold)
            kept += [
                self._renew_member(old[number % len(old)], each, width) for number, (each, _) in enumerate(job.fitted)
            ]
            fitted += [(job.fold, member, report) for member, (_, report) in zip(members, job.fitted, strict=True)]
            each = [score_logits(member, logits[:, :width]) for member, logits in zip(members, found, strict=True)]
            scores[0, folded.find_tested(job.fold)] = np.mean(each, axis=0)
            inner += _score_inner(job, members[0], width)
        return dataclasses.replace(gather_fits(preparation, plan, fitted, scores, inner), kept=tuple(kept))

    def _make_member(self, plan: HeadPlan, task: Task, fitted: Member) -> Member:
        """A member for the new target alone, with the numbers of one that was fitted for both."""
        shape, width = bag_shape(self._source, plan.token_sets), plan.outputs(task)
        member = build_member(plan.head, shape, outputs=width, kind=task.kind, options=plan.options)
        member.head.load_state_dict(_take(fitted.head.state_dict(), self.start.axes, slice(0, width)))
        member.standardiser = copy.deepcopy(fitted.standardiser)
        member.unit.copy_(fitted.unit)
        member.sharpness.copy_(fitted.sharpness)
        return member.eval()

    def _renew_member(self, old: Member, fitted: Member, width: int) -> Member:
        """A member of the old run with the head of one that was fitted for both targets, the new one's width first."""
        member = copy.deepcopy(old)
        where = slice(width, width + self.start.run.record.outputs)
        member.head.load_state_dict(_take(fitted.head.state_dict(), self.start.axes, where))
        return member.eval()


def _ask(members: Sequence[Member], bag: Bag) -> tuple[Tensor, Tensor]:
    """Of each case the mean of its standardised tokens [cases views*dim], and the members' mean logits [cases outputs].

    Logits are those before the sharpness, which a kept member goes on to have.
    """
    with torch.no_grad():
        prepared = members[0].prepare(bag)
        pooled = [
            tokens.masked_fill(~bag.mask[..., None, None], 0.0).mean(3).sum(2) / bag.mask.sum(2).clamp(min=1)[..., None]
            for tokens in prepared.tokens.values()
        ]
        logits = torch.stack([member.head(member.prepare(bag)).logits.float() for member in members]).mean(0)
    return torch.cat([each.flatten(1) for each in pooled], 1).float(), logits


def _take(state: Mapping[str, Tensor], axes: Mapping[str, tuple[int, ...]], where: slice) -> dict[str, Tensor]:
    """The numbers of a head for some of its outputs."""
    length = where.stop - where.start
    return {
        name: value.narrow(axes[name][0], where.start, length).clone() if axes[name] else value
        for name, value in state.items()
    }


def _score_inner(job: FoldJob, member: Member, width: int) -> list[InnerScores]:
    """The new target's scores of the training cases that inner splits held out."""
    task = job.task
    if not isinstance(task, KeepingTask):
        raise TypeError(f"{type(task).__name__} is no KeepingTask")
    numbers = np.full(len(task.case_ids), -1, np.int64)
    numbers[task.rows] = np.arange(len(task.rows))
    found = []
    for split, (held, logits) in enumerate(zip(job.splits, job.fitted[0][1].inner, strict=True)):
        cases = np.flatnonzero(held)
        there = task.labelled[cases]
        scores = score_logits(member, logits[torch.from_numpy(there), :width])
        found.append(InnerScores(job.fold, split, numbers[cases[there]], scores))
    return found

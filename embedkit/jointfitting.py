"""Owns the fitting of one head on several targets at once, in every fold, and what each target has of it then.

The head is trained once for all; after that every target has members of its own, which share their numbers but for
what turns logits into scores. So a run of one target looks like any other.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedkit.answers import score_columns
from embedkit.bags import bag_shape
from embedkit.crossfitting import (
    CrossFit,
    InnerScores,
    OnFold,
    cross_fit,
    gather_fits,
    isolated_generators,
    score_logits,
)
from embedkit.errors import HeadError, OptionError, TaskError
from embedkit.fitting import FitReport
from embedkit.foldjobs import FoldedTask, FoldJob, make_job
from embedkit.gradientfits import GradientFitter, HeadStart
from embedkit.headplans import HeadPlan
from embedkit.jointlosses import JointLoss
from embedkit.jointtasks import JointTask, join_tasks
from embedkit.losses import StackedLoss
from embedkit.members import Member, build_member
from embedkit.plugins import is_joint
from embedkit.preparation import Preparation
from embedkit.stopping import Watch
from embedkit.targets import count_noun
from embedkit.tasks import Task

__all__ = ["JointTargets", "cross_fit_all", "deal_jointly", "deal_together"]


@dataclass(frozen=True, eq=False)
class JointTargets:
    """The targets that joint heads learn together; none where there is no such head.

    Attributes:
        folded: A `JointTask` and its folds.
        parts: Target -> that target with the folds of its own cases.
    """

    folded: FoldedTask | None = None
    parts: Mapping[str, FoldedTask] = field(default_factory=dict)

    def place(self, plan: HeadPlan, task: Task) -> HeadPlan:
        """The plan of one of the targets; that of a head which is not joint as it is."""
        if self.folded is None or not is_joint(plan.head):
            return plan
        return _lay_out(plan, _joint_task(self.folded), place=list(self.parts).index(task.name))


def deal_together(tasks: Sequence[Task], deal: Callable[[Task], FoldedTask]) -> dict[str, FoldedTask]:
    """Deals the cases of all targets at once: each has the folds and inner splits of its own cases, alike for all.

    Args:
        tasks: The targets.
        deal: Deals the cases of a task.

    Returns:
        Per target.

    Raises:
        OptionError: there are fewer than two targets.
        TaskError: as ``deal``, or no case of a target is tested.
    """
    if len(tasks) < 2:
        raise OptionError("the same folds were asked for a single target, expected two targets or more")
    joint = join_tasks(tasks)
    whole = deal(joint)
    dealt = {task.name: FoldedTask(task, whole.folds[:, joint.find_rows(task)], whole) for task in tasks}
    _require_tested(dealt)
    return dealt


def _require_tested(dealt: Mapping[str, FoldedTask]) -> None:
    for name, folded in dealt.items():
        if not folded.tested:
            raise TaskError(
                f"target {name}: every labelled case is in training alone, none is tested; correct the split"
            )


def deal_jointly(
    matched: Mapping[str, Sequence[HeadPlan]],
    tasks: Sequence[Task],
    deal: Callable[[Task], FoldedTask],
    together: Mapping[str, FoldedTask] | None = None,
) -> JointTargets:
    """Joins the targets that a joint head is to learn, and deals the cases of all of them into common folds.

    Args:
        matched: Target -> the plans of its heads.
        tasks: The targets.
        deal: Deals the cases of a task.
        together: The targets as `deal_together` dealt them, if it did.

    Raises:
        HeadError: a joint head has fewer than two targets, or an option that follows from them.
        OptionError: balanced batches are asked of a joint head.
        TaskError: as ``deal``.
    """
    plans = {plan.head: plan for each in matched.values() for plan in each if is_joint(plan.head)}
    learned = [task for task in tasks if set(plans) <= {plan.head for plan in matched[task.name]}]
    for plan in plans.values():
        _require_joinable(plan, len(learned))
    if not plans:
        return JointTargets()
    task = join_tasks(learned)
    whole = together[learned[0].name].joint if together else None
    folded = (
        deal(task) if whole is None else FoldedTask(task, whole.folds[:, _joint_task(whole).find_rows(task)], whole)
    )
    parts = zip(task.parts, task.rows, strict=True)
    dealt = {part.name: FoldedTask(part, folded.folds[:, rows], whole) for part, rows in parts}
    _require_tested(dealt)
    return JointTargets(folded, dealt)


def cross_fit_all(
    preparation: Preparation,
    wanted: Sequence[tuple[HeadPlan, FoldedTask]],
    joint: JointTargets,
    *,
    seed: int,
    seeds: int = 1,
    start: HeadStart | None = None,
    on_fold: OnFold | None = None,
) -> list[CrossFit]:
    """As `cross_fit`, joint heads once for all of their targets."""
    alone = [pair for pair in wanted if not is_joint(pair[0].head)]
    found = dict(
        zip(
            map(_name, alone),
            cross_fit(preparation, alone, seed=seed, seeds=seeds, start=start, on_fold=on_fold),
            strict=True,
        )
    )
    together: dict[str, list[tuple[HeadPlan, FoldedTask]]] = {}
    for pair in wanted:
        if is_joint(pair[0].head):
            together.setdefault(pair[0].head, []).append(pair)
    for head, pairs in together.items():

        def tell(job: FoldJob, pairs: Sequence[tuple[HeadPlan, FoldedTask]] = pairs) -> None:
            for plan, part in pairs if on_fold is not None else ():
                cast(OnFold, on_fold)(plan, part, job.fold)

        fits = _fit_jointly(preparation, pairs[0][0], joint, seed=seed, seeds=seeds, on_done=tell)
        found |= {(head, target): fitted for target, fitted in fits.items()}
    return [found[_name(pair)] for pair in wanted]


def _name(pair: tuple[HeadPlan, FoldedTask]) -> tuple[str, str]:
    return pair[0].head, pair[1].task.name


def _fit_jointly(
    preparation: Preparation,
    plan: HeadPlan,
    joint: JointTargets,
    *,
    seed: int,
    seeds: int,
    on_done: Callable[[FoldJob], None],
) -> dict[str, CrossFit]:
    """Fits one head on every fold of the targets together; gives what each has of it."""
    folded = cast(FoldedTask, joint.folded)
    laid_out = _lay_out(plan, _joint_task(folded), place=None)
    jobs = [make_job(laid_out, folded, fold, seed=seed, device=preparation.device) for fold in folded.tested]
    fitter = GradientFitter(preparation, seed, seeds=seeds)
    with isolated_generators(preparation.device):
        fitter.fit(jobs, on_done=on_done)
        answers = fitter.answer(jobs)
    return {
        target: dataclasses.replace(_collect(preparation, place, part, jobs, answers), notes=fitter.notes(plan.head))
        for place, (target, part) in enumerate(joint.parts.items())
    }


def _require_joinable(plan: HeadPlan, targets: int) -> None:
    if targets < 2:
        raise HeadError(
            f"head {plan.head!r} learns several targets at once, but {count_noun(targets, 'target')} of the kinds that"
            " it learns was given; give --target again, or choose another head"
        )
    if given := [name for name in ("targets", "widths", "place") if plan.options.get(name)]:
        raise HeadError(f"option {given[0]} of head {plan.head!r} follows from the targets; leave it out")
    if plan.fit.sampling == "balanced":
        raise OptionError(
            f"balanced sampling belongs to one target, but head {plan.head!r} learns {targets} at once; train it in a"
            " call of its own, with sampling shuffled"
        )


def _joint_task(joint: FoldedTask) -> JointTask:
    if not isinstance(joint.task, JointTask):
        raise TypeError(f"{type(joint.task).__name__} is no JointTask")
    return joint.task


def _lay_out(plan: HeadPlan, task: JointTask, *, place: int | None) -> HeadPlan:
    """The plan of a joint head for the targets of a task together, or for the one at ``place``."""
    options = {"targets": tuple(part.name for part in task.parts), "widths": task.widths, "place": place}
    candidates = [dataclasses.replace(each, options={**each.options, **options}) for each in plan.candidates]
    return HeadPlan(plan.head, tuple(candidates))


def _collect(
    preparation: Preparation,
    place: int,
    part: FoldedTask,
    jobs: Sequence[FoldJob],
    answers: Sequence[Sequence[Tensor]],
) -> CrossFit:
    """What one target has of the jobs, whose tested cases are answered by logits [tested outputs] of each member."""
    task = _joint_task(jobs[0].target)
    scores = np.full((*part.folds.shape, len(score_columns(part.task.kind, part.task.classes))), np.nan)
    fitted: list[tuple[int, Member, FitReport]] = []
    inner: list[InnerScores] = []
    for job, found in zip(jobs, answers, strict=True):
        report, held = _judge_part(job, place)
        members = [_place_member(preparation, job, place, each, report) for each, _ in job.fitted]
        fitted += [(job.fold, member, report) for member in members]
        there, numbers = task.find_numbers(place, job.tested)
        own = [logits[torch.from_numpy(there), task.columns[place]] * report.choices["sharpness"] for logits in found]
        scores[part.find_repeat(job.fold), numbers] = np.mean(
            [score_logits(*pair) for pair in zip(members, own, strict=True)], axis=0
        )
        inner += [
            InnerScores(job.fold, split, cases, score_logits(members[0], logits))
            for split, (cases, logits) in enumerate(zip(held, report.inner, strict=True))
        ]
    return gather_fits(preparation, jobs[0].plan, fitted, scores, inner)


def _judge_part(job: FoldJob, place: int) -> tuple[FitReport, list[NDArray[np.int64]]]:
    """How the fits of a job went for one target, its sharpness with it; and who of it each inner split held out."""
    task, report = _joint_task(job.target), job.fitted[0][1]
    loss = cast(JointLoss, job.loss).parts[place].judge
    held: list[NDArray[np.int64]] = []
    found: list[tuple[Tensor, Watch]] = []
    for split, logits in zip(job.splits, report.inner, strict=True):
        cases = np.flatnonzero(split)
        there, numbers = task.find_numbers(place, cases)
        held.append(numbers)
        own = logits[torch.from_numpy(there), task.columns[place]].float().cpu()
        asked = torch.from_numpy(cases[there])[None].to(loss.targets.device)
        watch = Watch(asked, torch.ones_like(asked, dtype=torch.bool), patience=1)
        watch.judge(own[None].to(asked.device), StackedLoss([loss]))
        found.append((own, watch))
    sharpness = math.exp(float(np.mean([math.log(float(watch.sharpness)) for _, watch in found])))
    return (
        dataclasses.replace(
            report,
            held_out_loss=float(np.mean([float(watch.losses) for _, watch in found])),
            choices={"sharpness": sharpness},
            inner=tuple(own * sharpness for own, _ in found),
        ),
        held,
    )


def _place_member(preparation: Preparation, job: FoldJob, place: int, fitted: Member, report: FitReport) -> Member:
    """A member of one target with the numbers of one that was fitted for all."""
    candidate, part = job.plan.candidates[report.candidate], _joint_task(job.target).parts[place]
    member = build_member(
        job.plan.head,
        bag_shape(preparation.source, candidate.token_sets),
        outputs=part.outputs,
        kind=part.kind,
        options={**candidate.options, "place": place},
    )
    member.head.load_state_dict(fitted.head.state_dict())
    member.standardiser = copy.deepcopy(fitted.standardiser)
    member.unit.copy_(torch.tensor(cast(JointLoss, job.loss).parts[place].unit))
    member.sharpness.fill_(report.choices["sharpness"])
    return member.eval()

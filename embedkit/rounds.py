"""Owns the rounds of a training that is planned: pending runs are fitted, those of a round together, and written.

Decides nothing: which heads, folds and folders there are is `embedkit.training`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from embedkit.bags import TokenSource
from embedkit.cache import Cache
from embedkit.copies import Copies
from embedkit.crossfitting import CrossFit
from embedkit.foldjobs import FoldedTask
from embedkit.headplans import HeadPlan
from embedkit.jointfitting import JointTargets, cross_fit_all
from embedkit.keeping import Keeper
from embedkit.preparation import Preparation
from embedkit.runfolder import write_run
from embedkit.storage import Storage
from embedkit.supervision import Supervision
from embedkit.trainingrecords import TrainedTarget, make_record, tabulate_inner, tabulate_scores
from embedkit.warmstart import WarmStart

__all__ = ["Work"]


@dataclass(frozen=True, eq=False)
class Work:
    """What the runs of a training have in common.

    Attributes:
        source: What is trained on.
        joint: The targets that joint heads learn together.
        supervision: The masks.
        folders: Target and head -> where its run is written.
        begun: The old run that the head of its name starts from, if any.
        keeper: What keeps that run's answers, if they are kept.
        copies: Altered copies to train on beside the cases, if any.
        device, storage: As `embedkit.training.train` takes them.
    """

    source: Cache
    joint: JointTargets
    supervision: Supervision
    folders: Mapping[tuple[str, str], Path]
    begun: WarmStart | None = field(kw_only=True)
    keeper: Keeper | None = field(kw_only=True)
    copies: Copies | None = field(kw_only=True)
    device: torch.device = field(kw_only=True)
    storage: Storage = field(kw_only=True)

    def run(
        self,
        pending: Sequence[tuple[HeadPlan, TrainedTarget]],
        case_ids: Sequence[str],
        *,
        overwrite: bool,
        seeds: int,
        on_fold: Callable[[HeadPlan, FoldedTask, int], None],
        **told: Any,
    ) -> None:
        """Fits and writes the runs that are pending.

        Args:
            pending: Plans and what each learns.
            case_ids: All that are read.
            overwrite: Replace runs that are there.
            seeds: Members per fold.
            on_fold: Called with every fold that is done.
            told: ``sweep``, ``seed`` and ``resamples``, as `make_record` takes them.
        """
        if not pending:
            return
        plans = list(dict.fromkeys(plan for plan, _ in pending))
        shared: dict[str, Any] = {"seed": told["seed"], "storage": self.storage, "covers": self.supervision.covers}
        source: TokenSource = self.source
        if self.copies is not None:
            source, shared["copies"] = self.copies.source, self.copies.by_case
        preparation = Preparation(source, plans, case_ids, self.device, **shared)
        how: dict[str, Any] = {"seed": told["seed"], "seeds": seeds, "on_fold": on_fold}
        for together in preparation.rounds(plans):
            started = time.perf_counter()
            wanted = [(plan, target) for plan, target in pending if plan in together]
            found = self._fit(preparation, [(plan, target.folded) for plan, target in wanted], **how)
            seconds = (time.perf_counter() - started) / len(wanted)
            for (plan, target), fitted in zip(wanted, found, strict=True):
                self._write(plan, target, fitted, overwrite=overwrite, seconds=seconds, **told)

    def _fit(
        self, preparation: Preparation, wanted: Sequence[tuple[HeadPlan, FoldedTask]], **how: Any
    ) -> list[CrossFit]:
        """The fits of some plans and tasks, those of a keeper beside its old answers."""
        kept = [pair for pair in wanted if self.keeper is not None and pair[0].head == self.keeper.start.head]
        others = [pair for pair in wanted if pair not in kept]
        fits = cross_fit_all(preparation, others, self.joint, start=self.begun, **how)
        found = dict(zip(others, fits, strict=True))
        if self.keeper is not None:
            found |= {pair: self.keeper.fit(preparation, *pair, **how) for pair in kept}
        return [found[pair] for pair in wanted]

    def _write(
        self, plan: HeadPlan, target: TrainedTarget, fitted: CrossFit, *, overwrite: bool, seconds: float, **told: Any
    ) -> None:
        """Writes a run, and the old one whose answers were kept beside it."""
        more = (self.begun.note,) if self.begun is not None and self.begun.head == plan.head else ()
        place = self.joint.place(plan, target.task)
        record = make_record(self.source, place, target, fitted, seconds=seconds, more=more, **told)
        record = self.supervision.tell(record, plan, target.folded, fitted, resamples=told["resamples"])
        record = record if self.copies is None else self.copies.tell(record, plan, target.task)
        scored, inner = tabulate_scores(target, fitted.scores), tabulate_inner(target.task, fitted.inner)
        write_run(self.folders[target.task.name, plan.head], record, fitted.members, scored, inner, overwrite=overwrite)
        if self.keeper is not None and fitted.kept:
            judged = {"seed": told["seed"], "resamples": told["resamples"]}
            kept, scored = self.keeper.tell(fitted, name=record.name, seconds=seconds, **judged)
            old = self.keeper.start.run
            folder = self.folders[old.record.target, old.head]
            write_run(folder, kept, fitted.kept, scored, old.inner, overwrite=overwrite)

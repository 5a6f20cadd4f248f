"""Owns fitting by gradient for many fold jobs at once: first fits that choose, last fits on all training cases.

Knows no file and no label; how fits are trained side by side is in `embedkit.stacks`.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embedkit.batching import Deck
from embedkit.errors import HeadError
from embedkit.fitting import FitReport
from embedkit.foldjobs import FoldJob, rank
from embedkit.members import Member
from embedkit.passes import find_obstacle, run_passes
from embedkit.plugins import check_output
from embedkit.preparation import Preparation
from embedkit.stacks import Fit, Outcome
from embedkit.standardisation import Standardiser
from embedkit.sweeps import Candidate

__all__ = ["GradientFitter", "HeadStart"]

_MEMBERS_APART = 7_919
_SCORED_AT_ONCE = 64


class HeadStart(Protocol):
    """What the fits of one head start from instead of chance; `embedkit.warmstart.WarmStart` is one."""

    @property
    def head(self) -> str: ...
    def load(self, head: nn.Module, fold: int, number: int, /) -> None: ...
    def standardiser(self, fold: int, /) -> Standardiser: ...


class GradientFitter:
    """Fits heads by gradient; what fits have in common is made once.

    Attributes:
        obstacles: Head -> why its fits are run one after the other.
    """

    def __init__(self, preparation: Preparation, seed: int, *, seeds: int, start: HeadStart | None = None) -> None:
        """Takes what heads share, the seed of everything, how many members to fit per fold, and where one starts."""
        self.start = start
        self.preparation = preparation
        self.seed = seed
        self.seeds = seeds
        self.obstacles: dict[str, str] = {}
        self._heads: dict[Hashable, nn.Module] = {}
        self._decks: dict[Hashable, Deck] = {}
        self._standardisers: dict[Hashable, Standardiser] = {}
        self._checked: set[Hashable] = set()

    def fit(self, jobs: Sequence[FoldJob], *, on_done: Callable[[FoldJob], None]) -> None:
        """Fits the members of all jobs in common passes over the tokens.

        Draws from torch's global generators, seeded anew at every turn: isolate them around the call.

        Raises:
            HeadError: a head breaks its contract or diverges.
        """
        first: dict[Fit, tuple[FoldJob, int]] = {}
        for job in jobs:
            for place, candidate in enumerate(job.plan.candidates):
                self._check(job, candidate)
                for held in job.splits:
                    fit = self._fit(job, candidate, held_out=held, epochs=candidate.fit.epochs)
                    first[fit] = job, place
        outcomes = run_passes(list(first), self.obstacles)
        found: dict[FoldJob, dict[int, list[Outcome]]] = {job: {} for job in jobs}
        for fit, (job, place) in first.items():
            found[job].setdefault(place, []).append(outcomes[fit])
        last: dict[Fit, tuple[FoldJob, FitReport]] = {}
        for job in jobs:
            report = _choose(job, found[job])
            candidate, nobody = job.plan.candidates[report.candidate], np.zeros_like(job.training)
            for number in range(self.seeds):
                fit = self._fit(job, candidate, held_out=nobody, epochs=report.epochs, number=number)
                last[fit] = job, report

        def finish(fit: Fit, outcome: Outcome) -> None:
            job, report = last[fit]
            job.fitted.append((self._finish(job, fit, report, outcome), report))
            if len(job.fitted) == self.seeds:
                on_done(job)

        run_passes(list(last), self.obstacles, finish)
        self._fit_curves([job for job in jobs if job.task.kind == "survival"])

    def notes(self, head: str) -> tuple[str, ...]:
        """What the user should know of how the fits of a head were run."""
        obstacle = self.obstacles.get(head)
        return (f"{head} was fitted one fit after the other ({obstacle})",) if obstacle else ()

    def answer(self, jobs: Sequence[FoldJob]) -> list[list[Tensor]]:
        """Logits [tested outputs] of the tested cases of each job by each of its members."""
        return self._compute_logits(jobs, {job: job.tested for job in jobs})

    def _fit_curves(self, jobs: Sequence[FoldJob]) -> None:
        """Takes from the training cases what turns logits of survival heads into chances."""
        training = {job: np.flatnonzero(job.training) for job in jobs}
        for job, found in zip(jobs, self._compute_logits(jobs, training), strict=True):
            for (member, _), logits in zip(job.fitted, found, strict=True):
                cast(Any, member.curve).fit(logits, job.task.targets[training[job]])

    def _compute_logits(
        self, jobs: Sequence[FoldJob], cases: Mapping[FoldJob, NDArray[np.int64]]
    ) -> list[list[Tensor]]:
        """Logits [cases outputs] of the cases of each job, in rising order, by each of its members."""
        asked: dict[Hashable, list[FoldJob]] = {}
        for job in jobs:
            candidate = self._chosen(job)
            asked.setdefault((job.plan.head, candidate.token_sets, job.target), []).append(job)
        found: dict[FoldJob, list[Tensor]] = {}
        for each in asked.values():
            found |= self._compute_together(each, cases)
        return [found[job] for job in jobs]

    def _compute_together(
        self, jobs: Sequence[FoldJob], cases: Mapping[FoldJob, NDArray[np.int64]]
    ) -> dict[FoldJob, list[Tensor]]:
        """Of jobs that read the same tokens of the same task."""
        candidate = self._chosen(jobs[0])
        deck, store = self._deck(jobs[0], candidate), self.preparation.store(jobs[0].plan, candidate)
        blocks = np.array_split(np.unique(np.concatenate([cases[job] for job in jobs])), deck.blocks)
        parts: dict[FoldJob, list[list[Tensor]]] = {job: [[] for _ in job.fitted] for job in jobs}
        visits = store.visit([deck.places[block] for block in blocks], candidate.token_sets)
        for block, _ in zip(blocks, visits, strict=True):
            for job in jobs:
                places = deck.places[np.intersect1d(cases[job], block)]
                for start in range(0, len(places), _SCORED_AT_ONCE):
                    bag = store.batch(places[start : start + _SCORED_AT_ONCE], candidate.token_sets).to("cpu")
                    for (member, _), logits in zip(job.fitted, parts[job], strict=True):
                        with torch.no_grad():
                            logits.append(member(bag).logits)
        return {job: [torch.cat(logits) for logits in each] for job, each in parts.items()}

    def _chosen(self, job: FoldJob) -> Candidate:
        return job.plan.candidates[job.fitted[0][1].candidate]

    def _fit(
        self,
        job: FoldJob,
        candidate: Candidate,
        *,
        held_out: NDArray[np.bool_],
        epochs: int,
        number: int = 0,
    ) -> Fit:
        deck = self._deck(job, candidate)
        return Fit(
            name=job.plan.head,
            head=self._build_head(job, candidate, number),
            how=candidate.fit,
            store=self.preparation.store(job.plan, candidate),
            standardiser=self._standardiser(job, candidate),
            loss=job.loss,
            deck=deck,
            key=self._name_training_set(job, candidate, held_out),
            training=(job.training & ~held_out)[deck.owners],
            held_out=deck.leave_copies(held_out),
            noise=self.seed + number,
            epochs=epochs,
            classes=job.task.targets[deck.owners] if candidate.fit.sampling == "balanced" else None,
        )

    def _build_head(self, job: FoldJob, candidate: Candidate, number: int) -> nn.Module:
        """A head with its initial weights, which depend on nothing but its shape and the seed."""
        seed = job.seed + _MEMBERS_APART * number
        key = (job.plan.head, candidate.token_sets, str(candidate.options), job.plan.outputs(job.task), seed)
        if key not in self._heads:
            torch.manual_seed(seed)
            self._heads[key] = job.build_member(self.preparation.shape(candidate), candidate).head
            if (start := self._started(job)) is not None:
                start.load(self._heads[key], job.fold, number)
        return self._heads[key]

    def _name_training_set(self, job: FoldJob, candidate: Candidate, held_out: NDArray[np.bool_]) -> Hashable:
        """Equal where fits see the same cases in the same order and are judged by the same ones, of whatever task."""
        dealt = [self._deck(job, candidate).places, job.training, held_out]
        if candidate.fit.sampling == "balanced":
            dealt.append(job.task.targets)
        if self._started(job) is not None:
            dealt.append(np.array([job.fold]))  # whose standardiser it takes
        return hashlib.blake2b(b"".join(each.tobytes() for each in dealt), digest_size=16).hexdigest()

    def _started(self, job: FoldJob) -> HeadStart | None:
        return self.start if self.start is not None and self.start.head == job.plan.head else None

    def _deck(self, job: FoldJob, candidate: Candidate) -> Deck:
        key = (job.plan.head, job.task.case_ids, candidate.token_sets)
        if key not in self._decks:
            self._decks[key] = self.preparation.deck(job.plan, candidate, job.task, seed=self.seed)
        return self._decks[key]

    def _standardiser(self, job: FoldJob, candidate: Candidate) -> Standardiser:
        if (start := self._started(job)) is not None:
            return start.standardiser(job.fold)
        key = (job.task.case_ids, job.training.tobytes(), candidate.token_sets)
        if key not in self._standardisers:
            places = self.preparation.places(job.task)[job.training]
            self._standardisers[key] = self.preparation.standardiser(candidate, places)
        return self._standardisers[key]

    def _check(self, job: FoldJob, candidate: Candidate) -> None:
        """Checks once that a head keeps its contract, and whether it can be run for several fits at once."""
        outputs = job.plan.outputs(job.task)
        key = (job.plan.head, candidate.token_sets, str(candidate.options), outputs)
        if key in self._checked:
            return
        self._checked.add(key)
        whole, read = self.preparation.samples(job.plan, candidate)
        head = job.build_member(self.preparation.shape(candidate), candidate).head.to(self.preparation.device)
        with torch.no_grad():
            check_output(job.plan.head, head(whole), whole, outputs)
        if obstacle := getattr(head, "one_by_one", "") or find_obstacle(head, read):
            self.obstacles[job.plan.head] = obstacle

    def _finish(self, job: FoldJob, fit: Fit, report: FitReport, outcome: Outcome) -> Member:
        """The member of a last fit."""
        candidate = job.plan.candidates[report.candidate]
        member = job.build_member(self.preparation.shape(candidate), candidate)
        member.head.load_state_dict(outcome.state)
        member.standardiser = copy.deepcopy(fit.standardiser)
        member.unit.copy_(torch.tensor(job.loss.unit))
        member.sharpness.fill_(report.choices["sharpness"])
        return member.cpu().eval()


def _choose(job: FoldJob, found: dict[int, list[Outcome]]) -> FitReport:
    """The candidate with the lowest mean held-out loss; its epochs and sharpness are means over the inner splits.

    Raises:
        HeadError: every candidate diverged.
    """
    means = [
        float(np.mean([outcome.loss if outcome.epochs else math.nan for outcome in found[place]]))
        for place in range(len(found))
    ]
    ranking = rank(means)
    best, loss = ranking[0]
    if math.isnan(loss):
        rates = sorted({candidate.fit.learning_rate for candidate in job.plan.candidates})
        raise HeadError(
            f"head {job.plan.head!r} diverged: its held-out loss was never a finite number;"
            f" lower its learning rate (now {', '.join(f'{rate:g}' for rate in rates)})"
        )
    epochs = max(1, round(float(np.mean([outcome.epochs for outcome in found[best]]))))
    sharpness = math.exp(float(np.mean([math.log(outcome.sharpness) for outcome in found[best]])))
    inner = tuple(outcome.logits * sharpness for outcome in found[best])
    return FitReport(epochs, loss, {"sharpness": sharpness}, inner, best, ranking if len(ranking) > 1 else ())

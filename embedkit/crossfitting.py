"""Owns cross-fitting: one head per fold, each scored on the cases of its fold; reads the tokens once for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedkit.bags import BagShape, BagStore, TokenSource, bag_shape, load_bags, stream_bags
from embedkit.fitting import FitReport, TrainingSet, fit_closed_form, fit_gradient
from embedkit.headplans import HeadPlan
from embedkit.members import Member, build_member, check_member
from embedkit.standardisation import Moments, compute_moments, fit_standardiser
from embedkit.tasks import Task, inner_split

__all__ = ["CrossFit", "CrossFitter", "InnerScores"]

_Fitted = tuple[FitReport, Tensor, tuple[NDArray[np.bool_], ...]]
"""How it went, logits of the tested cases, and the inner splits: bool [cases], held out."""

_PENALTY_SPLITS = 5
_SCORED_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class CrossFit:
    """The heads of all folds.

    Attributes:
        shape: Of the bags that they read.
        members: One per fold.
        reports: One per fold.
        scores: float64 [cases outputs], each case by the head that was not trained on it; NaN where in no fold.
        inner: Of every fold and inner split.
    """

    shape: BagShape
    members: tuple[Member, ...]
    reports: tuple[FitReport, ...]
    scores: NDArray[np.float64]
    inner: tuple[InnerScores, ...]


@dataclass(frozen=True, eq=False)
class InnerScores:
    """What a fold's choices were made by: scores of training cases that were held out once.

    Attributes:
        fold: Whose training cases they are.
        split: Number of the inner split within the fold.
        cases: int64 [held], numbers of the held-out cases in the task.
        scores: float64 [held outputs].
    """

    fold: int
    split: int
    cases: NDArray[np.int64]
    scores: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Part:
    """One fold of a task: places of all its cases in the fitter, which train (bool), which are tested (numbers)."""

    task: Task
    places: NDArray[np.int64]
    training: NDArray[np.bool_]
    tested: NDArray[np.int64]
    seed: int


class CrossFitter:
    """Fits heads on tasks over one cache; the tokens, their moments and features in closed form are shared by all."""

    def __init__(
        self, source: TokenSource, plans: Sequence[HeadPlan], case_ids: Sequence[str], device: torch.device, seed: int
    ) -> None:
        """Reads what the plans trained by gradient need of these cases.

        Raises:
            CacheError: a token is NaN or infinite, or a token set is absent.
        """
        self.source = source
        self.case_ids = list(case_ids)
        self.device = device
        self.seed = seed
        self._places = {case: place for place, case in enumerate(self.case_ids)}
        self._features: dict[str, Tensor] = {}
        names = list(dict.fromkeys(name for plan in plans if plan.by_gradient for name in plan.token_sets))
        self._store: BagStore | None = None
        self._moments: dict[str, Moments] = {}
        if names:
            store = load_bags(source, self.case_ids, names)
            self._moments = {name: compute_moments(store, name) for name in names}
            self._store = store.to(device)

    def fit(
        self, plan: HeadPlan, task: Task, folds: NDArray[np.int64], *, after_fold: Callable[[int], None] | None = None
    ) -> CrossFit:
        """Fits one head on every fold of one task.

        Args:
            plan: One of those that the fitter was made for.
            task: Its cases are among the fitter's.
            folds: int64 [cases], -1 for cases that are never tested.
            after_fold: Called with every fold that is done.

        Raises:
            HeadError: the head breaks its contract or diverges.
            TaskError: a fold cannot be split further.
        """
        shape = bag_shape(self.source, plan.token_sets)
        scores = np.full((len(task.case_ids), task.outputs), np.nan)
        members, reports = [], []
        inner: list[InnerScores] = []
        places = np.array([self._places[case] for case in task.case_ids], dtype=np.int64)
        for fold in sorted(set(folds.tolist()) - {-1}):
            training, tested = folds != fold, np.flatnonzero(folds == fold)
            seed = self.seed + 1000 * (fold + 1)
            part = _Part(task, places, training, tested, seed)
            with _isolated_seed(seed, self.device):
                member = build_member(plan.head, shape, outputs=task.outputs, kind=task.kind, options=plan.options)
                fit = self._fit_gradient if plan.by_gradient else self._fit_closed_form
                report, logits, holdouts = fit(member, plan, part)
            scores[tested] = _score(member, logits)
            inner += [
                InnerScores(fold, split, np.flatnonzero(held), _score(member, found))
                for split, (held, found) in enumerate(zip(holdouts, report.inner, strict=True))
            ]
            members.append(member.cpu().eval())
            reports.append(report)
            if after_fold is not None:
                after_fold(fold)
        return CrossFit(shape, tuple(members), tuple(reports), scores, tuple(inner))

    def _fit_gradient(self, member: Member, plan: HeadPlan, part: _Part) -> _Fitted:
        """Fits on the training cases."""
        store, task = cast(BagStore, self._store), part.task
        moments = {name: self._moments[name] for name in plan.token_sets}
        shape = store.shape.select(plan.token_sets)
        member.standardiser = fit_standardiser(shape, moments, torch.from_numpy(part.places[part.training]))
        member.to(self.device)
        check_member(member, store.batch(torch.from_numpy(part.places[:2]), plan.token_sets), task.outputs)
        held_out = inner_split(task, part.training, fraction=plan.fit.holdout, seed=part.seed)
        data = TrainingSet(store, part.places, task.targets, task.kind, part.training, held_out)
        report = fit_gradient(member, data, plan.fit, seed=part.seed)
        tested = torch.from_numpy(part.places[part.tested])
        with torch.no_grad():
            logits = [
                member(store.batch(some, plan.token_sets)).logits for some in torch.split(tested, _SCORED_AT_ONCE)
            ]
        return report, torch.cat(logits), (held_out,)

    def _fit_closed_form(self, member: Member, plan: HeadPlan, part: _Part) -> _Fitted:
        """Fits on the training cases."""
        task, training = part.task, part.training
        features = self._compute_features(member, plan)[torch.from_numpy(part.places)]
        holdouts = tuple(
            inner_split(task, training, fraction=plan.fit.holdout, seed=part.seed + number)
            for number in range(_PENALTY_SPLITS)
        )
        learned, targets = features[torch.from_numpy(training)], task.targets[training]
        held = [each[training] for each in holdouts]
        report = fit_closed_form(member, learned, targets, held, class_weights=plan.fit.class_weights)
        with torch.no_grad():
            logits: Tensor = cast(Any, member.head).read_out(features[torch.from_numpy(part.tested)])
        return report, logits, holdouts

    def _compute_features(self, member: Member, plan: HeadPlan) -> Tensor:
        """Features [cases features] of a head in closed form, the same for every fold and task."""
        key = f"{plan.head} {plan.token_sets} {sorted(plan.options.items())}"
        if key not in self._features:
            head = cast(Any, member.head)
            with torch.no_grad():
                bags = stream_bags(self.source, self.case_ids, plan.token_sets)
                self._features[key] = torch.cat([head.features(member.prepare(bag)) for bag in bags])
        return self._features[key]


def _score(member: Member, logits: Tensor) -> NDArray[np.float64]:
    """Scores [cases outputs] of logits [cases outputs]."""
    scores: NDArray[np.float64] = member.scores(logits).reshape(len(logits), -1).double().cpu().numpy()
    return scores


@contextmanager
def _isolated_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators for a while; afterwards they are as they were."""
    cuda = device.type == "cuda"
    devices = [torch.cuda.current_device() if device.index is None else device.index] if cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(devices[0]):
                torch.cuda.manual_seed(seed)
        yield

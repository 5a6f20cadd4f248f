"""Owns the fitting of one head on one training set: loss, schedule, early stopping; knows no fold, file or table.

By gradient: a first fit with some training patients held out finds how many epochs help; a second fit on all training
cases runs that many of the same schedule. The held-out cases judge by the loss at the sharpness (a factor on the
logits, one over the temperature of Guo et al. 2017) that suits them best: a head that ranks better and better while
growing overconfident is then not stopped too soon. The factor is kept, so that the scores are calibrated.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedkit.bags import Bag, BagStore
from embedkit.errors import HeadError, OptionError
from embedkit.losses import TaskLoss, target_unit
from embedkit.members import Member
from embedkit.targets import TaskKind

__all__ = ["FitOptions", "FitReport", "TrainingSet", "fit_closed_form", "fit_gradient"]

_SHARPNESS = torch.logspace(-1.5, 0.5, 21)  # has 1 among its values
_JUDGED_AT_ONCE = 64


@dataclass(frozen=True)
class FitOptions:
    """How a head is fitted by gradient; a head's ``fit_defaults`` and the user's choice replace single fields.

    Attributes:
        learning_rate: Peak of the one-cycle schedule (Smith and Topin, arXiv 1708.07120) of AdamW.
        weight_decay: Of AdamW.
        epochs: Length of the schedule.
        batch_size: Cases per step.
        patience: Epochs without a better held-out loss after which the first fit stops.
        holdout: Part of the training patients held out in the first fit.
        class_weights: Weigh classes by the inverse of their frequency in the training set.
    """

    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    epochs: int = 30
    batch_size: int = 16
    patience: int = 12
    holdout: float = 0.2
    class_weights: bool = True

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "batch_size", "patience"):
            if getattr(self, name) <= 0:
                raise OptionError(f"fit option {name} is {getattr(self, name)}, expected above 0")
        if self.weight_decay < 0:
            raise OptionError(f"fit option weight_decay is {self.weight_decay}, expected 0 or above")

    def replace(self, **changes: Any) -> FitOptions:
        """These options with some fields changed.

        Raises:
            OptionError: a field that does not exist, or a value that means nothing.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(changes) - set(known)):
            raise OptionError(f"no fit option is called {', '.join(unknown)}; there are {', '.join(known)}")
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """What one head learns from.

    Attributes:
        store: Holds the tokens of the cases.
        places: int64 [cases], place of each labelled case in ``store``.
        targets: As `Task.targets`, one per case.
        kind: Of the task.
        training: bool [cases].
        held_out: bool [cases], a part of ``training`` to stop by.
    """

    store: BagStore
    places: NDArray[np.int64]
    targets: NDArray[Any]
    kind: TaskKind
    training: NDArray[np.bool_]
    held_out: NDArray[np.bool_]


@dataclass(frozen=True)
class FitReport:
    """How a fit went.

    Attributes:
        epochs: Run on all training cases.
        held_out_loss: Of the first fit after as many epochs.
        choices: Made on the held-out cases.
        inner: Per inner split, logits [held outputs] of the cases held out, in their order, by a head that was not
            trained on them, as the final head will be: at the epoch, sharpness or penalty chosen.
    """

    epochs: int = 0
    held_out_loss: float = math.nan
    choices: dict[str, float] = dataclasses.field(default_factory=dict)
    inner: tuple[Tensor, ...] = ()


def fit_gradient(member: Member, data: TrainingSet, options: FitOptions, *, seed: int) -> FitReport:
    """Fits the head of ``member`` in place; its standardiser must be fitted, it stays as it is.

    Draws from torch's global generators (dropout): seed them around the call. Order of cases comes from ``seed``.

    Raises:
        HeadError: the head diverged.
    """
    loss = TaskLoss(
        data.kind, data.targets, data.training, class_weights=options.class_weights, device=member.unit.device
    )
    member.unit.copy_(torch.tensor(loss.unit))
    start = copy.deepcopy(member.head.state_dict())
    search = _Descent(member, data, data.training & ~data.held_out, loss=loss, options=options, seed=seed)
    watch = _Watch(options.patience)
    for _ in range(options.epochs):
        search.run_epoch()
        if not watch.judge(*_held_out_logits(member, data), loss):
            break
    if not watch.epochs:
        raise HeadError(
            f"head {member.name!r} diverged: its held-out loss was never a finite number;"
            f" lower its learning rate (now {options.learning_rate:g})"
        )
    member.head.load_state_dict(start)
    final = _Descent(member, data, data.training, loss=loss, options=options, seed=seed)
    for _ in range(watch.epochs):
        final.run_epoch()
    member.sharpness.fill_(watch.sharpness)
    member.eval()
    return FitReport(watch.epochs, watch.loss, {"sharpness": watch.sharpness}, (watch.logits * watch.sharpness,))


def fit_closed_form(
    member: Member,
    features: Tensor,
    targets: NDArray[Any],
    holdouts: Sequence[NDArray[np.bool_]],
    *,
    class_weights: bool = True,
) -> FitReport:
    """Fits a head in closed form, in place.

    Args:
        member: Its head has ``fit``.
        features: [cases features] of the training cases.
        targets: Of the training cases, as `Task.targets`.
        holdouts: Each bool [cases], a part of the training cases to choose the penalty by.
        class_weights: As in `FitOptions`.
    """
    mean, scale = target_unit(member.kind, targets)
    if member.kind == "regression":
        member.unit.copy_(torch.tensor([mean, scale]))
        targets = (targets - mean) / scale
    head = cast(Any, member.head)
    unfitted = copy.deepcopy(head)
    how = {"kind": member.kind, "class_weights": class_weights}
    choices = dict(head.fit(features, targets, holdouts=holdouts, **how) or {})
    inner = []
    for held in holdouts:
        partner = copy.deepcopy(unfitted)
        partner.fit(features[torch.from_numpy(~held)], targets[~held], holdouts=(), **how, **choices)
        inner.append(partner.read_out(features[torch.from_numpy(held)]))
    member.eval()
    return FitReport(choices=choices, inner=tuple(inner))


class _Descent:
    """AdamW under a one-cycle schedule over the training cases, epoch by epoch."""

    def __init__(
        self,
        member: Member,
        data: TrainingSet,
        use: NDArray[np.bool_],
        *,
        loss: TaskLoss,
        options: FitOptions,
        seed: int,
    ) -> None:
        self.member = member
        self.data = data
        self.loss = loss
        self.options = options
        self.cases = torch.from_numpy(np.flatnonzero(use))
        self.places = torch.from_numpy(data.places)[self.cases]
        self.generator = torch.Generator().manual_seed(seed)
        parameters = [parameter for parameter in member.head.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(
            parameters, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        steps = math.ceil(len(self.cases) / options.batch_size)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, options.learning_rate, total_steps=options.epochs * steps, pct_start=0.2
        )

    def run_epoch(self) -> None:
        """One pass over the cases in a new order."""
        self.member.train()
        store = self.data.store
        for items in store.batches(self.places, self.options.batch_size, generator=self.generator):
            self._step(self.cases[items], store.batch(self.places[items], _token_sets(self.member)))

    def _step(self, cases: Tensor, bag: Bag) -> None:
        output = self.member.head(self.member.prepare(bag))
        answers = [each for each in (output.logits, output.auxiliary_logits) if each is not None]
        loss = torch.stack([self.loss(each.float(), cases.to(each.device)) for each in answers]).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.schedule.step()


class _Watch:
    """Judges each epoch of a fit on held-out cases and remembers how many epochs to run.

    With few cases held out their loss is noisy, and the lowest of thirty is low by chance. So the latest epoch that is
    not worse than the best by more than one standard error (of the paired difference) is taken, and in the same way the
    sharpness nearest to 1: the one-standard-error rule of Breiman et al., "Classification and regression trees" (1984).
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.epochs = 0
        self.sharpness = 1.0
        self.loss = math.nan
        self.logits = torch.empty(0)
        self._seen = 0
        self._best: Tensor | None = None

    def judge(self, logits: Tensor, cases: Tensor, loss: TaskLoss) -> bool:
        """Takes held-out logits [cases outputs] after an epoch; False once further epochs are of no use."""
        self._seen += 1
        factors = (torch.ones(1) if loss.kind == "regression" else _SHARPNESS).to(logits.device)
        losses = loss.each(logits * factors[:, None, None], cases)
        means = losses.mean(1)
        if bool(means.isfinite().all()):
            lowest = losses[means.argmin()]
            if self._best is None or lowest.mean() < self._best.mean():
                self._best = lowest
            if _is_as_good(lowest, self._best):
                fine = [place for place, found in enumerate(losses) if _is_as_good(found, lowest)]
                place = min(fine, key=lambda place: abs(math.log(float(factors[place]))))
                self.epochs, self.loss, self.sharpness = self._seen, float(means[place]), float(factors[place])
                self.logits = logits
        return self._seen - self.epochs < self.patience


def _is_as_good(losses: Tensor, best: Tensor) -> bool:
    """Whether losses [cases] exceed the best ones by no more than one standard error of the difference."""
    difference = losses - best
    return bool(difference.mean() <= difference.std(correction=0) / math.sqrt(len(difference)))


def _held_out_logits(member: Member, data: TrainingSet) -> tuple[Tensor, Tensor]:
    """Logits of the held-out cases, and their numbers."""
    member.eval()
    cases = torch.from_numpy(np.flatnonzero(data.held_out))
    places = torch.from_numpy(data.places)[cases]
    with torch.no_grad():
        parts = [
            member.head(member.prepare(data.store.batch(part, _token_sets(member)))).logits.float()
            for part in torch.split(places, _JUDGED_AT_ONCE)
        ]
    return torch.cat(parts), cases.to(parts[0].device)


def _token_sets(member: Member) -> tuple[str, ...]:
    """The token sets that a member trained by gradient reads."""
    return () if member.standardiser is None else member.standardiser.token_sets

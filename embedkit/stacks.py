"""Owns stacks: fits of one architecture trained together, their parameters side by side; knows no cache, fold or file.

The parameters of all fits are the rows of one tensor. A step runs the head once for many rows (`torch.vmap` of
`torch.func.functional_call`): fits of one training set share the bag, others of equal size have their bags side by
side. A head that cannot be run so runs fit by fit, on the same batches.

What a fit becomes does not depend on the rows beside it, but for rounding: its batches come from its own training set,
bags that are laid side by side have one size, and chance in the head (dropout) is drawn once per step, seeded by the
fit's own ``noise``, for one bag, and holds for every row of the run. So fits of one ``noise`` drop the same places,
which also makes candidates easier to tell apart.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from embedkit.augmentation import drop_views
from embedkit.bags import Bag
from embedkit.batching import Deck
from embedkit.calls import Call, Calls, as_index, pad_cases
from embedkit.descent import StackedAdamW, one_cycle
from embedkit.fitting import FitOptions
from embedkit.losses import FitLoss
from embedkit.masklosses import mask_losses
from embedkit.plugins import HeadOutput
from embedkit.standardisation import Standardiser
from embedkit.stopping import Watch
from embedkit.storage import TokenStore

__all__ = ["Fit", "Outcome", "Stack"]

_JUDGED_AT_ONCE = 64
_APART = 1_000_003  # so that no two steps of two noises draw alike

_Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Fit:
    """One head to be fitted on one training set.

    Attributes:
        name: Of the head.
        head: With its initial weights; it is not changed.
        how: Rate, decay, schedule and the like.
        store: Where its tokens are.
        standardiser: Of the tokens.
        loss: Of the task on the training cases.
        deck: Deals the task's cases.
        key: Names the training set; fits of equal keys have the cases of one deck in common, those to train on, those
            to be judged by, and the standardiser.
        training: bool [items of the deck], what to descend on.
        held_out: bool [items], what to judge by, never a copy; none where ``epochs`` is to be run without judging.
        noise: Seed of the dropout.
        epochs: How many of the schedule to run at most.
        classes: int64 [items], where batches are to hold each class alike.
    """

    name: str
    head: nn.Module
    how: FitOptions
    store: TokenStore
    standardiser: Standardiser
    loss: FitLoss
    deck: Deck
    key: Hashable
    training: NDArray[np.bool_]
    held_out: NDArray[np.bool_]
    noise: int
    epochs: int
    classes: _Ints | None = None

    @property
    def steps(self) -> int:
        """Batches per block."""
        return self.deck.steps(int(self.training.sum()), self.how.batch_size)

    @property
    def kin(self) -> Hashable:
        """Equal where fits can be trained in one stack."""
        how = dataclasses.replace(self.how, learning_rate=1.0, weight_decay=0.0)
        shapes = tuple((name, value.shape) for name, value in self.head.state_dict().items())
        loss = (self.loss.kind, self.loss.weights is None)
        length = (self.steps, self.deck.blocks, bool(self.held_out.any()))
        return self.name, repr(self.head), shapes, self.standardiser.token_sets, how, loss, length


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a fit.

    Attributes:
        epochs: To run; 0 where no epoch had a finite held-out loss.
        sharpness: Factor on the logits.
        loss: Mean held-out loss at both.
        logits: [held outputs] of the held-out cases there, before the sharpness.
        state: Trained parameters and buffers of the head.
    """

    epochs: int
    sharpness: float
    loss: float
    logits: Tensor
    state: dict[str, Tensor]


class Stack:
    """Some fits of one `Fit.kin`, in training."""

    def __init__(self, fits: Sequence[Fit], *, stackable: bool) -> None:
        """Takes the fits, and whether the head can be run for several rows at once."""
        self.fits = sorted(fits, key=lambda fit: (fit.noise, int(fit.training.sum()), str(fit.key)))
        self.store = store = self.fits[0].store
        self.stackable = stackable
        self.head = copy.deepcopy(self.fits[0].head).to(store.device)
        self.epoch = 0
        self._step = 0
        self._layout = _lay_out(self.head)
        states = [fit.head.state_dict() for fit in self.fits]
        values = [torch.cat([state[name].detach().flatten() for name in self._layout]) for state in states]
        self._fixed = {
            name: torch.stack([state[name].detach() for state in states]).to(store.device)
            for name in states[0]
            if name not in self._layout
        }
        rates, decays = (
            torch.tensor([getattr(fit.how, name) for fit in self.fits], device=store.device)
            for name in ("learning_rate", "weight_decay")
        )
        self._standard = {
            name: [
                torch.stack([fit.standardiser.get_buffer(f"{part}_{number}") for fit in self.fits]).to(store.device)
                for part in ("mean", "scale")
            ]
            for number, name in enumerate(self.token_sets)
        }
        self._adam = StackedAdamW(torch.stack(values).to(store.device), rates, decays)
        self._held = [np.flatnonzero(fit.held_out) for fit in self.fits]
        self._watch = _start_watch(self._held, self.fits[0].how.patience, store.device)
        self._logits = torch.zeros(0)
        self._mask_losses: Tensor | None = None
        self._arrange()

    @property
    def token_sets(self) -> tuple[str, ...]:
        """What the head reads."""
        return self.fits[0].standardiser.token_sets

    @property
    def judged_places(self) -> _Ints:
        """Where in the store the cases lie that fits are judged by."""
        held = [fit.deck.places[cases] for fit, cases in zip(self.fits, self._held, strict=True)]
        return np.unique(np.concatenate(held))

    def train_block(self, block: int) -> None:
        """Descends on one block of the epoch; its cases must be at hand in the store."""
        self.head.train()
        first = self.fits[0]
        steps = first.steps
        dealt = {
            fit.key: fit.deck.batches(fit.key, fit.training, self.epoch, block, steps, classes=fit.classes)
            for fit in self.fits
        }
        for step in range(steps):
            at = one_cycle(self._step, first.how.epochs * first.deck.blocks * steps)
            batches = [dealt[fit.key][step] for fit in self.fits]
            for call in self._calls.cover(batches):
                _seed(self.store.device, (self.fits[call.rows[0]].noise * _APART + self._step) % 2**63)
                self._adam.update(as_index(call.rows), self._slopes(call), at)
            if idle := [row for row, cases in enumerate(batches) if not len(cases)]:
                nothing = torch.zeros_like(self._adam.values[idle])
                self._adam.update(idle, {(0, nothing.shape[1]): nothing}, at)
            self._step += 1

    def judge_part(self, places: _Ints) -> None:
        """Computes the logits of those held-out cases that lie at these places, which are at hand in the store."""
        self.head.eval()
        there = [np.isin(fit.deck.places[held], places) for fit, held in zip(self.fits, self._held, strict=True)]
        asked = [held[here] for held, here in zip(self._held, there, strict=True)]
        spots = [np.flatnonzero(here) for here in there]
        for start in range(0, max(map(len, asked)), _JUDGED_AT_ONCE):
            part = slice(start, start + _JUDGED_AT_ONCE)
            with torch.no_grad():
                for call in self._calls.cover([cases[part] for cases in asked], level=True):
                    found = self._answer(call, self._leaves(call.rows))
                    for row, logits in zip(call.rows, found["logits"].float(), strict=True):
                        self._keep_logits(row, spots[row][part], logits)
                    for row, losses in zip(call.rows, found.get("mask_losses", ()), strict=False):
                        self._keep_mask_losses(row, spots[row][part], losses)

    def end_epoch(self) -> list[tuple[Fit, Outcome]]:
        """Judges the epoch, and gives and drops the fits that are done."""
        self.epoch += 1
        going = torch.tensor([self.epoch < fit.epochs for fit in self.fits])
        if self._watch is not None:
            more = None if self._mask_losses is None else self.fits[0].how.mask_weight * self._mask_losses
            going &= self._watch.judge(self._logits, self._judge, more)
        done = [(self.fits[row], self._outcome(row)) for row in (~going).nonzero()[:, 0].tolist()]
        if done:
            self._keep(going.nonzero()[:, 0])
        return done

    def alter(self, bag: Bag, *, rows: int) -> Bag:
        """The raw bag [rows * batch ...] as heads are shown it in training; chance is drawn once for all ``rows``."""
        rate = self.fits[0].how.view_dropout
        return drop_views(bag, rate, rows=rows) if rate else bag

    def _arrange(self) -> None:
        """What follows from which fits there are."""
        if not self.fits:
            return
        self._loss = self.fits[0].loss.stack([fit.loss for fit in self.fits])
        self._judge = self.fits[0].loss.judge.stack([fit.loss.judge for fit in self.fits])
        sizes = [self.store.shape.token_sets[name] for name in self.token_sets]
        numbers = len(self.store.shape.views) * sum(patches * dim for patches, dim in sizes)
        groups = [(fit.noise, fit.key) for fit in self.fits]
        self._calls = Calls(
            groups,
            [fit.deck for fit in self.fits],
            numbers=numbers,
            parameters=self._adam.values.shape[1],
            stackable=self.stackable,
        )

    def _keep(self, rows: Tensor) -> None:
        places = rows.tolist()
        self.fits = [self.fits[row] for row in places]
        self._held = [self._held[row] for row in places]
        there = rows.to(self.store.device)
        self._adam.keep(there)
        self._fixed = {name: values[there] for name, values in self._fixed.items()}
        self._standard = {name: [values[there] for values in both] for name, both in self._standard.items()}
        self._logits = self._logits[there] if len(self._logits) else self._logits
        self._mask_losses = None if self._mask_losses is None else self._mask_losses[there]
        if self._watch is not None:
            self._watch.keep(rows)
        self._arrange()

    def _outcome(self, row: int) -> Outcome:
        state = {name: values.detach()[0].clone() for name, values in self._leaves([row]).items()}
        state |= {name: values[row].clone() for name, values in self._fixed.items()}
        if self._watch is None:
            return Outcome(self.epoch, 1.0, float("nan"), torch.zeros(0), state)
        watch = self._watch
        logits = watch.logits[row, : len(self._held[row])].cpu()
        return Outcome(int(watch.epochs[row]), float(watch.sharpness[row]), float(watch.losses[row]), logits, state)

    def _slopes(self, call: Call) -> dict[tuple[int, int], Tensor]:
        """The gradients [rows ...] of one run, by the place of their numbers in a row of the stack."""
        leaves = {name: leaf.requires_grad_() for name, leaf in self._leaves(call.rows).items()}
        answers = self._answer(call, leaves)
        owners = [self.fits[row].deck.owners[items] for row, items in zip(call.firsts, call.cases, strict=True)]
        cases = torch.from_numpy(np.stack(owners).repeat(call.sharing, axis=0)).to(self.store.device)
        of_masks = answers.pop("mask_losses", None)
        losses = [self._loss.total(answer.float(), cases, call.rows, self.head, leaves) for answer in answers.values()]
        loss = torch.stack(losses).mean()
        if of_masks is not None:
            loss = loss + self.fits[0].how.mask_weight * of_masks.mean(1).sum()
        parameters = list(leaves.values())
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return {(start, stop): slope for (start, stop, _), slope in zip(self._layout.values(), found, strict=True)}

    def _leaves(self, rows: list[int]) -> dict[str, Tensor]:
        """The parameters of some rows, each [rows ...]."""
        values = self._adam.values[as_index(rows)].detach()
        return {
            name: values[:, start:stop].reshape(len(rows), *shape).detach()
            for name, (start, stop, shape) in self._layout.items()
        }

    def _answer(self, call: Call, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """The head's answers by name, as `_answers` of each row: [rows batch outputs], of masks [rows batch]."""
        parameters = leaves | {name: values[as_index(call.rows)] for name, values in self._fixed.items()}
        places = np.concatenate(
            [self.fits[row].deck.places[cases] for row, cases in zip(call.firsts, call.cases, strict=True)]
        )
        bag = self.store.batch(places, self.token_sets, slices=call.slices)
        if self.head.training:
            bag = self.alter(bag, rows=len(call.cases))
        with torch.autocast(self.store.device.type, torch.bfloat16, enabled=self.fits[0].how.precision == "bf16"):
            bag = self._standardise(bag, call.firsts)
            return (
                self._run_together(parameters, bag) if len(call.cases) == 1 else self._run_beside(parameters, bag, call)
            )

    def _run_together(self, parameters: dict[str, Tensor], bag: Bag) -> dict[str, Tensor]:
        """Runs all rows on one standardised bag."""

        def run(each: dict[str, Tensor]) -> dict[str, Tensor]:
            return _answers(functional_call(self.head, each, (bag,)), bag)

        if len(next(iter(parameters.values()))) == 1:
            alone = run({name: values[0] for name, values in parameters.items()})
            return {name: answer[None] for name, answer in alone.items()}
        answers: dict[str, Tensor] = torch.vmap(run, randomness="same")(parameters)
        return answers

    def _run_beside(self, parameters: dict[str, Tensor], bag: Bag, call: Call) -> dict[str, Tensor]:
        """Runs the rows of each training set on its own part of a standardised bag [sets * batch ...]."""
        size, ids = call.cases.shape, bag.case_ids[: call.cases.shape[1]]
        fields: dict[str, Any] = {
            name: values.view(*size, *values.shape[1:])
            for name in ("mask", "positions", "cover")
            if (values := getattr(bag, name)) is not None
        }
        fields["tokens"] = {name: values.view(*size, *values.shape[1:]) for name, values in bag.tokens.items()}

        def run(each: dict[str, Tensor], own: dict[str, Any]) -> dict[str, Tensor]:
            part = dataclasses.replace(bag, **own, case_ids=ids)
            return _answers(functional_call(self.head, each, (part,)), part)

        if call.sharing == 1:
            answers: dict[str, Tensor] = torch.vmap(run, randomness="same")(parameters, fields)
            return answers
        of_sets = {name: values.reshape(len(call.cases), -1, *values.shape[1:]) for name, values in parameters.items()}
        rows_of_a_set = torch.vmap(run, in_dims=(0, None), randomness="same")
        answers = torch.vmap(rows_of_a_set, randomness="same")(of_sets, fields)
        return {name: answer.flatten(0, 1) for name, answer in answers.items()}

    def _standardise(self, bag: Bag, rows: list[int]) -> Bag:
        """As `Standardiser`, with that of each row on its part of the bag; masked slices become zeros."""
        size, at = (len(rows), len(bag) // len(rows)), as_index(rows)
        masked = (~bag.mask).flatten().nonzero()[:, 0]
        tokens = {}
        for name, (mean, scale) in self._standard.items():
            values = bag.tokens[name]
            apart = values.view(*size, *values.shape[1:])
            apart = (apart - mean[at, None]).mul_(scale[at, None])
            tokens[name] = apart.view(values.shape)
            tokens[name].flatten(0, 2).index_fill_(0, masked, 0.0)
        return dataclasses.replace(bag, tokens=tokens, zeroed=True)

    def _keep_logits(self, row: int, spots: _Ints, logits: Tensor) -> None:
        if not len(self._logits):
            most = max(map(len, self._held))
            self._logits = logits.new_zeros(len(self.fits), most, logits.shape[-1])
        self._logits[row, torch.from_numpy(spots).to(logits.device)] = logits[: len(spots)]

    def _keep_mask_losses(self, row: int, spots: _Ints, losses: Tensor) -> None:
        if self._mask_losses is None:
            self._mask_losses = losses.new_zeros(len(self.fits), max(map(len, self._held)))
        self._mask_losses[row, torch.from_numpy(spots).to(losses.device)] = losses[: len(spots)]


def _answers(output: HeadOutput, bag: Bag) -> dict[str, Tensor]:
    """What a head is judged by: its logits, auxiliary ones where it has them, the losses of masks it was shown."""
    answers = {"logits": output.logits}
    if output.auxiliary_logits is not None:
        answers["auxiliary_logits"] = output.auxiliary_logits
    if output.mask_logits is not None and bag.cover is not None:
        seen = bag.cover.masked_fill(~bag.mask[..., None], torch.nan)  # a view may be hidden in training
        answers["mask_losses"] = mask_losses(output.mask_logits, seen)
    return answers


def _lay_out(head: nn.Module) -> dict[str, tuple[int, int, torch.Size]]:
    """Where in a row each trained parameter lies, and its shape."""
    layout: dict[str, tuple[int, int, torch.Size]] = {}
    start = 0
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            layout[name] = (start, start + parameter.numel(), parameter.shape)
            start += parameter.numel()
    return layout


def _seed(device: torch.device, seed: int) -> None:
    """Seeds the generator that dropout draws from; `torch.manual_seed` seeds those of all devices, at a millisecond."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _start_watch(held: Sequence[_Ints], patience: int, device: torch.device) -> Watch | None:
    """A watch over fits with these held-out cases; None where nothing is held out."""
    most = max(map(len, held))
    if most == 0:
        return None
    cases = torch.from_numpy(np.stack([pad_cases(each, most) for each in held])).to(device)
    real = torch.from_numpy(np.stack([np.arange(most) < len(each) for each in held])).to(device)
    return Watch(cases, real, patience)

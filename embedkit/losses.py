"""Owns the loss of a task on its training cases: what a head is fitted to, case by case; knows no head and no token."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from embedkit.curves import choose_edges, count_edges, interval_logits
from embedkit.targets import TaskKind

__all__ = ["FitLoss", "StackedFitLoss", "StackedLoss", "TaskLoss", "count_outputs", "lengthen", "target_unit"]


class StackedFitLoss(Protocol):
    """Losses of several fits taken at once, as `StackedLoss`."""

    @property
    def kind(self) -> str: ...
    def each(
        self, logits: Tensor, cases: Tensor, rows: Sequence[int] | None = None, *, real: Tensor | None = None
    ) -> Tensor: ...
    def total(
        self, logits: Tensor, cases: Tensor, rows: Sequence[int], head: nn.Module, leaves: Mapping[str, Tensor]
    ) -> Tensor: ...


class FitLoss(Protocol):
    """What a fit by gradient descends on: `TaskLoss`, or several of them as `embedkit.jointlosses.JointLoss`."""

    @property
    def kind(self) -> str: ...
    @property
    def unit(self) -> tuple[float, float]: ...
    @property
    def weights(self) -> Tensor | None: ...
    @property
    def judge(self) -> FitLoss: ...
    def stack(self, losses: Sequence[Any]) -> StackedFitLoss: ...


class TaskLoss:
    """The loss of a task on some of its cases, with the class weights or the unit of its training cases.

    Attributes:
        kind: Of the task.
        unit: Mean and deviation of a regression's training targets, in which its logits count; (0, 1) otherwise.
        weights: Binary and multilabel: weight of the positives [outputs]; multiclass: weights [classes]; None for
            equal weights, for a regression and for survival.
        judge: The loss of held-out cases: cross entropy with class weights, whatever is descended on.
        targets: [cases ...], what `compare` takes; of survival float64 [cases 2+intervals]: time, event, and for
            ``mtlr`` 1 for each interval in which the event may lie.
    """

    def __init__(
        self,
        kind: TaskKind,
        targets: NDArray[Any],
        training: NDArray[np.bool_],
        *,
        class_weights: bool = True,
        likelihood: str = "cox",
        gamma: float = 0.0,
        balanced: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """Takes what a task is and how it is learned.

        Args:
            kind: Of the task.
            targets: As `Task.targets`.
            training: bool [cases], which of them train.
            class_weights: As in `FitOptions`.
            likelihood: How a head learns survival.
            gamma: Of the focal loss; 0 for cross entropy.
            balanced: Batches hold each class alike, so that weights would count it twice.
            device: Where logits are.
        """
        self.kind = kind
        self.likelihood = likelihood
        self.gamma = gamma
        self.unit = target_unit(kind, targets[training])
        self.weights: Tensor | None = None
        if kind == "regression":
            targets = (targets - self.unit[0]) / self.unit[1]
        elif kind == "survival":
            if likelihood == "mtlr":
                edges = choose_edges(targets[training], count_edges(targets))
                targets = np.hstack([targets, _open_intervals(targets, edges)])
        elif class_weights:
            self.weights = _class_weights(kind, targets[training]).to(device)
        dtype = {"multiclass": torch.int64, "survival": torch.float64}.get(kind, torch.float32)
        self.targets = torch.as_tensor(targets, dtype=dtype, device=device)
        self.judge = self
        if gamma or balanced:
            self.judge = copy.copy(self)
            self.judge.judge, self.judge.gamma = self.judge, 0.0
        if balanced:
            self.weights = None

    def stack(self, losses: Sequence[Any]) -> StackedLoss:
        """Those of several fits of one kind, taken at once."""
        return StackedLoss(losses)

    def __call__(self, logits: Tensor, cases: Tensor) -> Tensor:
        """Mean loss of logits [batch outputs] for cases [batch]."""
        return self.each(logits, cases).mean()

    def each(self, logits: Tensor, cases: Tensor) -> Tensor:
        """Losses [... batch] of logits [... batch outputs] for cases [batch]."""
        return self.compare(logits, self.targets[cases], self.weights)

    def compare(self, logits: Tensor, truth: Tensor, weights: Tensor | None) -> Tensor:
        """Losses [... batch] of logits [... batch outputs] for rows of ``targets`` and for ``weights``.

        It depends on nothing but its arguments, the kind of task and the likelihood, so that losses of one kind can be
        stacked. By ``cox`` risk sets are those among the cases given, so that the loss of one depends on the others.
        """
        if self.kind == "survival":
            if self.likelihood == "mtlr":
                chances = interval_logits(logits.double()).log_softmax(-1)
                return -chances.masked_fill(truth[..., 2:] == 0, -torch.inf).logsumexp(-1)
            return _partial_losses(logits[..., 0].double(), truth[:, 0], truth[:, 1])
        truth = truth.expand(logits.shape if truth.ndim == 2 else logits.shape[:-1])
        if self.kind == "regression":
            return F.smooth_l1_loss(logits[..., 0], truth, reduction="none")
        if self.kind == "multiclass":
            losses = F.cross_entropy(logits.flatten(0, -2), truth.flatten(), weights, reduction="none")
            losses = losses.view(truth.shape)
            if self.gamma:
                losses = losses * self._focus(1 - logits.softmax(-1).gather(-1, truth[..., None])[..., 0])
            return losses
        truth = truth[..., None] if self.kind == "binary" else truth
        losses = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=weights, reduction="none")
        if self.gamma:
            losses = losses * self._focus((logits * (1 - 2 * truth)).sigmoid())
        return losses.mean(-1)

    def _focus(self, missing: Tensor) -> Tensor:
        """Weight of a case whose true class has all probability but this (Lin et al. 2017, equation 4)."""
        return missing.clamp(min=torch.finfo(missing.dtype).tiny) ** self.gamma


class StackedLoss:
    """Losses of several fits, of one kind and weighted alike, taken at once.

    Attributes:
        kind: Of the tasks.
    """

    def __init__(self, losses: Sequence[TaskLoss]) -> None:
        """Takes the loss of each fit."""
        self.kind = losses[0].kind
        self._first = losses[0]
        self._same = all(loss is losses[0] for loss in losses)
        most = max(len(loss.targets) for loss in losses)
        self._targets, self._weights = losses[0].targets[None], losses[0].weights
        if not self._same:
            self._targets = torch.stack([lengthen(loss.targets, most) for loss in losses])
            weights = [loss.weights for loss in losses if loss.weights is not None]
            self._weights = torch.stack(weights) if weights else None

    def each(
        self, logits: Tensor, cases: Tensor, rows: Sequence[int] | None = None, *, real: Tensor | None = None
    ) -> Tensor:
        """Losses [fits ... batch] of logits [fits ... batch outputs] for cases [fits batch] of each fit's task.

        Args:
            logits, cases: Of some fits.
            rows: Which fits these are; None for all.
            real: bool [fits batch], which cases are no padding; None for all. Padding may have any loss, but must not
                stand in a risk set.
        """
        weights = self._weights
        if self._same:
            truth = self._targets[0, cases]
        else:
            asked = torch.arange(len(cases)) if rows is None else torch.tensor(rows)
            asked = asked.to(cases.device)
            truth = self._targets[asked[:, None], cases]
            weights = None if weights is None else weights[asked]
        if self.kind == "survival" and self._first.likelihood == "cox":
            return self._each_alone(logits, truth, torch.ones_like(cases, dtype=torch.bool) if real is None else real)
        axes = (0, 0, None if self._same or weights is None else 0)
        found: Tensor = torch.vmap(self._first.compare, in_dims=axes)(logits, truth, weights)
        return found

    def total(
        self,
        logits: Tensor,
        cases: Tensor,
        rows: Sequence[int],
        head: nn.Module,  # noqa: ARG002 - for losses that the head weighs
        leaves: Mapping[str, Tensor],  # noqa: ARG002
    ) -> Tensor:
        """What is descended on: the mean over the batch, summed over fits.

        Args:
            logits: [fits batch outputs].
            cases: [fits batch].
            rows: Which fits these are.
            head: Of the fits.
            leaves: Its parameters, each [fits ...].
        """
        return self.each(logits, cases, rows).mean(1).sum()

    def _each_alone(self, logits: Tensor, truth: Tensor, real: Tensor) -> Tensor:
        """Fit after fit, since each sorts its own cases by time; padding has loss 0."""
        losses = []
        for own, rows, there in zip(logits, truth, real, strict=True):
            found = self._first.compare(own[..., there, :], rows[there], None)
            losses.append(found.new_zeros(own.shape[:-1]).masked_scatter(there, found))
        return torch.stack(losses)


def lengthen(values: Tensor, length: int) -> Tensor:
    """Values [cases ...] with rows of zeros after them, up to ``length``."""
    return torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])


def target_unit(kind: TaskKind, targets: NDArray[Any]) -> tuple[float, float]:
    """Mean and deviation of a regression's training targets, (0, 1) for other kinds."""
    return (float(targets.mean()), float(targets.std()) or 1.0) if kind == "regression" else (0.0, 1.0)


def _class_weights(kind: TaskKind, targets: NDArray[Any]) -> Tensor:
    """Binary and multilabel: weight of the positives [outputs]; multiclass: weights [classes]."""
    if kind == "multiclass":
        counts = np.bincount(targets)
        return torch.as_tensor(len(targets) / (np.count_nonzero(counts) * counts.clip(min=1)), dtype=torch.float32)
    positives = targets.reshape(len(targets), -1).sum(0)
    return torch.as_tensor((len(targets) - positives).clip(min=1) / positives.clip(min=1), dtype=torch.float32)


def count_outputs(kind: TaskKind, outputs: int, targets: NDArray[Any], *, likelihood: str) -> int:
    """Width of a head's logits: that of the task, but of a survival head by ``mtlr`` the number of its edges."""
    return count_edges(targets) if kind == "survival" and likelihood == "mtlr" else outputs


def _partial_losses(logits: Tensor, times: Tensor, events: Tensor) -> Tensor:
    """Each event's share [... batch] of minus the log partial likelihood, ties as Efron; 0 for censored cases.

    Of d events at one time the r-th sees the hazard at risk less r/d of that of all d: with s the share of the d in
    the hazard at risk, its log is that of the hazard at risk plus log(1 - r/d s).

    Args:
        logits: [... batch], log hazards.
        times, events: [batch].
    """
    order = times.argsort(descending=True, stable=True)
    logits, falling, happened = logits[..., order], -times[order], events[order]
    first = torch.searchsorted(falling, falling)
    last = torch.searchsorted(falling, falling, right=True)
    at_risk = logits.logcumsumexp(-1)[..., last - 1]
    counts = F.pad(happened.cumsum(0), (1, 0))
    ties = counts[last] - counts[first]
    rank = counts[:-1] - counts[first]
    shares = F.pad(((logits - at_risk).exp() * happened).cumsum(-1), (1, 0))
    share = shares[..., last] - shares[..., first]
    losses = happened * (at_risk + torch.log1p(-rank / ties.clamp(min=1) * share) - logits)
    return losses[..., order.argsort()]


def _open_intervals(targets: NDArray[Any], edges: NDArray[np.float64]) -> NDArray[np.bool_]:
    """bool [cases edges+1]: in which intervals the event of each case may lie; its own, or all not yet over."""
    times, happened = targets[:, 0], targets[:, 1] == 1
    place = np.where(happened, np.searchsorted(edges, times, "left"), np.searchsorted(edges, times, "right"))
    intervals = np.arange(len(edges) + 1)
    return np.where(happened[:, None], intervals == place[:, None], intervals >= place[:, None])

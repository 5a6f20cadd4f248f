"""Owns how a head is fitted, in options and in the report of it, and the fit in closed form; knows no fold or file.

Fits by gradient are trained in stacks, see `embedkit.stacks`.
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

from embedkit.errors import OptionError
from embedkit.losses import target_unit
from embedkit.members import Member

__all__ = ["FitOptions", "FitReport", "fit_closed_form"]

_NAMED = {"precision": ("fp32", "bf16"), "loss": ("cross_entropy", "focal"), "sampling": ("shuffled", "balanced")}


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
        inner_splits: First fits, each with another part held out, over which the epochs of the last are averaged; a
            choice among candidates takes three or more.
        class_weights: Weigh classes by the inverse of their frequency in the training set; of balanced batches, which
            need none, only to judge by held-out cases.
        loss: Of a classification: ``cross_entropy``, or ``focal`` (Lin et al. 2017, arXiv 1708.02002), which makes
            little of cases that are answered well; class weights are its alpha. Held-out cases judge without it.
        gamma: Of the focal loss, how little; 0 is cross entropy.
        sampling: ``shuffled``, every training case once an epoch; or ``balanced``, as many cases in all, but of each
            class alike: a rare one's come several times, a common one's not all.
        view_dropout: Chance of each view of a case to be masked in training, never its last one.
        precision: Of the head's arithmetic, ``fp32`` or ``bf16``; parameters are float32 always.
        mask_weight: What the loss of the predicted mask counts beside that of the label, of a head that learns masks.
    """

    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    epochs: int = 30
    batch_size: int = 16
    patience: int = 12
    holdout: float = 0.2
    inner_splits: int = 1
    class_weights: bool = True
    loss: str = "cross_entropy"
    gamma: float = 2.0
    sampling: str = "shuffled"
    precision: str = "fp32"
    mask_weight: float = 1.0
    view_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, values in _NAMED.items():
            if (found := getattr(self, name)) not in values:
                raise OptionError(f"fit option {name} is {found!r}, expected {' or '.join(values)}")
        for name in ("learning_rate", "epochs", "batch_size", "patience", "inner_splits"):
            if getattr(self, name) <= 0:
                raise OptionError(f"fit option {name} is {getattr(self, name)}, expected above 0")
        if not 0 <= self.view_dropout < 1:
            raise OptionError(f"fit option view_dropout is {self.view_dropout}, expected from 0 to below 1")
        for name in ("weight_decay", "gamma", "mask_weight"):
            if not getattr(self, name) >= 0:
                raise OptionError(f"fit option {name} is {getattr(self, name)}, expected 0 or above")

    def replace(self, **changes: Any) -> FitOptions:
        """These options with some fields changed.

        Raises:
            OptionError: a field that does not exist, or a value that means nothing.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(changes) - set(known)):
            raise OptionError(f"no fit option is called {', '.join(unknown)}; there are {', '.join(known)}")
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class FitReport:
    """How a fit went.

    Attributes:
        epochs: Run on all training cases.
        held_out_loss: Of the first fit after as many epochs.
        choices: Made on the held-out cases.
        inner: Per inner split, logits [held outputs] of the cases held out, in their order, by a head that was not
            trained on them, as the final head will be: at the epoch, sharpness or penalty chosen.
        candidate: Place of the candidate chosen.
        ranking: Places of all candidates and their mean held-out losses, best first; none where there is no choice.
    """

    epochs: int = 0
    held_out_loss: float = math.nan
    choices: dict[str, float] = dataclasses.field(default_factory=dict)
    inner: tuple[Tensor, ...] = ()
    candidate: int = 0
    ranking: tuple[tuple[int, float], ...] = ()


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
    if member.curve is not None:
        member.curve.fit(head.read_out(features), targets)
    member.eval()
    return FitReport(choices=choices, inner=tuple(inner))

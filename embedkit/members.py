"""Owns the member: one fitted head with all that surrounds it (standardisation, units, scores); trains nothing.

A run is an ensemble of members, one per fold.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.curves import CoxCurve, MtlrCurve, make_curve
from embedkit.plugins import HeadOutput, check_output, create_head, list_options, load_head, survival_likelihood
from embedkit.standardisation import Standardiser
from embedkit.targets import TaskKind

__all__ = ["Member", "build_member", "check_member", "complete_options", "count_parameters", "fitted_tensors"]


class Member(nn.Module):
    """Maps a raw bag to logits and scores.

    Tokens are standardised first where the head is trained by gradient; a head in closed form does that itself.
    """

    def __init__(
        self,
        name: str,
        head: nn.Module,
        standardiser: Standardiser | None,
        kind: TaskKind,
        curve: CoxCurve | MtlrCurve | None = None,
    ) -> None:
        """Takes a curve for a survival task alone."""
        super().__init__()
        self.name = name
        self.kind = kind
        self.head = head
        self.standardiser = standardiser
        self.curve = curve
        self.sharpness: Tensor
        self.unit: Tensor
        self.register_buffer("sharpness", torch.tensor(1.0))
        self.register_buffer("unit", torch.tensor([0.0, 1.0]))

    def prepare(self, bag: Bag) -> Bag:
        """The bag as the head reads it: on the member's device, float32 and standardised."""
        bag = bag.to(self.unit.device)
        if self.standardiser is None:
            return bag.to(dtype=self.unit.dtype)
        standardised: Bag = self.standardiser(bag)
        return standardised

    def forward(self, bag: Bag) -> HeadOutput:
        """The head's output on a raw bag, its logits scaled by the sharpness that was fitted on held-out cases."""
        output: HeadOutput = self.head(self.prepare(bag))
        return dataclasses.replace(output, logits=output.logits * self.sharpness)

    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities, or predictions of a regression in the target's unit.

        Returns:
            [batch] for binary and regression, [batch classes] for multiclass and multilabel, [batch 1+times] for
            survival: the risk and the chance to be without the event at each stated time.
        """
        if self.curve is not None:
            chances: Tensor = self.curve(logits)
            return chances
        if self.kind == "regression":
            return logits[:, 0].float() * self.unit[1] + self.unit[0]
        if self.kind == "multiclass":
            return logits.float().softmax(1)
        probabilities = logits.float().sigmoid()
        return probabilities[:, 0] if self.kind == "binary" else probabilities


def build_member(
    name: str,
    shape: BagShape,
    *,
    outputs: int,
    kind: TaskKind,
    options: Mapping[str, Any],
    times: Sequence[float] = (),
) -> Member:
    """A member that is yet to be fitted or loaded; it reads all token sets of ``shape``.

    ``times`` are those at which the survival of a survival task is stated.

    Raises:
        HeadError: as `create_head`.
    """
    token_sets = tuple(shape.token_sets)
    head = create_head(name, shape, token_sets, outputs, options=options)
    by_gradient = load_head(name).fit_by == "gradient"
    curve = make_curve(survival_likelihood(name), outputs, times) if kind == "survival" else None
    return Member(name, head, Standardiser(shape, token_sets) if by_gradient else None, kind, curve)


def complete_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The head's options with its defaults, so that a run can be rebuilt after defaults or files have changed.

    Raises:
        HeadError: unknown head, or a file that an option names cannot be used.
    """
    defaults = {key: value for key, value in list_options(name).items() if value is not inspect.Parameter.empty}
    completed = defaults | dict(options)
    resolve = getattr(load_head(name), "resolve_options", dict)
    return dict(resolve(completed))


def check_member(member: Member, bag: Bag, outputs: int) -> None:
    """Runs a head once and checks that it keeps its contract.

    Raises:
        HeadError: as `check_output`.
    """
    with torch.no_grad():
        check_output(member.name, member.head(member.prepare(bag)), bag, outputs)


def count_parameters(member: Member) -> int:
    """Numbers that were fitted: the head's parameters, or what it solved for in closed form."""
    return sum(values.numel() for values in fitted_tensors(member))


def fitted_tensors(member: Member) -> tuple[Tensor, ...]:
    """What was fitted, in place: the head's parameters, or what it solved for in closed form."""
    trained = tuple(member.head.parameters())
    if trained or not hasattr(member.head, "readout"):
        return trained
    readout = cast(nn.Module, member.head.readout)
    return tuple(readout.get_buffer(name) for name in ("weight", "bias"))

"""Owns the member: one fitted head with all that surrounds it (standardisation, units, scores); trains nothing.

A run is an ensemble of members, one per fold.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.curves import CoxCurve, MtlrCurve, make_curve
from embedkit.plugins import HeadOutput, check_output, create_head, list_options, load_head, survival_likelihood
from embedkit.recipe import TokenSet
from embedkit.standardisation import Standardiser
from embedkit.targets import TaskKind

__all__ = ["Member", "build_member", "check_member", "complete_options", "count_parameters", "mean_evidence"]


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

    def evidence(self, bag: Bag, output: int) -> Tensor:
        """What each token adds to one logit: exact where the head can say so, else gradient times token.

        Of survival to the mean of all logits, each of which speaks for an earlier event.

        Returns:
            [batch views slices patches]; 0 on masked slices.
        """
        prepared = self.prepare(bag)
        outputs = [output] if self.curve is None else range(self.curve.outputs)
        if hasattr(self.head, "evidence"):
            each = [cast(Any, self.head).evidence(prepared, place) for place in outputs]
        else:
            each = [_gradient_times_token(self.head, prepared, place) for place in outputs]
        found: Tensor = torch.stack(each).mean(0).detach().float()
        return found * self.sharpness


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


def mean_evidence(parts: Sequence[Tensor]) -> Tensor:
    """The mean of evidence [batch views slices patches] on square grids, on the finest, coarse places shared out."""
    finest = max(part.shape[3] for part in parts)
    return torch.stack([_share_out(part, finest) for part in parts]).mean(0)


def _share_out(evidence: Tensor, patches: int) -> Tensor:
    """Evidence [batch views slices patches] on a finer square grid, with the same sum over every slice."""
    side, wanted = math.isqrt(evidence.shape[3]), math.isqrt(patches)
    line = torch.arange(wanted) * side // wanted
    places = (line[:, None] * side + line).flatten()
    counts = places.bincount(minlength=side * side).to(evidence)
    return (evidence / counts)[..., places]


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
    trained = sum(parameter.numel() for parameter in member.head.parameters())
    if trained or not hasattr(member.head, "readout"):
        return trained
    readout = cast(nn.Module, member.head.readout)
    return sum(readout.get_buffer(name).numel() for name in ("weight", "bias"))


def _gradient_times_token(head: nn.Module, bag: Bag, output: int) -> Tensor:
    tokens = {name: values.detach().requires_grad_() for name, values in bag.tokens.items()}
    with torch.enable_grad():
        logits = head(dataclasses.replace(bag, tokens=tokens)).logits[:, output].sum()
        gradients = torch.autograd.grad(logits, list(tokens.values()), allow_unused=True, materialize_grads=True)
    parts = [(values * slope).sum(-1) for values, slope in zip(tokens.values(), gradients, strict=True)]
    if bag.tail is not None:  # cut tokens open with the class token and registers, which have no place in the image
        prefix = bag.tail.shape.prefix
        cuts = [TokenSet.parse(name).kind == "cut" for name in tokens]
        parts = [part[..., prefix:] if cut else part for part, cut in zip(parts, cuts, strict=True)]
    patches = max(part.shape[3] for part in parts)
    spread = [part.expand(-1, -1, -1, patches) / (patches // part.shape[3]) for part in parts]
    return torch.stack(spread).sum(0).masked_fill(~bag.mask[..., None], 0.0)

"""Owns the head ``multitask``: any other head as trunk, its last layer shared out among several targets.

What the targets have in common is learned once; who has few labels borrows from who has many (Caruana, "Multitask
learning", Machine Learning 28, 1997), as MTMed3D trains its tasks. The losses are weighed

- by uncertainty (Kendall, Gal and Cipolla, arXiv 1705.07115, equation 10): sum over targets of exp(-s) loss + s / 2, a
  log variance s learned for each;
- by GradNorm (Chen et al., arXiv 1711.02257): weights that sum to the number of targets are learned so that every
  target's gradient on the shared parameters, G = weight |slope|, comes to mean(G) r^1.5, r being how much of its loss
  at the start a target still has, over the mean of that;
- or alike (``equal``).

Different from the papers: the weights learn in the same steps as the head and by ten times its rate, since a head on a
cache is trained in some hundred steps; GradNorm's are a softmax, which keeps their sum, and look at all that is shared,
not at its last layer alone; a loss at the start is that of logits of zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.errors import HeadError
from embedkit.plugins import HeadOutput
from embedkit.trunks import TrunkHead, find_output_axes

__all__ = ["MultitaskHead"]

_WEIGHTINGS = ("uncertainty", "gradnorm", "equal")
_PACE = 10.0
_RESTORING = 1.5  # alpha of GradNorm


class MultitaskHead(TrunkHead):
    """A trunk whose outputs are those of several targets side by side, or of one of them where ``place`` says which."""

    owner: ClassVar[str] = "multitask"
    kinds: ClassVar[frozenset[str]] = frozenset({"binary", "multiclass", "multilabel", "regression"})
    joint: ClassVar[bool] = True

    def __init__(
        self,
        shape: BagShape,
        token_sets: Sequence[str],
        outputs: int,
        *,
        trunk: str = "abmil",
        weighting: str = "uncertainty",
        targets: Sequence[str] = (),  # noqa: ARG002 - for the record
        widths: Sequence[int] = (),
        place: int | None = None,
    ) -> None:
        """Takes the names of the targets and the number of each one's logits; none for a lone target."""
        if weighting not in _WEIGHTINGS:
            raise HeadError(f"weighting of head 'multitask' is {weighting!r}, expected {', '.join(_WEIGHTINGS)}")
        widths = tuple(widths) or (outputs,)
        super().__init__(shape, token_sets, sum(widths), trunk=trunk)
        self.weighting = weighting
        self.first = 0 if place is None else sum(widths[:place])
        self.last = self.first + outputs
        if len(widths) > 1:
            self.shared = _list_shared(self.trunk, trunk, shape, token_sets, sum(widths))
            self.balance = nn.Parameter(torch.zeros(len(widths)))
        if hasattr(self.trunk, "evidence"):
            self.evidence = self._find_evidence

    def _find_evidence(self, bag: Bag, output: int) -> Tensor:
        found: Tensor = cast(Any, self.trunk).evidence(bag, self.first + output)
        return found

    def forward(self, bag: Bag) -> HeadOutput:
        output: HeadOutput = self.trunk(bag)
        return output.select(slice(self.first, self.last))

    def combine(self, losses: Tensor, chance: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
        """The loss to descend on, [fits].

        Args:
            losses: [fits targets].
            chance: [fits targets], what they are where all logits are 0.
            leaves: Parameters of the fits, each [fits ...].
        """
        if self.weighting == "equal":
            return losses.sum(1)
        paced = _PACE * leaves["balance"]
        if self.weighting == "uncertainty":
            return ((-paced).exp() * losses + paced / 2).sum(1)
        weights = losses.shape[1] * paced.softmax(1)
        shared = [leaves[name] for name in self.shared]
        return (weights.detach() * losses).sum(1) + _unevenness(losses, chance, weights, shared)


def _unevenness(losses: Tensor, chance: Tensor, weights: Tensor, shared: Sequence[Tensor]) -> Tensor:
    """GradNorm's loss of the weights [fits targets] (equation 2 of its paper), [fits]; ``shared`` are [fits ...]."""
    slopes = [_measure_slope(loss, shared) for loss in losses.unbind(1)]
    norms = weights * torch.stack(slopes, 1)
    left = (losses / chance).detach()
    wanted = norms.mean(1, keepdim=True).detach() * (left / left.mean(1, keepdim=True)) ** _RESTORING
    return (norms - wanted).abs().sum(1)


def _measure_slope(loss: Tensor, shared: Sequence[Tensor]) -> Tensor:
    """Length [fits] of the gradient of a loss [fits] by parameters [fits ...]."""
    slopes = torch.autograd.grad(loss.sum(), shared, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([slope.flatten(1) for slope in slopes], 1).norm(dim=1).detach()


def _list_shared(
    trunk: nn.Module, name: str, shape: BagShape, token_sets: Sequence[str], outputs: int
) -> tuple[str, ...]:
    """The parameters that all targets share."""
    axes = find_output_axes(name, shape, token_sets, outputs)
    shared = [f"trunk.{key}" for key, _ in trunk.named_parameters() if not axes[key]]
    if not shared:
        raise HeadError(
            f"head {name!r} shares nothing between targets, so it cannot be the trunk of 'multitask'; choose another,"
            " as abmil or mlp"
        )
    return tuple(shared)

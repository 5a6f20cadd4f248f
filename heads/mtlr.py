"""Owns the head ``mtlr``: any other head as trunk, its outputs a logistic regression for each edge between intervals.

Yu, Greiner, Lin and Baracos, "Learning patient-specific cancer survival distributions as a sequence of dependent
regressors" (NeurIPS 2011), on pooled tokens as the prognosis head of MAFM3. The chance of the event in each interval is
a softmax (`embedkit.curves.interval_logits`); a censored case has the likelihood of all intervals that are left to it.
It assumes no proportional hazards: curves of two cases may cross. The smoothness term of the paper is left to weight
decay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.plugins import HeadOutput, SliceOrder
from embedkit.trunks import build_trunk

__all__ = ["MtlrHead"]


class MtlrHead(nn.Module):
    """Survival curve from a trunk, learned by the censored likelihood of multi-task logistic regression."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    kinds: ClassVar[frozenset[str]] = frozenset({"survival"})
    likelihood: ClassVar[str] = "mtlr"
    has_trunk: ClassVar[bool] = True
    slice_order: ClassVar[SliceOrder] = "free"  # of its default trunk
    fit_defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, shape: BagShape, token_sets: Sequence[str], outputs: int, *, trunk: str = "abmil") -> None:
        super().__init__()
        self.trunk = build_trunk("mtlr", trunk, shape, token_sets, outputs)
        if hasattr(self.trunk, "evidence"):
            self.evidence: Callable[[Bag, int], Tensor] = self.trunk.evidence  # type: ignore[assignment]

    def forward(self, bag: Bag) -> HeadOutput:
        output: HeadOutput = self.trunk(bag)
        return output

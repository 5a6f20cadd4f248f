"""Owns the head ``cox``: any other head as trunk, its one output the log hazard of a survival task.

Katzman et al., "DeepSurv: personalized treatment recommender system using a Cox proportional hazards deep neural
network" (BMC Medical Research Methodology 18:24, 2018, arXiv 1606.00931), with pooled tokens in place of covariates.

The partial likelihood compares each event with all who are then at risk, so a small batch is biased: by default a step
takes all training cases, up to 1,024 at once. Beyond that, or where tokens are streamed in blocks, a risk set is the
batch's part of it. The level of the logit means nothing: the baseline hazard of the training cases takes it up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.plugins import HeadOutput, SliceOrder
from embedkit.trunks import build_trunk

__all__ = ["CoxHead"]


class CoxHead(nn.Module):
    """Log hazard from a trunk, learned by the Cox partial likelihood over whole risk sets."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    kinds: ClassVar[frozenset[str]] = frozenset({"survival"})
    likelihood: ClassVar[str] = "cox"
    has_trunk: ClassVar[bool] = True
    slice_order: ClassVar[SliceOrder] = "free"  # of its default trunk
    fit_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 1024, "epochs": 100, "patience": 40}

    def __init__(self, shape: BagShape, token_sets: Sequence[str], outputs: int, *, trunk: str = "abmil") -> None:
        super().__init__()
        self.trunk = build_trunk("cox", trunk, shape, token_sets, outputs)
        if hasattr(self.trunk, "evidence"):
            self.evidence: Callable[[Bag, int], Tensor] = self.trunk.evidence  # type: ignore[assignment]

    def forward(self, bag: Bag) -> HeadOutput:
        output: HeadOutput = self.trunk(bag)
        return output

"""Owns the head ``logistic``: the baseline of mean pooling and L2 logistic regression.

The linear probe that any trained head must beat: the mean of the tokens over the slices of each view, views side by
side, a missing one at the training mean. A regression is fitted by ridge regression, survival by Cox regression with a
ridge penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.closed_form import LinearReadout
from embedkit.plugins import HeadOutput, SliceOrder
from embedkit.pooling import join_tokens, joined_size, masked_mean
from embedkit.targets import KINDS

__all__ = ["LogisticHead"]


class LogisticHead(nn.Module):
    """Baseline: mean over slices and patches per view, then L2 logistic (ridge, Cox) regression in closed form."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "closed form"
    kinds: ClassVar[frozenset[str]] = frozenset(KINDS)
    slice_order: ClassVar[SliceOrder] = "free"

    def __init__(self, shape: BagShape, token_sets: Sequence[str], outputs: int) -> None:
        super().__init__()
        self.token_sets = tuple(token_sets)
        self.patches, self.dim = joined_size(shape, token_sets)
        self.readout = LinearReadout(len(shape.views) * self.dim, outputs)

    def features(self, bag: Bag) -> Tensor:
        """[batch views * dim], NaN where a view is missing."""
        pooled = masked_mean(join_tokens(bag, self.token_sets).mean(3), bag.mask[..., None], 2)
        return pooled.masked_fill(~bag.mask.any(2)[..., None], torch.nan).flatten(1)

    def fit(self, features: Tensor, targets: Any, **how: Any) -> dict[str, float]:
        """Fits the read-out as `LinearReadout.fit` and returns what was chosen."""
        return {"strength": self.readout.fit(features, targets, **how)}

    def read_out(self, features: Tensor) -> Tensor:
        """Logits [batch outputs] of `features`."""
        logits: Tensor = self.readout(features)
        return logits

    def forward(self, bag: Bag) -> HeadOutput:
        features = self.features(bag)
        return HeadOutput(self.read_out(features), embedding=self.readout.standardise(features))

    def evidence(self, bag: Bag, output: int) -> Tensor:
        """[batch views slices patches]: what each token adds to the logit, against an average case."""
        readout = self.readout
        weight = (readout.weight[output] * readout.scale).view(-1, self.dim)
        mean = (readout.mean.view(-1, self.dim) * weight).sum(1)
        each = torch.einsum("bvspd,vd->bvsp", join_tokens(bag, self.token_sets), weight) - mean[:, None, None]
        slices = bag.mask.sum(2).clamp(min=1)[..., None, None]
        return (each / (slices * self.patches)).masked_fill(~bag.mask[..., None], 0.0)

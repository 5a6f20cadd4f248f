"""Owns the head ``raptor``: the baseline of fixed random projections of patch tokens and logistic regression.

An et al., "Raptor: Scalable train-free embeddings for 3D medical volumes leveraging pretrained 2D foundation models"
(ICML 2025, arXiv 2507.08254): the patch tokens of the slices of each plane are averaged over the slices, place by
place, projected by one Gaussian matrix dim -> K (K = 100) and laid side by side. Averaging and projecting commute, so
the average is taken first. The paper uses the three planes of one volume; here the views (and planes) that are cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.closed_form import LinearReadout
from embedkit.plugins import HeadOutput, SliceOrder, TokenPreference
from embedkit.pooling import join_tokens, joined_size, masked_mean
from embedkit.targets import KINDS

__all__ = ["RaptorHead"]


class RaptorHead(nn.Module):
    """Baseline: mean patch tokens over slices per place, random projection, L2 logistic (ridge, Cox) in closed form."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "closed form"
    kinds: ClassVar[frozenset[str]] = frozenset(KINDS)
    slice_order: ClassVar[SliceOrder] = "free"
    prefers: ClassVar[TokenPreference] = TokenPreference("patch")

    def __init__(
        self, shape: BagShape, token_sets: Sequence[str], outputs: int, *, projections: int = 100, seed: int = 0
    ) -> None:
        super().__init__()
        self.token_sets = tuple(token_sets)
        self.patches, dim = joined_size(shape, token_sets)
        generator = torch.Generator().manual_seed(seed)
        self.projection: Tensor
        self.register_buffer("projection", torch.randn(dim, projections, generator=generator) / projections**0.5)
        self.readout = LinearReadout(len(shape.views) * self.patches * projections, outputs)

    def features(self, bag: Bag) -> Tensor:
        """[batch views * patches * projections], NaN where a view is missing."""
        pooled = masked_mean(join_tokens(bag, self.token_sets), bag.mask[..., None, None], 2)
        return (pooled @ self.projection).masked_fill(~bag.mask.any(2)[..., None, None], torch.nan).flatten(1)

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
        size = (-1, self.patches, self.projection.shape[1])
        weight = (readout.weight[output] * readout.scale).view(size)
        mean = (readout.mean.view(size) * weight).sum(2)
        tokens = join_tokens(bag, self.token_sets)
        each = torch.einsum("bvspd,vpd->bvsp", tokens, weight @ self.projection.T) - mean[:, None]
        slices = bag.mask.sum(2).clamp(min=1)[..., None, None]
        return (each / slices).masked_fill(~bag.mask[..., None], 0.0)

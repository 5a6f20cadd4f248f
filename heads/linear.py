"""Owns the head ``linear``: mean of the tokens over slices, then one linear layer.

The linear probe of frozen features (Alain and Bengio, "Understanding intermediate layers using linear classifier
probes", arXiv 1610.01644), on the mean over slices per view.

Its embedding is that mean with every channel times the length of what was learned for it (the L2 norm over the outputs
of its weights), so that two cases are near each other where they agree in what the task turns on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.dropout import Dropout
from embedkit.plugins import HeadOutput, SliceOrder
from embedkit.pooling import join_tokens, joined_size, pool_bag, pool_views

__all__ = ["LinearHead"]


class LinearHead(nn.Module):
    """Masked mean over slices and patches per view; a linear layer per view; the views present are averaged."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    slice_order: ClassVar[SliceOrder] = "free"

    def __init__(self, shape: BagShape, token_sets: Sequence[str], outputs: int, *, dropout: float = 0.2) -> None:
        super().__init__()
        self.token_sets = tuple(token_sets)
        _, dim = joined_size(shape, token_sets)
        views = len(shape.views)
        self.dropout = Dropout(dropout)
        self.weight = nn.Parameter(torch.empty(views, outputs, dim).normal_(std=0.01))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def reduce(self, bag: Bag) -> Bag:
        """The mean of each view, which is all that the head makes of its tokens."""
        return pool_bag(bag)

    def forward(self, bag: Bag) -> HeadOutput:
        pooled, share = pool_views(bag, self.token_sets)
        per_view: Tensor = torch.einsum("bvd,vod->bvo", self.dropout(pooled), self.weight)
        logits = torch.einsum("bvo,bv->bo", per_view, share) + self.bias
        return HeadOutput(logits, embedding=(pooled * self.weight.norm(dim=1)).flatten(1))

    def evidence(self, bag: Bag, output: int) -> Tensor:
        """[batch views slices patches]: what each token adds to the logit, exactly."""
        tokens = join_tokens(bag, self.token_sets)
        counts = bag.mask.sum(2).clamp(min=1) * bag.mask.any(2).sum(1, keepdim=True).clamp(min=1) * tokens.shape[3]
        return torch.einsum("bvspd,vd->bvsp", tokens, self.weight[:, output]) / counts[..., None, None]

"""Owns the head ``mlp``: mean of the tokens over slices, then one hidden layer.

The linear probe's mean pooling with a perceptron of one hidden layer in the place of its linear layer (Rumelhart,
Hinton and Williams, "Learning representations by back-propagating errors", Nature 323, 1986): for what is not linear
in pooled features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from embedkit.bags import Bag, BagShape
from embedkit.dropout import Dropout
from embedkit.plugins import HeadOutput, SliceOrder
from embedkit.pooling import joined_size, pool_bag, pool_views
from embedkit.products import project_views

__all__ = ["MlpHead"]


class MlpHead(nn.Module):
    """Masked mean over slices and patches per view, one hidden layer on the views present."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    slice_order: ClassVar[SliceOrder] = "free"

    def __init__(
        self, shape: BagShape, token_sets: Sequence[str], outputs: int, *, hidden: int = 128, dropout: float = 0.3
    ) -> None:
        super().__init__()
        self.token_sets = tuple(token_sets)
        _, dim = joined_size(shape, token_sets)
        self.weight = nn.Parameter(torch.empty(len(shape.views), hidden, dim).normal_(std=dim**-0.5))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.dropout = Dropout(dropout)
        self.classify = nn.Linear(hidden, outputs)

    def reduce(self, bag: Bag) -> Bag:
        """The mean of each view, which is all that the head makes of its tokens."""
        return pool_bag(bag)

    def forward(self, bag: Bag) -> HeadOutput:
        pooled, share = pool_views(bag, self.token_sets)
        per_view = project_views(self.dropout(pooled), self.weight)
        embedding = F.gelu(torch.einsum("bvh,bv->bh", per_view, share) + self.bias)
        return HeadOutput(self.classify(self.dropout(embedding)), embedding=embedding)

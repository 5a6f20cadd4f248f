"""Owns the head ``query``: one learned query per view pools its tokens, a second one pools the views.

Equation 5 of AnyMC3D ("Revisiting 2D foundation models for scalable 3D medical image classification",
arXiv 2512.12887): h = softmax(H q / sqrt(d))^T H over the tokens H of a view, then the same over views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.dropout import Dropout
from embedkit.plugins import HeadOutput, SliceOrder
from embedkit.pooling import ViewQuery, join_tokens, joined_size, masked_softmax, weigh_slices
from embedkit.products import score_tokens, weigh_tokens
from embedkit.viewfusion import merge_shape, merge_views, require_way

__all__ = ["QueryHead"]


class QueryHead(nn.Module):
    """Query pooling over the slices (and patches) of each view, query pooling over views, one linear layer.

    Queries start at zero, so that the head starts as mean pooling.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    slice_order: ClassVar[SliceOrder] = "free"

    def __init__(
        self,
        shape: BagShape,
        token_sets: Sequence[str],
        outputs: int,
        *,
        dropout: float = 0.2,
        views: str = "late",
    ) -> None:
        """Takes, of its own options, ``views``: ``late`` or ``early``, see `embedkit.viewfusion`."""
        super().__init__()
        require_way("query", views, ("late", "early"))
        self.token_sets = tuple(token_sets)
        self.views = views
        _, dim = joined_size(shape, token_sets)
        shape = merge_shape(shape) if views == "early" else shape
        self.query = nn.Parameter(torch.zeros(len(shape.views), dim))
        self.fuse = ViewQuery(dim, len(shape.views))
        self.dropout = Dropout(dropout)
        self.classify = nn.Linear(dim, outputs)

    def forward(self, bag: Bag) -> HeadOutput:
        shape = bag.mask.shape
        tokens, attention, present = self._attend(bag)
        pooled = weigh_tokens(attention, tokens)
        embedding = self.fuse(pooled, present)
        logits = self.classify(self.dropout(embedding))
        if self.views == "early":
            _, attention = weigh_slices(attention.reshape(*shape, -1))
        return HeadOutput(logits, attention.sum(3), attention, embedding=embedding)

    def evidence(self, bag: Bag, output: int) -> Tensor:
        """[batch views slices patches]: what each token adds to the logit under its attention, exactly."""
        shape = bag.mask.shape
        tokens, attention, present = self._attend(bag)
        pooled = weigh_tokens(attention, tokens)
        share = attention * self.fuse.weigh(pooled, present)[..., None, None]
        return (share * torch.einsum("bvspd,d->bvsp", tokens, self.classify.weight[output])).reshape(*shape, -1)

    def _attend(self, bag: Bag) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, attention [batch views slices patches] and which views are there, merged to one or not."""
        bag = merge_views(bag) if self.views == "early" else bag
        tokens = join_tokens(bag, self.token_sets)
        scores = score_tokens(tokens, self.query) / math.sqrt(tokens.shape[-1])
        return tokens, masked_softmax(scores, bag.mask[..., None], (2, 3)), bag.mask.any(2)

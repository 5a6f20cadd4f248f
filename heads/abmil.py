"""Owns the head ``abmil``: gated attention over the tokens of each view.

Ilse, Tomczak and Welling, "Attention-based deep multiple instance learning" (ICML 2018, arXiv 1802.04712), equation 9:
a_k = softmax_k(w^T (tanh(V h_k) * sigmoid(U h_k))), here on h_k = relu(W x_k + b).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.dropout import Dropout
from embedkit.plugins import HeadOutput, SliceOrder
from embedkit.pooling import ViewQuery, join_tokens, joined_size, masked_softmax, weigh_slices
from embedkit.viewfusion import merge_shape, merge_views, require_way

__all__ = ["AbmilHead"]


class AbmilHead(nn.Module):
    """Gated attention pooling per view (one w per view, V and U shared), query pooling over views, one linear layer."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    slice_order: ClassVar[SliceOrder] = "free"

    def __init__(
        self,
        shape: BagShape,
        token_sets: Sequence[str],
        outputs: int,
        *,
        width: int = 128,
        attention_width: int = 64,
        dropout: float = 0.2,
        views: str = "late",
    ) -> None:
        """Takes, of its own options, ``views``: ``late`` (with one V and U) or ``early``, see `embedkit.viewfusion`."""
        super().__init__()
        require_way("abmil", views, ("late", "early"))
        self.token_sets = tuple(token_sets)
        self.views = views
        shape = merge_shape(shape) if views == "early" else shape
        _, dim = joined_size(shape, token_sets)
        self.embed = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), Dropout(dropout))
        self.value = nn.Linear(width, attention_width)
        self.gate = nn.Linear(width, attention_width)
        self.score = nn.Parameter(torch.empty(len(shape.views), attention_width).normal_(std=attention_width**-0.5))
        self.fuse = ViewQuery(width, len(shape.views))
        self.dropout = Dropout(dropout)
        self.classify = nn.Linear(width, outputs)

    def forward(self, bag: Bag) -> HeadOutput:
        hidden, attention, present = self._attend(bag)
        pooled = torch.einsum("bvsp,bvspd->bvd", attention.to(hidden.dtype), hidden)
        embedding = self.fuse(pooled, present)
        logits = self.classify(self.dropout(embedding))
        if self.views == "early":
            _, attention = weigh_slices(attention.reshape(*bag.mask.shape, -1))
        return HeadOutput(logits, attention.sum(3), attention, embedding=embedding)

    def evidence(self, bag: Bag, output: int) -> Tensor:
        """[batch views slices patches]: what each token adds to the logit under its attention, exactly."""
        hidden, attention, present = self._attend(bag)
        pooled = torch.einsum("bvsp,bvspd->bvd", attention.to(hidden.dtype), hidden)
        share = attention * self.fuse.weigh(pooled, present)[..., None, None]
        evidence = share * torch.einsum("bvspd,d->bvsp", hidden, self.classify.weight[output])
        return evidence.reshape(*bag.mask.shape, -1)

    def _attend(self, bag: Bag) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden tokens, attention [batch views slices patches] and which views are there [batch views]."""
        bag = merge_views(bag) if self.views == "early" else bag
        hidden = self.embed(join_tokens(bag, self.token_sets))
        gated = torch.tanh(self.value(hidden)) * torch.sigmoid(self.gate(hidden))
        scores = torch.einsum("bvspa,va->bvsp", gated, self.score)
        return hidden, masked_softmax(scores, bag.mask[..., None], (2, 3)), bag.mask.any(2)

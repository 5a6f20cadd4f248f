"""Owns the head ``dsmil``: the most telling token of a case, and all others weighed by their likeness to it.

Li, Li and Eliceiri, "Dual-stream multiple instance learning network for whole slide image classification with
self-supervised contrastive learning" (CVPR 2021, arXiv 2011.08939). Stream 1 scores every instance, W_0 h_i, and keeps
the highest per output, h_m. Stream 2 weighs all by U(h_i, h_m) = softmax_i(q_i . q_m), q being a small
network of h, and reads b = sum_i U(h_i, h_m) v_i. The score is the mean of both, (W_0 h_m + W_b b) / 2; stream 1 has
a loss of its own, half of the whole. Different from the paper: one scale, frozen tokens projected to 128 dims, products
scaled by 1 / sqrt(d) as in the authors' code; the tokens of all views are the instances, each view with a bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.dropout import Dropout
from embedkit.plugins import HeadOutput, SliceOrder
from embedkit.pooling import join_tokens, joined_size, masked_max, masked_softmax, weigh_slices

__all__ = ["DsmilHead"]


class DsmilHead(nn.Module):
    """Dual-stream multiple instance learning: the critical token and attention by likeness to it."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    fit_defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-3}
    slice_order: ClassVar[SliceOrder] = "free"

    def __init__(
        self,
        shape: BagShape,
        token_sets: Sequence[str],
        outputs: int,
        *,
        width: int = 128,
        query_width: int = 64,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.token_sets = tuple(token_sets)
        _, dim = joined_size(shape, token_sets)
        self.embed = nn.Linear(dim, width, bias=False)
        self.view_bias = nn.Parameter(torch.zeros(len(shape.views), width))
        self.dropout = Dropout(dropout)
        self.score = nn.Linear(width, outputs)
        self.query = nn.Sequential(
            nn.Linear(width, query_width), nn.ReLU(), nn.Linear(query_width, query_width), nn.Tanh()
        )
        self.value = nn.Linear(width, width)
        self.classify = nn.Linear(outputs * width, outputs)

    def forward(self, bag: Bag) -> HeadOutput:
        hidden = torch.relu(self.embed(join_tokens(bag, self.token_sets)) + self.view_bias[:, None, None])
        size = hidden.shape[1:4]
        hidden = self.dropout(hidden).flatten(1, 3)
        mask = bag.mask[..., None].expand(-1, -1, -1, size[2]).flatten(1)
        scores = self.score(hidden)
        highest = masked_max(scores, mask[..., None], 1)
        attention = self._compare(hidden, scores, mask)
        pooled = torch.einsum("bic,bid->bcd", attention.to(hidden.dtype), self.value(hidden)).flatten(1)
        logits = (self.classify(pooled) + highest) / 2
        weights = attention.mean(2).unflatten(1, size)
        return HeadOutput(logits, *weigh_slices(weights), embedding=pooled, auxiliary_logits=highest)

    def _compare(self, hidden: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        """Weights [batch tokens outputs] of every token by its likeness to the critical one of each output."""
        critical = scores.masked_fill(~mask[..., None], torch.finfo(scores.dtype).min).argmax(1)
        queries = self.query(hidden)
        chosen = queries.gather(1, critical[..., None].expand(-1, -1, queries.shape[-1]))
        likeness = torch.einsum("bid,bcd->bic", queries, chosen) / math.sqrt(queries.shape[-1])
        return masked_softmax(likeness, mask[..., None], 1)

"""Owns the head ``mha``: multi-head attention whose query is the mean of the tokens, over slices of all planes at once.

Ziller et al., "Interpretable 2D vision models for 3D medical images" (arXiv 2307.06614): the slices of all orientations
go through one 2D network, and attention pooling weighs them. Here as attention with the mean as its one query,
softmax_i((W_q mean(x) + b) . W_k x_i / sqrt(d)) per head. Different from the paper: tokens are frozen and projected to
128 dims; with patch tokens every patch is weighed, not every slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from embedkit.attention import attend
from embedkit.bags import Bag, BagShape
from embedkit.dropout import Dropout
from embedkit.plugins import HeadOutput, SliceOrder
from embedkit.pooling import join_tokens, joined_size, masked_mean, weigh_slices

__all__ = ["MhaHead"]


class MhaHead(nn.Module):
    """Mean-query multi-head attention over the tokens of all views and planes together, one linear layer."""

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
        heads: int = 4,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.token_sets = tuple(token_sets)
        self.heads = heads
        _, dim = joined_size(shape, token_sets)
        self.query = nn.Linear(dim, width)
        self.key = nn.Linear(dim, width, bias=False)
        self.value = nn.Linear(dim, width)
        self.dropout = Dropout(dropout)
        self.classify = nn.Linear(width, outputs)

    def forward(self, bag: Bag) -> HeadOutput:
        embedding, _, weights = self._attend(bag)
        attention = weights.mean(1)
        logits = self.classify(self.dropout(embedding))
        return HeadOutput(logits, *weigh_slices(attention), embedding=embedding)

    def evidence(self, bag: Bag, output: int) -> Tensor:
        """[batch views slices patches]: what each token adds to the logit under its attention, exactly."""
        _, value, weights = self._attend(bag)
        added = value.unflatten(-1, (self.heads, -1)) * self.classify.weight[output].view(self.heads, -1)
        return torch.einsum("bvsph,bhvsp->bvsp", added.sum(-1), weights.to(added.dtype))

    def _attend(self, bag: Bag) -> tuple[Tensor, Tensor, Tensor]:
        """The pooled vector [batch width], values [batch views slices patches width] and weights [batch heads ...]."""
        tokens = join_tokens(bag, self.token_sets)
        size = tokens.shape[1:4]
        mask = bag.mask[..., None].expand(-1, -1, -1, size[2]).flatten(1)
        flat = tokens.flatten(1, 3)
        mean = masked_mean(flat, mask[..., None], 1)
        value = self.value(flat)
        pooled, weights = attend(self.query(mean)[:, None], self.key(flat), value, mask, heads=self.heads)
        return pooled[:, 0], value.unflatten(1, size), weights[:, :, 0].unflatten(2, size)

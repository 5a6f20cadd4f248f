"""Owns the head ``grid``: a small network on every place of the patch grid, read out with the places kept apart.

Pooling that forgets where a token was cannot tell left from right. Here slices are pooled place by place, as PointNet
pools points (mean and maximum; Qi et al., arXiv 1612.00593), and one linear layer reads the pooled map whole. Made for
tens to hundreds of cases: whole channels are dropped, and the last layer starts small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.places import ChannelDropout, small_linear
from embedkit.plugins import HeadOutput, SliceOrder, TokenPreference
from embedkit.pooling import join_tokens, joined_size, masked_max, masked_mean

__all__ = ["GridHead"]


class GridHead(nn.Module):
    """Small network at every grid place, mean and maximum over slices per place, one linear layer over all places."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    slice_order: ClassVar[SliceOrder] = "free"
    prefers: ClassVar[TokenPreference] = TokenPreference("patch", depth=2 / 3, grid=4)
    fit_defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-3}

    def __init__(
        self,
        shape: BagShape,
        token_sets: Sequence[str],
        outputs: int,
        *,
        hidden: int = 64,
        width: int = 24,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.token_sets = tuple(token_sets)
        patches, dim = joined_size(shape, token_sets)
        self.network = nn.Sequential(
            ChannelDropout(dropout),
            nn.Linear(dim, hidden),
            nn.GELU(),
            ChannelDropout(dropout),
            nn.Linear(hidden, width),
        )
        self.dropout = ChannelDropout(dropout)
        self.places = (len(shape.views), patches, 2, width)
        self.classify = small_linear(len(shape.views) * patches * 2 * width, outputs)

    def forward(self, bag: Bag) -> HeadOutput:
        features = self.network(join_tokens(bag, self.token_sets))
        mask = bag.mask[..., None, None]
        pooled = torch.cat([masked_mean(features, mask, 2), masked_max(features, mask, 2)], -1)
        embedding = pooled.flatten(1)
        logits = self.classify(self.dropout(pooled).flatten(1))
        return HeadOutput(logits, embedding=embedding)

    def evidence(self, bag: Bag, output: int) -> Tensor:
        """[batch views slices patches]: what each token adds to the logit, against an average token in its place.

        Exact: the mean is shared out over the slices, each maximum goes to the slice that holds it; with the logit of
        an all-average case they sum to the logit.
        """
        tokens = join_tokens(bag, self.token_sets)
        mask = bag.mask[..., None, None]
        average = self.network(tokens.new_zeros(tokens.shape[-1]))
        features = self.network(tokens) - average
        mean_weight, max_weight = self.classify.weight[output].view(self.places).unbind(2)
        slices = bag.mask.sum(2).clamp(min=1)[..., None, None]
        shared = torch.einsum("bvspc,vpc->bvsp", features, mean_weight) / slices
        highest = features.masked_fill(~mask, torch.finfo(features.dtype).min).max(2, keepdim=True)
        credit = (highest.values * max_weight[:, None]).new_zeros(features.shape)
        credit.scatter_(2, highest.indices, highest.values * max_weight[:, None])
        return (shared + credit.sum(-1)).masked_fill(~bag.mask[..., None], 0.0)

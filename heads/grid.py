"""Owns the head ``grid``: a small network on every place of the patch grid, read out with the places kept apart.

Pooling that forgets where a token was cannot tell left from right. Here slices are pooled place by place, as PointNet
pools points (mean and maximum; Qi et al., arXiv 1612.00593), and one linear layer reads the pooled map whole. Made for
tens to hundreds of cases: whole channels are dropped, and the last layer starts small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.layers import ViewLinear, first_linear
from embedkit.places import ChannelDropout, small_linear
from embedkit.plugins import HeadOutput, SliceOrder, TokenPreference
from embedkit.pooling import join_tokens, joined_grid, joined_size, masked_max, masked_mean
from embedkit.tokenvolume import MaskDecoder
from embedkit.viewfusion import MapFusion

__all__ = ["GridHead"]


class GridHead(nn.Module):
    """Small network at every grid place, mean and maximum over slices per place, one linear layer over all places."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    learns_masks: ClassVar[bool] = True
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
        views: str = "joint",
        masks: bool = False,
    ) -> None:
        """Takes, of its own options, ``views``: ``joint`` (shared network, a weight for every place of every view),
        or ``late`` or ``early``, see `embedkit.viewfusion`; and ``masks``, whether it learns masks as well.
        """
        super().__init__()
        self.token_sets = tuple(token_sets)
        patches, _ = joined_size(shape, token_sets)
        late, count = views == "late", len(shape.views)
        self.fuse = MapFusion("grid", views, views=count, places=patches, channels=2 * width)
        self.network = nn.Sequential(
            ChannelDropout(dropout),
            first_linear(shape, token_sets, hidden, per_view=late),
            nn.GELU(),
            ChannelDropout(dropout),
            ViewLinear(hidden, width, views=count) if late else nn.Linear(hidden, width),
        )
        self.dropout = ChannelDropout(dropout)
        self.classify = small_linear(math.prod(self.fuse.size), outputs)
        self.decoder = MaskDecoder(width, joined_grid(shape, token_sets)) if masks else None

    def forward(self, bag: Bag) -> HeadOutput:
        features = self.network(join_tokens(bag, self.token_sets))
        masks = self.decoder(features, bag.mask) if self.decoder is not None and bag.asks_mask else None
        features, mask = self.fuse.merge(features, bag.mask)
        pooled = self.fuse(_pool(features, mask), mask.any(2))
        logits = self.classify(self.dropout(pooled).flatten(1))
        return HeadOutput(logits, mask_logits=masks, embedding=pooled.flatten(1))

    def evidence(self, bag: Bag, output: int) -> Tensor:
        """[batch views slices patches]: what each token adds to the logit, against an average token in its place.

        Exact: the mean is shared out over the slices, each maximum goes to the slice that holds it; with the logit of
        an all-average case (under the weights that the views have here, where these are fused late) they sum to the
        logit.
        """
        shape = bag.mask.shape
        tokens = join_tokens(bag, self.token_sets)
        found, mask = self.fuse.merge(self.network(tokens), bag.mask)
        average = self.network(tokens.new_zeros(1, tokens.shape[1], 1, 1, tokens.shape[-1]))
        features = found - average[:, : mask.shape[1]]
        places = (*self.fuse.size[:2], 2, -1)
        mean_weight, max_weight = self.classify.weight[output].view(places).unbind(2)
        slices = mask.sum(2).clamp(min=1)[..., None, None]
        shared = (features * mean_weight[:, None]).sum(-1) / slices
        highest = features.masked_fill(~mask[..., None, None], torch.finfo(features.dtype).min)
        highest = highest.max(2, keepdim=True)
        credit = features.new_zeros(features.shape)
        credit.scatter_(2, highest.indices, highest.values * max_weight[:, None])
        shares = self.fuse.weigh(_pool(found, mask), mask.any(2))[..., None, None]
        evidence = (shared + credit.sum(-1)) * shares
        return evidence.masked_fill(~mask[..., None], 0.0).reshape(*shape, -1)


def _pool(features: Tensor, mask: Tensor) -> Tensor:
    """Mean and maximum over the slices of each view [batch views patches 2*width]."""
    mask = mask[..., None, None]
    return torch.cat([masked_mean(features, mask, 2), masked_max(features, mask, 2)], -1)

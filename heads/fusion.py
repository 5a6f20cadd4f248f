"""Owns the head ``fusion``: at every grid place its own softmax over slices, told what the whole volume looks like.

The part of MVSC (Ding et al., "Multimodal visual surrogate compression for Alzheimer's disease classification", arXiv
2601.21673) that frozen tokens allow: its adaptive slice fusion weighs the slices patch by patch, conditioned on a
vector of volume context, and so compresses a volume into one 2D map. Here scores are additive (Bahdanau et al., arXiv
1409.0473), s = w . tanh(U h + C c), with c the mean of all tokens of the case; the fused map is read by one linear
layer that keeps the places apart. Different from the paper: it fuses the images before the frozen network, this head
the network's tokens after it; context comes from a mean instead of an encoder, and there is no text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedkit.bags import Bag, BagShape
from embedkit.layers import first_linear
from embedkit.places import ChannelDropout, small_linear
from embedkit.plugins import HeadOutput, SliceOrder, TokenPreference
from embedkit.pooling import join_tokens, joined_size, masked_mean, masked_softmax, weigh_slices
from embedkit.viewfusion import MapFusion

__all__ = ["FusionHead"]


class FusionHead(nn.Module):
    """Softmax over slices at every grid place given the context of the volume, one linear layer over the fused map."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    prefers: ClassVar[TokenPreference] = TokenPreference("patch", depth=2 / 3, grid=4)
    fit_defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-3}
    slice_order: ClassVar[SliceOrder] = "free"

    def __init__(
        self,
        shape: BagShape,
        token_sets: Sequence[str],
        outputs: int,
        *,
        width: int = 32,
        attention_width: int = 32,
        dropout: float = 0.3,
        views: str = "joint",
    ) -> None:
        """Takes, of its own options, ``views``: ``joint``, ``late`` or ``early``, see `embedkit.viewfusion`."""
        super().__init__()
        self.token_sets = tuple(token_sets)
        patches, _ = joined_size(shape, token_sets)
        late, count = views == "late", len(shape.views)
        self.fuse = MapFusion("fusion", views, views=count, places=patches, channels=width)
        self.dropout = ChannelDropout(dropout)
        self.project = first_linear(shape, token_sets, width, per_view=late)
        self.compare = nn.Linear(width, attention_width)
        self.context = nn.Linear(width, attention_width, bias=False)
        scored = 1 if views == "early" else count
        self.score = nn.Parameter(torch.empty(scored, attention_width).normal_(std=attention_width**-0.5))
        self.classify = small_linear(math.prod(self.fuse.size), outputs)

    def forward(self, bag: Bag) -> HeadOutput:
        hidden, attention, present = self._attend(bag)
        fused = self.fuse(torch.einsum("bvsp,bvspd->bvpd", attention.to(hidden.dtype), hidden), present)
        logits = self.classify(self.dropout(fused).flatten(1))
        weights = (attention / attention.shape[3]).reshape(*bag.mask.shape, -1)
        if self.fuse.early:
            _, weights = weigh_slices(weights)
        return HeadOutput(logits, weights.sum(3), weights, embedding=fused.flatten(1))

    def evidence(self, bag: Bag, output: int) -> Tensor:
        """[batch views slices patches]: what each token adds to the logit under its attention, exactly."""
        hidden, attention, present = self._attend(bag)
        maps = torch.einsum("bvsp,bvspd->bvpd", attention.to(hidden.dtype), hidden)
        share = attention * self.fuse.weigh(maps, present)[..., None, None]
        weight = self.classify.weight[output].view(self.fuse.size)
        return (share * torch.einsum("bvspd,vpd->bvsp", hidden, weight.expand(hidden.shape[1], -1, -1))).reshape(
            *bag.mask.shape, -1
        )

    def _attend(self, bag: Bag) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden tokens, their weight in their place [batch views slices patches], and which views are there."""
        hidden = F.gelu(self.project(self.dropout(join_tokens(bag, self.token_sets))))
        context = masked_mean(hidden.mean(3).flatten(1, 2), bag.mask.flatten(1)[..., None], 1)
        hidden, mask = self.fuse.merge(hidden, bag.mask)
        shaped = torch.tanh(self.compare(hidden) + self.context(context)[:, None, None, None])
        scores = torch.einsum("bvspa,va->bvsp", shaped, self.score)
        return hidden, masked_softmax(scores, mask[..., None], 2), mask.any(2)

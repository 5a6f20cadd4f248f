"""Owns the head ``segment``: a label and a mask from one small volume of features, the mask also from clicks.

Supervision by pixels where masks are at hand, as AnyMC3D has it beside its classification (arXiv 2512.12887): every
token is made small on its own, a masked depthwise 3D convolution mixes it with its neighbours, and both answers are
read from there. The label takes mean and maximum over slices of every place, on a grid of at most 4 x 4 places; the
decoder takes one more convolution and a linear layer per token. It is run only while masks are learned or asked for.

A click is answered as in ProMISe (Li et al., arXiv 2310.19721): the feature of the token under it is sampled, looks at
all tokens (cross-attention), and then every token is compared with it. Different from the paper, features are those of
frozen 2D tokens, several clicks may be given, a token gains by likeness to the click it is most like, less with its
distance, and without any click the mask is found alone. With ``clicks`` above 0 the head practises on up to as many
clicks drawn from the true mask, none in half of the steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedkit.attention import attend
from embedkit.bags import Bag, BagShape
from embedkit.errors import HeadError
from embedkit.places import ChannelDropout, small_linear
from embedkit.plugins import HeadOutput, SliceOrder, TokenPreference
from embedkit.pooling import join_tokens, joined_grid, joined_size, masked_max, masked_mean
from embedkit.tokenvolume import ConvBlock, MaskDecoder, TokenVolume

__all__ = ["SegmentHead"]

_LABEL_SIDE = 4


class SegmentHead(nn.Module):
    """Label and mask from depthwise 3D convolutions over the token volume, with or without clicks."""

    reads: ClassVar[frozenset[str]] = frozenset({"patch"})
    fit_by: ClassVar[str] = "gradient"
    learns_masks: ClassVar[bool] = True
    prefers: ClassVar[TokenPreference] = TokenPreference("patch", depth=2 / 3)
    fit_defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-3}
    slice_order: ClassVar[SliceOrder] = "sequence"

    def __init__(
        self,
        shape: BagShape,
        token_sets: Sequence[str],
        outputs: int,
        *,
        hidden: int = 64,
        width: int = 24,
        dropout: float = 0.3,
        clicks: int = 0,
    ) -> None:
        super().__init__()
        if clicks < 0:
            raise HeadError(f"head 'segment' was given clicks={clicks}, expected 0 or more to practise on")
        self.token_sets = tuple(token_sets)
        self.grid = joined_grid(shape, token_sets)
        self.most = clicks
        self.network = nn.Sequential(
            ChannelDropout(dropout),
            nn.Linear(joined_size(shape, token_sets)[1], hidden),
            nn.GELU(),
            ChannelDropout(dropout),
            nn.Linear(hidden, width),
        )
        self.mix = ConvBlock(width)
        self.dropout = ChannelDropout(dropout)
        places = min(_LABEL_SIDE, self.grid[0]) ** 2
        self.classify = small_linear(len(shape.views) * places * 2 * width, outputs)
        self.decoder = MaskDecoder(width, self.grid)
        self.prompt = Prompt(width) if clicks else None

    def forward(self, bag: Bag) -> HeadOutput:
        tokens = self.network(join_tokens(bag, self.token_sets))
        lined = TokenVolume(bag.mask, tokens.dtype)
        volume = self.mix(lined.gather(tokens), lined.filled, self.grid)
        pooled = torch.cat([masked_mean(volume, lined.filled, 2), masked_max(volume, lined.filled, 2)], -1)
        pooled = self._shrink(pooled)
        logits = self.classify(self.dropout(pooled).flatten(1))
        output = HeadOutput(logits, embedding=pooled.flatten(1))
        if not bag.asks_mask:
            return output
        features = self.decoder.refine(volume, lined)
        mask_logits = self.decoder.read(features)
        if self.prompt is not None:
            clicks = self._practise(cast(Tensor, bag.cover), bag.mask) if bag.clicks is None else bag.clicks
            mask_logits = mask_logits + self.prompt(features, self._places(bag), bag.mask, clicks, self.most)
        return dataclasses.replace(output, mask_logits=mask_logits)

    def _shrink(self, pooled: Tensor) -> Tensor:
        """Pooled maps [batch views patches channels] on a grid of at most 4 x 4 places."""
        side = min(_LABEL_SIDE, self.grid[0])
        maps = pooled.flatten(0, 1).transpose(1, 2).unflatten(2, self.grid)
        return F.adaptive_avg_pool2d(maps, side).flatten(2).transpose(1, 2).unflatten(0, pooled.shape[:2])

    def _practise(self, cover: Tensor, mask: Tensor) -> Tensor:
        """Clicks as a user would set them, on patches drawn by how far the mask covers them; none in half of the steps.

        One draw holds for all fits that are trained together. Outside training there are none.
        """
        known = torch.where(cover.isfinite() & mask[..., None], cover, 0.0)
        if not self.training:
            return torch.zeros_like(known)
        noise = -torch.rand(known.shape[1:], device=known.device).clamp(min=1e-9).log()
        races = (known / noise).flatten(1)  # the largest are drawn in proportion to the cover, without replacement
        drawn = races.topk(min(self.most, races.shape[1])).indices
        count = torch.randint(1, self.most + 1, (1,), device=known.device) * torch.randint(
            0, 2, (1,), device=known.device
        )
        taken = (torch.arange(drawn.shape[1], device=known.device) < count).to(known.dtype).expand(drawn.shape)
        clicks = torch.zeros_like(races).scatter(1, drawn, taken)
        return clicks.view(known.shape) * (known > 0)

    def _places(self, bag: Bag) -> Tensor:
        """Where each token lies, [batch views slices patches 3], each axis in 0..1."""
        height, width = self.grid
        rows = (torch.arange(height, device=bag.mask.device) + 0.5) / height
        columns = (torch.arange(width, device=bag.mask.device) + 0.5) / width
        plane = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
        along = bag.positions.float().masked_fill(~bag.mask, 0.0)[..., None]
        shape = (*bag.mask.shape, height * width)
        return torch.cat([along.expand(shape)[..., None], plane.expand(*shape, 2)], -1)


class Prompt(nn.Module):
    """What clicks add to the log odds of every token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ask, self.show, self.tell = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.compare = nn.Linear(width, width, bias=False)
        self.falloff = nn.Parameter(torch.ones(1))
        self.level = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor, places: Tensor, mask: Tensor, clicks: Tensor, most: int) -> Tensor:
        """[batch views slices patches]; 0 for a case without a click.

        Args:
            features: [batch views slices patches dim].
            places: [batch views slices patches 3].
            mask: Bool [batch views slices].
            clicks: [batch views slices patches].
            most: Clicks that are heard at most.
        """
        tokens, spots = features.flatten(1, 3), places.flatten(1, 3)
        heard = clicks.flatten(1).topk(min(most, tokens.shape[1]))
        active = heard.values > 0
        index = heard.indices[..., None]
        sampled = tokens.gather(1, index.expand(-1, -1, tokens.shape[2]))
        real = mask[..., None].expand(clicks.shape).flatten(1)
        looked, _ = attend(self.ask(sampled), self.show(tokens), self.tell(tokens), real, heads=1)
        likeness = self.compare(tokens) @ (sampled + looked).transpose(1, 2) / math.sqrt(tokens.shape[2])
        centres = spots.gather(1, index.expand(-1, -1, 3))
        distance = (spots[:, :, None] - centres[:, None]).square().sum(-1)
        scores = likeness - F.softplus(self.falloff) * 10 * distance + self.level
        best = scores.masked_fill(~active[:, None], torch.finfo(scores.dtype).min).amax(2)
        return torch.where(active.any(1)[:, None], best, 0.0).view(clicks.shape)

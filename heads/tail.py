"""Owns the head ``tail``: low-rank adaptation of the last blocks from cached tokens, read out by class token and place.

AnyMC3D (arXiv 2512.12887) adapts a frozen 2D backbone with LoRA in all blocks, from pixels, and pools the slices' class
tokens with a learned query (its equation 5). Here the blocks before the cut are not run again: their tokens are in the
cache. Class tokens forget where a patch was, so a second read-out keeps the places of a coarse patch grid, on the
tokens that enter the blocks and on those that leave them; both logits are added.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from embedkit.bags import Bag, BagShape
from embedkit.dropout import Dropout
from embedkit.errors import HeadError
from embedkit.lora import LowRankUpdates
from embedkit.places import ChannelDropout, small_linear
from embedkit.plugins import HeadOutput, SliceOrder, TokenPreference
from embedkit.pooling import ViewQuery, masked_max, masked_mean, masked_softmax
from embedkit.tokenvolume import MaskDecoder

__all__ = ["TailHead"]

_TOKENS_AT_ONCE = 32_768  # whose activations are kept for the way back; beyond, they are computed twice


class TailHead(nn.Module):
    """LoRA in the last blocks; query pooling of class tokens, and a small network on every place of the patch grid."""

    reads: ClassVar[frozenset[str]] = frozenset({"cut"})
    fit_by: ClassVar[str] = "gradient"
    learns_masks: ClassVar[bool] = True
    slice_order: ClassVar[SliceOrder] = "free"
    one_by_one: ClassVar[str] = "its blocks keep the machine busy by themselves"
    prefers: ClassVar[TokenPreference] = TokenPreference("cut")
    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 2e-3,
        "precision": "bf16",
        "epochs": 20,
        "batch_size": 4,  # of some hundred cases, 16 make too few steps
    }

    def __init__(
        self,
        shape: BagShape,
        token_sets: Sequence[str],
        outputs: int,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        projections: str = "q,k,v,proj",
        blocks: int = 0,
        grid: int = 4,
        hidden: int = 64,
        width: int = 24,
        dropout: float = 0.3,
        masks: bool = False,
    ) -> None:
        """Takes, of its own options, ``blocks``: how many of the last blocks to adapt, 0 for all of the tail; and
        ``masks``, whether it learns masks as well.
        """
        super().__init__()
        if len(token_sets) != 1 or shape.tail is None:
            raise HeadError(f"head 'tail' reads one set of cut tokens, but was given {', '.join(token_sets) or 'none'}")
        self.token_sets = tuple(token_sets)
        tail = self.tail = shape.tail
        adapted = blocks or tail.blocks
        if not 0 <= blocks <= tail.blocks:
            raise HeadError(f"blocks is {blocks}, but the cache keeps the tokens before the last {tail.blocks}")
        if not 0 <= grid <= min(tail.grid):
            raise HeadError(f"grid is {grid}, but slices have {tail.grid[0]} x {tail.grid[1]} patches; 0 leaves it out")
        parts = tuple(part.strip() for part in projections.split(",") if part.strip())
        self.updates = LowRankUpdates(tail.linears, adapted, rank=rank, alpha=alpha, projections=parts)
        views, dim = len(shape.views), tail.dim
        self.query = nn.Parameter(torch.zeros(views, dim))
        self.fuse = ViewQuery(dim, views)
        self.dropout = Dropout(dropout)
        self.classify = nn.Linear(dim, outputs)
        self.grid = grid
        if grid or masks:
            self.network = nn.Sequential(
                ChannelDropout(dropout),
                nn.Linear(2 * dim, hidden),
                nn.GELU(),
                ChannelDropout(dropout),
                nn.Linear(hidden, width),
            )
        if grid:
            self.drop_places = ChannelDropout(dropout)
            self.classify_places = small_linear(views * grid * grid * 2 * width, outputs)
        self.decoder = MaskDecoder(width, tail.grid) if masks else None

    def forward(self, bag: Bag) -> HeadOutput:
        entering = bag.tokens[self.token_sets[0]][bag.mask]
        asked = self.decoder is not None and bag.asks_mask
        summary, coarse, fine = self._adapt(bag, entering, fine=asked)
        logits, attention, embedding = self._read_summary(bag, summary)
        if self.grid:
            pooled = self._pool_places(bag, coarse)
            logits = logits + self.classify_places(self.drop_places(pooled).flatten(1))
            embedding = torch.cat([embedding, pooled.flatten(1)], 1)
        masks = None
        if self.decoder is not None and asked:
            masks = self.decoder(_spread(self.network(fine), bag.mask), bag.mask)
        return HeadOutput(logits, attention, mask_logits=masks, embedding=embedding)

    def _adapt(self, bag: Bag, entering: Tensor, *, fine: bool) -> list[Tensor]:
        """What `_run` makes of the real slices' tokens [real tokens dim]."""
        run = functools.partial(self._run, bag, updates=self.updates(), fine=fine)
        most = max(1, _TOKENS_AT_ONCE // entering.shape[1])
        if len(entering) <= most:
            return list(run(entering))
        parts = [
            checkpoint(run, part, use_reentrant=False) if torch.is_grad_enabled() else run(part)
            for part in entering.split(most)
        ]
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    def _run(
        self, bag: Bag, entering: Tensor, *, updates: Sequence[Mapping[str, Tensor]], fine: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Summaries [real dim], places [real grid*grid 2*dim], and those of all patches where ``fine``, else none."""
        if bag.tail is None:
            raise HeadError(
                "head 'tail' needs the blocks that its tokens enter, but these come without; give the cache"
            )
        summary, patches = bag.tail.run(entering, updates)
        nothing = summary.new_zeros(len(summary), 0, 0)
        if not (self.grid or fine):
            return summary, nothing, nothing
        before = F.layer_norm(entering[:, self.tail.prefix :], entering.shape[-1:])
        both = torch.cat([before, patches], -1)
        return summary, self._coarsen(both) if self.grid else nothing, both if fine else nothing

    def _coarsen(self, patches: Tensor) -> Tensor:
        """Patch tokens [real patches dim] as means over a grid [real grid*grid dim]."""
        plane = patches.transpose(1, 2).unflatten(2, self.tail.grid)
        return F.adaptive_avg_pool2d(plane, self.grid).flatten(2).transpose(1, 2)

    def _read_summary(self, bag: Bag, summary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, attention over the slices of each view, and the pooled vector [batch dim]."""
        tokens = _spread(summary, bag.mask)
        scores = torch.einsum("bvsd,vd->bvs", tokens, self.query) / math.sqrt(tokens.shape[-1])
        attention = masked_softmax(scores, bag.mask, 2)
        pooled = torch.einsum("bvs,bvsd->bvd", attention.to(tokens.dtype), tokens)
        embedding = self.fuse(pooled, bag.mask.any(2))
        return self.classify(self.dropout(embedding)), attention, embedding

    def _pool_places(self, bag: Bag, places: Tensor) -> Tensor:
        """[batch views grid*grid 2*width]: mean and maximum over slices of what the network makes of every place."""
        features = _spread(self.network(places), bag.mask)
        mask = bag.mask[..., None, None]
        return torch.cat([masked_mean(features, mask, 2), masked_max(features, mask, 2)], -1)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values [real ...] of the real slices at their places in [batch views slices ...], zeros elsewhere."""
    spread = values.new_zeros(*mask.shape, *values.shape[1:])
    spread[mask] = values
    return spread

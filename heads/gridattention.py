"""Owns the head ``gridattention``: attention over slices and patches together, each token knowing where it is.

Gated attention (Ilse et al., arXiv 1802.04712, equation 9) with several sets of weights, on h = gelu(W x + e_place + A
sin(z)): e_place is the place in the slice, learned per place or sines of row and column, z the place along the stack
(sines of Vaswani et al., arXiv 1706.03762). Against ``grid``, which has a weight for every place, it shares all weights
between places and is told the place instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedkit.attention import encode_positions
from embedkit.bags import Bag, BagShape
from embedkit.dropout import Dropout
from embedkit.errors import HeadError
from embedkit.layers import first_linear
from embedkit.plugins import HeadOutput, SliceOrder, TokenPreference
from embedkit.pooling import ViewQuery, join_tokens, joined_size, masked_softmax

__all__ = ["GridAttentionHead"]

_PLACES = ("learned", "sines")


class GridAttentionHead(nn.Module):
    """Gated attention over slices and patches with positions in the slice and along the stack, query over views."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    prefers: ClassVar[TokenPreference] = TokenPreference("patch", depth=2 / 3, grid=4)
    slice_order: ClassVar[SliceOrder] = "positions"

    def __init__(
        self,
        shape: BagShape,
        token_sets: Sequence[str],
        outputs: int,
        *,
        width: int = 64,
        heads: int = 4,
        places: str = "learned",
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if places not in _PLACES:
            raise HeadError(f"option places of head 'gridattention' is {places!r}, expected {' or '.join(_PLACES)}")
        self.token_sets = tuple(token_sets)
        patches, _ = joined_size(shape, token_sets)
        grid = next((grid for grid in shape.grids.values() if grid[0] * grid[1] == patches), (1, patches))
        self.project = first_linear(shape, token_sets, width)
        self.place = LearnedPlaces(patches, width) if places == "learned" else SinePlaces(grid, width)
        self.axial = nn.Linear(width, width, bias=False)
        self.dropout = Dropout(dropout)
        self.value = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        self.score = nn.Parameter(torch.empty(len(shape.views), heads, width).normal_(std=width**-0.5))
        self.fuse = ViewQuery(heads * width, len(shape.views))
        self.classify = nn.Linear(heads * width, outputs)

    def forward(self, bag: Bag) -> HeadOutput:
        _, attention, pooled = self._attend(bag)
        embedding = self.fuse(pooled, bag.mask.any(2))
        weights = attention.mean(2)
        return HeadOutput(self.classify(self.dropout(embedding)), weights.sum(3), weights, embedding=embedding)

    def evidence(self, bag: Bag, output: int) -> Tensor:
        """[batch views slices patches]: what each token adds to the logit under its attention, exactly."""
        hidden, attention, pooled = self._attend(bag)
        share = attention * self.fuse.weigh(pooled, bag.mask.any(2))[:, :, None, None, None]
        weight = self.classify.weight[output].view(attention.shape[2], -1)
        return torch.einsum("bvhsp,bvspd,hd->bvsp", share.to(hidden.dtype), hidden, weight)

    def _attend(self, bag: Bag) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden tokens, attention [batch views heads slices patches] and what it pools [batch views dim]."""
        positions = bag.positions.masked_fill(~bag.mask, 0.0)
        tokens = self.project(join_tokens(bag, self.token_sets))
        axial = self.axial(encode_positions(positions, tokens.shape[-1]).to(tokens.dtype))
        hidden = self.dropout(F.gelu(tokens + self.place() + axial[:, :, :, None]))
        gated = torch.tanh(self.value(hidden)) * torch.sigmoid(self.gate(hidden))
        scores = torch.einsum("bvspa,vha->bvhsp", gated, self.score)
        attention = masked_softmax(scores, bag.mask[:, :, None, :, None], (3, 4))
        pooled = torch.einsum("bvhsp,bvspd->bvhd", attention.to(hidden.dtype), hidden)
        return hidden, attention, pooled.flatten(2)


class LearnedPlaces(nn.Module):
    """A learned vector per place, [patches width]."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(patches, width).normal_(std=0.5))

    def forward(self) -> Tensor:
        return self.vectors


class SinePlaces(nn.Module):
    """Sines of row and column, linearly mapped, [patches width]."""

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        rows, columns = (torch.linspace(0, 1, side) if side > 1 else torch.full((1,), 0.5) for side in grid)
        places = torch.cartesian_prod(rows, columns)
        self.sines: Tensor
        self.register_buffer("sines", encode_positions(places, width).flatten(1), persistent=False)
        self.map = nn.Linear(2 * width, width, bias=False)

    def forward(self) -> Tensor:
        mapped: Tensor = self.map(self.sines)
        return mapped

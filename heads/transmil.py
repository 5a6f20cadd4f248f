"""Owns the head ``transmil``: correlated multiple instance learning over the slices of each view.

Shao et al., "TransMIL: transformer based correlated multiple instance learning for whole slide image classification"
(NeurIPS 2021, arXiv 2106.00908): two self-attention layers around a pyramid position encoding (PPEG), read out at a
class token. Attention is Nystrom's (Xiong et al., "Nystromformer", arXiv 2102.03902): softmax(Q K~^T) pinv(softmax(Q~
K~^T)) softmax(Q~ K^T) V with means of Q and K over segments as landmarks and six steps of the iterative pseudo-inverse.
PPEG lays the sequence out as the smallest square that holds it, filled up with its first tokens, and adds depthwise
convolutions of 7x7, 5x5 and 3x3.

Different from the paper: frozen tokens, 128 dims and 32 landmarks instead of 512 and 256; the start of the
pseudo-inverse is scaled per matrix, not per batch, and the authors' further convolution of the values is left out, so
that no case depends on another. Of a view with fewer slices than landmarks each slice is a landmark of its own, and the
product is full attention but for the error of the pseudo-inverse. Square and segments count the real slices alone.
Views are fused by query pooling; patch tokens are averaged per slice first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedkit.attention import order_slices
from embedkit.bags import Bag, BagShape
from embedkit.dropout import Dropout
from embedkit.plugins import HeadOutput, SliceOrder
from embedkit.pooling import ViewQuery, join_tokens, joined_size, masked_softmax

__all__ = ["TransmilHead"]

_INVERSE_STEPS = 6


class TransmilHead(nn.Module):
    """TransMIL: two Nystrom attention layers with a pyramid position encoding between them, class token read out."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    fit_defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-3}
    slice_order: ClassVar[SliceOrder] = "sequence"

    def __init__(
        self,
        shape: BagShape,
        token_sets: Sequence[str],
        outputs: int,
        *,
        width: int = 128,
        heads: int = 4,
        landmarks: int = 32,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.token_sets = tuple(token_sets)
        _, dim = joined_size(shape, token_sets)
        self.project = nn.Sequential(nn.Linear(dim, width), nn.ReLU())
        self.class_token = nn.Parameter(torch.empty(len(shape.views), 1, width).normal_(std=0.02))
        self.before = NystromLayer(width, heads=heads, landmarks=landmarks, dropout=dropout)
        self.encode = PyramidEncoding(width)
        self.after = NystromLayer(width, heads=heads, landmarks=landmarks, dropout=dropout)
        self.norm = nn.LayerNorm(width)
        self.fuse = ViewQuery(width, len(shape.views))
        self.dropout = Dropout(dropout)
        self.classify = nn.Linear(width, outputs)

    def forward(self, bag: Bag) -> HeadOutput:
        slices = self.project(join_tokens(bag, self.token_sets).mean(3))
        slices = order_slices(bag.mask, dtype=slices.dtype) @ slices
        counts = bag.mask.sum(2)
        tokens = torch.cat([self.class_token.expand(slices.shape[0], -1, -1, -1), slices], 2)
        tokens = self.before(tokens, counts + 1)
        tokens = torch.cat([tokens[:, :, :1], self.encode(tokens[:, :, 1:], counts)], 2)
        tokens = self.after(tokens, counts + 1)
        embedding = self.fuse(self.norm(tokens[:, :, 0]), bag.mask.any(2))
        return HeadOutput(self.classify(self.dropout(embedding)), embedding=embedding)


class NystromLayer(nn.Module):
    """Tokens plus their Nystrom attention; only the first ``counts`` tokens of each sequence are real."""

    def __init__(self, width: int, *, heads: int, landmarks: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.landmarks = landmarks
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """[batch views tokens width] with ``counts`` [batch views]."""
        places = torch.arange(tokens.shape[2], device=tokens.device)
        real = places < counts[..., None]
        segments = self._share_out(places, counts) * real[:, :, None]
        sizes = segments.sum(-1, keepdim=True)
        means = (segments / sizes.clamp(min=1)).to(tokens.dtype)[:, :, None]
        parts = self.project(self.norm(tokens)).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        query, key, value = parts.unbind(0)
        few_queries, few_keys = means @ query, means @ key
        there, real = (sizes > 0).mT[:, :, None], real[:, :, None, None]
        scale = query.shape[-1] ** -0.5
        to_few = masked_softmax(query @ few_keys.mT * scale, there, -1)
        between = masked_softmax(few_queries @ few_keys.mT * scale, there, -1) * there.mT
        from_few = masked_softmax(few_queries @ key.mT * scale, real, -1) * there.mT
        weights = to_few @ _invert(between)
        mixed = weights.to(value.dtype) @ (from_few.to(value.dtype) @ value)
        return tokens + self.dropout(self.mix(mixed.permute(0, 1, 3, 2, 4).flatten(3)))

    def _share_out(self, places: Tensor, counts: Tensor) -> Tensor:
        """Which of the landmarks each place belongs to: float32 [batch views landmarks tokens] of zeros and ones."""
        used = counts.clamp(max=self.landmarks)[..., None]
        owner = places * used // counts[..., None].clamp(min=1)
        return (owner[..., None, :] == torch.arange(self.landmarks, device=places.device)[:, None]).float()


class PyramidEncoding(nn.Module):
    """PPEG: the sequence as a square, plus its depthwise convolutions with kernels of 7, 5 and 3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.large, self.middle, self.small = (
            nn.Parameter(torch.empty(width, 1, side, side).uniform_(-1 / side, 1 / side)) for side in (7, 5, 3)
        )
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, slices: Tensor, counts: Tensor) -> Tensor:
        """[batch views slices width], of which the first ``counts`` [batch views] are real; anything behind them."""
        length = slices.shape[2]
        # An export knows no square root of a length: there, a side that is at least as long (x / 4 + 1 >= sqrt(x)).
        edge = length // 4 + 2 if torch.compiler.is_exporting() else math.isqrt(max(length - 1, 0)) + 1
        side = counts.clamp(min=1).float().sqrt().ceil().to(counts.dtype)[..., None]
        sides = torch.arange(edge, device=slices.device)
        rows, columns = (each.expand(edge, edge).flatten() for each in (sides[:, None], sides))
        place = rows * side + columns
        place = torch.where(place < counts[..., None], place, place - counts[..., None])
        inside = (rows < side) & (columns < side) & (counts[..., None] > 0)
        place = place.clamp(min=0).minimum(place.new_full((), length - 1))
        square = _pick(slices, place).masked_fill(~inside[..., None], 0.0)
        square = square.flatten(0, 1).mT.unflatten(-1, (edge, edge))
        kernel = self.large + F.pad(self.middle, (1, 1, 1, 1)) + F.pad(self.small, (2, 2, 2, 2))
        mixed = F.conv2d(square, kernel.to(square.dtype), self.bias.to(square.dtype), padding=3, groups=len(kernel))
        mixed = mixed.flatten(2).mT.unflatten(0, slices.shape[:2])
        places = torch.arange(length, device=slices.device)
        back = places // side * edge + places % side
        return slices + _pick(mixed, back.minimum(back.new_full((), edge * edge - 1)))


def _pick(tokens: Tensor, places: Tensor) -> Tensor:
    """The tokens [batch views places width] at these places [batch views places] of [batch views tokens width]."""
    return tokens.gather(2, places[..., None].expand(-1, -1, -1, tokens.shape[-1]))


def _invert(matrix: Tensor) -> Tensor:
    """Pseudo-inverse of [... landmarks landmarks] by six steps of the iteration of Nystromformer (Razavi et al.)."""
    largest = matrix.sum(-2).amax(-1) * matrix.sum(-1).amax(-1)
    inverse = matrix.mT / largest.clamp(min=torch.finfo(matrix.dtype).tiny)[..., None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(_INVERSE_STEPS):
        product = matrix @ inverse
        inverse = 0.25 * inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product)))
    return inverse

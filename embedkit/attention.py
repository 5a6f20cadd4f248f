"""Owns attention between tokens and the places it needs to know: multi-head products, positions; knows no head.

Plain matrix products under a mask: `torch.func.vmap`, `torch.export` and half precision take them as they are, and
bags have hundreds of slices, not the thousands for which fused kernels pay.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from embedkit.dropout import Dropout
from embedkit.pooling import masked_softmax

__all__ = ["EncoderLayer", "attend", "encode_positions", "order_slices"]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, heads: int) -> tuple[Tensor, Tensor]:
    """Multi-head scaled dot-product attention (Vaswani et al., "Attention is all you need", arXiv 1706.03762, eq. 1).

    Args:
        query: [... targets dim].
        key: [... tokens dim].
        value: [... tokens dim].
        mask: Bool [... tokens], which tokens may be attended.
        heads: Into how many equal parts dim is cut.

    Returns:
        [... targets dim] and the weights, float32 [... heads targets tokens]; zeros where nothing may be attended.
    """
    parts = [each.reshape(*each.shape[:-1], heads, -1).transpose(-3, -2) for each in (query, key, value)]
    scores = parts[0] @ parts[1].transpose(-2, -1) / math.sqrt(parts[0].shape[-1])
    weights = masked_softmax(scores, mask[..., None, None, :], -1)
    mixed = weights.to(value.dtype) @ parts[2]
    return mixed.transpose(-3, -2).flatten(-2), weights


class EncoderLayer(nn.Module):
    """One pre-norm transformer layer under a mask; projections of queries, keys and values have no bias."""

    def __init__(self, width: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width)
        self.norm_network = nn.LayerNorm(width)
        self.network = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), Dropout(dropout), nn.Linear(2 * width, width)
        )
        self.dropout = Dropout(dropout)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [... tokens dim] under ``mask`` [... tokens]; with the attention [... heads tokens tokens]."""
        query, key, value = self.project(self.norm_attention(tokens)).chunk(3, -1)
        mixed, weights = attend(query, key, value, mask, heads=self.heads)
        tokens = tokens + self.dropout(self.mix(mixed))
        return tokens + self.dropout(self.network(self.norm_network(tokens))), weights


def encode_positions(positions: Tensor, width: int) -> Tensor:
    """Sines and cosines [... width] of positions [...] in 0..1, with wavelengths from 2 down to 2 / 64.

    The encoding of Vaswani et al. (arXiv 1706.03762, section 3.5) for relative positions: the longest wave tells one
    end of a stack from the other, the shortest one neighbouring slices of a stack of some sixty.
    """
    octaves = torch.linspace(0, 6, width // 2, dtype=torch.float32, device=positions.device)
    phases = positions.float()[..., None] * (math.pi * 2**octaves)
    return torch.cat([phases.sin(), phases.cos()], -1).to(positions.dtype)


def order_slices(mask: Tensor, *, dtype: torch.dtype = torch.float32, backwards: bool = False) -> Tensor:
    """Permutation that brings the real slices to the front in their order, wherever masked ones lie between them.

    Args:
        mask: Bool [... slices].
        dtype: Of the result.
        backwards: Last real slice first.

    Returns:
        [... places slices] of zeros and ones: times [... slices dim] it gives the real slices without gaps and
        zeros behind them, its transpose brings them back. A product, so that it is exact, has gradients, and can be
        stacked and exported.
    """
    ranks = mask.cumsum(-1) - 1
    if backwards:
        ranks = mask.sum(-1, keepdim=True) - 1 - ranks
    places = torch.arange(mask.shape[-1], device=mask.device)
    return ((ranks[..., None, :] == places[:, None]) & mask[..., None, :]).to(dtype)

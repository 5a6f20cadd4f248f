"""Owns the head ``transformer``: self-attention between the slices of each view, read out at a class token.

Müller-Franzes et al., "Medical Slice Transformer: improved diagnosis and explainability on 3D medical images with
DINOv2" (arXiv 2411.15802): slice features with a positional encoding and a class token go through a transformer
encoder; the class token's output is classified and its attention tells the slices that matter. Different from the
paper: tokens are frozen and projected to 128 dims, positions are relative to the stack (sines), and several views are
fused by query pooling. Patch tokens are averaged per slice first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedkit.attention import EncoderLayer, encode_positions
from embedkit.bags import Bag, BagShape
from embedkit.dropout import Dropout
from embedkit.plugins import HeadOutput, SliceOrder
from embedkit.pooling import ViewQuery, join_tokens, joined_size, weigh_slices

__all__ = ["TransformerHead"]


class TransformerHead(nn.Module):
    """Transformer encoder over the slices of each view with their positions, query pooling over views."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    fit_defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-3}
    slice_order: ClassVar[SliceOrder] = "positions"

    def __init__(
        self,
        shape: BagShape,
        token_sets: Sequence[str],
        outputs: int,
        *,
        width: int = 128,
        depth: int = 1,
        heads: int = 4,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.token_sets = tuple(token_sets)
        _, dim = joined_size(shape, token_sets)
        self.project = nn.Linear(dim, width)
        self.place = nn.Linear(width, width, bias=False)
        self.class_token = nn.Parameter(torch.empty(len(shape.views), width).normal_(std=0.02))
        self.layers = nn.ModuleList(EncoderLayer(width, heads=heads, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.fuse = ViewQuery(width, len(shape.views))
        self.dropout = Dropout(dropout)
        self.classify = nn.Linear(width, outputs)

    def forward(self, bag: Bag) -> HeadOutput:
        slices = self.project(join_tokens(bag, self.token_sets).mean(3))
        positions = bag.positions.masked_fill(~bag.mask, 0.0).to(slices.dtype)
        slices = slices + self.place(encode_positions(positions, slices.shape[-1]))
        tokens = torch.cat([self.class_token[:, None].expand(slices.shape[0], -1, -1, -1), slices], 2)
        mask = F.pad(bag.mask, (1, 0), value=True)
        for layer in self.layers:
            tokens, weights = layer(tokens, mask)
        embedding = self.fuse(self.norm(tokens[:, :, 0]), bag.mask.any(2))
        attention: Tensor = weights[:, :, :, 0, 1:].mean(2)
        return HeadOutput(self.classify(self.dropout(embedding)), weigh_slices(attention[..., None])[0], None,
                          embedding=embedding)  # fmt: skip

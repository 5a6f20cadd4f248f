"""Owns the head ``gru``: a bidirectional recurrent network along the slices of each view.

The recurrent half of the LRCN of Ke et al., "Video pretraining advances 3D deep learning on chest CT tasks" (arXiv
2304.00546): every slice's features and their differences to the previous and the next slice go through a bidirectional
GRU (Cho et al., arXiv 1406.1078), whose states are pooled by attention. Different from the paper: tokens are frozen,
projected to 96 dims before the differences are taken (both being linear, their order does not matter), and several
views are fused by query pooling. Patch tokens are averaged per slice first; the previous slice is the previous real
one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from embedkit.attention import order_slices
from embedkit.bags import Bag, BagShape
from embedkit.dropout import Dropout
from embedkit.plugins import HeadOutput, SliceOrder
from embedkit.pooling import ViewQuery, join_tokens, joined_size, masked_softmax

__all__ = ["GruHead"]


class GruHead(nn.Module):
    """Bidirectional GRU over slices and their differences to both neighbours, attention over its states."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    fit_defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 2e-3}
    slice_order: ClassVar[SliceOrder] = "sequence"

    def __init__(
        self,
        shape: BagShape,
        token_sets: Sequence[str],
        outputs: int,
        *,
        width: int = 96,
        hidden: int = 64,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.token_sets = tuple(token_sets)
        _, dim = joined_size(shape, token_sets)
        self.project = nn.Linear(dim, width)
        self.recurrence = BothWays(3 * width, hidden)
        self.score = nn.Parameter(torch.zeros(len(shape.views), 2 * hidden))
        self.fuse = ViewQuery(2 * hidden, len(shape.views))
        self.dropout = Dropout(dropout)
        self.classify = nn.Linear(2 * hidden, outputs)

    def forward(self, bag: Bag) -> HeadOutput:
        slices = self.project(join_tokens(bag, self.token_sets).mean(3))
        order = order_slices(bag.mask, dtype=slices.dtype)
        turned = order_slices(bag.mask, dtype=slices.dtype, backwards=True) @ order.mT
        steps = self.dropout(_add_differences(order @ slices, order.sum(3) > 0))
        there, back = self.recurrence(torch.stack([steps, turned @ steps]).flatten(1, 2)).unflatten(1, steps.shape[:2])
        states = order.mT @ torch.cat([there, turned @ back], -1)
        attention = masked_softmax(torch.einsum("bvsh,vh->bvs", states, self.score), bag.mask, 2)
        pooled = torch.einsum("bvs,bvsh->bvh", attention.to(states.dtype), states)
        embedding = self.fuse(pooled, bag.mask.any(2))
        return HeadOutput(self.classify(self.dropout(embedding)), attention, embedding=embedding)


class BothWays(nn.Module):
    """Two GRUs side by side, as torch.nn.GRU computes them (with one bias, and one more for the candidate state).

    Written out, since ``nn.GRU`` can neither be stacked by `torch.func.vmap` nor exported for any number of slices.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        bound = hidden**-0.5
        self.hidden = hidden
        self.inward = nn.Parameter(torch.empty(2, width, 3 * hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(2, 1, 3 * hidden))
        self.recurrent = nn.Parameter(torch.empty(2, hidden, 3 * hidden).uniform_(-bound, bound))
        self.candidate_bias = nn.Parameter(torch.zeros(2, 1, hidden))

    def forward(self, steps: Tensor) -> Tensor:
        """States [2 batch slices hidden] of [2 batch slices width]; the first axis holds the two networks."""
        inward = (steps.flatten(1, 2) @ self.inward + self.bias).unflatten(1, steps.shape[1:3]).permute(2, 0, 1, 3)
        state = inward.new_zeros(1).expand(2, steps.shape[1], self.hidden)
        if torch.compiler.is_exporting():  # a loop of any length, which a traced Python loop is not
            from torch._higher_order_ops.scan import scan

            return scan(self._step, state.clone(), inward, dim=0)[1].permute(1, 2, 0, 3)
        states = []
        for each in inward.unbind(0):
            state, _ = self._step(state, each)
            states.append(state)
        return torch.stack(states, 2)

    def _step(self, state: Tensor, inward: Tensor) -> tuple[Tensor, Tensor]:
        recurrent = torch.bmm(state, self.recurrent)
        reset, update, candidate = inward.chunk(3, -1)
        reset_too, update_too, candidate_too = recurrent.chunk(3, -1)
        update = torch.sigmoid(update + update_too)
        fresh = torch.tanh(candidate + torch.sigmoid(reset + reset_too) * (candidate_too + self.candidate_bias))
        state = fresh + update * (state - fresh)
        return state, state.clone()


def _add_differences(slices: Tensor, filled: Tensor) -> Tensor:
    """Slices [batch views places dim] beside their differences to both neighbours, 0 where ``filled`` has none."""
    places = torch.arange(slices.shape[-2], device=slices.device)
    change = (slices - slices.roll(1, -2)).masked_fill(~(filled & (places > 0))[..., None], 0.0)
    return torch.cat([slices, change, change.roll(-1, -2)], -1)

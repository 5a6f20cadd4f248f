"""Owns low-rank updates of frozen weights (LoRA: Hu et al., arXiv 2106.09685); knows no block and runs none.

W + alpha / rank * B A, with B zero at the start, so that training starts from the frozen weights exactly. Updates are
made as tensors and handed to whoever runs the block: no layer is wrapped, so any block is served whose weights have the
usual names, those included that read a weight without calling its layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embedkit.errors import HeadError

__all__ = ["PROJECTIONS", "LowRankUpdates"]

PROJECTIONS = ("q", "k", "v", "proj", "mlp")
"""What of a block can be adapted: queries, keys, values, what follows attention, and the two-layer network."""
_FUSED = "attn.qkv.weight"  # queries, keys and values one above the other


class LowRankUpdates(nn.Module):
    """The updates of some blocks of one shape."""

    def __init__(
        self,
        linears: Sequence[tuple[str, int, int]],
        blocks: int,
        *,
        rank: int,
        alpha: float,
        projections: Sequence[str],
    ) -> None:
        """Takes (name, outputs, inputs) of a block's weight matrices, and how many blocks there are.

        Raises:
            HeadError: a rank below 1, or a projection that is unknown or that the block lacks.
        """
        super().__init__()
        if rank < 1:
            raise HeadError(f"rank is {rank}, expected 1 or more")
        self._scale = alpha / rank
        self._places = [place for each in projections for place in _find(each, linears)]
        if not self._places:
            raise HeadError(f"no projection to adapt was given, expected some of {', '.join(PROJECTIONS)}")
        self.down = nn.ParameterList()
        self.up = nn.ParameterList()
        for _ in range(blocks):
            for _, outputs, inputs, _, _ in self._places:
                bound = 1 / math.sqrt(inputs)
                self.down.append(nn.Parameter(torch.empty(rank, inputs).uniform_(-bound, bound)))
                self.up.append(nn.Parameter(torch.zeros(outputs, rank)))

    def forward(self) -> list[dict[str, Tensor]]:
        """For each block: name of a weight matrix to what is added to it."""
        found: list[dict[str, Tensor]] = []
        count = len(self._places)
        for start in range(0, len(self.down), count):
            block: dict[str, Tensor] = {}
            for number, (name, outputs, inputs, first, rows) in enumerate(self._places, start):
                change = self._scale * (self.up[number] @ self.down[number])
                if rows != outputs:
                    whole = block.get(name)
                    whole = change.new_zeros(rows, inputs) if whole is None else whole
                    change = whole + nn.functional.pad(change, (0, 0, first, rows - first - outputs))
                block[name] = change
            found.append(block)
        return found


def _find(projection: str, linears: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int, int, int]]:
    """(name, outputs, inputs, first row, rows) of each part of a block's weights that a projection stands for."""
    if projection not in PROJECTIONS:
        raise HeadError(f"projection {projection!r} is unknown, expected some of {', '.join(PROJECTIONS)}")
    found = []
    for name, rows, inputs in linears:
        if name == _FUSED and projection in {"q", "k", "v"}:
            width = rows // 3
            found.append((name, width, inputs, "qkv".index(projection) * width, rows))
        elif name in {f"attn.{projection}_proj.weight", f"attn.{projection}.weight"} or (
            projection == "mlp" and name.startswith("mlp.")
        ):
            found.append((name, rows, inputs, 0, rows))
    if not found:
        raise HeadError(
            f"these blocks have no {projection} to adapt; their weights are {', '.join(name for name, *_ in linears)}"
        )
    return found

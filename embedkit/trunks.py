"""Owns the trunk: a registered head inside another, which gives it outputs of its own; knows no head by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.errors import HeadError
from embedkit.plugins import HeadOutput, SliceOrder, create_head, load_head

__all__ = ["TrunkHead", "build_trunk", "find_output_axes"]


class TrunkHead(nn.Module):
    """A head whose outputs are those of its trunk; what they mean is said by the class that derives from it.

    Attributes:
        owner: Name of that head.
    """

    owner: ClassVar[str]
    reads: ClassVar[frozenset[str]] = frozenset({"cls", "patch"})
    fit_by: ClassVar[str] = "gradient"
    has_trunk: ClassVar[bool] = True
    slice_order: ClassVar[SliceOrder] = "free"  # of its default trunk

    def __init__(self, shape: BagShape, token_sets: Sequence[str], outputs: int, *, trunk: str = "abmil") -> None:
        super().__init__()
        self.trunk = build_trunk(self.owner, trunk, shape, token_sets, outputs)
        if hasattr(self.trunk, "evidence"):
            self.evidence: Callable[[Bag, int], Tensor] = self.trunk.evidence  # type: ignore[assignment]

    def forward(self, bag: Bag) -> HeadOutput:
        output: HeadOutput = self.trunk(bag)
        return output


def build_trunk(owner: str, name: str, shape: BagShape, token_sets: Sequence[str], outputs: int) -> nn.Module:
    """The head called ``name`` with its default options, for use inside the head called ``owner``.

    Raises:
        HeadError: no such head, one that is fitted in closed form, or one that has a trunk itself.
    """
    head = cast(Any, load_head(name))
    if head.fit_by != "gradient" or getattr(head, "has_trunk", False):
        why = "is fitted in closed form" if head.fit_by != "gradient" else "has a trunk itself"
        raise HeadError(f"head {name!r} {why}, so it cannot be the trunk of {owner!r}; choose another, as abmil or mlp")
    return create_head(name, shape, token_sets, outputs)


def find_output_axes(
    name: str, shape: BagShape, token_sets: Sequence[str], outputs: int, *, options: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, ...]]:
    """Which axes of each parameter and buffer of a head grow with the number of its outputs.

    Args:
        name, shape, token_sets, outputs, options: As in `create_head`.

    Returns:
        Name -> axes; () for what all outputs share.

    Raises:
        HeadError: as `create_head`.
    """
    with torch.random.fork_rng(devices=[]):
        few, more = (
            create_head(name, shape, token_sets, outputs + added, options=options).state_dict() for added in (0, 1)
        )
    return {
        key: tuple(axis for axis, size in enumerate(value.shape) if size != more[key].shape[axis])
        for key, value in few.items()
    }

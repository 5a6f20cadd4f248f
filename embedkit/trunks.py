"""Owns the trunk: a registered head inside another, which gives it outputs of its own; knows no head by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from embedkit.bags import BagShape
from embedkit.errors import HeadError
from embedkit.plugins import create_head, load_head

__all__ = ["build_trunk"]


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

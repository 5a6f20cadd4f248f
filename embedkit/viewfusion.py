"""Owns the ways in which a head joins the views of a case, by name; knows no head.

``late`` (AnyMC3D, arXiv 2512.12887): weights of its own for every view, whose vectors a second query pools. ``early``:
the slices of all views as one stack, through weights that they share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from embedkit.bags import Bag, BagShape
from embedkit.errors import HeadError

__all__ = ["merge_shape", "merge_views", "require_way"]


def require_way(head: str, way: str, known: Sequence[str]) -> None:
    """Stops where a head cannot join views so.

    Raises:
        HeadError: it cannot.
    """
    if way not in known:
        raise HeadError(f"option views of head {head!r} is {way!r}, expected {', '.join(known[:-1])} or {known[-1]}")


def merge_views(bag: Bag) -> Bag:
    """The bag with the slices of all views as those of one, [batch 1 views*slices ...], each at its own position."""
    tokens = {name: values.flatten(1, 2)[:, None] for name, values in bag.tokens.items()}
    mask, positions = (values.flatten(1)[:, None] for values in (bag.mask, bag.positions))
    cover, clicks = (None if values is None else values.flatten(1, 2)[:, None] for values in (bag.cover, bag.clicks))
    return dataclasses.replace(bag, tokens=tokens, mask=mask, positions=positions, cover=cover, clicks=clicks)


def merge_shape(shape: BagShape) -> BagShape:
    """The shape of bags that `merge_views` gives."""
    return dataclasses.replace(shape, views=("+".join(shape.views),))

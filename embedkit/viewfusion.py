"""Owns the ways in which a head joins the views of a case, by name; knows no head.

``late`` (AnyMC3D, arXiv 2512.12887): weights of its own for every view, whose vectors a second query pools. ``early``:
the slices of all views as one stack, through weights that they share. ``joint``, of heads that keep places apart: one
network for all views, and in the last layer a weight for every place of every view.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.errors import HeadError
from embedkit.pooling import ViewQuery

__all__ = ["MapFusion", "merge_shape", "merge_views", "require_way"]


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


class MapFusion(nn.Module):
    """What a head pooled at every place of each view, as its last layer reads it.

    Attributes:
        size: (views, places, channels) of that.
    """

    def __init__(self, head: str, way: str, *, views: int, places: int, channels: int) -> None:
        """Takes the name of the head for the error.

        Raises:
            HeadError: no such way.
        """
        super().__init__()
        require_way(head, way, ("joint", "late", "early"))
        self.early = way == "early"
        self.size = (views if way == "joint" else 1, places, channels)
        self.query = ViewQuery(places * channels, views) if way == "late" else None

    def merge(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Values and mask [batch views slices ...] to pool; where early, with all slices in one view."""
        return (values.flatten(1, 2)[:, None], mask.flatten(1, 2)[:, None]) if self.early else (values, mask)

    def forward(self, maps: Tensor, present: Tensor) -> Tensor:
        """Maps [batch views places channels] as one of ``size`` for each case; ``present`` is bool [batch views]."""
        if self.query is None:
            return maps
        return torch.einsum("bv,bvpc->bpc", self.weigh(maps, present), maps)[:, None]

    def weigh(self, maps: Tensor, present: Tensor) -> Tensor:
        """The weight of each view [batch views]: where late, that of the query; else 1."""
        if self.query is None:
            return present.new_ones(present.shape, dtype=maps.dtype)
        return self.query.weigh(maps.flatten(2), present)

"""Owns what is done to bags in training alone, so that a head learns to do without; knows no head, task or fit."""

from __future__ import annotations

import dataclasses

import torch

from embedkit.bags import Bag

__all__ = ["drop_views"]


def drop_views(bag: Bag, rate: float, *, rows: int = 1) -> Bag:
    """Masks views of each case at random, never the last that it has.

    Draws from torch's global generator.

    Args:
        bag: Of ``rows`` batches of one size, one after the other.
        rate: Chance of each view to go, from 0 to below 1.
        rows: Batches for which chance is drawn once.
    """
    present = bag.mask.any(2)
    drawn = torch.rand(len(present) // rows, present.shape[1], device=present.device)
    drawn = drawn.repeat(rows, 1).masked_fill(~present, -1.0)
    stays = drawn >= torch.minimum(drawn.amax(1, keepdim=True), drawn.new_tensor(rate))
    return dataclasses.replace(bag, mask=bag.mask & stays[..., None], zeroed=False)

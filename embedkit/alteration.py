"""Owns how an altered copy of a case differs from it: what is drawn for the copy, and its slices altered so.

What is drawn comes from a hash of the case's id, the number of the copy and the name of what is drawn, and from nothing
else: whoever makes the copy, and in whatever order, makes the same. Knows no file and no case beyond its id.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from embedkit.recipe import Recipe

__all__ = ["Alteration", "alter_slices", "draw_alteration", "draw_copies", "move_slices"]

_MOST_DEGREES, _MOST_SCALING, _MOST_SHIFT, _MOST_BENDING = 10.0, 0.1, 0.1, 0.25
_ACROSS = ("sagittal",)
"""Planes in whose images left and right do not lie, so that mirroring them would put front to back."""


@dataclass(frozen=True)
class Alteration:
    """What is done to every slice of a stack alike, in the plane of the slices and about their middle.

    Attributes:
        mirrored: Left and right change places, before anything else.
        degrees: Turned, clockwise as one looks at the image.
        scale: Enlarged by this factor.
        shift: Moved down and to the right, in sides of the image.
        powers: Of each channel, the exponent of its grey values in 0..1.
    """

    mirrored: bool
    degrees: float
    scale: float
    shift: tuple[float, float]
    powers: tuple[float, ...]


def draw_alteration(case_id: str, number: int, *, plane: str, sources: Sequence[str], flips: bool) -> Alteration:
    """What one copy of a case differs by; the motion is alike for all of its views, the contrast for all slices of one.

    Args:
        case_id: Of the case itself.
        number: Of the copy, from 1.
        plane: Of the stack; sagittal slices are never mirrored, for left and right do not lie in them.
        sources: The view that feeds each channel.
        flips: Whether half of the copies are mirrored.
    """

    def draw(what: str) -> float:
        """Uniform from -1 to below 1."""
        digest = hashlib.blake2b(f"{number}\n{what}\n{case_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**63 - 1

    return Alteration(
        mirrored=flips and plane not in _ACROSS and draw("mirrored") < 0,
        degrees=_MOST_DEGREES * draw("degrees"),
        scale=1 + _MOST_SCALING * draw("scale"),
        shift=(_MOST_SHIFT * draw("down"), _MOST_SHIFT * draw("right")),
        powers=tuple(math.exp(_MOST_BENDING * draw(f"power {view}")) for view in sources),
    )


def draw_copies(case_id: str, *, plane: str, sources: Sequence[str], recipe: Recipe) -> list[tuple[str, Alteration]]:
    """The id of each copy of a case that a recipe makes, and what it differs by; none where it keeps the case itself.

    Args:
        case_id, plane, sources: As in `draw_alteration`.
        recipe: Of the copies.
    """
    if not recipe.copies:
        return []
    return [
        (own, draw_alteration(case_id, number, plane=plane, sources=sources, flips=recipe.flips))
        for number, own in enumerate(recipe.stored_ids(case_id), start=1)
    ]


def alter_slices(images: Tensor, alteration: Alteration) -> Tensor:
    """The slices of a copy: moved, then bent in contrast.

    Args:
        images: Of the case, [slices channels size size] in 0..1, the rows from the top and the columns from the left.
        alteration: With a power per channel.
    """
    powers = torch.tensor(alteration.powers, device=images.device)
    return move_slices(images, alteration).clamp_(0, 1).pow_(powers[:, None, None])


def move_slices(images: Tensor, alteration: Alteration) -> Tensor:
    """Slices [slices channels size size] mirrored, turned, scaled and moved, bilinearly; outside all is 0."""
    angle = math.radians(alteration.degrees)
    cosine, sine = math.cos(angle) / alteration.scale, math.sin(angle) / alteration.scale
    down, right = (2 * part for part in alteration.shift)  # a side is 2 long, from -1 to 1
    back = torch.tensor([[cosine, sine], [-sine, cosine]])  # from a place in the copy to that in the case
    if alteration.mirrored:
        back[0] *= -1
    start = back @ torch.tensor([[-right], [-down]])
    flat = images.flatten(0, 1)[None]  # all move alike, so that places are computed once
    places = F.affine_grid(torch.cat([back, start], 1)[None], list(flat.shape), align_corners=False)
    moved = F.grid_sample(flat, places.to(images.device), mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved.view(images.shape)

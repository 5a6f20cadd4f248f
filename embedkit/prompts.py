"""Owns clicks: a point that a user gives in the source image, brought to the token under it; knows no head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedkit.cache import Cache, StackRecord
from embedkit.catalogue import canonical_shape
from embedkit.errors import OptionError
from embedkit.orientation import canonical_axes
from embedkit.patches import find_patch

__all__ = ["Click", "place_clicks"]


@dataclass(frozen=True)
class Click:
    """A point in an image of a case.

    Attributes:
        point: ``voxel``: whole-number index along the axes of the source file, in the order of viewers and of NIfTI
            (i, j, k; the axis that runs fastest in the file first); ``mm``: world coordinates, RAS+ mm.
        unit: ``voxel`` or ``mm``.
        view: The view that it is set in; empty for every view of the case that it lies in.
    """

    point: tuple[float, float, float]
    unit: str = "mm"
    view: str = ""

    def __post_init__(self) -> None:
        if self.unit not in ("voxel", "mm"):
            raise OptionError(f"click in {self.unit!r}, expected voxel or mm")
        if len(self.point) != 3 or not all(map(math.isfinite, self.point)):
            raise OptionError(f"click at {self.point}, expected three finite numbers: i,j,k in voxels or x,y,z in mm")

    def __str__(self) -> str:
        return f"{','.join(f'{value:g}' for value in self.point)} {self.unit}{f' of {self.view}' if self.view else ''}"


def place_clicks(
    clicks: Sequence[Click],
    cache: Cache,
    stacks: Mapping[int, int],
    *,
    grid: tuple[int, int],
    size: tuple[int, int, int, int],
) -> Tensor:
    """Clicks of one case as `Bag.clicks`.

    Args:
        clicks: One or more.
        cache: Holds the stacks.
        stacks: Place of each view in the bag -> stack of the case.
        grid: Patches as (height, width).
        size: [1 views slices patches] of the bag.

    Raises:
        OptionError: a click that lies in no image of the case, or where the backbone saw nothing of it.
    """
    placed = torch.zeros(size)
    for click in clicks:
        found = False
        for place, stack in stacks.items():
            record = cache.record(stack)
            if click.view and click.view not in (record.view, *record.sources):
                continue
            voxel = _find_voxel(click, record)
            table = cache.slices(stack)
            spot = voxel and find_patch(
                voxel,
                indices=table.indices,
                box=record.box,
                plane=record.plane,
                shape=canonical_shape(record),
                grid=grid,
            )
            if spot and not table.blank[spot[0]]:
                placed[0, place, spot[0], spot[1]] = 1
                found = True
        if not found:
            raise OptionError(_explain(click, [cache.record(stack) for stack in stacks.values()]))
    return placed


def _find_voxel(click: Click, record: StackRecord) -> tuple[int, int, int] | None:
    """Index in the canonical volume; None outside of the image."""
    if click.unit == "voxel":
        source = np.asarray(click.point[::-1])
    else:
        source = (np.linalg.inv(record.source_affine) @ np.array([*click.point, 1.0]))[:3]
    index: Any = np.floor(source + 0.5).astype(np.int64)
    if (index < 0).any() or (index >= np.asarray(record.source_shape)).any():
        return None
    order, flips = canonical_axes(record.source_affine)
    depth, height, width = (
        int(record.source_shape[axis] - 1 - index[axis] if flipped else index[axis])
        for axis, flipped in zip(order, flips, strict=True)
    )
    return depth, height, width


def _explain(click: Click, records: Sequence[StackRecord]) -> str:
    views = sorted({view for record in records for view in (record.view, *record.sources)})
    if click.view and click.view not in views:
        return (
            f"click at {click}, but case {records[0].case_id} has no view of that name among those that the run reads;"
            f" it has {', '.join(views)}"
        )
    images = [
        f"{record.view} has {'x'.join(map(str, record.source_shape[::-1]))} voxels,"
        f" its {record.plane} slices were seen in a window of {record.box[2]}x{record.box[3]} from"
        f" {record.box[0]},{record.box[1]} on"
        for record in records
    ]
    return (
        f"click at {click} lies in no slice that the backbone saw of case {records[0].case_id} ({'; '.join(images)});"
        " give a point inside, in voxels counted from 0 or in RAS+ mm"
    )

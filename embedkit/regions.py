"""Owns the part of an image that a query is about: a box or a mask, brought onto the patches of a stack.

Knows no index and no similarity.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray

from embedkit.catalogue import StackRecord
from embedkit.errors import OptionError, SearchError
from embedkit.orientation import measure_spacing
from embedkit.patches import measure_patch_cover
from embedkit.volumes import Volume, read_mask, to_canonical

__all__ = ["Region"]


@dataclass(frozen=True)
class Region:
    """A part of an image.

    Attributes:
        kind: ``voxels``, ``mm`` or ``mask``.
        corners: Of a box, the lower three and the upper three. ``voxels``: the file's own indices i, j, k (i runs
            fastest), the upper ones not included; ``mm``: RAS+ world coordinates x, y, z.
        mask: The file of a mask; what is not 0 counts.
    """

    kind: Literal["voxels", "mm", "mask"]
    corners: tuple[float, ...] = ()
    mask: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads ``voxels:I,J,K,I,J,K``, ``mm:X,Y,Z,X,Y,Z`` or the path of a mask.

        Raises:
            OptionError: a box without six ordered numbers, or no such file.
        """
        kind, _, numbers = text.partition(":")
        if kind not in ("voxels", "mm"):
            path = Path(text)
            if not path.exists():
                raise OptionError(
                    f"region {text!r} is no file and no box; give a mask, voxels:I,J,K,I,J,K or mm:X,Y,Z,X,Y,Z"
                )
            return cls("mask", mask=path)
        try:
            corners = tuple(float(number) for number in numbers.split(","))
        except ValueError:
            corners = ()
        ordered = len(corners) == 6 and all(low < high for low, high in zip(corners[:3], corners[3:], strict=True))
        whole = kind == "mm" or all(corner == math.floor(corner) for corner in corners)
        if not ordered or not whole or not all(map(math.isfinite, corners)):
            raise OptionError(
                f"region {text!r} is no box: give six numbers, the lower corner and then the upper, such as"
                " voxels:10,20,5,40,60,12 (whole numbers) or mm:-30,0,10,-5,25,40"
            )
        return cls(cast(Literal["voxels", "mm"], kind), corners)

    def measure_cover(self, record: StackRecord, indices: NDArray[np.int32], patches: int) -> NDArray[np.float32]:
        """How much of each patch of a stack lies in the region, 0..1: float32 [slices patches].

        Args:
            record: Geometry of the stack.
            indices: [slices] of the stack.
            patches: Per slice; a square grid.

        Raises:
            SearchError: the patches form no grid.
            VolumeError: the mask cannot be read, or lies elsewhere.
        """
        side = math.isqrt(patches)
        if side * side != patches or patches == 1:
            raise SearchError(
                "a region needs patches that keep their place, but the slices of this index are compared by a single"
                " vector; build it with --slices grid:patch@4"
            )
        cover = measure_patch_cover(
            self._fill(record), indices=indices, box=record.box, plane=record.plane, grid=(side, side)
        )
        return cast(NDArray[np.float32], cover.reshape(len(indices), patches))

    def describe_extent(self, record: StackRecord) -> str:
        """The whole image behind a stack as a box of this kind, for people; a mask's in world coordinates."""
        if self.kind == "voxels":
            return "voxels:0,0,0," + ",".join(str(size) for size in record.source_shape[::-1])
        affine = np.asarray(record.source_affine)
        corners = np.array(list(itertools.product(*((0, size - 1) for size in record.source_shape))))
        places = corners @ affine[:3, :3].T + affine[:3, 3]
        return "mm:" + ",".join(f"{value:.0f}" for value in (*places.min(0), *places.max(0)))

    def _fill(self, record: StackRecord) -> NDArray[Any]:
        """bool canonical volume of the stack's source, True in the region."""
        inside = np.zeros(record.source_shape, bool)
        if self.kind == "voxels":
            low, high = self.corners[2::-1], self.corners[:2:-1]  # array axes run k, j, i
            inside[tuple(slice(max(0, int(a)), max(0, int(b))) for a, b in zip(low, high, strict=True))] = True
        canonical, affine = to_canonical(inside, record.source_affine)
        if self.kind == "mm":
            return _fill_box(canonical.shape, affine, np.array(self.corners))
        if self.mask is not None:
            like = Volume(canonical, measure_spacing(affine), affine, record.source_shape, record.source_affine, 0, "")
            return np.asarray(read_mask(self.mask, like) != 0)
        return canonical


def _fill_box(shape: tuple[int, ...], affine: NDArray[Any], corners: NDArray[np.float64]) -> NDArray[np.bool_]:
    """True for the voxels whose centres lie in a box of world coordinates, slice by slice."""
    inside = np.zeros(shape, bool)
    rows, columns = np.meshgrid(np.arange(shape[1]), np.arange(shape[2]), indexing="ij")
    plane = rows[..., None] * affine[:3, 1] + columns[..., None] * affine[:3, 2] + affine[:3, 3]
    for number in range(shape[0]):
        places = plane + number * affine[:3, 0]
        inside[number] = ((places >= corners[:3]) & (places <= corners[3:])).all(-1)
    return inside

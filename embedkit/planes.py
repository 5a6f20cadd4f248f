"""Owns the geometry of slices: how a plane cuts a volume, the body's extent, and the rectangle that becomes an image;
knows no grey values beyond telling body from air."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from embedkit.errors import OptionError, VolumeError
from embedkit.spill import copy_slices
from embedkit.volumes import Volume

__all__ = [
    "PLANES",
    "common_extents",
    "cut_slices",
    "foreground_extent",
    "plane_axes",
    "restore_volume",
    "same_grid",
    "whole_extent",
    "wrap_box",
]

Array = np.ndarray[Any, Any]
Extent = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Half-open voxel ranges along the three axes of a canonical array."""

PLANES = ("axial", "coronal", "sagittal")
_AXES = {"axial": (0, 1, 2), "coronal": (1, 0, 2), "sagittal": (2, 0, 1)}
_MARGIN = 0.02
_FOREGROUND_SIDE = 128
_OTSU_BINS = 256
_AIR_HU = -500.0


def plane_axes(plane: str) -> tuple[int, int, int]:
    """Axes of a canonical array along which a plane's slices, rows and columns run.

    Images look as radiologists read them: axial with anterior at the top and the patient's right at the left, coronal
    with superior at the top and the patient's right at the left, sagittal with superior at the top and anterior at the
    left. Rows of coronal and sagittal images therefore run against axis 0.

    Raises:
        OptionError: no such plane.
    """
    if plane not in _AXES:
        raise OptionError(f"plane {plane!r} is unknown; give some of {', '.join(PLANES)}")
    return _AXES[plane]


def cut_slices(array: Array, plane: str) -> Array:
    """A view of a canonical array as the plane's images, [slices height width]; nothing is copied."""
    images = array.transpose(plane_axes(plane))
    return images if plane == "axial" else images[:, ::-1]


def restore_volume(images: Array, plane: str) -> Array:
    """The inverse of `cut_slices`: a view of a plane's images as a canonical array."""
    upright = images if plane == "axial" else images[:, ::-1]
    return upright.transpose(tuple(int(axis) for axis in np.argsort(plane_axes(plane))))


def same_grid(first: Volume, second: Volume) -> bool:
    """Whether two volumes have equal shapes and voxels in the same places to a hundredth of a voxel."""
    tolerance = 0.01 * min(first.spacing_mm)
    if first.array.shape != second.array.shape:
        return False
    corners = _corners([(0, size) for size in first.array.shape])
    return bool(np.abs(corners @ (first.affine - second.affine).T).max() <= tolerance)


def whole_extent(volume: Volume) -> Extent:
    """The whole volume."""
    depth, height, width = volume.array.shape
    return (0, depth), (0, height), (0, width)


def foreground_extent(array: Array) -> Extent | None:
    """Finds the body or head in a volume of any modality; None where there is no contrast.

    Where values reach below -500, as only HU do, the body is what lies above that. Elsewhere it is what differs from
    the background by more than half of Otsu's threshold (IEEE Trans. SMC 1979); the background is the grey that
    fills the frame's rim, or the darkest where none does. Specks and lines are opened away within slices, and
    connected parts smaller than a tenth of the largest are left out. The extent is where at least 1 % of a plane is
    body, widened by 2 % on every side, and never larger than the volume. Measured on at most 128 voxels per axis.

    Args:
        array: [slices height width].
    """
    steps = [max(1, -(-size // _FOREGROUND_SIDE)) for size in array.shape]
    bright = _find_body(copy_slices(array[:: steps[0], :: steps[1], :: steps[2]], slice(None)).astype(np.float32))
    if bright is None:
        return None
    body = _largest_parts(ndimage.binary_opening(bright, np.ones((1, 3, 3), bool)))
    ranges = []
    for axis, step in enumerate(steps):
        profile = body.mean(axis=tuple(other for other in range(3) if other != axis))
        places = np.flatnonzero(profile > 0.01)
        if not len(places):
            return None
        first, last = int(places[0]) * step, (int(places[-1]) + 1) * step
        margin = round(_MARGIN * (last - first))
        ranges.append((max(0, first - margin), min(array.shape[axis], last + margin)))
    return ranges[0], ranges[1], ranges[2]


def common_extents(volumes: Mapping[str, Volume]) -> dict[str, Extent]:
    """Gives, in each view's own voxels, the one box in space that holds the foreground of all views of a case.

    Views without contrast add nothing; where none has any, every view keeps its whole extent. Views on other grids
    are brought together in mm.
    """
    found = {view: foreground_extent(volume.array) for view, volume in volumes.items()}
    known = {view: extent for view, extent in found.items() if extent is not None}
    if not known:
        return {view: whole_extent(volume) for view, volume in volumes.items()}
    reference = volumes[next(iter(known))]
    moved = np.array([_move(extent, volumes[view], reference) for view, extent in known.items()])
    union = np.stack([moved[:, :, 0].min(0), moved[:, :, 1].max(0)], axis=1)
    result: dict[str, Extent] = {}
    for view, volume in volumes.items():
        ranges = [(int(low), int(high)) for low, high in np.round(_move(union, reference, volume))]
        result[view] = ranges[0], ranges[1], ranges[2]
    return result


def wrap_box(extent: Extent, volume: Volume, plane: str, *, resize: str) -> tuple[int, int, int, int]:
    """The rectangle of a plane's images that is resampled to the backbone's square: top, left, height, width in voxels.

    Args:
        extent: What must lie inside.
        volume: Whose slices are cut.
        plane: Axial, coronal or sagittal.
        resize: ``stretch`` gives the extent itself; ``pad`` the smallest square in mm centred on it, which may leave
            the image (it is black there).

    Raises:
        OptionError: another ``resize``.
        VolumeError: the extent lies outside the volume altogether.
    """
    _, row_axis, column_axis = plane_axes(plane)
    (first, last), (left, right) = extent[row_axis], extent[column_axis]
    count = volume.array.shape[row_axis]
    top, bottom = (first, last) if plane == "axial" else (count - last, count - first)
    if bottom <= 0 or top >= count or right <= 0 or left >= volume.array.shape[column_axis]:
        raise VolumeError(
            "the foreground of this case's views does not overlap one of them; use --crop none, or give the views as"
            " cases of their own"
        )
    if resize == "stretch":
        return top, left, bottom - top, right - left
    if resize != "pad":
        raise OptionError(f"resize {resize!r} is unknown; give pad or stretch")
    row_mm, column_mm = volume.spacing_mm[row_axis], volume.spacing_mm[column_axis]
    side_mm = max((bottom - top) * row_mm, (right - left) * column_mm)
    height, width = max(1, round(side_mm / row_mm)), max(1, round(side_mm / column_mm))
    return (top + bottom - height) // 2, (left + right - width) // 2, height, width


def _find_body(sample: Array) -> Array | None:
    """bool like ``sample``: what is no air; None where there is no contrast."""
    low, high = (float(value) for value in np.percentile(sample, [0.5, 99.5]))
    if high <= low:
        return None
    if low < _AIR_HU:
        return np.asarray(sample > _AIR_HU)
    rim = np.concatenate([sample[:, [0, -1]].reshape(-1), sample[:, :, [0, -1]].reshape(-1)])
    middle = float(np.median(rim))
    even = np.mean(np.abs(rim - middle) <= 0.015 * (high - low)) >= 0.6
    difference = np.abs(sample - (middle if even else low))
    most = np.percentile(difference, 99)
    difference = np.minimum(difference, most) if most > 0 else difference  # an object may be less than a hundredth
    return np.asarray(difference > _otsu(difference) / 2)


def _otsu(sample: Array) -> float:
    """The threshold that best separates the values into two classes (largest variance between them).

    Where a whole gap between the classes serves equally well, its middle.
    """
    counts, edges = np.histogram(sample, _OTSU_BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    below, mass = np.cumsum(counts)[:-1].astype(float), np.cumsum(counts * centres)
    above = counts.sum() - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass[:-1] / below - (mass[-1] - mass[:-1]) / above) ** 2
    best = np.flatnonzero(between >= np.nanmax(between) * (1 - 1e-6))
    return float(edges[1 + best[0]] + edges[1 + best[-1]]) / 2


def _largest_parts(mask: Array) -> Array:
    """``mask`` without the connected parts smaller than a tenth of the largest."""
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(labels.reshape(-1))
    sizes[0] = 0
    return np.asarray((sizes >= 0.1 * sizes.max())[labels] & mask)


def _move(extent: Sequence[tuple[float, float]] | Array, source: Volume, target: Volume) -> Array:
    """[3 2] ``extent`` (voxel edges of ``source``) as the enclosing box in voxel edges of ``target``."""
    box = np.asarray(extent, float)
    if source is target or same_grid(source, target):
        return box
    centres = _corners([(low - 0.5, high - 0.5) for low, high in box])  # voxel i spans i - 0.5 to i + 0.5
    indices = (centres @ (np.linalg.inv(target.affine) @ source.affine).T)[:, :3]
    return np.stack([indices.min(0) + 0.5, indices.max(0) + 0.5], axis=1)


def _corners(ranges: Sequence[tuple[float, float]]) -> Array:
    """[8 4] homogeneous corner points of a box."""
    grid = np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, 3)
    return np.concatenate([grid, np.ones((len(grid), 1))], axis=1)

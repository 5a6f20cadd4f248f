"""Owns the way between a slice's patch grid and the voxels of its volume, both ways; knows no backbone."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from embedkit.errors import VolumeError
from embedkit.planes import cut_slices, plane_axes, restore_volume

__all__ = ["Box", "find_patch", "frame_image", "measure_image_cover", "measure_patch_cover", "place_patch_scores"]

Array = np.ndarray[Any, Any]
Box = tuple[int, int, int, int]


def place_patch_scores(scores: Array, *, indices: Array, box: Box, plane: str, shape: tuple[int, int, int]) -> Array:
    """Spreads scores of patches over the voxels that the patches saw.

    Within a slice the scores are interpolated between patch centres; between chosen slices they are interpolated by
    distance, and before the first and after the last they are held. Voxels outside the box get 0.

    Args:
        scores: [slices grid_height grid_width].
        indices: [slices], ascending, as in the stack.
        box: Top, left, height and width in voxels, as in the stack.
        plane: Axial, coronal or sagittal.
        shape: Of the canonical volume, [slices height width].

    Returns:
        float32 canonical volume of ``shape``.

    Raises:
        VolumeError: scores and indices do not belong together, or an index lies outside ``shape``.
    """
    axis, row_axis, column_axis = plane_axes(plane)
    scores = np.asarray(scores, np.float32)
    _check(scores.shape, indices, shape[axis])
    along = np.interp(np.arange(shape[axis]), indices, np.arange(len(indices)))
    lower = np.floor(along).astype(np.intp)
    upper = np.minimum(lower + 1, len(indices) - 1)
    weight = (along - lower).astype(np.float32)[:, None, None]
    every_slice = scores[lower] * (1 - weight) + scores[upper] * weight
    top, left, height, width = box
    rows = _interpolation(top, height, shape[row_axis], scores.shape[1])
    columns = _interpolation(left, width, shape[column_axis], scores.shape[2])
    return np.ascontiguousarray(restore_volume(rows @ every_slice @ columns.T, plane))


def measure_patch_cover(volume: Array, *, indices: Array, box: Box, plane: str, grid: tuple[int, int]) -> Array:
    """Gives the mean of a volume over each patch of a stack, for a mask the share that it covers.

    What of a patch lies outside the image counts as 0.

    Args:
        volume: Canonical, [slices height width]; bool or a number.
        indices: [slices] of the stack.
        box: Top, left, height and width in voxels, as in the stack.
        plane: Axial, coronal or sagittal.
        grid: Patches as (height, width).

    Returns:
        float32 [slices grid_height grid_width]; in 0..1 for a mask.

    Raises:
        VolumeError: an index lies outside the volume.
    """
    images = cut_slices(np.asarray(volume), plane)
    _check((len(indices),), indices, images.shape[0])
    top, left, height, width = box
    rows = _shares(top, height, images.shape[1], grid[0])
    columns = _shares(left, width, images.shape[2], grid[1])
    return np.asarray(rows @ images[indices].astype(np.float32) @ columns.T, np.float32)


def measure_image_cover(plane_shape: tuple[int, int], *, box: Box, grid: tuple[int, int]) -> Array:
    """How much of each part of a stack's square lies in the image, 0..1, and not in the black beside it.

    Args:
        plane_shape: Height and width of the plane's image in voxels.
        box: Top, left, height and width in voxels, as in the stack.
        grid: Parts as (height, width).

    Returns:
        float32 [grid_height grid_width].
    """
    top, left, height, width = box
    rows = _shares(top, height, plane_shape[0], grid[0]).sum(1)
    columns = _shares(left, width, plane_shape[1], grid[1]).sum(1)
    return np.asarray(np.outer(rows, columns), np.float32)


def frame_image(plane_shape: tuple[int, int], box: Box) -> tuple[float, float, float, float]:
    """Where the image lies in a stack's square: its left, top, right and bottom edge, 0..1 from left and top.

    Args:
        plane_shape: Height and width of the plane's image in voxels.
        box: Top, left, height and width in voxels, as in the stack.
    """
    top, left, height, width = box
    edges = -left / width, -top / height, (plane_shape[1] - left) / width, (plane_shape[0] - top) / height
    return cast(tuple[float, float, float, float], tuple(min(max(edge, 0.0), 1.0) for edge in edges))


def find_patch(
    voxel: tuple[int, int, int],
    *,
    indices: Array,
    box: Box,
    plane: str,
    shape: tuple[int, int, int],
    grid: tuple[int, int],
) -> tuple[int, int] | None:
    """The slice (its place in the stack) and the patch that a voxel lies in; where its slice was left out, the nearest.

    Args:
        voxel: Index in the canonical volume.
        indices: [slices] of the stack, ascending.
        box: Top, left, height and width in voxels, as in the stack.
        plane: Axial, coronal or sagittal.
        shape: Of the canonical volume.
        grid: Patches as (height, width).

    Returns:
        None for a voxel outside of the box, which no patch saw.
    """
    axis, row_axis, column_axis = plane_axes(plane)
    row = voxel[row_axis] if plane == "axial" else shape[row_axis] - 1 - voxel[row_axis]
    top, left, height, width = box
    down, across = (row + 0.5 - top) / height, (voxel[column_axis] + 0.5 - left) / width
    if not (0 <= down < 1 and 0 <= across < 1):
        return None
    place = int(np.abs(np.asarray(indices, np.int64) - voxel[axis]).argmin())
    return place, int(down * grid[0]) * grid[1] + int(across * grid[1])


def _check(shape: tuple[int, ...], indices: Array, count: int) -> None:
    if not len(indices) or shape[0] != len(indices) or indices.min() < 0 or indices.max() >= count:
        raise VolumeError(
            f"patch scores of shape {shape} for {len(indices)} slices do not fit a volume of {count} slices along their"
            " plane; they belong to another image"
        )


def _interpolation(first: int, length: int, size: int, patches: int) -> Array:
    """float32 [size patches]: weights by which voxels take the scores of the patches around them; 0 outside."""
    voxels = np.arange(size)
    inside = (voxels >= first) & (voxels < first + length)
    place = np.clip((voxels + 0.5 - first) / length * patches - 0.5, 0, patches - 1)
    weights = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(patches)))
    return np.asarray(weights * inside[:, None], np.float32)


def _shares(first: int, length: int, size: int, patches: int) -> Array:
    """float32 [patches size]: what share of a patch each voxel makes up."""
    edges = first + length / patches * np.arange(patches + 1)
    voxels = np.arange(size)
    overlap = np.minimum(edges[1:, None], voxels + 1) - np.maximum(edges[:-1, None], voxels)
    return np.asarray(np.maximum(0, overlap) * (patches / length), np.float32)

"""Owns where voxels lie: turning an array to the canonical index order and back, and what makes an affine acceptable.

Pure functions of arrays and affines; knows nothing of file formats, voxel values and SimpleITK.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from embedkit.errors import VolumeError

__all__ = [
    "canonical_axes",
    "check_affine",
    "default_affine",
    "has_square_corners",
    "measure_spacing",
    "to_canonical",
    "to_source",
    "turn_canonical",
]

Array = np.ndarray[Any, Any]

_SHEAR_DEGREES = 0.5


def canonical_axes(affine: Array) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """How an array is turned to the canonical index order (see `embedkit.volumes.Volume`).

    World axes are matched to array axes greedily, the largest direction cosine first, as ITK's DICOMOrient does;
    cosines are compared to six digits, so that rounding in a header does not decide.

    Args:
        affine: ``[4 4]``, indices of an array to RAS+ mm.

    Returns:
        (permutation, flips): canonical axis ``a`` is array axis ``permutation[a]``, reversed where ``flips[a]``.

    Raises:
        VolumeError: the affine is singular or not finite.
    """
    directions = np.asarray(affine, dtype=np.float64)[:3, :3]
    lengths = np.linalg.norm(directions, axis=0)
    if not np.isfinite(directions).all() or lengths.min() == 0 or abs(np.linalg.det(directions / lengths)) < 1e-6:
        raise VolumeError(f"affine {np.asarray(affine).tolist()} is singular, expected three independent axes")
    # rows: superior, posterior, left (the canonical directions); columns: array axes
    cosines = np.round((directions / lengths)[[2, 1, 0]] * np.array([[1.0], [-1.0], [-1.0]]), 6)
    strength = np.abs(cosines)
    permutation, flips = [0, 0, 0], [False, False, False]
    for _ in range(3):
        world, axis = divmod(int(np.argmax(strength)), 3)
        permutation[world], flips[world] = axis, bool(cosines[world, axis] < 0)
        strength[world, :] = strength[:, axis] = -1.0
    return (permutation[0], permutation[1], permutation[2]), (flips[0], flips[1], flips[2])


def to_canonical(array: Array, affine: Array) -> tuple[Array, Array]:
    """As `turn_canonical`, but an array that is C-contiguous and writable, a copy where it must be."""
    turned, moved = turn_canonical(array, affine)
    return np.require(turned, requirements=["C", "W"]), moved


def turn_canonical(array: Array, affine: Array) -> tuple[Array, Array]:
    """A view of an array in canonical index order, and its affine; world positions stay.

    Raises:
        VolumeError: the affine is singular or not finite.
    """
    permutation, flips = canonical_axes(affine)
    turn = np.zeros((4, 4))  # canonical index to source index
    turn[3, 3] = 1.0
    for axis, (source, flipped) in enumerate(zip(permutation, flips, strict=True)):
        turn[source, axis] = -1.0 if flipped else 1.0
        turn[source, 3] = array.shape[source] - 1 if flipped else 0.0
    turned = array.transpose(permutation)[_reversed(flips)]
    return turned, np.asarray(affine, dtype=np.float64) @ turn


def to_source(array: Array, source_affine: Array) -> Array:
    """The inverse of `to_canonical`: an array in canonical order put back into the order of its file.

    Args:
        array: ``[slices height width]`` in canonical order.
        source_affine: ``[4 4]``, indices of the file's own array to RAS+ mm.

    Raises:
        VolumeError: the affine is singular or not finite.
    """
    permutation, flips = canonical_axes(source_affine)
    return np.ascontiguousarray(array[_reversed(flips)].transpose(np.argsort(permutation)))


def _reversed(flips: tuple[bool, bool, bool]) -> tuple[slice, ...]:
    return tuple(slice(None, None, -1 if flipped else None) for flipped in flips)


def measure_spacing(affine: Array) -> tuple[float, float, float]:
    """Distance of neighbours along each axis in mm, rounded to float32 and six digits."""
    depth, height, width = (float(f"{np.float32(length):.6g}") for length in np.linalg.norm(affine[:3, :3], axis=0))
    return depth, height, width


def default_affine(depth_mm: float = 1.0, height_mm: float = 1.0, width_mm: float = 1.0) -> Array:
    """Indices of an array that is canonical already to RAS+ mm, voxel (0, 0, 0) at the origin."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = depth_mm, -height_mm, -width_mm, 1.0
    return affine


def has_square_corners(affine: Array) -> bool:
    """Whether an affine is finite, regular and its axes meet at right angles."""
    directions = affine[:3, :3]
    lengths = np.linalg.norm(directions, axis=0)
    if not np.isfinite(affine).all() or lengths.min() == 0:
        return False
    cosines = (directions / lengths).T @ (directions / lengths) - np.eye(3)
    return bool(np.abs(cosines).max() <= math.sin(math.radians(_SHEAR_DEGREES)))


def check_affine(path: Path, affine: Array) -> None:
    """Refuses an affine that is no grid with square corners; ``path`` is named in the message.

    Raises:
        VolumeError: not [4 4] with 0 0 0 1 below, not finite, singular or skewed.
    """
    if affine.shape != (4, 4) or not np.array_equal(affine[3], [0, 0, 0, 1]):
        raise VolumeError(f"its affine is {affine.tolist()}, expected [4 4] with 0 0 0 1 as the last row", file=path)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or lengths.min() == 0:
        raise VolumeError(
            f"its geometry is singular (voxel sizes {np.round(lengths, 6).tolist()} mm), expected three "
            "independent axes of positive size; repair the header",
            file=path,
        )
    if not has_square_corners(affine):
        raise VolumeError(
            f"its axes are skewed, expected right angles to within {_SHEAR_DEGREES} degrees; resample it to a "
            "grid with square corners",
            file=path,
        )

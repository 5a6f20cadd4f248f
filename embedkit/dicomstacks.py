"""Owns whether the slices of a DICOM series form one straight even stack, their order, and the stack's affine.

Works on headers that others have read; knows nothing of files, pixels and orientation conventions other than DICOM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from embedkit.dicomheaders import DicomSeries, DicomSlice
from embedkit.errors import VolumeError
from embedkit.sourceimage import MAX_VOXELS

__all__ = ["order_slices"]

Array = np.ndarray[Any, Any]

_SAME_VALUE = 1e-3  # direction cosines, and pixel spacings in mm, closer than this are equal
_TILT_DEGREES = 0.5
_UNEVEN = 0.05  # spacing may differ from the median by this fraction
_SAME_POSITION_MM = 1e-3


def order_slices(series: DicomSeries) -> tuple[list[DicomSlice], Array]:
    """The slices by position along their normal, and the affine (slice, row, column, 1) to RAS+ mm."""
    _check_formats(series)
    row, column, normal = _common_directions(series)
    slices = sorted(series.slices, key=lambda item: (float(np.dot(item.position, normal)), item.file))
    positions = np.array([item.position for item in slices], dtype=np.float64)
    if len(slices) > 1:
        _check_spacing(series, slices, positions @ normal)
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
        _check_straight(series, positions, step, normal)
    else:
        step = normal * slices[0].thickness_mm
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = column * slices[0].pixel_mm[0]
    affine[:3, 2] = row * slices[0].pixel_mm[1]
    affine[:3, 3] = positions[0]
    affine[:2] *= -1  # LPS+ to RAS+
    return slices, affine


def _check_formats(series: DicomSeries) -> None:
    for item in series.slices:
        if item.frames > 1:
            problem = f"holds {item.frames} frames (multi-frame or enhanced DICOM); convert it with dcm2niix to NIfTI"
        elif item.samples > 1 or item.photometric == "PALETTE COLOR":
            problem = "is a colour image, expected one grey value per pixel; leave this series out"
        elif item.photometric == "MONOCHROME1":
            problem = "has inverted grey values (MONOCHROME1), expected MONOCHROME2; convert the series"
        elif item.slope == 0:
            problem = "has a rescale slope of 0 or none that is a number; repair the header"
        elif len(item.position) != 3 or len(item.directions) != 6:
            problem = "lacks its position or orientation in space; leave this series out"
        elif len(item.pixel_mm) != 2 or min(item.pixel_mm) <= 0:
            problem = "lacks a positive PixelSpacing; repair the header or leave this series out"
        else:
            continue
        raise VolumeError(f"{item.file}: {problem}")
    _check_same(series, "size", [item.shape for item in series.slices])
    voxels = len(series.slices) * series.slices[0].shape[0] * series.slices[0].shape[1]
    if voxels > MAX_VOXELS:
        raise VolumeError(
            f"{series.folder}: its headers promise {voxels} voxels, more than {MAX_VOXELS}; they are damaged, or the "
            "image must be cropped first"
        )
    _check_same(series, "PixelSpacing", [item.pixel_mm for item in series.slices])


def _check_same(series: DicomSeries, what: str, values: Sequence[tuple[float, ...]]) -> None:
    """Refuses slices that differ in ``values`` by more than a direction cosine's or a spacing's rounding."""
    table = np.asarray(values, dtype=np.float64)
    other = np.abs(table - table[0]).max(axis=1) >= _SAME_VALUE
    if other.any():
        first, second = np.round(table[0], 3).tolist(), np.round(table[int(np.argmax(other))], 3).tolist()
        raise VolumeError(
            f"{series.folder}: a series mixes slices of more than one {what} ({int((~other).sum())} have {first}, "
            f"{int(other.sum())} another, such as {second}); move the slices that do not belong to it (often a "
            "localizer) elsewhere"
        )


def _common_directions(series: DicomSeries) -> tuple[Array, ...]:
    """Unit vectors along a row, down a column and along the normal (LPS+), equal for all slices."""
    _check_same(series, "ImageOrientationPatient", [item.directions for item in series.slices])
    directions = np.array(series.slices[0].directions)
    row, column = directions[:3], directions[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if not (np.allclose(lengths, 1, atol=1e-2) and abs(float(row @ column)) < 1e-2):
        raise VolumeError(
            f"{series.folder}: ImageOrientationPatient {directions.tolist()} is not two perpendicular unit vectors; "
            "repair the headers"
        )
    row = row / lengths[0]
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    return row, np.cross(normal, row), normal


def _check_spacing(series: DicomSeries, slices: Sequence[DicomSlice], places: Array) -> None:
    """Refuses slices at one place, gaps and uneven steps; ``places`` are sorted mm along the normal."""
    steps = np.diff(places)
    apart = steps > _SAME_POSITION_MM
    if not apart.all():
        first = int(np.argmin(apart))
        raise VolumeError(
            f"{series.folder}: {int((~apart).sum())} slices lie where another one does, for example at"
            f" {places[first]:.2f} mm; remove the copies, or give each phase or echo a folder of its own",
            found=f"{slices[first].file.name} and {slices[first + 1].file.name}",
        )
    usual = float(np.median(steps))
    widest = int(np.argmax(steps))
    if steps[widest] > 1.5 * usual:
        raise VolumeError(
            f"{series.folder}: about {round(steps[widest] / usual) - 1} slices are missing between"
            f" {places[widest]:.2f} and {places[widest + 1]:.2f} mm (usual spacing {usual:.2f} mm); fetch the whole"
            " series again",
            found=f"{slices[widest].file.name} and {slices[widest + 1].file.name}",
        )
    if np.abs(steps - usual).max() > _UNEVEN * usual:
        raise VolumeError(
            f"{series.folder}: slices are unevenly spaced ({steps.min():.2f} to {steps.max():.2f} mm), expected one "
            "spacing; slices may be missing: fetch the series again or resample it"
        )


def _check_straight(series: DicomSeries, positions: Array, step: Array, normal: Array) -> None:
    """Refuses stacks whose slices do not lie square above each other."""
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    if tilt > _TILT_DEGREES:
        raise VolumeError(
            f"{series.folder}: slices are shifted along their plane, the stack leans by {tilt:.1f} degrees (tilted "
            "gantry), expected 0; resample it to a square grid (dcm2niix does)"
        )
    line = positions[0] + np.arange(len(positions))[:, None] * step
    sideways = positions - line - ((positions - line) @ normal)[:, None] * normal
    worst = float(np.linalg.norm(sideways, axis=1).max())
    if worst > 0.5 * series.slices[0].pixel_mm[0]:
        raise VolumeError(
            f"{series.folder}: slices are shifted sideways by up to {worst:.1f} mm against each other, expected one "
            "straight stack; resample it to one grid"
        )

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
    _check_damage(series)
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
    _check_count(series)
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = column * slices[0].pixel_mm[0]
    affine[:3, 2] = row * slices[0].pixel_mm[1]
    affine[:3, 3] = positions[0]
    affine[:2] *= -1  # LPS+ to RAS+
    return slices, affine


def _check_damage(series: DicomSeries) -> None:
    """Refuses a series of which a file cannot be read: its place in the stack is not known for sure."""
    if series.damaged:
        first, *rest = series.damaged
        more = "is 1 more file" if len(rest) == 1 else f"are {len(rest)} more files"
        raise first.error(f"; so {more} of this series" if rest else "")


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
        raise VolumeError(problem, file=item.file)
    _check_same(series, "size", [item.shape for item in series.slices])
    voxels = len(series.slices) * series.slices[0].shape[0] * series.slices[0].shape[1]
    if voxels > MAX_VOXELS:
        raise VolumeError(
            f"its headers promise {voxels} voxels, more than {MAX_VOXELS}; they are damaged, or the "
            "image must be cropped first",
            file=series.folder,
        )
    _check_same(series, "PixelSpacing", [item.pixel_mm for item in series.slices])


def _check_same(series: DicomSeries, what: str, values: Sequence[tuple[float, ...]]) -> None:
    """Refuses slices that differ in ``values`` by more than a direction cosine's or a spacing's rounding."""
    table = np.asarray(values, dtype=np.float64)
    other = np.abs(table - table[0]).max(axis=1) >= _SAME_VALUE
    if other.any():
        first, second = np.round(table[0], 3).tolist(), np.round(table[int(np.argmax(other))], 3).tolist()
        raise VolumeError(
            f"a series mixes slices of more than one {what} ({int((~other).sum())} have {first}, "
            f"{int(other.sum())} another, such as {second}); move the slices that do not belong to it (often a "
            "localizer) elsewhere",
            file=series.folder,
        )


def _common_directions(series: DicomSeries) -> tuple[Array, ...]:
    """Unit vectors along a row, down a column and along the normal (LPS+), equal for all slices."""
    _check_same(series, "ImageOrientationPatient", [item.directions for item in series.slices])
    directions = np.array(series.slices[0].directions)
    row, column = directions[:3], directions[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if not (np.allclose(lengths, 1, atol=1e-2) and abs(float(row @ column)) < 1e-2):
        raise VolumeError(
            f"ImageOrientationPatient {directions.tolist()} is not two perpendicular unit vectors; repair the headers",
            file=series.folder,
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
        first, copies = int(np.argmin(apart)), int((~apart).sum())
        raise VolumeError(
            f"{copies} {'slice lies' if copies == 1 else 'slices lie'} where another one does, for example at"
            f" {places[first]:.2f} mm; remove the copies, or give each phase or echo a folder of its own",
            file=series.folder,
            found=f"{slices[first].file.name} and {slices[first + 1].file.name}",
        )
    usual = float(np.median(steps))
    widest = int(np.argmax(steps))
    if steps[widest] > 1.5 * usual:
        missing = round(steps[widest] / usual) - 1
        raise _lacking(
            series,
            f"about {missing} {'slice is' if missing == 1 else 'slices are'} missing between"
            f" {places[widest]:.2f} and {places[widest + 1]:.2f} mm (usual spacing {usual:.2f} mm)",
            neighbours=slices[widest : widest + 2],
        )
    if np.abs(steps - usual).max() > _UNEVEN * usual:
        lengths = f"{steps.min():.2f} to {steps.max():.2f} mm"
        problem = f"slices are unevenly spaced ({lengths}), expected one spacing; slices may be missing"
        raise _lacking(series, problem, way_out="fetch the series again or resample it")


def _check_count(series: DicomSeries) -> None:
    """Refuses even slices whose headers count more of them, where a file beside them that cannot be read may be one."""
    missing = _count_missing(series) if series.strays else 0
    if missing:
        told = f"the headers of its {len(series.slices)} slices tell of {missing} more"
        raise _lacking(series, f"{told} by their instance numbers or their count")


def _lacking(
    series: DicomSeries,
    problem: str,
    *,
    way_out: str = "fetch the whole series again",
    neighbours: Sequence[DicomSlice] = (),
) -> VolumeError:
    """The error of a series that lacks slices; files beside it that cannot be read may hold them."""
    names = [each.file.name for each in series.strays]
    if names:
        files = "a file that cannot be read lies" if len(names) == 1 else f"{len(names)} files that cannot be read lie"
        problem += f", and {files} beside it"
    found = " and ".join(item.file.name for item in neighbours), ", ".join(names[:5]) + (" ..." if names[5:] else "")
    return VolumeError(f"{problem}; {way_out}", file=series.folder, found=", beside ".join(filter(None, found)))


def _count_missing(series: DicomSeries) -> int:
    """How many slices are missing by the headers of the others.

    Numbers that are absent count where they leave a hole among even steps, or where the strays are as many or more:
    some series are numbered from far beyond 1 on, or every second number.
    """
    given = [item.number for item in series.slices if item.number is not None]
    numbers = np.unique(given)
    if len(numbers) == len(series.slices):
        absent = int(numbers[-1]) - min(int(numbers[0]), 1) + 1 - len(numbers)
        if 0 < absent <= len(series.strays):
            return absent
        steps = np.diff(numbers)
        if len(steps) > 1 and steps.max() > 1.5 * np.median(steps):
            return round(float(steps.max() / np.median(steps))) - 1
    promised = max(item.promised for item in series.slices) - len(series.slices)
    return promised if 0 < promised <= len(series.strays) else 0


def _check_straight(series: DicomSeries, positions: Array, step: Array, normal: Array) -> None:
    """Refuses stacks whose slices do not lie square above each other."""
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    if tilt > _TILT_DEGREES:
        raise VolumeError(
            f"slices are shifted along their plane, the stack leans by {tilt:.1f} degrees (tilted "
            "gantry), expected 0; resample it to a square grid (dcm2niix does)",
            file=series.folder,
        )
    line = positions[0] + np.arange(len(positions))[:, None] * step
    sideways = positions - line - ((positions - line) @ normal)[:, None] * normal
    worst = float(np.linalg.norm(sideways, axis=1).max())
    if worst > 0.5 * series.slices[0].pixel_mm[0]:
        raise VolumeError(
            f"slices are shifted sideways by up to {worst:.1f} mm against each other, expected one "
            "straight stack; resample it to one grid",
            file=series.folder,
        )

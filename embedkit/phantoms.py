"""Owns synthetic scans with known answers: chest-like CT volumes with or without a lesion, written as real files.

Refuses to be mistaken for anatomy: the shapes are ellipsoids and tubes, made to try and to demonstrate the pipeline.
World coordinates are RAS+ mm with the body's centre near the origin, so +x is the patient's right.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import SimpleITK as sitk

from embedkit.errors import OptionError, VolumeError
from embedkit.itk import quiet_itk
from embedkit.manifest import MANIFEST_COLUMNS, write_manifest
from embedkit.volumes import write_volume

__all__ = ["PhantomSet", "make_phantoms"]

Array = np.ndarray[Any, Any]

LESION_SHARE = 0.6
SECOND_EXAMS = 0.25
"""Share of the patients that have two exams, the second with another pose, grid and noise and a grown lesion."""

AIR_HU, LUNG_HU, FAT_HU, MUSCLE_HU, BLOOD_HU, BONE_HU = -1000.0, -820.0, -95.0, 50.0, 40.0, 400.0
_VESSEL_WAYS = (
    (1, 0.7, 0.6),
    (1, -0.7, 0.6),
    (1, 0.7, -0.6),
    (1, -0.7, -0.6),
    (1, 0, 0),
    (0.4, 0.3, 1),
    (0.4, 0.3, -1),
)
_SIDE = 96  # pixels along rows and columns

# File orders that are met in practice, each as (canonical axis of every file axis, whether it is reversed).
_FILE_ORDERS = (
    ((0, 1, 2), (False, False, False)),  # LPS, as DICOM
    ((0, 1, 2), (False, True, True)),  # RAS, as most NIfTI
    ((0, 1, 2), (False, True, False)),  # LAS
    ((0, 1, 2), (True, False, False)),  # slices from the head down
    ((1, 0, 2), (False, True, True)),  # coronal acquisition
    ((2, 0, 1), (True, True, False)),  # sagittal acquisition
)


@dataclass(frozen=True)
class PhantomSet:
    """Where `make_phantoms` put its tables; the images lie beside them."""

    manifest: Path
    labels: Path


@dataclass(frozen=True)
class _Patient:
    """What stays the same between the exams of one patient; lengths in mm, places in the body's own RAS+ frame."""

    patient_id: str
    body: tuple[float, float]  # half axes of the outline: left-right, front-back
    fat: float
    lung: tuple[float, float, float]  # half axes
    vessels: Array  # [tubes 7]: start, end, radius
    lesion: tuple[float, float, float] | None
    lesion_radius: float
    lesion_hu: float


def make_phantoms(folder: Path | str, *, cases: int = 48, seed: int = 0) -> PhantomSet:
    """Writes labelled CT-like volumes, their lesion masks, a manifest and a label table.

    Volumes are int16 HU of 24 to 32 slices of 96x96, about 4 x 3.5 x 3.5 mm, in the file orders met in practice, half
    of them oblique; all NIfTI but the first, which is a DICOM series. About six in ten cases hold one round lesion in a
    lung, of varying site, size (radius 15 to 27 mm) and density, among vessels of the same density. ``labels.csv`` has
    per case: ``case_id``, ``patient_id`` (a quarter of the patients have two exams), ``lesion`` (0 or 1), ``side``
    (``left`` or ``right`` of the patient; empty without lesion) and ``volume_mm3`` (of the mask's voxels; 0 without).

    Args:
        folder: Is made where needed; files of the same names are replaced.
        cases: How many exams.
        seed: The same seed gives the same arrays to the bit.

    Raises:
        OptionError: fewer than 4 cases, or a negative seed.
        VolumeError: an image, or the label table, cannot be written.
        ManifestError: the manifest cannot be written.
    """
    if cases < 4 or seed < 0:
        raise OptionError(f"{cases} phantoms of seed {seed} were asked for, expected at least 4 and a seed from 0 up")
    folder = Path(folder)
    manifest, table = folder / "manifest.csv", folder / "labels.csv"
    try:
        for name in ("volumes", "masks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        exams = [_write_exam(folder, number, patient, seed) for number, patient in enumerate(_draw_exams(cases, seed))]
        pl.DataFrame([label for _, label in exams], _LABELS, orient="row").write_csv(table)
    except OSError as error:
        raise VolumeError(
            f"cannot be written ({error.strerror}); check its space and its rights", file=folder
        ) from error
    write_manifest(pl.DataFrame([row for row, _ in exams], list(MANIFEST_COLUMNS), orient="row"), manifest)
    return PhantomSet(manifest, table)


_LABELS = ["case_id", "patient_id", "lesion", "side", "volume_mm3"]


def _write_exam(
    folder: Path, number: int, patient: _Patient, seed: int
) -> tuple[tuple[str, ...], tuple[str, str, int, str | None, float]]:
    """Writes image and mask of one exam; returns its rows of the manifest and of the labels."""
    case_id = f"phantom_{number:03d}"
    random = np.random.default_rng([seed, 1, number])
    hu, lesion, affine = _render(patient, random)
    order, flips = _FILE_ORDERS[0 if number == 0 else int(random.integers(len(_FILE_ORDERS)))]
    mask = folder / "masks" / f"{case_id}_mask.nii.gz"
    write_volume(mask, *_to_file_order(lesion.astype(np.uint8), affine, order, flips))
    if number == 0:
        image = folder / "volumes" / case_id
        _write_dicom_series(image, hu, affine, seed)
    else:
        image = folder / "volumes" / f"{case_id}.nii.gz"
        write_volume(image, *_to_file_order(hu, affine, order, flips))
    side = ("right" if patient.lesion[0] > 0 else "left") if patient.lesion else None
    volume_mm3 = round(float(lesion.sum()) * abs(float(np.linalg.det(affine[:3, :3]))), 1)
    return (
        (case_id, patient.patient_id, "ct", str(image), str(mask)),
        (case_id, patient.patient_id, int(patient.lesion is not None), side, volume_mm3),
    )


def _draw_exams(cases: int, seed: int) -> list[_Patient]:
    """The patient of every case; lesions and their sides are dealt out evenly before they are shuffled."""
    random = np.random.default_rng([seed, 0])
    patients = round(cases / (1 + SECOND_EXAMS))
    with_lesion = min(max(round(LESION_SHARE * patients), 2), patients - 1)
    sides = np.zeros(patients, dtype=int)
    sides[:with_lesion] = np.where(np.arange(with_lesion) % 2, 1, -1)
    random.shuffle(sides)
    chosen = [_make_patient(f"patient_{number:03d}", int(side), random) for number, side in enumerate(sides)]
    again = random.choice(patients, cases - patients, replace=False)
    exams = chosen + [chosen[number] for number in again]
    return [exams[number] for number in random.permutation(cases)]


def _make_patient(patient_id: str, side: int, random: np.random.Generator) -> _Patient:
    """``side`` is +1 for a lesion in the right lung, -1 for the left, 0 for none."""
    width = random.uniform(143, 149)
    lung = (width * random.uniform(0.34, 0.37), random.uniform(60, 68), random.uniform(85, 100))
    vessels = [_make_vessel(lung, width, side_, way, random) for side_ in (1, -1) for way in _VESSEL_WAYS]
    radius = float(np.exp(random.uniform(np.log(15), np.log(27))))
    direction = random.normal(size=3)
    direction *= random.uniform(0.1, 0.9) / np.linalg.norm(direction)
    place = np.array([side * width * 0.47, 5.0, 0.0]) + direction * (np.array([lung[0], lung[1], 36.0]) - radius * 0.7)
    return _Patient(
        patient_id=patient_id,
        body=(width, width * random.uniform(0.70, 0.74)),
        fat=random.uniform(9, 13),
        lung=lung,
        vessels=np.array(vessels),
        lesion=(float(place[0]), float(place[1]), float(place[2])) if side else None,
        lesion_radius=radius,
        lesion_hu=random.uniform(-250, 60),
    )


def _make_vessel(
    lung: tuple[float, float, float], width: float, side: int, way: tuple[float, ...], random: np.random.Generator
) -> tuple[float, ...]:
    """A tube from near the root of the lung outwards: start, end, radius."""
    root = np.array([side * width * 0.25, -5.0, 0.0]) + random.normal(size=3) * [2, 3, 5]
    direction = np.array(way) * [side, 1, 1] + random.normal(size=3) * 0.15
    end = np.array([side * width * 0.47, 5.0, 0.0]) + 0.8 * direction / np.linalg.norm(direction) * np.array(lung)
    return (*root, *end, random.uniform(1.5, 3.0))


def _render(patient: _Patient, random: np.random.Generator) -> tuple[Array, Array, Array]:
    """One exam in canonical order: int16 HU and bool lesion ``[slices height width]``, and the affine to RAS+ mm."""
    affine, shape, pose = _choose_grid(random)
    growth = random.uniform(0.9, 1.25)
    to_body = pose @ affine
    voxel_mm = float(np.abs(np.linalg.det(affine[:3, :3])) ** (1 / 3))
    index = np.ogrid[tuple(slice(length) for length in shape)]
    grid = tuple(
        (to_body[row, 0] * index[0] + to_body[row, 1] * index[1] + to_body[row, 2] * index[2] + to_body[row, 3]).astype(
            np.float32
        )
        for row in range(3)
    )
    hu = np.full(shape, AIR_HU, dtype=np.float32)
    _paint_body(hu, patient, grid, voxel_mm)
    paint = _Brush(hu, grid, np.linalg.inv(to_body), voxel_mm)
    for vessel in patient.vessels:
        paint.tube(vessel[:3], vessel[3:6], radius=float(vessel[6]), value=BLOOD_HU)
    lesion = np.zeros(shape, dtype=bool)
    if patient.lesion is not None:
        place, radius = np.array(patient.lesion), patient.lesion_radius * growth ** (1 / 3)
        paint.tube(place, place, radius=radius, value=patient.lesion_hu)
        lesion = sum((axis - centre) ** 2 for axis, centre in zip(grid, place, strict=True)) <= radius**2
    hu += random.normal(0, random.uniform(20, 24), shape).astype(np.float32)
    return np.rint(np.clip(hu, -1024, 3071)).astype(np.int16), lesion, affine


def _choose_grid(random: np.random.Generator) -> tuple[Array, tuple[int, int, int], Array]:
    """(affine of the canonical array to RAS+ mm, its shape, RAS+ mm to the body's own frame)."""
    shape = (int(random.integers(24, 33)), _SIDE, _SIDE)
    depth, height = random.uniform(3.6, 4.6), random.uniform(3.4, 3.6)
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-height, -height, depth])[:, ::-1]
    affine[:3, :3] = _rotation(random.normal(size=3) * (2.0 if random.uniform() < 0.5 else 0.0)) @ affine[:3, :3]
    centre = random.normal(size=3) * [2, 2, 2]
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    pose = np.eye(4)
    pose[:3, :3] = _rotation(random.normal(size=3) * 1.0)
    return affine, shape, pose


def _rotation(degrees: Array) -> Array:
    """Rotation by the given angle about each axis in turn, at most 8 degrees each."""
    rotation = np.eye(3)
    for axis, angle in enumerate(np.radians(np.clip(degrees, -8, 8))):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        rotation = turn @ rotation
    return rotation


def _paint_body(hu: Array, patient: _Patient, grid: tuple[Array, ...], voxel_mm: float) -> None:
    x, y, z = grid
    width, depth = patient.body
    _blend(hu, (1 - np.hypot(x / width, y / depth)) * depth, FAT_HU, voxel_mm)
    inner = np.hypot(x / (width - patient.fat), y / (depth - patient.fat))
    _blend(hu, (1 - inner) * (depth - patient.fat), MUSCLE_HU, voxel_mm)
    ribs = np.cos(10 * np.arctan2(y, x) + z / 9) > 0.6
    hu[(np.abs(inner - 0.93) < 0.035) & ribs] = BONE_HU
    for side in (1, -1):
        radii = patient.lung
        distance = np.sqrt(
            ((x - side * width * 0.47) / radii[0]) ** 2 + ((y - 5) / radii[1]) ** 2 + (z / radii[2]) ** 2
        )
        _blend(hu, (1 - distance) * radii[0], LUNG_HU, voxel_mm)
    heart = np.sqrt(((x + 18) / 48) ** 2 + ((y - 28) / 36) ** 2 + ((z + 25) / 48) ** 2)
    _blend(hu, (1 - heart) * 36, BLOOD_HU, voxel_mm)
    back = depth * 0.62
    _blend(hu, 17 - np.hypot(x, y + back), BONE_HU * 0.6, voxel_mm)
    _blend(hu, 6 - np.hypot(x, y + back + 16), 20.0, voxel_mm)
    _blend(hu, 12 - np.hypot(x + 22, y + back - 18), BLOOD_HU, voxel_mm)


@dataclass(frozen=True)
class _Brush:
    """Paints tubes into a volume; ``grid`` holds every voxel's x, y and z in the body's frame."""

    hu: Array
    grid: tuple[Array, ...]
    to_index: Array
    voxel_mm: float

    def tube(self, start: Array, end: Array, *, radius: float, value: float) -> None:
        """Paints a tube with round ends, a sphere where start and end agree, computing only in the box around it."""
        inside = self._box(start, end, radius + self.voxel_mm)
        offsets = [axis[inside] - place for axis, place in zip(self.grid, start, strict=True)]
        along = end - start
        length = float(along @ along)
        if length > 0:
            share = sum(offset * step for offset, step in zip(offsets, along, strict=True)) / length
            share = np.clip(share, 0, 1)
            offsets = [offset - share * step for offset, step in zip(offsets, along, strict=True)]
        distance = np.sqrt(sum(offset**2 for offset in offsets))
        _blend(self.hu[inside], radius - distance, value, self.voxel_mm)

    def _box(self, start: Array, end: Array, margin: float) -> tuple[slice, ...]:
        """The part of the array that holds everything within ``margin`` of the line; may be empty."""
        low, high = np.minimum(start, end) - margin, np.maximum(start, end) + margin
        corners = np.array(np.meshgrid(*zip(low, high, strict=True))).reshape(3, -1)
        places = self.to_index[:3, :3] @ corners + self.to_index[:3, 3:]
        first = np.clip(np.floor(places.min(axis=1)), 0, self.hu.shape).astype(int)
        last = np.clip(np.ceil(places.max(axis=1)) + 1, 0, self.hu.shape).astype(int)
        return tuple(slice(*pair) for pair in zip(first.tolist(), last.tolist(), strict=True))


def _blend(hu: Array, depth_mm: Array, value: float, voxel_mm: float) -> None:
    """Writes ``value`` in place where ``depth_mm`` below a surface is positive, mixed at the edge over one voxel."""
    share = np.clip(depth_mm / voxel_mm + 0.5, 0, 1).astype(np.float32)
    hu += share * (value - hu)


def _to_file_order(array: Array, affine: Array, order: tuple[int, ...], flips: tuple[bool, ...]) -> tuple[Array, Array]:
    """A canonical array and its affine in another file order; world positions stay."""
    turned = affine.copy()
    for axis, (canonical, flipped) in enumerate(zip(order, flips, strict=True)):
        turned[:, axis] = affine[:, canonical] * (-1 if flipped else 1)
        if flipped:
            turned[:, 3] += affine[:, canonical] * (array.shape[canonical] - 1)
    steps = tuple(slice(None, None, -1 if flipped else None) for flipped in flips)
    return np.ascontiguousarray(array.transpose(order)[steps]), turned


def _write_dicom_series(folder: Path, hu: Array, affine: Array, seed: int) -> None:
    """Writes a canonical array as a CT series, its files numbered out of order, as exports often are."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.dcm"):
        old.unlink()
    lps = affine.copy()
    lps[:2] *= -1
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    row, column = lps[:3, 2] / spacing[2], lps[:3, 1] / spacing[1]
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, position in enumerate(np.random.default_rng([seed, 2]).permutation(len(hu))):
        image = sitk.GetImageFromArray(hu[position : position + 1])
        image.SetSpacing(spacing[::-1].tolist())
        image.SetDirection(np.stack([row, column, np.cross(row, column)], axis=1).ravel().tolist())
        image.SetOrigin((lps[:3, 3] + position * lps[:3, 0]).tolist())
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"2.25.1{seed}.{position + 1}",
            "0008|0060": "CT",
            "0010|0010": "PHANTOM",
            "0020|000d": f"2.25.2{seed}",
            "0020|000e": f"2.25.3{seed}",
            "0020|0013": str(number),
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{number:03d}.dcm"))
        with quiet_itk():
            writer.Execute(image)

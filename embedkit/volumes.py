"""Owns images as volumes: every readable format in one orientation, masks on the same grid, and writing back.

Knows nothing of cases, manifests, planes and grey windows, and leaves what is particular to a format to
`embedkit.formats`, `embedkit.voxels` and `embedkit.dicom`.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from embedkit.dicom import check_dicom_series, read_dicom_series
from embedkit.dicomfolders import SeriesFolders
from embedkit.errors import StrayWarning, VolumeError
from embedkit.formats import format_by_name, image_format, read_header
from embedkit.itk import explain_itk_error, quiet_itk, to_itk
from embedkit.orientation import (
    canonical_axes,
    check_affine,
    measure_spacing,
    to_canonical,
    to_source,
    turn_canonical,
)
from embedkit.sourceimage import MAX_VOXELS, SourceImage, Stop
from embedkit.spill import allocate, is_spilled
from embedkit.voxels import read_voxels, whole_numbers

__all__ = [
    "MAX_VOXELS",
    "VOXEL_BYTES",
    "Volume",
    "canonical_axes",
    "check_volume",
    "image_format",
    "read_mask",
    "read_volume",
    "to_canonical",
    "to_source",
    "write_volume",
]

Array = np.ndarray[Any, Any]


VOXEL_BYTES = 64 << 20
"""Bytes of voxels that are kept in memory where there is a folder to keep more in."""

_SMALLEST_MM, _LARGEST_MM = 1e-6, 1e6


@dataclass(frozen=True, eq=False)
class Volume:
    """One grey 3D image, its array turned to the canonical index order.

    Canonical: axis 0 runs from inferior to superior, axis 1 from anterior to posterior, axis 2 from the patient's
    right to left, each as nearly as a permutation and flips of the file's axes allow (ITK calls it LPS). World
    coordinates are RAS+ mm: +x to the patient's right, +y to anterior, +z to superior.

    Attributes:
        array: ``[slices height width]`` of the file's values as uint8, int16, uint16, int32 or float32: C-contiguous,
            or the view of a temporary file, in the order of the image's own, that `read_volume` was told to keep it in.
        spacing_mm: Distance of neighbours along each axis of ``array``, rounded to float32 and six digits, so that
            one image read from DICOM and from NIfTI (whose header is float32) agrees.
        affine: float64 ``[4 4]``, (slice, row, column, 1) of ``array`` to RAS+ mm.
        source_shape: Shape of the file's own array, slowest axis first, as SimpleITK's GetArrayFromImage gives it.
        source_affine: float64 ``[4 4]``, indices of the file's own array to RAS+ mm.
        source_bytes: Bytes of the file or files.
        source_digest: SHA-256 in hex over the file's bytes; for a series, over its files in the order of their slices.
    """

    array: Array
    spacing_mm: tuple[float, float, float]
    affine: Array
    source_shape: tuple[int, int, int]
    source_affine: Array
    source_bytes: int
    source_digest: str


def read_volume(
    path: Path | str,
    *,
    spill: Path | None = None,
    most_bytes: int = VOXEL_BYTES,
    folders: SeriesFolders | None = None,
    stop: Stop = None,
) -> Volume:
    """Reads one 3D image, piece by piece.

    Args:
        path: A NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd) or numpy (.npy, .npz) file, a folder
            that holds one DICOM series, or any one file of a DICOM series (which gives the whole series). An .npz holds
            the image as ``array`` and optionally ``affine`` (indices to RAS+ mm); without one, and for .npy, the array
            is taken as canonical with 1 mm voxels.
        spill: Folder for a nameless temporary file that holds the voxels of a large image, so that few of them are in
            memory at a time; take its parts with `embedkit.spill`. None keeps all in memory.
        most_bytes: An image whose voxels take more is large.
        folders: Remembers the DICOM series of folders for further images that lie in them, and the damaged files in
            them of which no series can be told; None warns of these.
        stop: Once set, reading ends with an error, at the next piece.

    Returns:
        The volume. Values keep the file's type, except: bool to uint8; int8 to int16; wider integers to int32 where
        they fit; everything else, and whatever a NIfTI header rescales, to float32. A constant image and an image of
        one slice are volumes like any other. A trailing axis of length 1 is dropped. NIfTI places voxels by its sform
        where that has square corners, else by its qform, else by its voxel sizes alone (as ITK does).

    Raises:
        VolumeError: no such file, or one that is empty, truncated, damaged, not of the format that its name says or of
            none of these formats; not three axes; colours or vectors; NaN, infinite or complex values; a geometry
            that is singular, has skewed axes or is beyond 1e-6 to 1e6 mm; a promise of more voxels than the bytes
            could hold; all that `embedkit.dicom.read_dicom_series` refuses; and ``stop`` was set.
        CacheError: there is no room in ``spill``.

    Warns:
        StrayWarning: beside a DICOM series lies a damaged file of which no series can be told; nothing in the headers
            of the others says that they lack it.
    """
    path, looked = Path(path), folders or SeriesFolders()
    source = _read_source(path, image_format(path), spill=spill, most_bytes=most_bytes, folders=looked, stop=stop)
    if folders is None:
        _warn_of_strays(path, looked)
    _check_scale(path, source.affine)
    turn = turn_canonical if is_spilled(source.array) else to_canonical
    array, affine = turn(source.array, source.affine)
    depth, height, width = source.array.shape
    return Volume(
        array=array,
        spacing_mm=measure_spacing(affine),
        affine=affine,
        source_shape=(depth, height, width),
        source_affine=source.affine,
        source_bytes=source.source_bytes,
        source_digest=source.source_digest,
    )


def check_volume(path: Path | str) -> None:
    """Checks by headers alone that `read_volume` has a chance.

    Raises:
        VolumeError: as for `read_volume`, except what only the voxels show.
    """
    path = Path(path)
    kind = image_format(path)
    if kind == "dicom":
        check_dicom_series(SeriesFolders().find(path))
    else:
        read_header(path, kind)


def read_mask(path: Path | str, like: Volume) -> Array:
    """Reads a mask of whole-number labels onto the grid of an image.

    Args:
        path: As for `read_volume`. A mask without geometry (.npy) must have the shape of the image's own file and is
            laid over it voxel by voxel.
        like: The image that the mask belongs to.

    Returns:
        int32 ``[slices height width]`` of ``like.array``'s shape: the nearest label in world coordinates, 0 where the
        mask does not reach.

    Raises:
        VolumeError: the file cannot be read; values are not whole numbers; a mask without geometry has another shape
            than the image; no labelled voxel falls inside the image.
    """
    path = Path(path)
    kind = image_format(path)
    folders = SeriesFolders()
    source = _read_source(path, kind, folders=folders)
    _warn_of_strays(path, folders)
    labels = whole_numbers(path, source.array)
    if kind == "npy":
        if labels.shape != like.source_shape:
            raise VolumeError(
                f"a mask without geometry of shape {labels.shape}, but its image has {like.source_shape}; "
                "save the mask as NIfTI, or with the image's shape",
                file=path,
            )
        return to_canonical(labels, like.source_affine)[0]
    mask, affine = to_canonical(labels, source.affine)
    if mask.shape == like.array.shape and np.allclose(affine, like.affine, atol=1e-3 * min(like.spacing_mm)):
        return mask
    resampled = _resample_nearest(mask, affine, like)
    if mask.any() and not resampled.any():
        raise VolumeError(
            "every labelled voxel of the mask lies outside its image; check that both are of the same patient "
            "and that neither lost its origin",
            file=path,
        )
    return resampled


def write_volume(path: Path | str, array: Array, affine: Array) -> None:
    """Writes an image so that the file is either whole or not there.

    Args:
        path: Ends in .nii, .nii.gz, .nrrd, .mha, .npy or .npz; an existing file is replaced.
        array: ``[slices height width]`` in the order of the file (see `to_source`).
        affine: ``[4 4]``, (slice, row, column, 1) of ``array`` to RAS+ mm; an .npy keeps none.

    Raises:
        VolumeError: another ending, not three axes, a type that the format lacks, or the file cannot be written.
    """
    path = Path(path)
    if array.ndim != 3:
        raise VolumeError(f"cannot write an array of {array.ndim} axes; expected [slices height width]", file=path)
    kind, suffix = format_by_name(path)
    if kind in ("", "dicom") or suffix in (".nhdr", ".mhd"):
        raise VolumeError("cannot write this format; name it .nii.gz, .nii, .nrrd, .mha, .npy or .npz", file=path)
    check_affine(path, affine)
    values = array.astype(np.uint8) if array.dtype == bool else array
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder, quiet_itk():
            temporary = Path(folder) / path.name
            if kind == "npy":
                np.save(temporary, values)
            elif kind == "npz":
                np.savez_compressed(temporary, array=values, affine=affine)
            else:
                sitk.WriteImage(to_itk(values, affine), str(temporary), useCompression=True)
            temporary.replace(path)
    except (OSError, RuntimeError, TypeError, NotImplementedError) as error:
        reason = explain_itk_error(error) if isinstance(error, RuntimeError) else str(error)
        raise VolumeError(
            f"cannot be written ({reason}); check the folder, its space and its rights", file=path
        ) from error


def _read_source(
    path: Path,
    kind: str,
    *,
    folders: SeriesFolders,
    spill: Path | None = None,
    most_bytes: int = VOXEL_BYTES,
    stop: Stop = None,
) -> SourceImage:
    """The image as its file holds it, its values and geometry checked; ``kind`` is what `image_format` gave."""

    def place(shape: tuple[int, ...], dtype: np.dtype[Any], /) -> Array:
        return allocate(shape, dtype, folder=spill, most_bytes=most_bytes, what=f"voxels of {path.name}")

    if kind == "dicom":
        return read_dicom_series(folders.find(path, stop=stop), place, stop=stop)
    return read_voxels(path, kind, read_header(path, kind), place, stop=stop)


def _warn_of_strays(path: Path, folders: SeriesFolders) -> None:
    for strays in folders.take_looks().values():
        for stray in chain.from_iterable(strays):
            warnings.warn(f"{stray.path}, which lies beside {path}: {stray.reason}", StrayWarning, stacklevel=3)


def _check_scale(path: Path, affine: Array) -> None:
    """Refuses voxels of no physical size and places beyond the float32 in which positions are kept."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if lengths.min() < _SMALLEST_MM or np.abs(affine[:3]).max() > _LARGEST_MM:
        raise VolumeError(
            f"its voxels measure {lengths.tolist()} mm from {affine[:3, 3].tolist()} mm on, expected lengths"
            f" between {_SMALLEST_MM:g} and {_LARGEST_MM:g} mm; repair the header",
            file=path,
        )


def _resample_nearest(mask: Array, affine: Array, like: Volume) -> Array:
    target = to_itk(np.zeros((1, 1, 1), np.uint8), like.affine)
    moved = sitk.Resample(
        to_itk(mask, affine),
        like.array.shape[::-1],
        sitk.Transform(),
        sitk.sitkNearestNeighbor,
        target.GetOrigin(),
        target.GetSpacing(),
        target.GetDirection(),
        0,
    )
    resampled: Array = sitk.GetArrayFromImage(moved)
    return resampled

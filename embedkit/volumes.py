"""Owns images as volumes: every readable format in one orientation, masks on the same grid, and writing back.

Refuses to know cases, manifests, planes and grey windows. SimpleITK reads NRRD, MetaImage and (in `embedkit.dicom`)
DICOM. NIfTI is decoded here, because ITK fills the voxels of a truncated file with zeros, does not check the gzip
checksum, and takes the spacing of a contradictory header from the wrong field, each without an error.
"""

# SimpleITK ships half-typed wrappers.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import hashlib
import io
import lzma
import math
import re
import struct
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813

from embedkit.dicom import (
    MAX_VOXELS,
    DicomSeries,
    SourceImage,
    check_dicom_series,
    explain_itk_error,
    list_dicom_series,
    quiet_itk,
    read_dicom_series,
)
from embedkit.errors import VolumeError

__all__ = [
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

_INFLATION = 1032  # deflate never expands more than this (zlib technical details, "Maximum Compression Factor")
_SHEAR_DEGREES = 0.5
# What zlib and zipfile raise on damaged bytes (zipfile RuntimeError for a flag of encryption or an unknown method).
_DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    UnicodeDecodeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


@dataclass(frozen=True, eq=False)
class Volume:
    """One grey 3D image, its array turned to the canonical index order.

    Canonical: axis 0 runs from inferior to superior, axis 1 from anterior to posterior, axis 2 from the patient's
    right to left, each as nearly as a permutation and flips of the file's axes allow (ITK calls it LPS). World
    coordinates are RAS+ mm: +x to the patient's right, +y to anterior, +z to superior.

    Attributes:
        array: ``[slices height width]``, C-contiguous, of the file's values as uint8, int16, uint16, int32 or float32.
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


class _Header(NamedTuple):
    """What a file's header says: enough to know the size of the voxels before any is read."""

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    affine: Array
    offset: int = 0
    slope: float = 1.0
    intercept: float = 0.0
    fortran_order: bool = False
    member: str = ""  # of an npz archive
    payload: Path | None = None  # file of the voxels, where it is not the header's own
    zlib_stream: bool = False  # voxels are one zlib stream from ``offset`` on


def read_volume(path: Path | str) -> Volume:
    """Reads one 3D image.

    Args:
        path: A NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd) or numpy (.npy, .npz) file, a folder
            that holds one DICOM series, or any one file of a DICOM series (which gives the whole series). An .npz holds
            the image as ``array`` and optionally ``affine`` (indices to RAS+ mm); without one, and for .npy, the array
            is taken as canonical with 1 mm voxels.

    Returns:
        The volume. Values keep the file's type, except: bool to uint8; int8 to int16; wider integers to int32 where
        they fit; everything else, and whatever a NIfTI header rescales, to float32. A constant image and an image of
        one slice are volumes like any other. A trailing axis of length 1 is dropped. NIfTI places voxels by its sform
        where that has square corners, else by its qform, else by its voxel sizes alone (as ITK does).

    Raises:
        VolumeError: no such file, or one that is empty, truncated, damaged, not of the format that its name says or of
            none of these formats; not three axes; colours or vectors; NaN, infinite or complex values; a geometry
            that is singular or has skewed axes; a promise of more voxels than the bytes could hold; and all that
            `embedkit.dicom.read_dicom_series` refuses.
    """
    path = Path(path)
    source = _read_source(path, image_format(path))
    array, affine = to_canonical(source.array, source.affine)
    depth, height, width = source.array.shape
    return Volume(
        array=array,
        spacing_mm=_spacing(affine),
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
        check_dicom_series(_find_series(path))
    else:
        _read_header(path, kind)


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
    source = _read_source(path, kind)
    labels = _whole_numbers(path, source.array)
    if kind == "npy":
        if labels.shape != like.source_shape:
            raise VolumeError(
                f"{path}: a mask without geometry of shape {labels.shape}, but its image has {like.source_shape}; "
                "save the mask as NIfTI, or with the image's shape"
            )
        return to_canonical(labels, like.source_affine)[0]
    mask, affine = to_canonical(labels, source.affine)
    if mask.shape == like.array.shape and np.allclose(affine, like.affine, atol=1e-3 * min(like.spacing_mm)):
        return mask
    resampled = _resample_nearest(mask, affine, like)
    if mask.any() and not resampled.any():
        raise VolumeError(
            f"{path}: every labelled voxel of the mask lies outside its image; check that both are of the same patient "
            "and that neither lost its origin"
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
        raise VolumeError(f"{path}: cannot write an array of {array.ndim} axes; expected [slices height width]")
    kind, suffix = _format_by_name(path)
    if kind in ("", "dicom") or suffix in (".nhdr", ".mhd"):
        raise VolumeError(f"{path}: cannot write this format; name it .nii.gz, .nii, .nrrd, .mha, .npy or .npz")
    _check_affine(path, affine)
    values = array.astype(np.uint8) if array.dtype == bool else array
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder, quiet_itk():
            temporary = Path(folder) / path.name
            if kind == "npy":
                np.save(temporary, values)
            elif kind == "npz":
                np.savez_compressed(temporary, array=values, affine=affine)
            else:
                sitk.WriteImage(_to_itk(values, affine), str(temporary), useCompression=True)
            temporary.replace(path)
    except (OSError, RuntimeError, TypeError, NotImplementedError) as error:
        reason = explain_itk_error(error) if isinstance(error, RuntimeError) else str(error)
        raise VolumeError(
            f"{path}: cannot be written ({reason}); check the folder, its space and its rights"
        ) from error


# ---- orientation: pure functions of an affine ----


def canonical_axes(affine: Array) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """How an array is turned to the canonical index order (see `Volume`).

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
    """An array in canonical index order, C-contiguous and writable, and its affine; world positions stay.

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
    return np.require(turned, requirements=["C", "W"]), np.asarray(affine, dtype=np.float64) @ turn


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


def _spacing(affine: Array) -> tuple[float, float, float]:
    depth, height, width = (float(f"{np.float32(length):.6g}") for length in np.linalg.norm(affine[:3, :3], axis=0))
    return depth, height, width


def _default_affine(depth_mm: float = 1.0, height_mm: float = 1.0, width_mm: float = 1.0) -> Array:
    """Indices of an array that is canonical already to RAS+ mm, voxel (0, 0, 0) at the origin."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = depth_mm, -height_mm, -width_mm, 1.0
    return affine


def _has_square_corners(affine: Array) -> bool:
    """Whether an affine is finite, regular and its axes meet at right angles."""
    directions = affine[:3, :3]
    lengths = np.linalg.norm(directions, axis=0)
    if not np.isfinite(affine).all() or lengths.min() == 0:
        return False
    cosines = (directions / lengths).T @ (directions / lengths) - np.eye(3)
    return bool(np.abs(cosines).max() <= math.sin(math.radians(_SHEAR_DEGREES)))


def _check_affine(path: Path, affine: Array) -> None:
    if affine.shape != (4, 4) or not np.array_equal(affine[3], [0, 0, 0, 1]):
        raise VolumeError(f"{path}: its affine is {affine.tolist()}, expected [4 4] with 0 0 0 1 as the last row")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or lengths.min() == 0:
        raise VolumeError(
            f"{path}: its geometry is singular (voxel sizes {np.round(lengths, 6).tolist()} mm), expected three "
            "independent axes of positive size; repair the header"
        )
    if not _has_square_corners(affine):
        raise VolumeError(
            f"{path}: its axes are skewed, expected right angles to within {_SHEAR_DEGREES} degrees; resample it to a "
            "grid with square corners"
        )


# ---- to and from ITK ----


def _affine_of_itk(image: sitk.Image | sitk.ImageFileReader) -> Array:
    """Indices of the array of an ITK image, slowest axis first, to RAS+ mm; axes beyond the third are left out."""
    axes = image.GetDimension()
    direction = np.array(image.GetDirection()).reshape(axes, axes)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = (direction * np.array(image.GetSpacing())[:3])[:, ::-1]
    affine[:3, 3] = np.array(image.GetOrigin())[:3]
    affine[:2] *= -1  # LPS+ to RAS+
    return affine


def _to_itk(array: Array, affine: Array) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    lps = np.array(affine, dtype=np.float64)
    lps[:2] *= -1
    directions = lps[:3, 2::-1]
    lengths = np.linalg.norm(directions, axis=0)
    image.SetSpacing(lengths.tolist())
    image.SetDirection((directions / lengths).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def _resample_nearest(mask: Array, affine: Array, like: Volume) -> Array:
    target = _to_itk(np.zeros((1, 1, 1), np.uint8), like.affine)
    moved = sitk.Resample(
        _to_itk(mask, affine),
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


# ---- formats ----

_SUFFIXES = {
    ".nii.gz": "nifti",
    ".nii": "nifti",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".mha": "metaimage",
    ".mhd": "metaimage",
    ".npy": "npy",
    ".npz": "npz",
    ".dcm": "dicom",
    ".dicom": "dicom",
    ".ima": "dicom",
}


def image_format(path: Path | str) -> str:
    """The format of an image file by its name and its first bytes: nifti, nrrd, metaimage, npy, npz or dicom.

    A folder counts as dicom.

    Raises:
        VolumeError: no such file, an empty or unreadable one, a format that embedkit does not read, or content that
            is not what the name says.
    """
    path = Path(path)
    if path.is_dir():
        return "dicom"
    head = _read_head(path)
    named, suffix = _format_by_name(path)
    held, proper = _format_by_content(head)
    if named and held and (named != held or (named == "nifti" and (suffix == ".nii.gz") != (proper == ".nii.gz"))):
        raise VolumeError(f"{path}: is named {suffix} but holds {held} data; rename it to {proper}")
    if not named and held and held != "dicom":
        raise VolumeError(f"{path}: holds {held} data under an unknown ending; rename it to {proper}")
    kind = named or held
    if not kind:
        raise VolumeError(
            f"{path}: not a format that embedkit reads; expected .nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd, .npy, .npz "
            "or DICOM"
        )
    if not held and kind != "dicom":
        raise VolumeError(f"{path}: is named {suffix} but does not begin like one; it is damaged or of another format")
    return kind


def _format_by_name(path: Path) -> tuple[str, str]:
    name = path.name.lower()
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")
    return _SUFFIXES.get(suffix, ""), suffix


def _format_by_content(head: bytes) -> tuple[str, str]:
    """(format, proper ending) that the first bytes show; empty where they show none."""
    if head.startswith(b"\x1f\x8b"):
        return "nifti", ".nii.gz"
    if _nifti_byte_order(head):
        return "nifti", ".nii"
    if head.startswith(b"NRRD000"):
        return "nrrd", ".nrrd"
    if head.startswith(b"\x93NUMPY"):
        return "npy", ".npy"
    if head.startswith(b"PK\x03\x04"):
        return "npz", ".npz"
    if head[128:132] == b"DICM":
        return "dicom", ".dcm"
    if re.search(rb"^\s*NDims\s*=", head, re.MULTILINE):
        return "metaimage", ".mha"
    return "", ""


def _read_head(path: Path, size: int = 2**16) -> bytes:
    try:
        with path.open("rb") as stream:
            head = stream.read(size)
    except FileNotFoundError as error:
        raise VolumeError(
            f"{path}: no such file or folder; a path in a manifest is relative to the manifest's folder"
        ) from error
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read ({error.strerror}); check its rights") from error
    if not head:
        raise VolumeError(f"{path}: is empty (0 bytes); copy the file again")
    return head


def _find_series(path: Path) -> DicomSeries:
    """The series of a folder that holds just one, or the series that a file belongs to."""
    folder = path if path.is_dir() else path.parent
    series = list_dicom_series(folder)
    if path != folder:
        found = [one for one in series if path in one.files]
        if not found:
            raise VolumeError(f"{path}: no DICOM image; give an image file of the series, or its folder")
        return found[0]
    if not series:
        raise VolumeError(f"{path}: holds no DICOM image directly; give the folder in which the series' files lie")
    if len(series) > 1:
        names = ", ".join(f"{one.files[0].name} ({one.modality}, {len(one.files)} files)" for one in series[:5])
        raise VolumeError(
            f"{path}: holds {len(series)} DICOM series, expected one; give one file of it instead: {names}"
        )
    return series[0]


def _read_source(path: Path, kind: str) -> SourceImage:
    """The image as its file holds it, its values and geometry checked; ``kind`` is what `image_format` gave."""
    if kind == "dicom":
        return read_dicom_series(_find_series(path))
    header = _read_header(path, kind)
    try:
        raw = path.read_bytes()
        payload = header.payload.read_bytes() if header.payload else b""
        array = _read_voxels(path, kind, header, raw, payload)
    except _DAMAGE as error:
        raise VolumeError(f"{path}: damaged or unreadable ({error}); copy the file again") from error
    digest = hashlib.sha256(raw)
    digest.update(payload)
    return SourceImage(_grey_values(path, array), header.affine, len(raw) + len(payload), digest.hexdigest())


def _read_header(path: Path, kind: str) -> _Header:
    """The header of any format but DICOM; the size that it promises and its geometry are checked."""
    try:
        size = path.stat().st_size
        packed = False
        if kind == "nifti":
            head = _read_head(path)
            packed = head.startswith(b"\x1f\x8b")
            header = _parse_nifti(path, _inflate_head(head) if packed else head)
            available = size if packed else size - header.offset
        elif kind == "npy":
            header, available = _parse_npy(path)
        elif kind == "npz":
            header, available = _parse_npz(path)
        else:
            header, available, packed = _parse_with_itk(path, kind)
    except _DAMAGE as error:
        raise VolumeError(f"{path}: damaged or unreadable ({error}); copy the file again") from error
    _check_promise(path, header, available, packed=packed)
    _check_affine(path, header.affine)
    return header


def _check_promise(path: Path, header: _Header, available: int, *, packed: bool) -> None:
    """Refuses a header that promises more voxels than the bytes that follow it can hold."""
    voxels = math.prod(header.shape)
    if min(header.shape) < 1:
        raise VolumeError(f"{path}: has shape {header.shape}, expected at least one voxel along each axis")
    if voxels > MAX_VOXELS:
        raise VolumeError(
            f"{path}: its header promises {header.shape} = {voxels} voxels, more than {MAX_VOXELS}; the header is "
            "damaged, or the image must be cropped first"
        )
    needed = voxels * header.dtype.itemsize
    if needed > available * (_INFLATION if packed else 1):
        raise VolumeError(
            f"{path}: its header promises {needed} bytes of voxels but the file holds {max(available, 0)}"
            f"{' compressed' if packed else ''}; it is truncated: copy the file again"
        )


def _grey_shape(path: Path, shape: tuple[int, ...], *, trailing: int) -> tuple[int, int, int]:
    """Three axes; an axis of length 1 beyond the third, at index ``trailing`` (0 or -1), is dropped."""
    axes = list(shape)
    while len(axes) > 3 and axes[trailing] == 1:
        axes.pop(trailing)
    if len(axes) > 3:
        raise VolumeError(
            f"{path}: has {len(axes)} axes {tuple(axes)}, expected one grey 3D image; save each time point or channel "
            "as a file of its own"
        )
    if len(axes) < 3:
        raise VolumeError(f"{path}: has {len(axes)} axes {tuple(axes)}, expected 3; save a slice as a volume of one")
    return axes[0], axes[1], axes[2]


def _read_voxels(path: Path, kind: str, header: _Header, raw: bytes, payload: bytes) -> Array:
    if kind in ("nrrd", "metaimage"):
        if header.zlib_stream:  # ITK gives garbage for a damaged stream
            _inflate(path, (payload or raw)[header.offset :], math.prod(header.shape) * header.dtype.itemsize, 15)
        try:
            with quiet_itk():
                image = sitk.ReadImage(str(path), imageIO=_ITK_READERS[kind])
        except RuntimeError as error:
            raise VolumeError(f"{path}: cannot be read ({explain_itk_error(error)}); copy the file again") from error
        voxels: Array = sitk.GetArrayFromImage(image).reshape(header.shape)
        return voxels
    if kind == "npz":
        with zipfile.ZipFile(path) as archive:
            raw = archive.read(header.member)
    elif raw.startswith(b"\x1f\x8b"):
        raw = _inflate(path, raw, header.offset + math.prod(header.shape) * header.dtype.itemsize, 31)
    values = np.frombuffer(raw, header.dtype, math.prod(header.shape), header.offset)
    array = values.reshape(header.shape, order="F" if header.fortran_order else "C")
    if header.slope != 1.0 or header.intercept != 0.0:
        array = np.multiply(array, header.slope, dtype=np.float64) + header.intercept
    return array


def _inflate_head(head: bytes) -> bytes:
    """The first kilobyte of a gzip file from its first bytes; less where they end early."""
    start = b""
    while head and len(start) < 1024:
        stream = zlib.decompressobj(31)
        start += stream.decompress(head, 1024)
        head = stream.unused_data
    return start


def _inflate(path: Path, data: bytes, needed: int, window: int) -> bytes:
    """The first ``needed`` bytes of a gzip (``window`` 31) or zlib (15) stream; the rest is read for its checksum only.

    Raises:
        VolumeError: the stream ends early.
        zlib.error: the stream is damaged.
    """
    parts: list[bytes] = []
    have = 0
    while True:
        stream = zlib.decompressobj(window)
        while not stream.eof:
            part = stream.decompress(data, max(needed - have, 2**20))
            data = stream.unconsumed_tail
            if have < needed:
                parts.append(part)
            have += len(part)
            if not part and not stream.eof and not data:
                raise VolumeError(
                    f"{path}: its compressed data end after {have} of {needed} bytes; it is truncated: copy the file "
                    "again"
                )
        data = stream.unused_data
        if have >= needed:
            return parts[0] if len(parts) == 1 else b"".join(parts)
        if not data:
            raise VolumeError(
                f"{path}: its compressed data hold {have} bytes, its header promises {needed}; it is truncated: copy "
                "the file again"
            )


# ---- NIfTI (nifti1.h and nifti2.h of the NIfTI Data Format Working Group) ----

_NIFTI_TYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
_NIFTI_OTHER_TYPES = {32: "complex", 1792: "complex", 128: "colour (RGB)", 2304: "colour (RGBA)"}


def _nifti_byte_order(head: bytes) -> str:
    """``<`` or ``>`` where a NIfTI-1 or NIfTI-2 header of one file begins, else empty."""
    for order in "<>":
        if head[:4] == struct.pack(f"{order}i", 348) and head[344:347] == b"n+1":
            return order
        if head[:4] == struct.pack(f"{order}i", 540) and head[4:7] == b"n+2":
            return order
    return ""


def _parse_nifti(path: Path, head: bytes) -> _Header:
    order = _nifti_byte_order(head)
    if not order or (len(head) < 540 and head[4:7] == b"n+2"):
        raise VolumeError(f"{path}: holds no NIfTI header; it is damaged, or an image of another format")
    second = head[4:7] == b"n+2"

    def fields(layout: str, first_at: int, second_at: int, wide: str = "") -> tuple[Any, ...]:
        return struct.unpack_from(
            order + (wide or layout if second else layout), head, second_at if second else first_at
        )

    dim = fields("8h", 40, 16, "8q")
    (code,) = fields("h", 70, 12)
    pixdim = fields("8f", 76, 104, "8d")
    offset, slope, intercept = fields("3f", 108, 168, "q2d")
    if code not in _NIFTI_TYPES:
        kind = _NIFTI_OTHER_TYPES.get(code, "unknown")
        raise VolumeError(
            f"{path}: its values are {kind} (NIfTI datatype {code}), expected one real number per voxel; convert it"
        )
    if not 1 <= dim[0] <= 7:
        raise VolumeError(f"{path}: its header says {dim[0]} axes, expected 3; the header is damaged")
    shape = _grey_shape(path, tuple(int(length) for length in dim[dim[0] : 0 : -1]), trailing=0)
    codes = fields("2h", 252, 344, "2i")
    rows = np.array(fields("12f", 280, 400, "12d")).reshape(3, 4)
    affine = _nifti_affine(pixdim, codes, fields("6f", 256, 352, "6d"), rows)
    scaled = np.isfinite([slope, intercept]).all() and (slope, intercept) != (0.0, 0.0)
    return _Header(
        shape=shape,
        dtype=np.dtype(order + _NIFTI_TYPES[code]),
        affine=affine[:, [2, 1, 0, 3]],
        offset=max(int(offset) if math.isfinite(offset) else 0, 540 if second else 348),
        slope=(slope or 1.0) if scaled else 1.0,
        intercept=intercept if scaled else 0.0,
    )


def _nifti_affine(
    pixdim: tuple[float, ...], codes: tuple[int, ...], quaternion: tuple[float, ...], rows: Array
) -> Array:
    """(i, j, k, 1) to RAS+ mm by sform, qform or voxel sizes, whichever first is set and has square corners."""
    sform = np.vstack([rows, [0.0, 0.0, 0.0, 1.0]])
    if codes[1] > 0 and _has_square_corners(sform):
        return sform
    if codes[0] > 0:
        b, c, d = quaternion[:3]
        a = math.sqrt(max(0.0, 1.0 - (b * b + c * c + d * d)))
        rotation = np.array(
            [
                [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
            ]
        )
        sizes = np.abs(pixdim[1:4]) * np.array([1.0, 1.0, -1.0 if pixdim[0] < 0 else 1.0])
        affine = np.eye(4)
        affine[:3, :3] = rotation * sizes
        affine[:3, 3] = quaternion[3:]
        return affine
    if codes[1] > 0:
        return sform
    return _default_affine(*np.abs(pixdim[3:0:-1]).tolist())[:, [2, 1, 0, 3]]


# ---- NRRD and MetaImage through ITK ----

_ITK_READERS = {"nrrd": "NrrdImageIO", "metaimage": "MetaImageIO"}


def _parse_with_itk(path: Path, kind: str) -> tuple[_Header, int, bool]:
    """(header, bytes that hold the voxels, whether they are compressed)."""
    offset, encoding, data_file = _parse_text_header(path, kind, _read_head(path))
    payload = None if data_file is None else _payload_file(path, data_file)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_ITK_READERS[kind])
    reader.SetFileName(str(path))
    try:
        with quiet_itk():
            reader.ReadImageInformation()
            type_name = sitk.GetPixelIDValueAsString(reader.GetPixelID())
            affine = _affine_of_itk(reader)
    except RuntimeError as error:
        raise VolumeError(f"{path}: cannot be read ({explain_itk_error(error)}); check its header") from error
    if reader.GetNumberOfComponents() != 1 or type_name not in _ITK_TYPES:
        raise VolumeError(
            f"{path}: its values are {type_name} with {reader.GetNumberOfComponents()} components, expected one real "
            "number per voxel; convert it"
        )
    size: tuple[int, ...] = reader.GetSize()
    header = _Header(
        shape=_grey_shape(path, size[::-1], trailing=0),
        dtype=np.dtype(_ITK_TYPES[type_name]),
        affine=affine,
        offset=0 if payload else offset,
        payload=payload,
        zlib_stream=kind == "metaimage" and encoding == "compressed",
    )
    file = payload or path
    return header, file.stat().st_size - header.offset, encoding == "compressed"


_ITK_TYPES = {
    "8-bit unsigned integer": "u1",
    "8-bit signed integer": "i1",
    "16-bit unsigned integer": "u2",
    "16-bit signed integer": "i2",
    "32-bit unsigned integer": "u4",
    "32-bit signed integer": "i4",
    "64-bit unsigned integer": "u8",
    "64-bit signed integer": "i8",
    "32-bit float": "f4",
    "64-bit float": "f8",
}


def _parse_text_header(path: Path, kind: str, head: bytes) -> tuple[int, str, str | None]:
    """(bytes of the header, ``raw`` or ``compressed``, name of the file of the voxels or None for this one)."""
    if kind == "nrrd":
        end = re.search(rb"\r?\n\r?\n", head)
        fields = dict(
            re.findall(rb"^([A-Za-z][A-Za-z ]*):[ \t]*([^\r\n]*)", head[: end.start() if end else None], re.M)
        )
        named = fields.get(b"data file", fields.get(b"datafile"))
        encoding = "raw" if fields.get(b"encoding", b"raw").strip().lower() == b"raw" else "compressed"
    else:
        end = re.search(rb"^\s*ElementDataFile\s*=[^\n]*\n?", head, re.M)
        fields = dict(re.findall(rb"^\s*(\w+)\s*=[ \t]*([^\r\n]*)", head[: end.end() if end else None], re.M))
        named = fields.get(b"ElementDataFile", b"").strip()
        named = None if named.upper() == b"LOCAL" else named
        encoding = "compressed" if fields.get(b"CompressedData", b"").strip().lower() == b"true" else "raw"
    if named == b"" or (end is None and named is None):
        raise VolumeError(f"{path}: its header does not end; the file is truncated or damaged: copy it again")
    return (end.end() if end else 0), encoding, None if named is None else named.decode("utf-8", "replace").strip()


def _payload_file(path: Path, name: str) -> Path:
    """The file that a header names for its voxels; only a single one in the header's own folder is read."""
    if name.split(" ", 1)[0].upper() == "LIST" or "%" in name:
        raise VolumeError(f"{path}: spreads its voxels over several files ({name}); save it as one .nrrd or .mha file")
    if not name.isprintable():
        raise VolumeError(f"{path}: names {name!r} for its voxels; the header is damaged: copy the file again")
    file = path.parent / name
    if file.resolve().parent != path.parent.resolve():
        raise VolumeError(
            f"{path}: names {name} for its voxels, which lies outside its own folder and is not read; save the image "
            "as one .nrrd or .mha file"
        )
    if not file.is_file():
        raise VolumeError(f"{path}: names {name} for its voxels, which is missing; copy both files")
    return file


# ---- numpy ----


def _parse_npy(path: Path) -> tuple[_Header, int]:
    with path.open("rb") as stream:
        shape, fortran_order, dtype, offset = _parse_npy_header(path, stream)
    header = _Header(
        shape=_grey_shape(path, shape, trailing=-1),
        dtype=dtype,
        affine=_default_affine(),
        offset=offset,
        fortran_order=fortran_order,
    )
    return header, path.stat().st_size - offset


def _parse_npz(path: Path) -> tuple[_Header, int]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        images = [name for name in names if name != "affine.npy"]
        if len(images) != 1 or len(set(names)) < len(names):
            raise VolumeError(
                f"{path}: holds {', '.join(names)}; expected one array, named array, and at most an affine"
            )
        with archive.open(images[0]) as stream:
            shape, fortran_order, dtype, offset = _parse_npy_header(path, stream)
        affine = _default_affine()
        if "affine.npy" in names:
            if archive.getinfo("affine.npy").file_size > 4096:
                raise VolumeError(f"{path}: its affine is not [4 4]; save it as such")
            affine = _parse_small_array(path, archive.read("affine.npy"))
        available = archive.getinfo(images[0]).file_size - offset
    shape = _grey_shape(path, shape, trailing=-1)
    return _Header(shape, dtype, affine, offset, fortran_order=fortran_order, member=images[0]), available


def _parse_small_array(path: Path, content: bytes) -> Array:
    try:
        return np.asarray(np.lib.format.read_array(io.BytesIO(content), allow_pickle=False), dtype=np.float64)
    except ValueError as error:
        raise VolumeError(f"{path}: its affine cannot be read ({error}); save it as float64 [4 4]") from error


def _parse_npy_header(path: Path, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(stream)
    except ValueError as error:
        raise VolumeError(f"{path}: its header is damaged ({error}); save the array again") from error
    if dtype.kind not in "biuf":
        raise VolumeError(f"{path}: holds values of type {dtype}, expected real numbers; save it as such")
    return shape, fortran_order, dtype, stream.tell()


# ---- values ----


def _grey_values(path: Path, array: Array) -> Array:
    """The array as one of the types of a `Volume`; refuses values that are no finite numbers."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "b":
        array = array.astype(np.uint8)
    elif kind == "i" and size == 1:
        array = array.astype(np.int16)
    elif (kind == "i" and size > 4) or (kind == "u" and size >= 4):
        low, high = int(array.min()), int(array.max())
        array = array.astype(np.int32 if low >= -(2**31) and high < 2**31 else np.float32)
    elif kind == "f" and size != 4:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind == "f":
        wrong = array.size - int(np.count_nonzero(np.isfinite(array)))
        if wrong:
            raise VolumeError(
                f"{path}: {wrong} of {array.size} values are NaN or infinite (or too large for float32), expected "
                "finite numbers; repair or fill them first"
            )
    return array


def _whole_numbers(path: Path, array: Array) -> Array:
    if array.dtype.kind == "f":
        rounded = np.rint(array)
        wrong = int(np.count_nonzero(np.abs(array - rounded) > 1e-3))
        if wrong:
            raise VolumeError(
                f"{path}: {wrong} of {array.size} values are not whole numbers, expected a label per voxel; threshold "
                "the mask first"
            )
        array = rounded
    return array.astype(np.int32)

"""Owns voxel values: taking them out of a file of any format but DICOM, and which values and types are accepted.

Knows nothing of orientation, and takes size, type and place of the voxels from a header that others have checked.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from embedkit.errors import VolumeError
from embedkit.itk import explain_itk_error, quiet_itk
from embedkit.nrrd import ITK_READERS
from embedkit.sourceimage import DAMAGE, SourceHeader, SourceImage

__all__ = ["read_voxels", "whole_numbers"]

Array = np.ndarray[Any, Any]


def read_voxels(path: Path, kind: str, header: SourceHeader) -> SourceImage:
    """The image as its file holds it, its values checked.

    Args:
        path: A file of any format but DICOM.
        kind: What `embedkit.formats.image_format` gave for it.
        header: What `embedkit.formats.read_header` gave for it.

    Raises:
        VolumeError: the file is truncated, damaged or unreadable, or holds values that are no finite numbers.
    """
    try:
        raw = path.read_bytes()
        payload = header.payload.read_bytes() if header.payload else b""
        array = _decode_voxels(path, kind, header, raw, payload)
    except DAMAGE as error:
        raise VolumeError(f"{path}: damaged or unreadable ({str(error)[:120]}); copy the file again") from error
    digest = hashlib.sha256(raw)
    digest.update(payload)
    return SourceImage(_grey_values(path, array), header.affine, len(raw) + len(payload), digest.hexdigest())


def _decode_voxels(path: Path, kind: str, header: SourceHeader, raw: bytes, payload: bytes) -> Array:
    """The values as the file holds them, of the header's shape, rescaled where it says so."""
    if kind in ("nrrd", "metaimage"):
        if header.zlib_stream:  # ITK gives garbage for a damaged stream, and for one whose length the header leaves out
            needed = math.prod(header.shape) * header.dtype.itemsize
            data = _inflate(path, (payload or raw)[header.offset :], needed, 15)
            return np.frombuffer(data, header.dtype, math.prod(header.shape)).reshape(header.shape)
        try:
            with quiet_itk():
                image = sitk.ReadImage(str(path), imageIO=ITK_READERS[kind])
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


def whole_numbers(path: Path, array: Array) -> Array:
    """The labels of a mask as int32.

    Raises:
        VolumeError: a value is further than 1e-3 from a whole number.
    """
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

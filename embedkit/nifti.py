"""Owns NIfTI headers (nifti1.h and nifti2.h of the NIfTI Data Format Working Group): voxels' number, type and place.

NIfTI is decoded here, because ITK fills the voxels of a truncated file with zeros, does not check the gzip checksum,
and takes the spacing of a contradictory header from the wrong field, each without an error. Knows nothing of other
formats, and never reads a voxel.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from embedkit.errors import VolumeError
from embedkit.orientation import default_affine, has_square_corners
from embedkit.sourceimage import SourceHeader, grey_shape

__all__ = ["inflate_head", "nifti_byte_order", "parse_nifti"]

Array = np.ndarray[Any, Any]

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


def nifti_byte_order(head: bytes) -> str:
    """``<`` or ``>`` where a NIfTI-1 or NIfTI-2 header of one file begins, else empty."""
    for order in "<>":
        if head[:4] == struct.pack(f"{order}i", 348) and head[344:347] == b"n+1":
            return order
        if head[:4] == struct.pack(f"{order}i", 540) and head[4:7] == b"n+2":
            return order
    return ""


def inflate_head(head: bytes) -> bytes:
    """The first kilobyte of a gzip file from its first bytes; less where they end early."""
    start = b""
    while head and len(start) < 1024:
        stream = zlib.decompressobj(31)
        start += stream.decompress(head, 1024)
        head = stream.unused_data
    return start


def parse_nifti(path: Path, head: bytes) -> SourceHeader:
    """The header of a NIfTI-1 or NIfTI-2 file that begins, decompressed, with ``head``."""
    order = nifti_byte_order(head)
    if not order or (len(head) < 540 and head[4:7] == b"n+2"):
        raise VolumeError("holds no NIfTI header; it is damaged, or an image of another format", file=path)
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
            f"its values are {kind} (NIfTI datatype {code}), expected one real number per voxel; convert it", file=path
        )
    if not 1 <= dim[0] <= 7:
        raise VolumeError(f"its header says {dim[0]} axes, expected 3; the header is damaged", file=path)
    shape = grey_shape(path, tuple(int(length) for length in dim[dim[0] : 0 : -1]), trailing=0)
    codes = fields("2h", 252, 344, "2i")
    rows = np.array(fields("12f", 280, 400, "12d")).reshape(3, 4)
    affine = _nifti_affine(pixdim, codes, fields("6f", 256, 352, "6d"), rows)
    scaled = np.isfinite([slope, intercept]).all() and (slope, intercept) != (0.0, 0.0)
    return SourceHeader(
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
    if codes[1] > 0 and has_square_corners(sform):
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
    return default_affine(*np.abs(pixdim[3:0:-1]).tolist())[:, [2, 1, 0, 3]]

"""Owns the headers of numpy's .npy and .npz files, and the affine that an .npz may hold.

Knows nothing of other formats, and never reads a voxel.
"""

from __future__ import annotations

import ast
import io
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from embedkit.errors import VolumeError
from embedkit.orientation import default_affine
from embedkit.sourceimage import SourceHeader, grey_shape

__all__ = ["parse_npy", "parse_npz"]

Array = np.ndarray[Any, Any]

_LONGEST_HEADER = 10_000  # bytes; numpy itself reads no longer one without being told to trust the file


def parse_npy(path: Path) -> tuple[SourceHeader, int]:
    """(header, bytes that hold the voxels)."""
    with path.open("rb") as stream:
        shape, fortran_order, dtype, offset = _parse_npy_header(path, stream)
    header = SourceHeader(
        shape=grey_shape(path, shape, trailing=-1),
        dtype=dtype,
        affine=default_affine(),
        offset=offset,
        fortran_order=fortran_order,
    )
    return header, path.stat().st_size - offset


def parse_npz(path: Path) -> tuple[SourceHeader, int]:
    """(header, bytes that hold the voxels once decompressed) of the one array beside the affine."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        images = [name for name in names if name != "affine.npy"]
        if len(images) != 1 or len(set(names)) < len(names):
            raise VolumeError(
                f"holds {len(names)} entries; expected one array, named array, and at most an affine",
                file=path,
                found=f"it holds {', '.join(names)[:200]}",
            )
        with archive.open(images[0]) as stream:
            shape, fortran_order, dtype, offset = _parse_npy_header(path, stream)
        affine = default_affine()
        if "affine.npy" in names:
            if archive.getinfo("affine.npy").file_size > 4096:
                raise VolumeError("its affine is not [4 4]; save it as such", file=path)
            affine = _parse_small_array(path, archive.read("affine.npy"))
        available = archive.getinfo(images[0]).file_size - offset
    shape = grey_shape(path, shape, trailing=-1)
    return SourceHeader(
        shape, dtype, affine, offset, fortran_order=fortran_order, member=images[0], encoding="zip"
    ), available


def _parse_small_array(path: Path, content: bytes) -> Array:
    try:
        return np.asarray(np.lib.format.read_array(io.BytesIO(content), allow_pickle=False), dtype=np.float64)
    except ValueError as error:
        raise VolumeError(
            "its affine cannot be read; save it as float64 [4 4]", file=path, found=str(error)[:200]
        ) from error


def _parse_npy_header(path: Path, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """(shape, whether the first axis runs fastest, type, bytes of the header), read as numpy's NEP 1 says."""
    magic = stream.read(8)
    length_bytes = 2 if magic[6:7] == b"\x01" else 4
    length = int.from_bytes(stream.read(length_bytes), "little")
    try:
        if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3) or length > _LONGEST_HEADER:
            raise ValueError(f"it begins with {magic!r} and a header of {length} bytes")
        fields = ast.literal_eval(stream.read(length).decode("latin1" if magic[6] < 3 else "utf-8").strip())
        shape, fortran_order, kind = fields["shape"], fields["fortran_order"], fields["descr"]
        if not isinstance(kind, str) or not isinstance(shape, tuple) or not isinstance(fortran_order, bool):
            raise ValueError("its descr, shape or fortran_order is of another type")
        if not all(type(axis) is int and axis >= 0 for axis in shape):
            raise ValueError(f"its shape is {shape}")
        dtype = np.dtype(kind)
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError) as error:
        raise VolumeError(
            "its header is damaged; save the array again", file=path, found=repr(str(error)[:200])
        ) from error
    if dtype.kind not in "biuf":
        raise VolumeError(f"holds values of type {dtype}, expected real numbers; save it as such", file=path)
    return shape, fortran_order, dtype, stream.tell()

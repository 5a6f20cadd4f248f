"""Owns voxel values: taking them out of a file of any format but DICOM, and which values and types are accepted.

A file is read once, piece by piece, so that an image whose voxels are put into a mapped file needs little memory. Knows
nothing of orientation, and takes size, type and place of the voxels from a header that others have checked.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import SimpleITK as sitk

from embedkit.errors import VolumeError
from embedkit.itk import explain_itk_error, quiet_itk
from embedkit.nrrd import ITK_READERS
from embedkit.sourceimage import DAMAGE, Allocate, SourceHeader, SourceImage, Stop, require_going
from embedkit.spill import convert, release_pages

__all__ = ["read_voxels", "whole_numbers"]

Array = np.ndarray[Any, Any]

_PIECE_BYTES = 4 << 20


def read_voxels(path: Path, kind: str, header: SourceHeader, allocate: Allocate, *, stop: Stop = None) -> SourceImage:
    """The image as its file holds it, its values checked.

    Args:
        path: A file of any format but DICOM.
        kind: What `embedkit.formats.image_format` gave for it.
        header: What `embedkit.formats.read_header` gave for it.
        allocate: Makes the array that the voxels are put into.
        stop: Once set, reading ends with an error, but not that of what only ITK can read.

    Raises:
        VolumeError: the file is truncated, damaged or unreadable, or holds values that are no finite numbers; or
            ``stop`` is set.
        CacheError: there is no room for the array.
    """
    digest = hashlib.sha256()
    try:
        with ExitStack() as stack:
            paths = [path] if header.payload is None else [path, header.payload]
            files = [_HashedFile(each, stack.enter_context(each.open("rb")), digest, stop) for each in paths]
            for file in files if header.encoding in ("zip", "itk") else files[:-1]:
                file.drain()
            array = _store(path, header, _pieces(path, kind, header, files[-1]), allocate, stop)
            files[-1].drain()
    except DAMAGE as error:
        raise VolumeError("damaged or unreadable; copy the file again", file=path, found=str(error)[:120]) from error
    return SourceImage(array, header.affine, sum(file.size for file in files), digest.hexdigest())


class _HashedFile:
    """A file that is read once from its first byte on, its bytes counted and hashed on the way."""

    def __init__(self, path: Path, file: BinaryIO, digest: Any, stop: Stop) -> None:
        self._path, self._file, self._digest, self._stop, self.size = path, file, digest, stop, 0

    def read(self, count: int = _PIECE_BYTES) -> bytes:
        """The next bytes; fewer than ``count`` only at the end."""
        require_going(self._path, self._stop)
        data = self._file.read(count)
        self._digest.update(data)
        self.size += len(data)
        return data

    def drain(self) -> None:
        """Reads what is left, for its size and hash alone."""
        while self.read():
            pass


def _pieces(path: Path, kind: str, header: SourceHeader, file: _HashedFile) -> Iterator[Array]:
    """The values as the file holds them, one after the other, [values] of the header's type.

    Args:
        path: The image.
        kind: Of its format.
        header: Of the image.
        file: Where the values lie; for a zip archive and what ITK reads it was hashed before.
    """
    if header.encoding == "itk":
        yield from _read_with_itk(path, kind)
        return
    needed = math.prod(header.shape) * header.dtype.itemsize
    if header.encoding == "zip":
        with zipfile.ZipFile(path) as archive, archive.open(header.member) as member:
            yield from _cut(_take(member.read, header.offset, needed), header.dtype)
    elif header.encoding == "raw":
        yield from _cut(_take(file.read, header.offset, needed), header.dtype)
    else:
        inside = header.offset if kind == "nifti" else 0  # the stream of a NIfTI holds its header too
        file.read(header.offset - inside)
        window = 31 if header.encoding == "gzip" else 15
        yield from _cut(_inflate(path, file, inside, needed, window), header.dtype)


def _take(read: Callable[[int], bytes], skip: int, needed: int) -> Iterator[bytes]:
    """``needed`` bytes after the first ``skip``; all there are where a file ends before."""
    while skip and (part := read(min(skip, _PIECE_BYTES))):
        skip -= len(part)
    while needed and (part := read(min(needed, _PIECE_BYTES))):
        needed -= len(part)
        yield part
    read(1)  # an archive's checksum is compared at its end


def _inflate(path: Path, file: _HashedFile, skip: int, needed: int, window: int) -> Iterator[memoryview]:
    """``needed`` bytes of a gzip (``window`` 31) or zlib (15) stream; the rest is read for its checksum only.

    Raises:
        VolumeError: the stream ends early.
        zlib.error: the stream is damaged.
    """
    have, data, last = 0, b"", skip + needed
    while True:
        stream = zlib.decompressobj(window)
        while not stream.eof:
            fed = data or file.read()
            part = stream.decompress(fed, _PIECE_BYTES)
            data = stream.unconsumed_tail
            yield memoryview(part)[max(0, skip - have) : max(0, last - have)]
            have += len(part)
            if not (fed or part or stream.eof):
                raise VolumeError(
                    f"its compressed data end after {have} of {last} bytes; it is truncated: copy the file again",
                    file=path,
                )
        data = stream.unused_data or file.read()
        if have >= last:
            return
        if not data:
            raise VolumeError(
                f"its compressed data hold {have} bytes, its header promises {last}; it is truncated: copy "
                "the file again",
                file=path,
            )


def _cut(parts: Iterator[bytes] | Iterator[memoryview], dtype: np.dtype[Any]) -> Iterator[Array]:
    """The whole values in bytes that come in parts of any length."""
    rest = b""
    for part in parts:
        data = b"".join((rest, part)) if rest else part
        if count := len(data) // dtype.itemsize:
            yield np.frombuffer(data, dtype, count)
        rest = bytes(data[count * dtype.itemsize :])


def _read_with_itk(path: Path, kind: str) -> Iterator[Array]:
    try:
        with quiet_itk():
            image = sitk.ReadImage(str(path), imageIO=ITK_READERS[kind])
    except RuntimeError as error:
        told = f"ITK: {explain_itk_error(error)}"
        raise VolumeError("cannot be read by ITK; copy the file again", file=path, found=told) from error
    yield sitk.GetArrayViewFromImage(image).reshape(-1)


def _store(path: Path, header: SourceHeader, pieces: Iterator[Array], allocate: Allocate, stop: Stop) -> Array:
    """All values in an array of the header's shape and one of the types of a `Volume`, rescaled where it says so.

    Raises:
        VolumeError: there are too few, or some that are no finite numbers; or ``stop`` is set.
    """
    shape = header.shape[::-1] if header.fortran_order else header.shape
    scaled = header.slope != 1.0 or header.intercept != 0.0
    stored = allocate(shape, np.dtype(np.float32) if scaled else _kept_type(header.dtype))
    filled, wrong = 0, 0
    for piece in pieces:
        require_going(path, stop)
        values = np.multiply(piece, header.slope, dtype=np.float64) + header.intercept if scaled else piece
        if stored.dtype == np.int32 and not _fits_int32(values):
            stored = convert(stored, allocate(shape, np.dtype(np.float32)))
        target = stored.reshape(-1)[filled : filled + len(values)]
        filled += len(values)
        with np.errstate(over="ignore"):
            np.copyto(target, values, casting="unsafe")
        if stored.dtype.kind == "f":
            wrong += len(target) - int(np.count_nonzero(np.isfinite(target)))
        release_pages(stored)
    if filled < stored.size:
        raise VolumeError(
            f"holds {filled} of the {stored.size} voxels that its header promises; copy it again", file=path
        )
    if wrong:
        raise VolumeError(
            f"{wrong} of {stored.size} values are NaN or infinite (or too large for float32), expected "
            "finite numbers; repair or fill them first",
            file=path,
        )
    return stored.transpose() if header.fortran_order else stored


def _kept_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type that values of a file's type are kept in; wide integers in int32 until one does not fit."""
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind == "f":
        return np.dtype(np.float32)
    if dtype.kind == "i" and dtype.itemsize == 1:
        return np.dtype(np.int16)
    if dtype.itemsize >= 4:
        return np.dtype(np.int32)
    return dtype.newbyteorder("=")


def _fits_int32(values: Array) -> bool:
    """Whether no value leaves int32; those of narrower types are not looked at."""
    if values.dtype.kind == "i" and values.dtype.itemsize <= 4:
        return True
    return len(values) == 0 or (int(values.min()) >= -(2**31) and int(values.max()) < 2**31)


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
                f"{wrong} of {array.size} values are not whole numbers, expected a label per voxel; threshold "
                "the mask first",
                file=path,
            )
        array = rounded
    return array.astype(np.int32)

"""Owns the headers of NRRD and MetaImage files, which ITK parses, and where such a file keeps its voxels.

Knows nothing of other formats, and never reads a voxel.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from embedkit.errors import VolumeError
from embedkit.itk import affine_of_itk, explain_itk_error, quiet_itk
from embedkit.sourceimage import Encoding, SourceHeader, grey_shape

__all__ = ["ITK_READERS", "parse_with_itk", "payload_file"]

ITK_READERS = {"nrrd": "NrrdImageIO", "metaimage": "MetaImageIO"}
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
_NRRD_ENCODINGS: dict[bytes, Encoding] = {b"raw": "raw", b"gzip": "gzip", b"gz": "gzip"}
_HEADER_ENDS = {
    "nrrd": re.compile(rb"\r?\n\r?\n"),
    "metaimage": re.compile(rb"^\s*ElementDataFile\s*=[^\n]*\n?", re.MULTILINE),
}
_USUAL_HEADER_BYTES, _LONGEST_HEADER_BYTES = 1 << 12, 1 << 16


def payload_file(path: Path, kind: str) -> Path | None:
    """The second file that holds the voxels of an image, by its header's text alone; None where they are in ``path``.

    Args:
        path: A regular file.
        kind: nrrd or metaimage.

    Raises:
        VolumeError: the header does not end, or names what is not one file in the header's own folder.
        OSError: ``path`` cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        head = file.read(_USUAL_HEADER_BYTES)
        end = _HEADER_ENDS[kind].search(head)
        if end is None or end.end() == len(head):
            head += file.read(_LONGEST_HEADER_BYTES - len(head))
    named = _parse_text_header(path, kind, head).data_file
    return None if named is None else _payload_file(path, named)


class _TextHeader(NamedTuple):
    """What the text of a header says of where and how the voxels lie.

    Attributes:
        offset: Bytes of the header.
        encoding: ``itk`` where only ITK knows how to read them.
        packed: Whether they are compressed.
        data_file: File that holds them; None for this one.
        order: Byte order, ``<`` or ``>``; empty where it is not told.
    """

    offset: int
    encoding: Encoding
    packed: bool
    data_file: str | None
    order: str


def parse_with_itk(path: Path, kind: str, head: bytes) -> tuple[SourceHeader, int, bool]:
    """(header, bytes that hold the voxels, whether they are compressed); ``head`` is how the file begins."""
    text = _parse_text_header(path, kind, head)
    payload = None if text.data_file is None else _payload_file(path, text.data_file)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(ITK_READERS[kind])
    reader.SetFileName(str(path))
    try:
        with quiet_itk():
            reader.ReadImageInformation()
            type_name = sitk.GetPixelIDValueAsString(reader.GetPixelID())
            size: tuple[int, ...] = reader.GetSize()
            shape = grey_shape(path, size[::-1], trailing=0)
            affine = affine_of_itk(reader)
    except RuntimeError as error:
        told = f"ITK: {explain_itk_error(error)}"
        raise VolumeError("cannot be read by ITK; check its header", file=path, found=told) from error
    if reader.GetNumberOfComponents() != 1 or type_name not in _ITK_TYPES:
        raise VolumeError(
            f"its values are {type_name} with {reader.GetNumberOfComponents()} components, expected one real "
            "number per voxel; convert it",
            file=path,
        )
    dtype = np.dtype((text.order or "=") + _ITK_TYPES[type_name])
    header = SourceHeader(
        shape=shape,
        dtype=dtype,
        affine=affine,
        offset=0 if payload else text.offset,
        payload=payload,
        encoding=text.encoding if text.order or dtype.itemsize == 1 else "itk",
    )
    file = payload or path
    return header, file.stat().st_size - header.offset, text.packed


def _parse_text_header(path: Path, kind: str, head: bytes) -> _TextHeader:
    end = _HEADER_ENDS[kind].search(head)
    if kind == "nrrd":
        pairs = re.findall(rb"^([A-Za-z][A-Za-z ]*):[ \t]*([^\r\n]*)", head[: end.start() if end else None], re.M)
        fields = {name.lower(): value.strip() for name, value in pairs}
        named = fields.get(b"data file", fields.get(b"datafile"))
        stored = fields.get(b"encoding", b"raw").lower()
        packed = stored != b"raw"
        order = {b"little": "<", b"big": ">"}.get(fields.get(b"endian", b"").lower(), "")
        skips = not fields.keys().isdisjoint((b"line skip", b"lineskip", b"byte skip", b"byteskip"))
        encoding = _NRRD_ENCODINGS.get(stored, "itk") if not skips else "itk"
    else:
        pairs = re.findall(rb"^\s*(\w+)\s*=[ \t]*([^\r\n]*)", head[: end.end() if end else None], re.M)
        fields = {name: value.strip() for name, value in pairs}
        named = fields.get(b"ElementDataFile", b"")
        named = None if named.upper() == b"LOCAL" else named
        packed = fields.get(b"CompressedData", b"").lower() == b"true"
        orders = (fields.get(name, b"").lower() for name in (b"BinaryDataByteOrderMSB", b"ElementByteOrderMSB"))
        order = ">" if b"true" in orders else "<"
        plain = fields.get(b"BinaryData", b"").lower() == b"true" and fields.get(b"HeaderSize", b"0") == b"0"
        encoding = "zlib" if packed else "raw" if plain else "itk"
    if named == b"" or (end is None and named is None):
        raise VolumeError("its header does not end; the file is truncated or damaged: copy it again", file=path)
    data_file = None if named is None else named.decode("utf-8", "replace")
    return _TextHeader(end.end() if end else 0, encoding, packed, data_file, order)


def _payload_file(path: Path, name: str) -> Path:
    """The file that a header names for its voxels; only a single one in the header's own folder is read."""
    found = f"it names {name[:80]!r}"
    if name.split(" ", 1)[0].upper() == "LIST" or "%" in name:
        problem = "spreads its voxels over several files; save it as one .nrrd or .mha file"
    elif not name.isprintable():
        problem = "names no printable file for its voxels; the header is damaged: copy the file again"
    elif (file := path.parent / name).resolve().parent != path.parent.resolve():
        problem = (
            "names a file for its voxels that lies outside its own folder and is not read; save the image as one .nrrd"
            " or .mha file"
        )
    elif not file.is_file():
        problem = "names a second file for its voxels, which is missing; copy both files"
    else:
        return file
    raise VolumeError(problem, file=path, found=found)

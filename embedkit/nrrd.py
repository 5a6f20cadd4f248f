"""Owns the headers of NRRD and MetaImage files, which ITK parses, and where such a file keeps its voxels.

Knows nothing of other formats, and never reads a voxel.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from embedkit.errors import VolumeError
from embedkit.itk import affine_of_itk, explain_itk_error, quiet_itk
from embedkit.sourceimage import SourceHeader, grey_shape

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
    _, _, named, _ = _parse_text_header(path, kind, head)
    return None if named is None else _payload_file(path, named)


def parse_with_itk(path: Path, kind: str, head: bytes) -> tuple[SourceHeader, int, bool]:
    """(header, bytes that hold the voxels, whether they are compressed); ``head`` is how the file begins."""
    offset, encoding, data_file, order = _parse_text_header(path, kind, head)
    payload = None if data_file is None else _payload_file(path, data_file)
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
        raise VolumeError(f"{path}: cannot be read ({explain_itk_error(error)}); check its header") from error
    if reader.GetNumberOfComponents() != 1 or type_name not in _ITK_TYPES:
        raise VolumeError(
            f"{path}: its values are {type_name} with {reader.GetNumberOfComponents()} components, expected one real "
            "number per voxel; convert it"
        )
    header = SourceHeader(
        shape=shape,
        dtype=np.dtype(order + _ITK_TYPES[type_name]),
        affine=affine,
        offset=0 if payload else offset,
        payload=payload,
        zlib_stream=kind == "metaimage" and encoding == "compressed",
    )
    file = payload or path
    return header, file.stat().st_size - header.offset, encoding == "compressed"


def _parse_text_header(path: Path, kind: str, head: bytes) -> tuple[int, str, str | None, str]:
    """(bytes of the header, ``raw`` or ``compressed``, file of the voxels or None for this one, byte order).

    The byte order is given for a MetaImage alone; ITK sees to that of an NRRD.
    """
    order = "="
    end = _HEADER_ENDS[kind].search(head)
    if kind == "nrrd":
        fields = dict(
            re.findall(rb"^([A-Za-z][A-Za-z ]*):[ \t]*([^\r\n]*)", head[: end.start() if end else None], re.M)
        )
        named = fields.get(b"data file", fields.get(b"datafile"))
        encoding = "raw" if fields.get(b"encoding", b"raw").strip().lower() == b"raw" else "compressed"
    else:
        fields = dict(re.findall(rb"^\s*(\w+)\s*=[ \t]*([^\r\n]*)", head[: end.end() if end else None], re.M))
        named = fields.get(b"ElementDataFile", b"").strip()
        named = None if named.upper() == b"LOCAL" else named
        encoding = "compressed" if fields.get(b"CompressedData", b"").strip().lower() == b"true" else "raw"
        orders = (fields.get(name, b"").strip().lower() for name in (b"BinaryDataByteOrderMSB", b"ElementByteOrderMSB"))
        order = ">" if b"true" in orders else "<"
    if named == b"" or (end is None and named is None):
        raise VolumeError(f"{path}: its header does not end; the file is truncated or damaged: copy it again")
    return (
        (end.end() if end else 0),
        encoding,
        None if named is None else named.decode("utf-8", "replace").strip(),
        order,
    )


def _payload_file(path: Path, name: str) -> Path:
    """The file that a header names for its voxels; only a single one in the header's own folder is read."""
    if name.split(" ", 1)[0].upper() == "LIST" or "%" in name:
        raise VolumeError(f"{path}: spreads its voxels over several files ({name}); save it as one .nrrd or .mha file")
    if not name.isprintable():
        raise VolumeError(f"{path}: names {name[:80]!r} for its voxels; the header is damaged: copy the file again")
    file = path.parent / name
    if file.resolve().parent != path.parent.resolve():
        raise VolumeError(
            f"{path}: names {name} for its voxels, which lies outside its own folder and is not read; save the image "
            "as one .nrrd or .mha file"
        )
    if not file.is_file():
        raise VolumeError(f"{path}: names {name} for its voxels, which is missing; copy both files")
    return file

"""Owns DICOM headers: telling DICOM files from others, and what a file's header says of its pixels and their place.

Never keeps who the patient is: of the header it uses geometry, pixel format, rescale, Modality, and SeriesInstanceUID
to group files (held in memory, never given out as a name). Knows nothing of what makes a stack, and never reads a
pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk

__all__ = ["DicomSeries", "DicomSlice", "explain_no_pixels", "looks_like_dicom", "read_slice", "read_tag"]

_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
# DICOM storage classes without pixel data (DICOM PS3.4, table B.5-1), by prefix of the class's identifier.
_PIXELLESS_CLASSES = {
    "1.2.840.10008.1.3.10": "DICOMDIR",
    "1.2.840.10008.5.1.4.1.1.481.3": "RTSTRUCT",
    "1.2.840.10008.5.1.4.1.1.481.": "radiotherapy object",
    "1.2.840.10008.5.1.4.1.1.88.": "structured report",
    "1.2.840.10008.5.1.4.1.1.11.": "presentation state",
    "1.2.840.10008.5.1.4.1.1.104.": "encapsulated document",
    "1.2.840.10008.5.1.4.1.1.66": "registration, fiducials or raw data",
    "1.2.840.10008.5.1.4.1.1.9.": "waveform",
}


@dataclass(frozen=True)
class DicomSlice:
    """What one file's header says of its pixels and their place. Positions and directions are LPS+ as in DICOM."""

    file: Path
    shape: tuple[int, int]
    frames: int
    samples: int
    photometric: str
    bits: tuple[int, int]  # allocated, stored
    slope: float
    intercept: float
    position: tuple[float, ...]
    directions: tuple[float, ...]
    pixel_mm: tuple[float, ...]
    thickness_mm: float


@dataclass(frozen=True)
class DicomSeries:
    """Files of one folder that share a SeriesInstanceUID; not yet known to form a readable stack.

    Attributes:
        folder: Where the files lie.
        files: Its image files, sorted by name.
        modality: The header's Modality, such as CT, MR or PT.
    """

    folder: Path
    files: tuple[Path, ...]
    modality: str
    uid: str = field(repr=False)
    slices: tuple[DicomSlice, ...] = field(repr=False)


def looks_like_dicom(file: Path, head: bytes) -> bool:
    """Whether a file is to be opened as DICOM.

    Args:
        file: Its name counts for files without the DICOM preamble.
        head: Its first 132 bytes or more.
    """
    return head[128:132] == b"DICM" or file.suffix.lower() in _DICOM_SUFFIXES


def read_tag(reader: sitk.ImageFileReader, tag: str) -> str:
    """A header value without its padding; empty where the header lacks it."""
    return str(reader.GetMetaData(tag)).strip(" \0") if reader.HasMetaDataKey(tag) else ""


def read_slice(file: Path, reader: sitk.ImageFileReader) -> DicomSlice:
    """The header of ``file``, which ``reader`` has just read."""

    def number(tag: str, default: float) -> float:
        text = read_tag(reader, tag)
        return (_numbers(text) or (0.0,))[0] if text else default

    size = reader.GetSize()
    return DicomSlice(
        file=file,
        shape=(size[1], size[0]),
        frames=size[2] if len(size) > 2 else 1,
        samples=reader.GetNumberOfComponents(),
        photometric=read_tag(reader, "0028|0004"),
        bits=(int(number("0028|0100", 16)), int(number("0028|0101", 16))),
        slope=number("0028|1053", 1.0),
        intercept=number("0028|1052", 0.0),
        position=_numbers(read_tag(reader, "0020|0032")),
        directions=_numbers(read_tag(reader, "0020|0037")),
        pixel_mm=_numbers(read_tag(reader, "0028|0030")),
        thickness_mm=number("0018|0088", 0.0) or number("0018|0050", 0.0) or 1.0,
    )


def _numbers(text: str) -> tuple[float, ...]:
    """A backslash-separated decimal string as finite numbers; empty where it is not one."""
    try:
        numbers = tuple(float(part) for part in text.split("\\"))
    except ValueError:
        return ()
    return numbers if np.isfinite(numbers).all() else ()


def explain_no_pixels(file: Path, head: bytes) -> tuple[Path, str, bool]:
    """Why a DICOM file gives no image: an object without pixels, or damage."""
    if file.name == "DICOMDIR":
        return file, f"{file}: a DICOMDIR, not an image", False
    # (0002,0002) MediaStorageSOPClassUID, always explicit little endian: tag, VR, 2-byte length, value
    at = head.find(b"\x02\x00\x02\x00UI")
    length = int.from_bytes(head[at + 6 : at + 8], "little")
    storage_class = head[at + 8 : at + 8 + length].decode("ascii", "replace").strip("\0 ") if at >= 0 else ""
    for prefix, name in _PIXELLESS_CLASSES.items():
        if storage_class.startswith(prefix):
            return file, f"{file}: a DICOM {name}, not an image", False
    return file, f"{file}: damaged, truncated or not DICOM; copy the file again or remove it", True

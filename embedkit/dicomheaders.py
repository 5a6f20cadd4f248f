"""Owns DICOM headers: telling DICOM files from others, and what a file's header says of its pixels and their place.

Never keeps who the patient is: of the header it uses geometry, pixel format, rescale, InstanceNumber and the count of
slices, Modality, and SeriesInstanceUID to group files, also a damaged one whose header still tells it (held in memory,
never given out as a name). Knows nothing of what makes a stack, and never reads a pixel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from embedkit.dicomelements import find_value
from embedkit.errors import VolumeError

__all__ = [
    "DicomSeries",
    "DicomSlice",
    "UnreadFile",
    "explain_no_pixels",
    "find_series_uid",
    "looks_like_dicom",
    "read_slice",
    "read_tag",
]

_LARGEST_COUNT = 2**31  # of an integer string (DICOM PS3.5, section 6.2)
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
    """What one file's header says of its pixels and their place. Positions and directions are LPS+ as in DICOM.

    ``number`` is InstanceNumber, None where there is none; ``promised`` how many slices there should be, 0 where the
    header does not say.
    """

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
    number: int | None = None
    promised: int = 0


class UnreadFile(NamedTuple):
    """A DICOM file that gives no image.

    Attributes:
        file: Which.
        problem: Why, and what to do.
        is_damage: False for an object that has no pixels, such as an RTSTRUCT.
        uid: SeriesInstanceUID; empty where the header no longer tells it, or nobody asked.
        found: In words, what the file itself says, which is never put on record: of `VolumeError`.
    """

    file: Path
    problem: str
    is_damage: bool
    uid: str = ""
    found: str = ""

    def error(self, more: str = "") -> VolumeError:
        """As an error; ``more`` is added to the problem."""
        return VolumeError(self.problem + more, file=self.file, found=self.found)


@dataclass(frozen=True)
class DicomSeries:
    """Files of one folder that share a SeriesInstanceUID; not yet known to form a readable stack.

    Attributes:
        folder: Where the files lie.
        files: All its files, sorted by name.
        modality: The header's Modality, such as CT, MR or PT.
        slices: What the headers of its sound files say.
        damaged: Those of its files that cannot be read.
        strays: Damaged files in the folder that could be of any series, so of this one too: their headers tell none, or
            one that no other file there tells.
    """

    folder: Path
    files: tuple[Path, ...]
    modality: str
    uid: str = field(repr=False)
    slices: tuple[DicomSlice, ...] = field(repr=False)
    damaged: tuple[UnreadFile, ...] = field(repr=False, default=())
    strays: tuple[UnreadFile, ...] = field(repr=False, default=())


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

    def whole(tag: str) -> int | None:
        found = _numbers(read_tag(reader, tag))
        return int(found[0]) if found and abs(found[0]) < _LARGEST_COUNT else None

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
        number=whole("0020|0013"),
        promised=max(whole("0020|1002") or 0, whole("0054|0081") or 0),  # ImagesInAcquisition, NumberOfSlices
    )


def _numbers(text: str) -> tuple[float, ...]:
    """A backslash-separated decimal string as finite numbers; empty where it is not one."""
    try:
        numbers = tuple(float(part) for part in text.split("\\"))
    except ValueError:
        return ()
    return numbers if np.isfinite(numbers).all() else ()


def find_series_uid(file: Path) -> str:
    """SeriesInstanceUID of a damaged file; empty where its header no longer tells it.

    Raises:
        OSError: the file cannot be read.
    """
    uid = find_value(file, (0x0020, 0x000E)).strip(b" \0").decode("ascii", "replace")
    return uid if re.fullmatch(r"[0-9.]{1,64}", uid) else ""


def explain_no_pixels(file: Path, head: bytes, damage: str = "") -> UnreadFile:
    """Why a DICOM file gives no image: an object without pixels, or damage, of which ``damage`` may tell more."""
    if file.name == "DICOMDIR":
        return UnreadFile(file, "a DICOMDIR, not an image", False)
    # (0002,0002) MediaStorageSOPClassUID, always explicit little endian: tag, VR, 2-byte length, value
    at = head.find(b"\x02\x00\x02\x00UI")
    length = int.from_bytes(head[at + 6 : at + 8], "little")
    storage_class = head[at + 8 : at + 8 + length].decode("ascii", "replace").strip("\0 ") if at >= 0 else ""
    for prefix, name in _PIXELLESS_CLASSES.items():
        if storage_class.startswith(prefix):
            return UnreadFile(file, f"a DICOM {name}, not an image", False)
    problem = "damaged, truncated or not DICOM; copy the file again or remove it"
    return UnreadFile(file, problem, True, find_series_uid(file), damage)

"""Owns the frame of a DICOM file, its data elements and their lengths (DICOM PS3.5, section 7), to bound what is read.

GDCM reserves as many bytes as an element's length says before it looks whether the file has them: one flipped bit
takes gigabytes. So lengths are held against the file first. And GDCM reads all of a header or nothing, so the one value
that is wanted of a damaged file is found here. Knows no element's meaning.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

__all__ = ["find_damage", "find_value"]

_Order = Literal["little", "big"]

_HARMLESS = 2**20  # a length up to this many bytes may go beyond the file: the reader will say what is wrong
_LONGEST_VALUE = 2**10
_UNDEFINED = 0xFFFFFFFF
_PIXELS = (0x7FE0, 0x0010)
_ITEM, _ITEM_END, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
# Value representations whose length has 32 bits in explicit encodings (DICOM PS3.5, table 7.1-1)
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_META = {b"AE", b"OB", b"SH", b"UI", b"UL", b"UN", b"UR"}  # what the file meta information is made of (PS3.10, 7.1)
_IMPLICIT_SYNTAX, _EXPLICIT_SYNTAX = b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1"
_DEFLATED_SYNTAX, _BIG_ENDIAN_SYNTAX = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.2"


class _Element(NamedTuple):
    """The head of a data element; ``place`` is where its value begins."""

    tag: tuple[int, int]
    kind: bytes
    length: int
    place: int


def find_damage(file: Path) -> str:
    """Says which data element has a length far beyond the end of the file; empty where none has.

    Raises:
        OSError: the file cannot be read.
    """
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        place, syntax = _find_data_set(stream, size)
        if not syntax:
            return "its file meta information (group 0002) is not that of a DICOM file"
        if syntax == _DEFLATED_SYNTAX:
            return ""
        implicit, order = _encoding(syntax)
        _, wrong = _walk(stream, place, size, implicit=implicit, order=order)
    if wrong is None:
        return ""
    return (
        f"element ({wrong.tag[0]:04x},{wrong.tag[1]:04x}) promises {wrong.length} bytes but the file has"
        f" {size - wrong.place} left"
    )


def find_value(file: Path, tag: tuple[int, int]) -> bytes:
    """The short value of one element outside of all sequences, from as much of a damaged file as can be followed.

    Returns:
        Empty where the element is absent, cut off, or behind the damage.

    Raises:
        OSError: the file cannot be read.
    """
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        place, syntax = _find_data_set(stream, size)
        if not syntax or syntax == _DEFLATED_SYNTAX:
            return b""
        implicit, order = _encoding(syntax)
        while (element := _read_element(stream, place, implicit=implicit, order=order)) and element.tag <= tag:
            if element.tag == tag:
                whole = element.length <= min(_LONGEST_VALUE, size - element.place)
                return stream.read(element.length) if whole else b""
            if element.length == _UNDEFINED:
                inside = implicit or element.kind == b"UN"
                order_inside: _Order = "little" if element.kind == b"UN" else order
                place, wrong = _walk(stream, element.place, size, implicit=inside, order=order_inside, depth=1)
                if wrong is not None:
                    return b""
            else:
                place = element.place + element.length
    return b""


def _find_data_set(stream: BinaryIO, size: int) -> tuple[int, bytes]:
    """(where the data set begins, transfer syntax); the syntax is empty where the file meta information is damaged."""
    stream.seek(128)
    if stream.read(4) == b"DICM":
        return _skip_meta(stream, size)
    stream.seek(4)
    return 0, _EXPLICIT_SYNTAX if stream.read(2).isalpha() else _IMPLICIT_SYNTAX


def _encoding(syntax: bytes) -> tuple[bool, _Order]:
    """(whether value representations are implicit, byte order)."""
    return syntax == _IMPLICIT_SYNTAX, "big" if syntax == _BIG_ENDIAN_SYNTAX else "little"


def _skip_meta(stream: BinaryIO, size: int) -> tuple[int, bytes]:
    """(end of the file meta information, transfer syntax); the syntax is empty where the information is damaged."""
    place, syntax = 132, b""
    while (element := _read_element(stream, place, implicit=False, order="little")) and element.tag[0] == 2:
        if element.kind not in _META or element.length > size - element.place:
            return place, b""
        if element.tag[1] == 0x0010:
            syntax = stream.read(element.length).strip(b"\0 ")
        place = element.place + element.length
    return place, syntax


def _walk(
    stream: BinaryIO, place: int, size: int, *, implicit: bool, order: _Order, depth: int = 0
) -> tuple[int, _Element | None]:
    """Goes from element to element, into sequences too, and returns (where it stopped, the overlong element if any).

    ``depth`` above 0 is that many open sequences of undefined length, at whose end the walk stops.
    """
    bounded, fragments = depth > 0, False
    while element := _read_element(stream, place, implicit=implicit, order=order):
        place = element.place
        if element.length != _UNDEFINED and element.length > size - place:
            return size, element if element.length > _HARMLESS else None
        if element.tag in (_ITEM_END, _SEQUENCE_END):
            depth -= element.tag == _SEQUENCE_END
            fragments = False
            if bounded and depth == 0:
                return place, None
        elif element.length == _UNDEFINED:
            depth += element.tag != _ITEM
            fragments = element.tag == _PIXELS
            if element.kind == b"UN" and not implicit:  # its content is encoded as implicit little-endian
                place, wrong = _walk(stream, place, size, implicit=True, order="little", depth=1)
                depth -= 1
                if wrong is not None:
                    return place, wrong
        elif element.tag == _ITEM and not fragments:
            continue
        elif element.kind != b"SQ" and not (implicit and _holds_items(stream, order)):
            place += element.length
    return place, None


def _holds_items(stream: BinaryIO, order: _Order) -> bool:
    head = stream.read(4)
    tag = (int.from_bytes(head[:2], order), int.from_bytes(head[2:], order))
    return tag == _ITEM


def _read_element(stream: BinaryIO, place: int, *, implicit: bool, order: _Order) -> _Element | None:
    """The head of the element at ``place``, the stream left at its value; None at the end of the file or its padding.

    An unknown value representation is taken for one with a length of 16 bits, as GDCM does.
    """
    stream.seek(place)
    head = stream.read(12)

    def number(start: int, stop: int) -> int:
        return int.from_bytes(head[start:stop], order)

    tag = (number(0, 2), number(2, 4))
    if len(head) < 8 or tag == (0, 0):
        return None
    kind = b"" if implicit or tag[0] == 0xFFFE else head[4:6]
    if not kind:
        element = _Element(tag, kind, number(4, 8), place + 8)
    elif kind in _LONG:
        element = _Element(tag, kind, number(8, 12), place + 12)
    else:
        element = _Element(tag, kind, number(6, 8), place + 8)
    stream.seek(element.place)
    return element

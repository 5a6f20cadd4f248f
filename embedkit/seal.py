"""Owns the seal of a shard: what its first bytes promise about all others; knows neither HDF5 nor tokens.

The seal fills the user block that HDF5 leaves to applications. It is checked before the HDF5 library sees a byte of the
file, so that a damaged file can neither crash that library nor yield wrong tables. docs/cache-format.md has the layout.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embedkit.blocks import SUM_BYTES, block_size, count_blocks
from embedkit.errors import CacheError
from embedkit.files import explain_os_error

__all__ = ["CHUNK_BYTES", "FORMAT", "FORMAT_VERSIONS", "Metadata", "Region", "Seal", "read_sealed", "userblock_bytes"]

FORMAT = "embedkit-cache"
FORMAT_VERSIONS = {"float16": 1, "int8": 2}
"""Version of the format of a shard, by how it stores tokens."""
CHUNK_BYTES = 1 << 23
"""Bytes read, hashed or copied at a time."""

_FIRST_LINE = re.compile(
    rb"(?P<head>embedkit-cache (?P<version>\d{1,9}) (?P<userblock>\d{1,8}) )(?P<sha256>[0-9a-f]{64})\n"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


_Bytes = bytes  # the name is a field's below


@dataclass(frozen=True)
class Region:
    """Raw bytes of one dataset, left out of what is checked at every opening.

    Attributes:
        name: The dataset: ``tokens/cls:12`` or ``preview``.
        offset: First byte, counted from the start of the file.
        bytes: How many.
        sha256: Hex digest over them.
        block_bytes: Of the blocks that they are checked by when they are first read.
        sums: Checksums of these, of `embedkit.blocks.BlockSums`; empty where the writer made none.
    """

    name: str
    offset: int
    bytes: int
    sha256: str
    block_bytes: int = 0
    sums: _Bytes = b""

    def to_json(self) -> dict[str, Any]:
        """As the seal says it."""
        fields: dict[str, Any] = {
            "name": self.name,
            "offset": self.offset,
            "bytes": self.bytes,
            "sha256": self.sha256,
        }
        return fields | {"block_bytes": self.block_bytes, "xxh3": self.sums.hex()} if self.sums else fields


@dataclass(frozen=True)
class Seal:
    """What the first bytes of a shard promise about all others.

    Attributes:
        userblock: Bytes of the user block, a power of two; HDF5 begins after them.
        file_bytes: Size of the file.
        created_ns: Nanoseconds since the epoch, at least one more than in every shard seen by its writer.
        fingerprint: Of the recipe.
        metadata_sha256: Hex digest over all bytes after the user block that are in no region, in order.
        regions: Sorted by offset, none overlapping.
        version: Of the format.
    """

    userblock: int
    file_bytes: int
    created_ns: int
    fingerprint: str
    metadata_sha256: str
    regions: tuple[Region, ...]
    version: int = 1

    def to_bytes(self) -> bytes:
        """The user block: ``userblock`` bytes."""
        fields = {
            "file_bytes": self.file_bytes,
            "created_ns": self.created_ns,
            "fingerprint": self.fingerprint,
            "metadata_sha256": self.metadata_sha256,
            "regions": [region.to_json() for region in self.regions],
        }
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=True).encode()
        head = f"{FORMAT} {self.version} {self.userblock} ".encode()
        rest = text.ljust(self.userblock - len(head) - 65)
        sealed = head + hashlib.sha256(head + rest).hexdigest().encode() + b"\n" + rest
        if len(sealed) != self.userblock:
            raise CacheError(f"seal takes {len(sealed)} bytes but its user block has {self.userblock}")
        return sealed

    def metadata_spans(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of every stretch of the file that is neither user block nor region, in order."""
        start = self.userblock
        for region in self.regions:
            if start < region.offset:
                yield start, region.offset
            start = region.offset + region.bytes
        if start < self.file_bytes:
            yield start, self.file_bytes


def userblock_bytes(sizes: Mapping[str, int]) -> int:
    """Bytes of a user block that holds the seal of a file with regions of these names and sizes: a power of two."""
    most, regions = 10**19, []
    for name, size in sizes.items():
        sums = bytes(SUM_BYTES * count_blocks(size, block_size(size)))
        regions.append(Region(name, most, most, "f" * 64, most, sums).to_json())
    needed = len(json.dumps(regions, ensure_ascii=True)) + 512
    return max(8192, 1 << (needed - 1).bit_length())


class Metadata(io.RawIOBase):
    """The checked bytes of a shard outside its regions, as a read-only file of the shard's full size.

    Regions read as zeros: HDF5 never needs them to find its way, and looks a little past the end of what it needs.
    """

    def __init__(self, pieces: Sequence[tuple[int, bytes]], size: int) -> None:
        super().__init__()
        self._pieces, self._size, self._position = tuple(pieces), size, 0

    def exact(self, start: int, count: int) -> memoryview | None:
        """Bytes ``start`` to ``start + count``, or None where they are not wholly metadata."""
        for offset, piece in self._pieces:
            if offset <= start and start + count <= offset + len(piece):
                return memoryview(piece)[start - offset : start - offset + count]
        return None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        target[:] = bytes(len(target))
        start, stop = self._position, self._position + len(target)
        for offset, piece in self._pieces:
            first, last = max(start, offset), min(stop, offset + len(piece))
            if first < last:
                target[first - start : last - start] = memoryview(piece)[first - offset : last - offset]
        self._position = stop
        return len(target)


def read_sealed(path: Path) -> tuple[Seal, Metadata]:
    """Reads and checks the seal and all bytes that it covers, which are all but the regions.

    Raises:
        CacheError: not a regular file, no shard, of a newer format, or not a bit as it was written.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise CacheError(f"cannot open shard: {explain_os_error(error, path)}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CacheError(f"{path} is not a regular file; a cache holds only files that embedkit wrote")
        seal = _read_seal(descriptor, status.st_size, path)
        return seal, _read_metadata(descriptor, seal, path)
    except OSError as error:
        raise CacheError(f"cannot read shard: {explain_os_error(error, path)}") from error
    finally:
        os.close(descriptor)


def _damaged(path: Path, what: str) -> CacheError:
    return CacheError(f"{path} is damaged: {what}; delete it and run the same extract again, or restore a copy")


def _read_seal(descriptor: int, size: int, path: Path) -> Seal:
    start = os.pread(descriptor, 128, 0)
    line = _FIRST_LINE.match(start)
    if line is None:
        if start.startswith(_HDF5_SIGNATURE):
            raise CacheError(f"{path} is an HDF5 file without a seal, expected a shard that embedkit wrote")
        if start.startswith(FORMAT.encode()):
            raise _damaged(path, "its seal is broken")
        raise CacheError(f"{path} is no embedkit shard, or its start is damaged; give a cache that embedkit wrote")
    userblock = int(line["userblock"])
    if not 512 <= userblock <= size or userblock & (userblock - 1):
        raise _damaged(path, f"its seal claims a user block of {userblock} bytes in a file of {size}")
    rest = os.pread(descriptor, userblock - line.end(), line.end())
    if hashlib.sha256(line["head"] + rest).hexdigest().encode() != line["sha256"]:
        raise _damaged(path, "its seal is broken")
    version, known = int(line["version"]), FORMAT_VERSIONS.values()
    if version not in known:
        raise CacheError(
            f"{path} has cache format {version}, this embedkit reads formats {min(known)} to {max(known)};"
            " upgrade embedkit"
        )
    try:
        seal = replace(_parse_seal(userblock, json.loads(rest)), version=version)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"its seal makes no sense ({error})") from error
    if seal.file_bytes != size:
        raise _damaged(path, f"it has {size} bytes, its seal says {seal.file_bytes}")
    return seal


def _parse_seal(userblock: int, fields: dict[str, Any]) -> Seal:
    regions = tuple(
        Region(
            _text(part["name"]),
            _count(part["offset"]),
            _count(part["bytes"]),
            _digest(part["sha256"]),
            *_sums(part),
        )
        for part in fields["regions"]
    )
    seal = Seal(
        userblock,
        _count(fields["file_bytes"]),
        _count(fields["created_ns"]),
        _text(fields["fingerprint"]),
        _digest(fields["metadata_sha256"]),
        regions,
    )
    if len({region.name for region in regions}) != len(regions):
        raise ValueError("two regions have one name")
    end = userblock
    for region in regions:
        if region.offset < end:
            raise ValueError(f"region {region.name} overlaps what comes before it")
        end = region.offset + region.bytes
    if end > seal.file_bytes:
        raise ValueError("a region ends after the file")
    return seal


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is not a count")
    return value


def _digest(value: object) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise TypeError(f"{value!r} is not a SHA-256")
    return value


def _sums(part: dict[str, Any]) -> tuple[int, bytes]:
    """Bytes of a block, and the checksums of all blocks; none where the writer made none."""
    if "xxh3" not in part:
        return 0, b""
    block_bytes, sums = _count(part["block_bytes"]), bytes.fromhex(_text(part["xxh3"]))
    if block_bytes < 1 or len(sums) != SUM_BYTES * count_blocks(part["bytes"], block_bytes):
        raise ValueError(f"region {part['name']} has {len(sums)} bytes of checksums for blocks of {block_bytes}")
    return block_bytes, sums


def _read_metadata(descriptor: int, seal: Seal, path: Path) -> Metadata:
    digest, pieces = hashlib.sha256(), []
    for start, stop in seal.metadata_spans():
        piece = bytearray()
        while len(piece) < stop - start:
            part = os.pread(descriptor, min(CHUNK_BYTES, stop - start - len(piece)), start + len(piece))
            if not part:
                raise _damaged(path, "it shrank while it was read")
            piece += part
        digest.update(piece)
        pieces.append((start, bytes(piece)))
    if digest.hexdigest() != seal.metadata_sha256:
        raise _damaged(path, "its tables or HDF5 structure are not what was written")
    return Metadata(pieces, seal.file_bytes)

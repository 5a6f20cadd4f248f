"""Owns the checksums of blocks of an array: made as it is written, held against its bytes as these are first read.

Knows neither files nor what the bytes mean. A checksum is XXH3 of 64 bits (https://xxhash.com), which finds damage at
the speed of memory; who wants to forge an array could seal it anew in any case.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

__all__ = ["SUM_BYTES", "BlockSums", "UncheckedBlocks", "block_size", "count_blocks"]

SUM_BYTES = 8
_SMALLEST, _MOST_BLOCKS = 1 << 18, 1 << 16


def block_size(size: int) -> int:
    """Bytes of a block of an array of ``size`` bytes: 256 KiB, or so many more that there are at most 65,536 blocks."""
    return max(_SMALLEST, 1 << max(0, -(-size // _MOST_BLOCKS) - 1).bit_length())


def count_blocks(size: int, block_bytes: int) -> int:
    """Blocks of an array of ``size`` bytes, the last of which may be shorter."""
    return -(-size // block_bytes)


class BlockSums:
    """Makes the checksums of an array whose bytes come in pieces."""

    def __init__(self, block_bytes: int) -> None:
        """Begins with the first block."""
        self._block_bytes = block_bytes
        self._sums = bytearray()
        self._open, self._filled = xxhash.xxh3_64(), 0

    def update(self, piece: Any) -> None:
        """Takes the next bytes, any number of them, as an object with the buffer protocol."""
        rest = memoryview(piece).cast("B")
        while len(rest):
            part = rest[: self._block_bytes - self._filled]
            self._open.update(part)
            self._filled += len(part)
            rest = rest[len(part) :]
            if self._filled == self._block_bytes:
                self._close()

    def finish(self) -> bytes:
        """The checksums of all blocks, `SUM_BYTES` each."""
        if self._filled:
            self._close()
        return bytes(self._sums)

    def _close(self) -> None:
        self._sums += self._open.digest()
        self._open, self._filled = xxhash.xxh3_64(), 0


class UncheckedBlocks:
    """Which blocks of an array have not been held against their checksums yet; safe to share between threads.

    Attributes:
        block_bytes: Of a block, all of which are read to check one byte.
    """

    def __init__(self, size: int, block_bytes: int, sums: bytes, sha256: str) -> None:
        """Takes what was written down of an array.

        Args:
            size: Bytes of the array.
            block_bytes: Of a block.
            sums: Of `BlockSums`; where there are none the array is one block, whose checksum is ``sha256``.
            sha256: Hex digest over the whole array.
        """
        self.block_bytes = block_bytes if sums else max(1, size)
        self._sums, self._sha256 = sums, sha256
        self._left = bytearray(b"\1") * count_blocks(size, self.block_bytes)

    def pass_bytes(self, array: NDArray[Any], start: int, stop: int) -> bool:
        """Whether the blocks with bytes ``start`` to ``stop`` of a C-contiguous array are as they were written.

        Those that were found so before are not looked at again.
        """
        first = start // self.block_bytes
        last = count_blocks(stop, self.block_bytes) if start < stop else first
        block = self._left.find(1, first, last)
        if block < 0:
            return True
        data = array.reshape(-1).view(np.uint8).data
        while block >= 0:
            if not self._is_sound(block, data[block * self.block_bytes : (block + 1) * self.block_bytes]):
                return False
            self._left[block] = 0
            block = self._left.find(1, block + 1, last)
        return True

    def _is_sound(self, block: int, data: memoryview) -> bool:
        if not self._sums:
            return hashlib.sha256(data).hexdigest() == self._sha256
        return xxhash.xxh3_64_digest(data) == self._sums[block * SUM_BYTES : (block + 1) * SUM_BYTES]

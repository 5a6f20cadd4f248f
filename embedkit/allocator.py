"""Owns one hint to the C library's allocator; knows nothing of who asks for memory."""

from __future__ import annotations

import ctypes
import platform

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_MMAP_THRESHOLD = 32 << 20
_TRIM_THRESHOLD = 1 << 30


def keep_freed_memory() -> bool:
    """Makes glibc keep up to a gigabyte of freed memory, in blocks up to 32 MiB, instead of giving it back at once.

    A pass through a network on a CPU takes and frees the same activations again and again; given back to the system in
    between, every page of them is faulted in anew, which costs a tenth of the time of extraction
    (`benchmarks/extract.py`); light heads in bfloat16 gain as well. The setting is of the whole process and cannot be
    undone, so it is for programs, not for a library call. See mallopt(3).

    Returns:
        True where it took effect; elsewhere than on glibc nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD) and kept)

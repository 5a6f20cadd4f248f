"""Owns arrays too large for memory: nameless temporary files, mapped, of which few pages are resident at a time.

Knows nothing of what the arrays hold. A page of a mapped file that was touched counts as memory of the process until it
is let go of, so whoever reads or fills such an array does it part by part, with the functions here, which take ordinary
arrays as well.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from embedkit.errors import CacheError
from embedkit.files import explain_os_error

__all__ = [
    "allocate",
    "allocate_spilled",
    "convert",
    "copy_slices",
    "is_spilled",
    "release_pages",
    "sample_lattice",
]

Array = NDArray[Any]

_PART = 16 << 20
"""Bytes of a mapped file that are touched before its pages are let go of."""


def allocate(
    shape: tuple[int, ...], dtype: DTypeLike, *, folder: Path | None, most_bytes: int, what: str = "tokens of one stack"
) -> Array:
    """Zeros, in memory or, if they take more than ``most_bytes`` and there is a ``folder``, as `allocate_spilled`."""
    if folder is None or math.prod(shape) * np.dtype(dtype).itemsize <= most_bytes:
        return np.zeros(shape, dtype)
    return allocate_spilled(shape, dtype, folder, what=what)


def allocate_spilled(
    shape: tuple[int, ...], dtype: DTypeLike, folder: Path, *, what: str = "tokens of one stack"
) -> Array:
    """Zeros in a file of ``folder`` that has no name and is gone with the array, however the process ends.

    Args:
        shape: At least one element.
        dtype: Of an element.
        folder: Where there is room for them.
        what: They are, for the message.

    Raises:
        CacheError: there is no room, or the folder is read-only.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is told now, not by a crash later
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise CacheError(
            f"cannot keep {math.ceil(size / (1 << 20))} MiB of {what}: {explain_os_error(error, folder)}"
        ) from error


def is_spilled(array: Array) -> bool:
    """Whether an array is, or is a view of, a mapped file."""
    return _mapping(array) is not None


def release_pages(array: Array) -> None:
    """Lets go of the memory that pages of a mapped file take; what was written to them stays in the file.

    An array in memory is left as it is, and so is a mapped one where the system has no such call (Windows).
    """
    mapping = _mapping(array)
    if mapping is not None and hasattr(mapping, "madvise"):
        mapping.madvise(mmap.MADV_DONTNEED)


def copy_slices(images: Array, chosen: slice | NDArray[np.integer[Any]]) -> Array:
    """A copy in memory, C-contiguous, of ``images[chosen]``.

    Args:
        images: Any array or view with at least one axis.
        chosen: Along the first axis.
    """
    if not is_spilled(images):
        return np.array(images[chosen], order="C")
    first = np.arange(len(images))[chosen]
    copied = np.empty((len(first), *images.shape[1:]), images.dtype)
    axis = _outer_axis(images)
    for part in _parts(images, axis, len(first) if axis == 0 else images.shape[axis]):
        if axis == 0:
            copied[part] = images[first[part]]
        else:
            place = (slice(None),) * axis + (part,)
            copied[place] = images[place][chosen]
        release_pages(images)
    return copied


def sample_lattice(array: Array, step: int) -> Array:
    """Every ``step``-th element, counted along the last axis first, [elements]; a view where the array allows one."""
    if not is_spilled(array):
        return array.reshape(-1)[::step]
    places = np.unravel_index(np.arange(0, array.size, step), array.shape)
    axis = _outer_axis(array)
    sample = np.empty(len(places[axis]), array.dtype)
    for part in _parts(array, axis, array.shape[axis]):
        here = (places[axis] >= part.start) & (places[axis] < part.stop)
        sample[here] = array[tuple(each[here] for each in places)]
        release_pages(array)
    return sample


def convert(array: Array, converted: Array) -> Array:
    """Fills ``converted`` with the values of another array of the same shape, and returns it."""
    for part in _parts(array, 0, len(array)):
        converted[part] = array[part]
        release_pages(array)
        release_pages(converted)
    return converted


def _mapping(array: Array) -> mmap.mmap | None:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


def _outer_axis(array: Array) -> int:
    """The axis along which neighbours lie furthest apart in memory."""
    return int(np.argmax(np.abs(array.strides)))


def _parts(array: Array, axis: int, length: int) -> Iterator[slice]:
    """``length`` places along an axis, in parts that touch about `_PART` bytes of memory each."""
    step = max(1, _PART // max(1, abs(array.strides[axis])))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))

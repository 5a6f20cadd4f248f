"""Owns what every reader takes and hands on: where voxels are put, headers, images as files hold them, their limits.

Knows nothing of any one file format, of SimpleITK and of the canonical index order.
"""

from __future__ import annotations

import lzma
import math
import struct
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from embedkit.errors import VolumeError

__all__ = [
    "DAMAGE",
    "MAX_VOXELS",
    "Allocate",
    "Encoding",
    "SourceHeader",
    "SourceImage",
    "Stop",
    "check_promise",
    "grey_shape",
    "require_going",
]

Array = np.ndarray[Any, Any]

MAX_VOXELS = 2**31
"""A header that promises more voxels than this is taken for damaged."""

_INFLATION = 1032  # deflate never expands more than this (zlib technical details, "Maximum Compression Factor")

# What zlib and zipfile raise on damaged bytes (zipfile RuntimeError for a flag of encryption or an unknown method).
DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    UnicodeDecodeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


Encoding = Literal["raw", "gzip", "zlib", "zip", "itk"]
"""How a file holds its voxels: as they are, in a gzip or zlib stream, as a member of a zip archive, or as ITK knows."""


Stop = threading.Event | None
"""Once set, whoever reads a file ends within a piece of it."""


class Allocate(Protocol):
    """Makes the C-contiguous array, in memory or mapped from a file, that voxels are put into."""

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any], /) -> Array: ...


class SourceHeader(NamedTuple):
    """What a file's header says: enough to know the size of the voxels before any is read."""

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    affine: Array
    offset: int = 0
    slope: float = 1.0
    intercept: float = 0.0
    fortran_order: bool = False
    member: str = ""  # of an npz archive
    payload: Path | None = None  # file of the voxels, where it is not the header's own
    encoding: Encoding = "raw"  # a gzip stream holds a NIfTI's header too


class SourceImage(NamedTuple):
    """An image as its file or files hold it.

    Attributes:
        array: ``[slices height width]`` in the order of the file, slowest axis first; a view where the file runs
            through them in another order.
        affine: float64 ``[4 4]``, (slice, row, column, 1) of ``array`` to RAS+ world mm.
        source_bytes: Bytes of all its files.
        source_digest: SHA-256 over those bytes, in hex.
    """

    array: Array
    affine: Array
    source_bytes: int
    source_digest: str


def require_going(path: Path, stop: Stop) -> None:
    """Ends the reading of an image that nobody waits for any more.

    Raises:
        VolumeError: ``stop`` is set.
    """
    if stop is not None and stop.is_set():
        raise VolumeError("reading was stopped half way; run the same command again", file=path)


def check_promise(path: Path, header: SourceHeader, available: int, *, packed: bool) -> None:
    """Refuses a header that promises more voxels than the bytes that follow it can hold."""
    voxels = math.prod(header.shape)
    if min(header.shape) < 1:
        raise VolumeError(f"has shape {header.shape}, expected at least one voxel along each axis", file=path)
    if voxels > MAX_VOXELS:
        raise VolumeError(
            f"its header promises {header.shape} = {voxels} voxels, more than {MAX_VOXELS}; the header is "
            "damaged, or the image must be cropped first",
            file=path,
        )
    needed = voxels * header.dtype.itemsize
    if needed > available * (_INFLATION if packed else 1):
        raise VolumeError(
            f"its header promises {needed} bytes of voxels but the file holds {max(available, 0)}"
            f"{' compressed' if packed else ''}; it is truncated: copy the file again",
            file=path,
        )


def grey_shape(path: Path, shape: tuple[int, ...], *, trailing: int) -> tuple[int, int, int]:
    """Three axes; an axis of length 1 beyond the third, at index ``trailing`` (0 or -1), is dropped."""
    axes = list(shape)
    while len(axes) > 3 and axes[trailing] == 1:
        axes.pop(trailing)
    if len(axes) > 3:
        more = [length for length in (axes[:-3] if trailing == 0 else axes[3:]) if length > 1]
        colours = f" (RGB{'A' * (more == [4])} colours, or {more[0]} time points)" if more in ([3], [4]) else ""
        raise VolumeError(
            f"has {len(axes)} axes {tuple(axes)}{colours}, expected one grey 3D image; save each time point or "
            "channel as a file of its own",
            file=path,
        )
    if len(axes) < 3:
        raise VolumeError(f"has {len(axes)} axes {tuple(axes)}, expected 3; save a slice as a volume of one", file=path)
    return axes[0], axes[1], axes[2]

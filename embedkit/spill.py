"""Owns arrays too large for memory, in temporary files that have no name; knows nothing of what they hold."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from embedkit.errors import CacheError
from embedkit.files import explain_os_error

__all__ = ["allocate_spilled"]


def allocate_spilled(shape: tuple[int, ...], dtype: DTypeLike, folder: Path) -> NDArray[Any]:
    """Zeros in a file of ``folder`` that has no name and is gone with the array, however the process ends.

    Args:
        shape: At least one element.
        dtype: Of an element.
        folder: Where there is room for them.

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
            f"cannot keep {math.ceil(size / (1 << 20))} MiB of tokens of one stack: {explain_os_error(error, folder)}"
        ) from error

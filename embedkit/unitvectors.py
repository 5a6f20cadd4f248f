"""Owns how given vectors become what is compared: centred, whitened, of length 1, block by block; knows no case.

A block is bounded in bytes, not in rows, so that long vectors take no more memory than short ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from embedkit.errors import SearchError

__all__ = ["Preparation", "measure_mean", "split_rows"]

FloatArray = NDArray[np.float32]

_BLOCK_BYTES = 1 << 25
_MOST_ROWS = 16_384


def split_rows(count: int, dim: int) -> Iterator[slice]:
    """Consecutive rows of ``count`` vectors of length ``dim``, at a time 16,384 at most and 32 MiB of float32."""
    rows = max(1, min(_MOST_ROWS, _BLOCK_BYTES // (4 * dim)))
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


def measure_mean(vectors: Any) -> FloatArray:
    """The mean of vectors [vectors dim], float32 [dim], read in blocks."""
    total = np.zeros(vectors.shape[1])
    for part in split_rows(*vectors.shape):
        total += np.asarray(vectors[part]).sum(0, dtype=np.float64)
    return cast(FloatArray, (total / len(vectors)).astype(np.float32))


@dataclass(frozen=True, eq=False)
class Preparation:
    """What was fitted to vectors, and is done to them and to every query before they are compared.

    Attributes:
        mean: float32 [dim], subtracted; None where they are not centred.
        whitening: float32 [dim kept], then multiplied with; None where they are not whitened.
    """

    mean: FloatArray | None = None
    whitening: FloatArray | None = None

    def __call__(self, vectors: NDArray[Any]) -> FloatArray:
        """Vectors [vectors dim] as they are compared, float32 [vectors kept]; all of them have a direction."""
        moved = self._move(vectors)
        return cast(FloatArray, moved / _measure_lengths(moved)[:, None].astype(np.float32))

    def check(self, vectors: NDArray[Any], name_of: Callable[[int], str]) -> FloatArray:
        """As a call, for vectors that may have no direction.

        Args:
            vectors: [vectors dim].
            name_of: What to call a row in the error.

        Raises:
            SearchError: a vector is zero, before or once it is prepared, or not finite; names the first.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite or NaN is found
            moved = self._move(vectors)
            lengths = _measure_lengths(moved)
        # An image that shows nothing has a vector of zeros; less the mean it would have a direction.
        empty = np.count_nonzero(vectors, axis=1) == 0
        bad = np.flatnonzero(~(lengths <= np.finfo(np.float32).max) | (lengths == 0) | empty)
        if len(bad):
            first = int(bad[0])
            about = "zero" if empty[first] else "zero after centring"
            what = about if empty[first] or lengths[first] == 0 else "not finite (NaN or too large)"
            raise SearchError(f"the vector of {name_of(first)} is {what}: it has no direction to compare; leave it out")
        return cast(FloatArray, moved / lengths[:, None].astype(np.float32))

    def _move(self, vectors: NDArray[Any]) -> FloatArray:
        moved: FloatArray = np.asarray(vectors, np.float32)
        if self.mean is not None:
            moved = moved - self.mean
        return moved if self.whitening is None else moved @ self.whitening


def _measure_lengths(vectors: FloatArray) -> NDArray[np.float64]:
    return cast(NDArray[np.float64], np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)))

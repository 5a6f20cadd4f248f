"""Owns the exact comparison of queries with vectors that come block by block; knows no index and no file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedkit.indextypes import faiss

__all__ = ["find_nearest"]

FloatArray = NDArray[np.float32]
RowArray = NDArray[np.int64]


def find_nearest(
    queries: FloatArray, blocks: Iterable[tuple[RowArray, NDArray[Any]]], k: int
) -> tuple[FloatArray, RowArray]:
    """The k vectors of the greatest inner product with each query, by matrix products; memory is that of a block.

    Args:
        queries: float32 [queries dim].
        blocks: Rows and their vectors, [rows] and float32 [rows dim]; no row twice.
        k: At least 1.

    Returns:
        Similarities and rows, [queries k] each, the greatest first and of equals the higher row, as FAISS has
        them; -inf and -1 where there are fewer.
    """
    best = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    for numbers, vectors in blocks:
        if not len(numbers):
            continue
        found, places = faiss.knn(queries, vectors, min(k, len(numbers)), metric=faiss.METRIC_INNER_PRODUCT)
        joined, owners = np.concatenate([best, found], 1), np.concatenate([rows, numbers[places]], 1)
        order = np.lexsort((-owners, -joined), axis=1)[:, :k]
        best, rows = np.take_along_axis(joined, order, 1), np.take_along_axis(owners, order, 1)
    return best, rows

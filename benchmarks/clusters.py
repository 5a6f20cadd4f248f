"""Owns made-up vectors to search among, and which of them are nearest by an exact comparison; measures no time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedkit.tuning import DEPTH

BATCH = 50_000
QUERIES = 256
LATENT = 48


def make_vectors(file: Path, size: int, dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors of length 1 in a file, mapped, and queries of the same make."""
    random = np.random.default_rng(0)
    turn = random.standard_normal((LATENT, dim)).astype(np.float32)
    centres = random.standard_normal((max(16, size // 200), LATENT)).astype(np.float32)

    def draw(count: int) -> NDArray[np.float32]:
        latent = centres[random.integers(len(centres), size=count)]
        latent = latent + 0.6 * random.standard_normal(latent.shape, np.float32)
        found = latent @ turn + 0.5 * random.standard_normal((count, dim), np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    vectors = np.lib.format.open_memmap(file, "w+", np.float32, (size, dim))
    for start in range(0, size, BATCH):
        vectors[start : start + BATCH] = draw(min(BATCH, size - start))
    vectors.flush()
    return vectors, draw(QUERIES)


def find_nearest(vectors: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rows of the ten vectors that are nearest by an exact comparison, [queries 10]."""
    best, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start in range(0, len(vectors), BATCH):
        found = queries @ vectors[start : start + BATCH].T
        places = np.argpartition(-found, DEPTH, axis=1)[:, :DEPTH]
        best = np.concatenate([best, np.take_along_axis(found, places, 1)], 1)
        rows = np.concatenate([rows, places + start], 1)
        kept = np.argsort(-best, axis=1)[:, :DEPTH]
        best, rows = np.take_along_axis(best, kept, 1), np.take_along_axis(rows, kept, 1)
    return rows


def measure_overlap(rows: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    return sum(len(np.intersect1d(mine, true)) for mine, true in zip(rows, truth, strict=True)) / truth.size

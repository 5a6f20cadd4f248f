"""Owns the table of what a search found, from rows of vectors; searches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

__all__ = ["list_hits", "pick_first"]

FloatArray = NDArray[np.float32]
RowArray = NDArray[np.int64]

_NAMES = ("case_id", "patient_id")


def list_hits(
    similarities: FloatArray,
    rows: RowArray,
    cases: pl.DataFrame,
    *,
    slices: pl.DataFrame | None = None,
    case_of: RowArray | None = None,
) -> pl.DataFrame:
    """What was found as a table, in the order of queries and ranks; a row of -1 is nothing.

    Args:
        similarities: float32 [queries found].
        rows: Of vectors, int64 [queries found], most similar first.
        cases: case_id, patient_id and metadata.
        slices: Where vectors are slices: ``view``, ``plane`` and ``slice`` of each.
        case_of: There the case of each vector, a row of ``cases``; None where vectors are cases.

    Returns:
        ``query``, ``rank``, ``case_id``, ``patient_id``, ``similarity``, those of slices, further columns of ``cases``.
    """
    found = rows >= 0
    chosen = rows[found]
    of_cases = chosen if case_of is None else case_of[chosen]
    return pl.DataFrame(
        [
            pl.Series("query", np.repeat(np.arange(len(rows)), found.sum(1))),
            pl.Series("rank", found.cumsum(1)[found].astype(np.int64)),
            *_gather(cases, of_cases, _NAMES),
            pl.Series("similarity", np.clip(similarities[found], -1, 1)),
            *([] if slices is None else _gather(slices, chosen, ("view", "plane", "slice"))),
            *_gather(cases, of_cases, [name for name in cases.columns if name not in _NAMES]),
        ]
    )


def pick_first(rows: RowArray, keep: NDArray[np.bool_], k: int) -> RowArray:
    """Rows [queries found] with -1 in the place of what is not among the first k to be kept of each query."""
    return cast(RowArray, np.where(keep & (keep.cumsum(1) <= k), rows, -1))


def _gather(table: pl.DataFrame, rows: RowArray, names: Sequence[str]) -> list[pl.Series]:
    """Columns of some rows; column by column, since a whole frame is gathered by threads that cost more than this."""
    return [table[name][rows] for name in names]

"""Owns the stack table of a whole cache: the tables of its shards joined and duplicates resolved; opens no file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.errors import CacheError
from embedkit.orientation import canonical_axes
from embedkit.shards import Shard
from embedkit.tables import TEXT_COLUMNS

__all__ = ["STACK_KEY", "StackRecord", "canonical_shape", "join_tables", "stack_record"]

STACK_KEY = ("case_id", "view", "plane")
"""The columns that name a stack within a cache."""

_SOURCES: dict[str, pl.DataType] = {"text": pl.String(), "names": pl.List(pl.String())}


@dataclass(frozen=True)
class StackRecord:
    """One row of a cache's stack table as plain values; see `StackTokens` for the fields' meaning."""

    case_id: str
    patient_id: str
    view: str
    plane: str
    sources: tuple[str, ...]
    plane_shape: tuple[int, int]
    box: tuple[int, int, int, int]
    source_shape: tuple[int, int, int]
    source_affine: NDArray[np.float64]
    source_bytes: int
    source_modified_ns: int
    source_digest: str


def join_tables(shards: Sequence[Shard]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Joins the tables of shards given from the oldest to the newest.

    Returns:
        The stack table, sorted by case, view and plane whatever the shards: columns ``stack`` (0, 1, ...), ``shard``
        (file name), ``shard_number`` (place in ``shards``), ``case_id``, ``patient_id``, ``view``, ``plane``,
        ``sources``, ``first_row``, ``count``, ``blank_count``, ``source_affine`` [4 4], ``source_shape`` [3], ``box``
        [4], ``plane_shape`` [2], ``source_bytes``,
        ``source_modified_ns``, ``source_digest``.
        The duplicates left out of it: ``case_id``, ``view``, ``plane``, ``shard`` (left out), ``kept_shard``,
        ``source_changed`` (the kept one was made from other bytes).

    Raises:
        CacheError: the ``sources`` of a stack are no list of names.
    """
    everything = pl.DataFrame(_columns(shards))
    kept = everything.unique(STACK_KEY, keep="last", maintain_order=True)
    duplicates = _list_duplicates(everything, kept)
    stacks = kept.sort(STACK_KEY).drop("row").with_row_index("stack").cast({"stack": pl.Int64})
    return stacks, duplicates


def _columns(shards: Sequence[Shard]) -> dict[str, pl.Series]:
    numbers = np.repeat(np.arange(len(shards)), [len(shard.stacks) for shard in shards])
    names = [shard.path.name for shard in shards]
    columns = {
        "row": pl.Series(np.arange(len(numbers))),
        "shard": pl.Series([names[number] for number in numbers.tolist()], dtype=pl.String),
        "shard_number": pl.Series(numbers),
    }
    for name in TEXT_COLUMNS:
        texts = [text for shard in shards for text in shard.stacks[name].tolist()]
        columns[name] = pl.Series(texts, dtype=pl.Binary).cast(pl.String)
    columns["sources"] = _parse_sources(columns["sources"], shards)
    columns["first_row"] = pl.Series(_joined(shards, "first_row", np.int64))
    columns["count"] = pl.Series(_joined(shards, "count", np.int64))
    columns["blank_count"] = pl.Series(_blank_counts(shards))
    kinds: dict[str, tuple[Any, tuple[int, ...]]] = {
        "source_affine": (np.float64, (4, 4)),
        "source_shape": (np.int32, (3,)),
        "box": (np.int32, (4,)),
        "plane_shape": (np.int32, (2,)),
        "source_bytes": (np.int64, ()),
        "source_modified_ns": (np.int64, ()),
    }
    for name, (dtype, shape) in kinds.items():
        columns[name] = pl.Series(_joined(shards, name, dtype, shape))
    return columns


def _joined(shards: Sequence[Shard], name: str, dtype: Any, shape: tuple[int, ...] = ()) -> NDArray[Any]:
    parts = [shard.stacks[name].astype(dtype) for shard in shards]
    return np.concatenate([np.empty((0, *shape), dtype), *parts])


def _blank_counts(shards: Sequence[Shard]) -> NDArray[np.int64]:
    parts = [
        np.add.reduceat(shard.slices["blank"].astype(np.int64), shard.stacks["first_row"].astype(np.intp))
        for shard in shards
    ]
    return np.concatenate([np.empty(0, np.int64), *parts])


def _parse_sources(texts: pl.Series, shards: Sequence[Shard]) -> pl.Series:
    parsed: dict[str, list[str]] = {}
    for text in texts.unique().to_list():
        try:
            names = json.loads(text)
        except (ValueError, RecursionError):
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            where = shards[0].path.parent if shards else Path()
            raise CacheError(f"a shard in {where} has sources {text[:80]!r}, expected a JSON list of view names")
        parsed[text] = names
    lookup = pl.DataFrame({"text": list(parsed), "names": list(parsed.values())}, schema=_SOURCES)
    return texts.to_frame("text").join(lookup, on="text", how="left", maintain_order="left")["names"]


def _list_duplicates(everything: pl.DataFrame, kept: pl.DataFrame) -> pl.DataFrame:
    dropped = everything.join(kept.select("row"), on="row", how="anti")
    winners = kept.select(*STACK_KEY, kept_shard="shard", kept_digest="source_digest")
    return (
        dropped.join(winners, on=STACK_KEY, how="left")
        .with_columns(source_changed=pl.col("source_digest") != pl.col("kept_digest"))
        .select(*STACK_KEY, "shard", "kept_shard", "source_changed")
        .sort(*STACK_KEY, "shard")
    )


def canonical_shape(record: StackRecord) -> tuple[int, int, int]:
    """Shape of the canonical volume that a stack was cut from."""
    order, _ = canonical_axes(record.source_affine)
    depth, height, width = (int(record.source_shape[axis]) for axis in order)
    return depth, height, width


def stack_record(stacks: pl.DataFrame, stack: int) -> StackRecord:
    """Row ``stack`` of a stack table as plain values."""
    row = stacks.row(stack, named=True)
    return StackRecord(
        case_id=row["case_id"],
        patient_id=row["patient_id"],
        view=row["view"],
        plane=row["plane"],
        sources=tuple(row["sources"]),
        plane_shape=tuple(row["plane_shape"]),
        box=tuple(row["box"]),
        source_shape=tuple(row["source_shape"]),
        source_affine=np.array(row["source_affine"], dtype=np.float64),
        source_bytes=row["source_bytes"],
        source_modified_ns=row["source_modified_ns"],
        source_digest=row["source_digest"],
    )

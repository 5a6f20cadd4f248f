"""Owns the packing of a cache into one file, in memory that does not grow with it; changes no token."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedkit.cache import Cache, open_cache
from embedkit.errors import CacheError
from embedkit.failures import read_failures
from embedkit.files import explain_os_error, remove_stale
from embedkit.seal import CHUNK_BYTES
from embedkit.sealing import write_sealed
from embedkit.shards import Shard
from embedkit.tables import SLICE_DTYPE, TEXT_COLUMNS, Table, stack_dtype

__all__ = ["PackSummary", "pack_cache"]


@dataclass(frozen=True)
class PackSummary:
    """What packing did.

    Attributes:
        path: The packed file.
        bytes: Its size.
        stacks: How many it holds.
        duplicates: Copies of stacks left out.
        failures: Cases recorded as failed in the cache; the packed file does not tell of them.
    """

    path: Path
    bytes: int
    stacks: int
    duplicates: int
    failures: int


def pack_cache(path: Path | str, out: Path | str, *, progress: Callable[[int, int], None] | None = None) -> PackSummary:
    """Merges all shards of a cache into one file that opens like the cache; equal caches give equal files.

    Every byte read is checked, so that no damage is packed. Killing it at any instant leaves no file named ``out``.

    Args:
        path: The cache.
        out: The file to write; must not exist nor lie inside the cache.
        progress: Called with (bytes done, bytes in all).

    Raises:
        CacheError: ``out`` exists, the cache is empty or damaged, disk full, or read-only folder.
    """
    path, out = Path(path), Path(out)
    if out.exists():
        raise CacheError(f"{out} exists; choose another name or delete it first")
    if out.absolute().parent.resolve().is_relative_to(path.resolve()):
        raise CacheError(f"{out} lies inside the cache {path}; choose a place outside of it")
    with open_cache(path) as cache:
        if not len(cache):
            raise CacheError(f"cache {path} holds no stack yet; there is nothing to pack")
        try:
            remove_stale(out.absolute().parent)
        except OSError as error:
            raise CacheError(f"cannot pack: {explain_os_error(error, out.parent)}") from error
        _write_packed(cache, out, progress)
    failures = len(read_failures(path).failures) if path.is_dir() else 0
    return PackSummary(out, out.stat().st_size, len(cache), len(cache.duplicates), failures)


def _write_packed(cache: Cache, out: Path, progress: Callable[[int, int], None] | None) -> None:
    kept = _kept_stacks(cache)
    slices = np.concatenate([np.empty(0, SLICE_DTYPE), *map(_kept_slices, cache.shards, kept)])
    arrays = {
        name: ((len(slices), *place.shape[1:]), place.dtype.str) for name, place in cache.shards[0].arrays.items()
    }
    total = sum(place.bytes for shard in cache.shards for place in shard.arrays.values())
    done = 0

    def chunks(name: str) -> Iterator[NDArray[np.uint8]]:
        nonlocal done
        for shard, rows in zip(cache.shards, kept, strict=True):
            for piece, parts in _region_pieces(shard, name, rows):
                yield from parts
                done += piece
                if progress is not None:
                    progress(done, total)

    try:
        write_sealed(
            out,
            recipe=cache.recipe,
            stacks=_joined_stacks([shard.stacks[rows] for shard, rows in zip(cache.shards, kept, strict=True)]),
            slices=slices,
            arrays=arrays,
            chunks=chunks,
            created_ns=cache.shards[-1].seal.created_ns,
        )
    except FileExistsError as error:
        raise CacheError(f"{out} exists; choose another name or delete it first") from error


def _kept_stacks(cache: Cache) -> list[NDArray[np.intp]]:
    """Per shard, the rows of its stack table that are no duplicates, ascending."""
    numbers, first = cache.stacks["shard_number"].to_numpy(), cache.stacks["first_row"].to_numpy()
    return [
        np.flatnonzero(np.isin(shard.stacks["first_row"], first[numbers == number]))
        for number, shard in enumerate(cache.shards)
    ]


def _kept_slices(shard: Shard, rows: NDArray[np.intp]) -> Table:
    keep = np.repeat(np.isin(np.arange(len(shard.stacks)), rows), shard.stacks["count"])
    table = np.zeros(int(keep.sum()), SLICE_DTYPE)
    for name in SLICE_DTYPE.names or ():
        table[name] = shard.slices[name][keep]
    return table


def _joined_stacks(tables: Sequence[Table]) -> Table:
    lengths = {name: max(table.dtype[name].itemsize for table in tables) for name in TEXT_COLUMNS}
    joined = np.zeros(sum(map(len, tables)), stack_dtype(lengths))
    for name in joined.dtype.names or ():
        joined[name] = np.concatenate([table[name] for table in tables])
    joined["first_row"] = np.cumsum(joined["count"], dtype=np.int64) - joined["count"]
    return joined


def _region_pieces(shard: Shard, name: str, rows: NDArray[np.intp]) -> Iterator[tuple[int, list[NDArray[np.uint8]]]]:
    """Reads a whole region in pieces: (bytes read, the parts of them that belong to the stacks in ``rows``)."""
    place, digest = shard.arrays[name], hashlib.sha256()
    row_bytes = place.bytes // place.shape[0]
    starts = shard.stacks["first_row"][rows] * row_bytes
    stops = starts + shard.stacks["count"][rows].astype(np.int64) * row_bytes
    position = 0
    try:
        with shard.path.open("rb", buffering=0) as file:
            file.seek(place.offset)
            while position < place.bytes:
                data = file.read(min(CHUNK_BYTES, place.bytes - position))
                if not data:
                    raise CacheError(f"{shard.path} is damaged: it ends early; run embedkit verify")
                digest.update(data)
                piece = np.frombuffer(data, np.uint8)
                first, last = np.maximum(starts - position, 0), np.minimum(stops - position, len(piece))
                parts = [piece[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True) if a < b]
                yield len(piece), parts
                position += len(piece)
    except OSError as error:
        raise CacheError(f"cannot read shard: {explain_os_error(error, shard.path)}") from error
    if digest.hexdigest() != next(region.sha256 for region in shard.seal.regions if region.name == name):
        raise CacheError(f"{shard.path} is damaged: {name} is not what was written; run embedkit verify")

"""Owns the packing of a cache into one file or few, in memory that does not grow with it; changes no token."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedkit.cache import Cache, open_cache
from embedkit.errors import CacheError, OptionError
from embedkit.failures import FAILURES_FILE, FailureLog, read_failures
from embedkit.files import explain_os_error, remove_stale, sync_folder, temporary_path, write_new_file
from embedkit.folder import create_cache, shard_path
from embedkit.seal import CHUNK_BYTES
from embedkit.sealing import write_sealed
from embedkit.shards import ArrayPlace, Shard
from embedkit.tables import SLICE_DTYPE, TEXT_COLUMNS, Table, stack_dtype
from embedkit.tails import copy_tail

__all__ = ["PackSummary", "pack_cache"]

Progress = Callable[[int, int], None]
Selection = list[tuple[int, NDArray[np.intp]]]
"""What a packed shard holds, in order: (number of a shard, rows of its stack table, ascending)."""


@dataclass(frozen=True)
class PackSummary:
    """What packing did.

    Attributes:
        path: The packed file, or the folder of the packed cache.
        bytes: Size of its shards.
        stacks: How many it holds.
        shards: In how many files.
        duplicates: Copies of stacks left out.
        failures: Cases recorded as failed in the cache that what was packed does not tell of: a folder keeps the
            record, a file cannot.
        strays: Damaged DICOM files on record there, in the same way.
    """

    path: Path
    bytes: int
    stacks: int
    shards: int
    duplicates: int
    failures: int
    strays: int


def pack_cache(
    path: Path | str, out: Path | str, *, shard_bytes: int | None = None, progress: Progress | None = None
) -> PackSummary:
    """Merges the shards of a cache into one file, or few, that open like the cache; equal caches give equal files.

    Every byte is checked, so that no damage is packed. Killing it at any instant leaves nothing named ``out``.

    Args:
        path: The cache.
        out: What to write; must not exist nor lie inside the cache.
        shard_bytes: None writes one file. A number makes ``out`` a cache folder whose shards have at most about so
            many bytes; all stacks of a case are in one, which is larger only where one case is.
        progress: Called with (bytes done, bytes in all). With ``shard_bytes`` all is read twice: checked, then copied.

    Raises:
        CacheError: ``out`` exists, the cache is empty or damaged, disk full, or read-only folder.
        OptionError: ``shard_bytes`` is not above 0.
    """
    path, out = Path(path), Path(out)
    if shard_bytes is not None and shard_bytes < 1:
        raise OptionError(f"shards of {shard_bytes} bytes cannot be; give a size above 0, for example 1GB")
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
        if shard_bytes is None:
            copy_tail(path, out)
            sizes = [_write_file(cache, out, progress)]
        else:
            sizes = _write_folder(cache, out, shard_bytes, progress)
    log = read_failures(path) if path.is_dir() and shard_bytes is None else FailureLog((), ())
    untold = len(log.failures), len(log.strays)
    return PackSummary(out, sum(sizes), len(cache), len(sizes), len(cache.duplicates), *untold)


def _write_file(cache: Cache, out: Path, progress: Progress | None) -> int:
    """Writes all stacks to one file, each byte checked as it is read; returns its size."""
    kept = _kept_stacks(cache)
    report = _Meter(progress, _token_bytes(cache))

    def chunks(name: str) -> Iterator[NDArray[np.uint8]]:
        for shard, rows in zip(cache.shards, kept, strict=True):
            for piece, parts in _region_pieces(shard, name, rows):
                yield from parts
                report.advance(piece)

    try:
        _write_selection(cache, list(enumerate(kept)), out, chunks)
    except FileExistsError as error:
        raise CacheError(f"{out} exists; choose another name or delete it first") from error
    except OSError as error:
        raise CacheError(f"cannot pack: {explain_os_error(error, out.absolute().parent)}") from error
    return out.stat().st_size


def _write_folder(cache: Cache, out: Path, shard_bytes: int, progress: Progress | None) -> list[int]:
    """Writes a cache folder of shards of about this size, complete before it has its name; returns their sizes."""
    report = _Meter(progress, 2 * _token_bytes(cache))
    for shard in cache.shards:
        for name in shard.arrays:
            for piece, _ in _region_pieces(shard, name, np.empty(0, np.intp)):
                report.advance(piece)
    temporary = temporary_path(out.absolute())
    created_ns = cache.shards[-1].seal.created_ns
    try:
        create_cache(temporary, cache.recipe)
        if (log := cache.path / FAILURES_FILE).is_file():
            write_new_file(temporary / FAILURES_FILE, log.read_bytes())
        copy_tail(cache.path, temporary)
        files = []
        for number, selection in enumerate(_split_cases(cache, shard_bytes)):
            files.append(shard_path(temporary, created_ns, f"{number:016x}"))
            _write_selection(cache, selection, files[-1], _copied_rows(cache, selection, report))
        sizes = [file.stat().st_size for file in files]
        sync_folder(temporary)
        temporary.rename(out)
        sync_folder(out.absolute().parent)
    except OSError as error:
        raise CacheError(f"cannot pack: {explain_os_error(error, out)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    report.finish()
    return sizes


class _Meter:
    """Adds up the bytes done and tells them."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)

    def finish(self) -> None:
        """Counts what was left out, the duplicates, as done; where nothing was, the end has been told already."""
        if left := self._total - self._done:
            self.advance(left)


def _token_bytes(cache: Cache) -> int:
    return sum(place.bytes for shard in cache.shards for place in shard.arrays.values())


def _write_selection(
    cache: Cache, selection: Selection, out: Path, chunks: Callable[[str], Iterator[NDArray[np.uint8]]]
) -> None:
    """Writes one shard that holds these stacks."""
    stacks = _joined_stacks([cache.shards[number].stacks[rows] for number, rows in selection])
    slices = np.concatenate([_slices_of(cache.shards[number], rows) for number, rows in selection])
    arrays = {
        name: ((len(stacks if _by_stack(name) else slices), *place.shape[1:]), place.dtype.str)
        for name, place in cache.shards[0].arrays.items()
    }
    write_sealed(
        out,
        recipe=cache.recipe,
        stacks=stacks,
        slices=slices,
        arrays=arrays,
        chunks=chunks,
        created_ns=cache.shards[-1].seal.created_ns,
    )


def _by_stack(name: str) -> bool:
    """Whether the rows of an array are stacks; else they are slices."""
    return name.startswith("channels/")


def _kept_stacks(cache: Cache) -> list[NDArray[np.intp]]:
    """Per shard, the rows of its stack table that are no duplicates, ascending."""
    numbers, first = cache.stacks["shard_number"].to_numpy(), cache.stacks["first_row"].to_numpy()
    return [
        np.flatnonzero(np.isin(shard.stacks["first_row"], first[numbers == number]))
        for number, shard in enumerate(cache.shards)
    ]


def _split_cases(cache: Cache, shard_bytes: int) -> Iterator[Selection]:
    """Shares the stacks out, case by case in the order in which the shards first have them."""
    places: dict[bytes, list[tuple[int, int]]] = {}
    for number, rows in enumerate(_kept_stacks(cache)):
        for row, case_id in zip(rows.tolist(), cache.shards[number].stacks["case_id"][rows].tolist(), strict=True):
            places.setdefault(case_id, []).append((number, row))
    per_slice, per_stack = _row_bytes(cache)
    chosen: list[tuple[int, int]] = []
    filled = 0
    for stacks in places.values():
        size = sum(int(cache.shards[number].stacks["count"][row]) * per_slice + per_stack for number, row in stacks)
        if chosen and filled + size > shard_bytes:
            yield _by_shard(chosen)
            chosen, filled = [], 0
        chosen += stacks
        filled += size
    yield _by_shard(chosen)


def _by_shard(stacks: list[tuple[int, int]]) -> Selection:
    """Runs of stacks of one shard, in the order given."""
    return [
        (number, np.array([row for _, row in run], np.intp)) for number, run in groupby(stacks, lambda stack: stack[0])
    ]


def _row_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes per slice and per stack, tables included."""
    shard = cache.shards[0]
    sizes = {name: place.bytes // place.shape[0] for name, place in shard.arrays.items()}
    per_stack = sum(size for name, size in sizes.items() if _by_stack(name)) + shard.stacks.dtype.itemsize
    return sum(size for name, size in sizes.items() if not _by_stack(name)) + SLICE_DTYPE.itemsize, per_stack


def _slices_of(shard: Shard, rows: NDArray[np.intp]) -> Table:
    keep = _row_numbers(shard, rows)
    table = np.zeros(len(keep), SLICE_DTYPE)
    for name in SLICE_DTYPE.names or ():
        table[name] = shard.slices[name][keep]
    return table


def _row_numbers(shard: Shard, rows: NDArray[np.intp]) -> NDArray[np.int64]:
    """The slices of these stacks, in their order."""
    first, count = shard.stacks["first_row"][rows], shard.stacks["count"][rows].astype(np.int64)
    before = np.cumsum(count) - count
    return np.repeat(first - before, count) + np.arange(int(count.sum()))


def _joined_stacks(tables: Sequence[Table]) -> Table:
    lengths = {name: max(table.dtype[name].itemsize for table in tables) for name in TEXT_COLUMNS}
    joined = np.zeros(sum(map(len, tables)), stack_dtype(lengths))
    for name in joined.dtype.names or ():
        joined[name] = np.concatenate([table[name] for table in tables])
    joined["first_row"] = np.cumsum(joined["count"], dtype=np.int64) - joined["count"]
    return joined


def _spans(shard: Shard, name: str, rows: NDArray[np.intp]) -> tuple[ArrayPlace, NDArray[np.int64], NDArray[np.int64]]:
    """An array's place, and where in it the bytes of each of these stacks begin and end."""
    place = shard.arrays[name]
    row_bytes = place.bytes // place.shape[0]
    if _by_stack(name):
        return place, rows * row_bytes, (rows + 1) * row_bytes
    starts = shard.stacks["first_row"][rows] * row_bytes
    return place, starts, starts + shard.stacks["count"][rows].astype(np.int64) * row_bytes


def _copied_rows(cache: Cache, selection: Selection, report: _Meter) -> Callable[[str], Iterator[NDArray[np.uint8]]]:
    """Reads the bytes of these stacks alone, from regions that have been checked."""

    def chunks(name: str) -> Iterator[NDArray[np.uint8]]:
        for number, rows in selection:
            place, starts, stops = _spans(cache.shards[number], name, rows)
            for start, stop in _merge_spans(starts.tolist(), stops.tolist()):
                for data in _read_span(cache.shards[number].path, place.offset + start, stop - start):
                    yield np.frombuffer(data, np.uint8)
                    report.advance(len(data))

    return chunks


def _merge_spans(starts: list[int], stops: list[int]) -> Iterator[tuple[int, int]]:
    """Spans in order, those that touch made one."""
    first, last = starts[0], stops[0]
    for start, stop in zip(starts[1:], stops[1:], strict=True):
        if start != last:
            yield first, last
            first = start
        last = stop
    yield first, last


def _region_pieces(shard: Shard, name: str, rows: NDArray[np.intp]) -> Iterator[tuple[int, list[NDArray[np.uint8]]]]:
    """Reads and checks a whole region in pieces: (bytes read, the parts of them that belong to these stacks)."""
    place, starts, stops = _spans(shard, name, rows)
    digest, position = hashlib.sha256(), 0
    for data in _read_span(shard.path, place.offset, place.bytes):
        digest.update(data)
        piece = np.frombuffer(data, np.uint8)
        first, last = np.maximum(starts - position, 0), np.minimum(stops - position, len(piece))
        yield len(piece), [piece[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True) if a < b]
        position += len(piece)
    if digest.hexdigest() != next(region.sha256 for region in shard.seal.regions if region.name == name):
        raise CacheError(f"{shard.path} is damaged: {name} is not what was written; run embedkit verify")


def _read_span(path: Path, offset: int, count: int) -> Iterator[bytes]:
    """``count`` bytes from ``offset`` on, in pieces."""
    left = count
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while left:
                data = file.read(min(CHUNK_BYTES, left))
                if not data:
                    raise CacheError(f"{path} is damaged: it ends early; run embedkit verify")
                yield data
                left -= len(data)
    except OSError as error:
        raise CacheError(f"cannot read shard: {explain_os_error(error, path)}") from error

"""Owns the writing of one shard, whole or not at all; knows no folder of shards.

HDF5 lays the file out in memory, which gives its structure and the place of every array; then the file is written from
start to end with plain writes, arrays hashed on the way, sealed, made durable and given its name.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from embedkit.blocks import BlockSums, block_size
from embedkit.errors import CacheError
from embedkit.files import publish_file, temporary_path
from embedkit.recipe import Recipe
from embedkit.seal import CHUNK_BYTES, FORMAT, FORMAT_VERSIONS, Region, Seal, userblock_bytes
from embedkit.shards import ArrayPlace
from embedkit.spill import release_pages
from embedkit.tables import Table

__all__ = ["array_chunks", "write_sealed"]

_ALIGNMENT = 4096


class _SparseFile(io.RawIOBase):
    """What HDF5 writes, kept in memory by pages: a file of any size of which only the written pages take room."""

    def __init__(self) -> None:
        super().__init__()
        self._pages: dict[int, bytearray] = {}
        self._position = 0
        self.size = 0

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for page, start, stop, done in self._parts(len(view)):
            self._pages.setdefault(page, bytearray(_ALIGNMENT))[start:stop] = view[done : done + stop - start]
        self._position += len(view)
        self.size = max(self.size, self._position)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        for page, start, stop, done in self._parts(len(view)):
            view[done : done + stop - start] = self._pages.get(page, bytes(_ALIGNMENT))[start:stop]
        self._position += len(view)
        return len(view)

    def _parts(self, count: int) -> Iterator[tuple[int, int, int, int]]:
        """(page, start, stop, bytes before) of the pages that ``count`` bytes from the position on touch."""
        done = 0
        while done < count:
            page, start = divmod(self._position + done, _ALIGNMENT)
            stop = min(_ALIGNMENT, start + count - done)
            yield page, start, stop, done
            done += stop - start


@cache
def _embedkit_version() -> str:
    try:
        return version("embedkit")
    except PackageNotFoundError:
        return "unknown"


def write_sealed(
    final: Path,
    *,
    recipe: Recipe,
    stacks: Table,
    slices: Table,
    arrays: Mapping[str, tuple[tuple[int, ...], str]],
    chunks: Callable[[str], Iterable[NDArray[np.uint8]]],
    created_ns: int,
) -> None:
    """Writes one shard durably and under its final name only when it is whole.

    Args:
        final: Must not exist.
        recipe: What the tokens were made by.
        stacks: The stack table, its rows tiling ``slices``.
        slices: The slice table.
        arrays: Dataset name to (shape, dtype).
        chunks: Gives the bytes of a dataset, in order, in pieces of any size; called once per dataset, in file order.
        created_ns: Orders shards that hold the same stack: the newest counts.

    Raises:
        FileExistsError: ``final`` exists.
        OSError: disk full or read-only folder; nothing is left behind. The caller knows what to do about it.
        CacheError: ``chunks`` gives not as many bytes as the table says, or raised it; nothing is left behind.
    """
    skeleton, places = _lay_out(recipe, stacks, slices, arrays, created_ns)
    temporary = temporary_path(final)
    try:
        with temporary.open("xb") as file:
            _write_body(
                file,
                skeleton,
                places,
                recipe=recipe,
                chunks=chunks,
                created_ns=created_ns,
            )
        publish_file(temporary, final)
    finally:
        if temporary.exists():  # unlinking what is not there is an error on a read-only disk
            temporary.unlink(missing_ok=True)


def _lay_out(
    recipe: Recipe,
    stacks: Table,
    slices: Table,
    arrays: Mapping[str, tuple[tuple[int, ...], str]],
    created_ns: int,
) -> tuple[_SparseFile, dict[str, ArrayPlace]]:
    """The HDF5 file without its arrays, and their places in file order, behind everything else."""
    smallest = min(
        int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
        for name, (shape, dtype) in arrays.items()
        if not name.startswith(("scales/", "channels/"))  # smaller than tokens, they may lie anywhere
    )
    skeleton = _SparseFile()
    places = {}
    with h5py.File(
        skeleton,
        "w",
        libver=("v108", "v110"),
        userblock_size=userblock_bytes(
            {
                name: int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
                for name, (shape, dtype) in arrays.items()
            }
        ),
        alignment_threshold=min(smallest, 1 << 16),
        alignment_interval=_ALIGNMENT,
    ) as file:
        texts = {"format": FORMAT, "recipe": recipe.to_json(), "fingerprint": recipe.fingerprint}
        for name, text in (texts | {"embedkit_version": _embedkit_version()}).items():
            file.attrs.create(name, text.encode(), dtype=h5py.string_dtype("utf-8", len(text.encode())))
        file.attrs.create("format_version", FORMAT_VERSIONS[recipe.dtype], dtype="<i8")
        file.attrs.create("created_ns", created_ns, dtype="<i8")
        file.create_dataset("stacks", data=stacks)
        file.create_dataset("slices", data=slices)
        made = {name: _create_array(file, name, shape, dtype) for name, (shape, dtype) in arrays.items()}
        for name, dataset in made.items():
            dataset[(0,) * dataset.ndim] = 0  # HDF5 gives an array its place when its first element is written
            places[name] = ArrayPlace(dataset.id.get_offset(), dataset.shape, dataset.dtype)
    return skeleton, dict(sorted(places.items(), key=lambda item: item[1].offset))


def _create_array(file: Any, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """A contiguous dataset that has no place in the file yet and is never filled."""
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_layout(h5py.h5d.CONTIGUOUS)
    options.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
    options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    options.set_obj_track_times(False)
    folder, _, leaf = name.rpartition("/")
    group = file.require_group(folder) if folder else file
    kind, space = h5py.h5t.py_create(np.dtype(dtype)), h5py.h5s.create_simple(shape)
    return h5py.Dataset(h5py.h5d.create(group.id, leaf.encode(), kind, space, options))


def _write_body(
    file: BinaryIO,
    skeleton: _SparseFile,
    places: Mapping[str, ArrayPlace],
    *,
    recipe: Recipe,
    chunks: Callable[[str], Iterable[NDArray[np.uint8]]],
    created_ns: int,
) -> None:
    """Writes everything from start to end, then the seal at the start."""
    userblock = userblock_bytes({name: place.bytes for name, place in places.items()})
    file.write(bytes(userblock))
    metadata, regions = hashlib.sha256(), []
    empty = tuple(Region(name, place.offset, place.bytes, "") for name, place in places.items())
    spans = Seal(userblock, skeleton.size, created_ns, "", "", empty).metadata_spans()
    pieces: list[tuple[int, int, str]] = [(start, stop, "") for start, stop in spans]
    pieces += [(place.offset, place.offset + place.bytes, name) for name, place in places.items()]
    for start, stop, name in sorted(pieces):
        if name:
            regions.append(_write_region(file, chunks(name), Region(name, start, stop - start, "")))
        else:
            skeleton.seek(start)
            piece = skeleton.read(stop - start) or b""
            metadata.update(piece)
            file.write(piece)
    seal = Seal(
        userblock,
        skeleton.size,
        created_ns,
        recipe.fingerprint,
        metadata.hexdigest(),
        tuple(regions),
        FORMAT_VERSIONS[recipe.dtype],
    )
    file.seek(0)
    file.write(seal.to_bytes())


def _write_region(file: BinaryIO, chunks: Iterable[NDArray[np.uint8]], region: Region) -> Region:
    """Writes an array and returns its region with the checksums."""
    block_bytes = block_size(region.bytes)
    digest, sums, written = hashlib.sha256(), BlockSums(block_bytes), 0
    for chunk in chunks:
        digest.update(chunk.data)
        sums.update(chunk.data)
        file.write(chunk.data)
        written += chunk.nbytes
    if written != region.bytes:
        raise CacheError(f"{region.name} has {written} bytes, its table says {region.bytes}; the shard was not written")
    return replace(region, sha256=digest.hexdigest(), block_bytes=block_bytes, sums=sums.finish())


def array_chunks(arrays: Sequence[NDArray[Any]]) -> Iterator[NDArray[np.uint8]]:
    """The bytes of arrays that lie one after the other in a dataset, without copying those already contiguous."""
    for array in arrays:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]
            release_pages(data)

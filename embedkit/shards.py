"""Owns the reading of one shard: an immutable, sealed HDF5 file of stacks and their tokens; knows no folder of shards.

The seal vouches for the bytes that HDF5 then parses, from memory; arrays are given as places in the file, to be mapped.
docs/cache-format.md is the format.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from embedkit.errors import CacheError
from embedkit.recipe import Recipe
from embedkit.seal import FORMAT, FORMAT_VERSIONS, Metadata, Seal, read_sealed
from embedkit.tables import SLICE_DTYPE, TEXT_COLUMNS, Table, check_tables, require_columns, stack_dtype

__all__ = ["ArrayPlace", "Shard", "array_names", "load_shard"]

_FOLDERS = {1: ("tokens",), 2: ("tokens", "scales", "channels")}
"""Groups with one dataset per token set, by version of the format."""
_TOKEN_TYPES = {1: "<f2", 2: "|i1"}


@dataclass(frozen=True)
class ArrayPlace:
    """Where an array of a shard lies: C-contiguous, little-endian, rows are slices."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A shard whose seal, structure and tables have been checked.

    Attributes:
        path: The file.
        seal: Its seal.
        recipe_json: Canonical JSON of its recipe.
        stacks: [stacks], one row per stack; columns in docs/cache-format.md.
        slices: [slices] with index, position_mm and blank.
        arrays: Dataset name (``tokens/cls:12``, ``preview``; of int8 also ``scales/cls:12`` and ``channels/cls:12``)
            to its place. Rows are slices, but those of ``channels`` are stacks.
    """

    path: Path
    seal: Seal
    recipe_json: str
    stacks: Table
    slices: Table
    arrays: dict[str, ArrayPlace]


def load_shard(path: Path) -> Shard:
    """Reads a shard's tables and the places of its arrays, trusting nothing.

    Raises:
        CacheError: damaged, of a newer format, or with anything in it that the format does not allow.
    """
    seal, metadata = read_sealed(path)
    try:
        with h5py.File(metadata, "r") as file:
            recipe_json = _read_attributes(file, seal, path)
            _require_hard_links(file.id, path)
            for folder in _FOLDERS[seal.version]:
                _require_hard_links(h5py.h5g.open(file.id, folder.encode()), path)
            stacks = _read_table(file, "stacks", metadata, path)
            slices = _read_table(file, "slices", metadata, path)
            arrays = {name: _find_array(file, name, seal, path) for name in _stored_names(file, seal.version)}
    except CacheError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CacheError(f"{path} is sealed but its HDF5 structure is not what the format says: {error}") from error
    require_columns(stacks.dtype, stack_dtype(dict.fromkeys(TEXT_COLUMNS, 1)), what=f"{path}: its stack table")
    require_columns(slices.dtype, SLICE_DTYPE, what=f"{path}: its slice table")
    check_tables(stacks, slices, what=str(path))
    _check_arrays(arrays, stacks=len(stacks), slices=len(slices), version=seal.version, path=path)
    return Shard(path, seal, recipe_json, stacks, slices, arrays)


def array_names(recipe: Recipe) -> tuple[str, ...]:
    """The arrays of a shard of this recipe, by their dataset names.

    Raises:
        CacheError: the recipe stores tokens in a way that the format does not have.
    """
    if recipe.dtype not in FORMAT_VERSIONS:
        raise CacheError(f"recipe stores {recipe.dtype}, the format has {' and '.join(FORMAT_VERSIONS)}; choose one")
    folders = _FOLDERS[FORMAT_VERSIONS[recipe.dtype]]
    names = [f"{folder}/{name}" for folder in folders for name in recipe.token_sets]
    return (*names, "preview") if recipe.preview else tuple(names)


def _read_attributes(file: Any, seal: Seal, path: Path) -> str:
    stored = h5py.h5a.open(file.id, b"format_version")
    if not stored.get_type().equal(h5py.h5t.STD_I64LE) or stored.shape != ():
        raise CacheError(f"{path}: its format_version is not one int64")
    if _read_text(file, "format", path) != FORMAT or file.attrs["format_version"] != seal.version:
        raise CacheError(f"{path}: its HDF5 attributes name another format than its seal")
    recipe_json = _read_text(file, "recipe", path)
    fingerprint = hashlib.sha256(recipe_json.encode()).hexdigest()[:16]
    if not fingerprint == _read_text(file, "fingerprint", path) == seal.fingerprint:
        raise CacheError(f"{path}: its fingerprint is not that of its recipe, which is {fingerprint}")
    return recipe_json


def _read_text(file: Any, name: str, path: Path) -> str:
    """A text attribute. One of variable length is refused: HDF5 can follow a forged one without end."""
    attribute = h5py.h5a.open(file.id, name.encode())
    kind = attribute.get_type()
    if not isinstance(kind, h5py.h5t.TypeStringID) or kind.is_variable_str() or attribute.shape != ():
        raise CacheError(f"{path}: its {name} is not one text of fixed length")
    return bytes(file.attrs[name]).decode()


def _require_hard_links(group: Any, path: Path) -> None:
    for name in group:
        if group.links.get_info(name).type != h5py.h5l.TYPE_HARD:
            raise CacheError(f"{path} holds {name.decode(errors='replace')} as a soft or external link: refused")


def _open_plain(file: Any, name: str, path: Path) -> ArrayPlace:
    """A dataset that lies in the file in one piece, as it is: no filter, chunk, virtual or external storage."""
    dataset = h5py.h5d.open(file.id, name.encode())
    options = dataset.get_create_plist()
    if options.get_layout() != h5py.h5d.CONTIGUOUS or options.get_external_count() or options.get_nfilters():
        raise CacheError(f"{path}: {name} is not one plain contiguous array")
    dtype = _numpy_type(dataset.get_type().encode())
    if dtype is None:
        raise CacheError(f"{path}: {name} has an element type that numpy does not have")
    place = ArrayPlace(dataset.get_offset(), dataset.shape, dtype)
    if place.offset is None or dataset.get_storage_size() != place.bytes:
        raise CacheError(f"{path}: {name} has no storage of its own size")
    return place


@lru_cache(maxsize=256)
def _numpy_type(encoded: bytes) -> np.dtype[Any] | None:
    """The numpy type with the very bytes of an HDF5 type, or None where there is none."""
    stored = h5py.h5t.decode(encoded)
    dtype: np.dtype[Any] = stored.dtype
    return dtype if h5py.h5t.py_create(dtype, logical=True).equal(stored) else None


def _read_table(file: Any, name: str, metadata: Metadata, path: Path) -> Table:
    place = _open_plain(file, name, path)
    data = metadata.exact(place.offset, place.bytes)
    if data is None or len(place.shape) != 1:
        raise CacheError(f"{path}: {name} is no table within the sealed bytes")
    return np.frombuffer(data, place.dtype)


def _stored_names(file: Any, version: int) -> list[str]:
    return [f"{folder}/{name}" for folder in _FOLDERS[version] for name in file[folder]] + ["preview"] * (
        "preview" in file
    )


def _find_array(file: Any, name: str, seal: Seal, path: Path) -> ArrayPlace:
    place = _open_plain(file, name, path)
    if not any((name, place.offset, place.bytes) == (part.name, part.offset, part.bytes) for part in seal.regions):
        raise CacheError(f"{path}: {name} lies elsewhere than its seal says")
    return place


def _check_arrays(arrays: dict[str, ArrayPlace], *, stacks: int, slices: int, version: int, path: Path) -> None:
    """Raises CacheError where an array has another element type or shape than the format asks for."""
    for name, place in arrays.items():
        folder, _, token_set = name.partition("/")
        if folder in ("tokens", "preview"):
            wanted, ranks = ("uint8", {3}) if folder == "preview" else (_TOKEN_TYPES[version], {2, 3})
            fits = len(place.shape) in ranks and place.shape[0] == slices
            expected = f"{wanted} with {slices} slices"
        else:
            tokens = arrays.get(f"tokens/{token_set}")
            if tokens is None:
                raise CacheError(f"{path}: {name} belongs to no token set")
            wanted, shape = ("<f4", tokens.shape[:-1]) if folder == "scales" else ("<f2", (stacks, 2, tokens.shape[-1]))
            fits, expected = place.shape == shape, f"{wanted} {list(shape)}"
        if place.dtype != np.dtype(wanted) or not fits:
            raise CacheError(f"{path}: {name} is {place.dtype} {list(place.shape)}, expected {expected}")

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
from embedkit.seal import FORMAT, FORMAT_VERSION, Metadata, Seal, read_sealed
from embedkit.tables import SLICE_DTYPE, TEXT_COLUMNS, Table, check_tables, require_columns, stack_dtype

__all__ = ["ArrayPlace", "Shard", "load_shard"]


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
        arrays: Dataset name (``tokens/cls:12``, ``preview``) to its place.
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
            _require_hard_links(h5py.h5g.open(file.id, b"tokens"), path)
            stacks = _read_table(file, "stacks", metadata, path)
            slices = _read_table(file, "slices", metadata, path)
            arrays = _find_arrays(file, seal, len(slices), path)
    except CacheError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CacheError(f"{path} is sealed but its HDF5 structure is not what the format says: {error}") from error
    require_columns(stacks.dtype, stack_dtype(dict.fromkeys(TEXT_COLUMNS, 1)), what=f"{path}: its stack table")
    require_columns(slices.dtype, SLICE_DTYPE, what=f"{path}: its slice table")
    check_tables(stacks, slices, what=str(path))
    return Shard(path, seal, recipe_json, stacks, slices, arrays)


def _read_attributes(file: Any, seal: Seal, path: Path) -> str:
    version = h5py.h5a.open(file.id, b"format_version")
    if not version.get_type().equal(h5py.h5t.STD_I64LE) or version.shape != ():
        raise CacheError(f"{path}: its format_version is not one int64")
    if _read_text(file, "format", path) != FORMAT or file.attrs["format_version"] != FORMAT_VERSION:
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


def _find_arrays(file: Any, seal: Seal, slices: int, path: Path) -> dict[str, ArrayPlace]:
    regions = {region.name: region for region in seal.regions}
    names = [f"tokens/{name}" for name in file["tokens"]] + ["preview"] * ("preview" in file)
    arrays = {}
    for name in names:
        place = _open_plain(file, name, path)
        region = regions.get(name)
        if region is None or (region.offset, region.bytes) != (place.offset, place.bytes):
            raise CacheError(f"{path}: {name} lies elsewhere than its seal says")
        wanted, ranks = ("uint8", {3}) if name == "preview" else ("<f2", {2, 3})
        if place.dtype != np.dtype(wanted) or len(place.shape) not in ranks or place.shape[0] != slices:
            raise CacheError(
                f"{path}: {name} is {place.dtype} {list(place.shape)}, expected {wanted} with {slices} slices"
            )
        arrays[name] = place
    return arrays

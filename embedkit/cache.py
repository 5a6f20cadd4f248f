"""Owns an open cache: its stack table and its tokens, mapped in place; knows nothing of how tokens are made.

Opening reads and checks the tables of every shard and no token; tokens are read from a memory map, under no lock, the
same for any number of processes: float16 as views that nobody copies, int8 restored to float16 as they are read. Every
byte is held against a checksum when an open cache first reads it.
"""

from __future__ import annotations

import copy
import errno
import mmap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.blocks import UncheckedBlocks
from embedkit.catalogue import STACK_KEY, StackRecord, join_tables, stack_record
from embedkit.errors import CacheError
from embedkit.failures import Failure, FailureLog, clear_failures, read_failures, record_failure
from embedkit.files import explain_os_error
from embedkit.folder import create_cache, describe_folder, list_shards, parse_recipe, stored_recipe, write_shard
from embedkit.quantisation import TOKEN_DTYPES, bytes_per_slice, dequantise_tokens
from embedkit.recipe import Recipe, require_same_recipe
from embedkit.seal import Region
from embedkit.shards import Shard, array_names, load_shard
from embedkit.spill import release_pages
from embedkit.tables import StackTokens, check_stack
from embedkit.tails import Tail, TailShape, load_tail, read_tail_shape

__all__ = [
    "Cache",
    "Failure",
    "FailureLog",
    "SliceTable",
    "StackRecord",
    "StackTokens",
    "TokenSetInfo",
    "check_stack",
    "clear_failures",
    "create_cache",
    "open_cache",
    "open_originals",
    "read_failures",
    "record_failure",
    "write_shard",
]

_MOST_MAPS = 128
_MOST_RESIDENT = 64 << 20
"""Bytes read after which the pages of the maps, which count as memory of the process, are let go of."""


@dataclass(frozen=True)
class TokenSetInfo:
    """One token set as stored.

    Attributes:
        shape: Per slice: [dim], [patches dim], [heads patches] or [tokens dim].
        dtype: Of a stored value.
        bytes: Per slice; of int8 with the scales of its tokens, without those of the channels, which are per stack.
    """

    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class SliceTable:
    """The slices of one stack, in order.

    Attributes:
        indices: int32 [slices], index along the plane's axis of the canonical volume.
        positions_mm: float32 [slices], along that axis.
        blank: bool [slices], True where the slice shows nothing.
    """

    indices: NDArray[np.int32]
    positions_mm: NDArray[np.float32]
    blank: NDArray[np.bool_]


class Cache:
    """An open cache; made by `open_cache`. It can be pickled and shared with other processes.

    Attributes:
        path: The folder or file.
        recipe: What made the tokens.
        fingerprint: The recipe's.
        shards: All shards, oldest first, with their tables.
        stacks: One row per stack, sorted by case, view and plane; `embedkit.catalogue.join_tables` lists the columns.
        duplicates: Stacks found more than once, one row per copy left out.
        token_sets: Token set to what is stored of it per slice; empty where the cache holds no stack yet.
    """

    def __init__(self, path: Path, recipe: Recipe, shards: Sequence[Shard]) -> None:
        _require_one_recipe(shards, recipe, path)
        self.path = path
        self.recipe = recipe
        self.fingerprint = recipe.fingerprint
        self.shards = tuple(sorted(shards, key=lambda shard: (shard.seal.created_ns, shard.path.name)))
        self.token_sets = _common_token_sets(self.shards, recipe)
        self.stacks, self.duplicates = join_tables(self.shards)
        rows = self.stacks.select("shard_number", "first_row", "count")
        self._rows: list[tuple[int, int, int]] = list(rows.iter_rows())
        quantised = self.shards if recipe.dtype == "int8" else ()
        self._starts = [np.ascontiguousarray(shard.stacks["first_row"]) for shard in quantised]
        self._maps: dict[int, dict[str, NDArray[Any]]] = {}
        self._unchecked: dict[int, dict[str, UncheckedBlocks]] = {}
        self._resident = 0

    def read(self, stack: int, token_set: str) -> NDArray[np.float16]:
        """The tokens of a stack: read-only float16 [slices ...].

        A view of the memory map where the cache stores float16; where it stores int8, a copy restored from that.

        Raises:
            CacheError: no such stack or token set; the shard was removed or changed since the cache was opened; its
                bytes are not those that were written; a scale that is NaN, infinite or negative.
        """
        number, first, count = self._row(stack)
        if token_set not in self.recipe.token_sets:
            raise CacheError(
                f"cache {self.path} has no token set {token_set}; it holds {', '.join(self.recipe.token_sets)}."
                " Choose one of these, or extract again with it"
            )
        tokens = self._rows_of(number, f"tokens/{token_set}", first, count)
        if self.recipe.dtype == "float16":
            return tokens
        place = int(np.searchsorted(self._starts[number], first))
        restored = dequantise_tokens(
            tokens,
            self._rows_of(number, f"scales/{token_set}", first, count),
            self._rows_of(number, f"channels/{token_set}", place, 1)[0],
            what=f"{self.shards[number].path}, {token_set} of stack {stack},",
        )
        restored.flags.writeable = False
        return restored

    def preview(self, stack: int) -> NDArray[np.uint8] | None:
        """Grey pictures of a stack's slices: read-only uint8 [slices height width]; None where none are kept.

        Raises:
            CacheError: no such stack; the shard was removed or changed since the cache was opened; its bytes are not
                those that were written.
        """
        number, first, count = self._row(stack)
        return self._rows_of(number, "preview", first, count) if self.recipe.preview else None

    def slices(self, stack: int) -> SliceTable:
        """Index, position and blank flag of each slice of a stack.

        Raises:
            CacheError: no such stack.
        """
        number, first, count = self._row(stack)
        rows = self.shards[number].slices[first : first + count]
        return SliceTable(
            indices=np.ascontiguousarray(rows["index"]),
            positions_mm=np.ascontiguousarray(rows["position_mm"]),
            blank=rows["blank"].astype(bool),
        )

    def tail_shape(self) -> TailShape:
        """Of the blocks that the cut tokens enter.

        Raises:
            CacheError: the cache keeps none, or they are damaged.
        """
        return read_tail_shape(self.path, self.fingerprint)

    def tail(self) -> Tail:
        """The blocks that the cut tokens enter, loaded once per process.

        Raises:
            CacheError: as `tail_shape`.
        """
        return load_tail(self.path, self.fingerprint)

    def record(self, stack: int) -> StackRecord:
        """Names, geometry and source of a stack.

        Raises:
            CacheError: no such stack.
        """
        self._row(stack)
        return stack_record(self.stacks, stack)

    def find_stacks(self, case_id: str, views: Collection[str]) -> dict[str, int]:
        """Number of the stack of each of these views (``view/plane``) that a case has."""
        rows = self.stacks.filter(pl.col("case_id") == case_id).select("stack", "view", "plane").iter_rows()
        return {f"{view}/{plane}": stack for stack, view, plane in rows if f"{view}/{plane}" in views}

    def finished(self) -> set[tuple[str, str, str, str]]:
        """(case_id, view, plane, source_digest) of every stack: what a resumed extraction need not do again."""
        return set(self.stacks.select(*STACK_KEY, "source_digest").iter_rows())

    def only_views(self, views: Sequence[str]) -> Self:
        """The same cache with the stacks of some views alone, numbered anew.

        Args:
            views: Each ``flair``, all planes of a view, or ``flair/axial``.

        Raises:
            CacheError: none of that name, or none at all was given.
        """
        names = pl.concat_str("view", "plane", separator="/")
        held = self.stacks.select(pl.col("view").alias("name")).vstack(self.stacks.select(names.alias("name")))
        if not views or (unknown := sorted(set(views) - set(held["name"]))):
            raise CacheError(
                f"cache {self.path} has no view {', '.join(unknown) if views else ''}; it holds"
                f" {', '.join(self.stacks.select(names).to_series().unique().sort())}. Choose some of these"
            )
        chosen = copy.copy(self)
        kept = self.stacks.filter(pl.col("view").is_in(views) | names.is_in(views))
        chosen._rows = [self._rows[stack] for stack in kept["stack"]]
        chosen.stacks = kept.with_columns(pl.Series("stack", range(len(kept)), kept.schema["stack"]))
        return chosen

    def close(self) -> None:
        """Lets go of the memory maps; arrays already given out stay valid, and reading maps anew."""
        self._maps.clear()

    def __len__(self) -> int:
        return len(self._rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __copy__(self) -> Self:
        """Shares what was found sound, but no map."""
        copied = object.__new__(type(self))
        copied.__dict__ |= self.__dict__ | {"_maps": {}}
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}, "_unchecked": {}}

    def __repr__(self) -> str:
        return f"Cache({str(self.path)!r}, {self.fingerprint}, {len(self)} stacks in {len(self.shards)} shards)"

    def _row(self, stack: int) -> tuple[int, int, int]:
        """(shard number, first row, count)."""
        if not 0 <= stack < len(self._rows):
            raise CacheError(f"cache {self.path} has no stack {stack}; it has {len(self._rows)}, counted from 0")
        return self._rows[stack]

    def _rows_of(self, number: int, name: str, first: int, count: int) -> NDArray[Any]:
        """Rows of an array of a shard, whose bytes were held against their checksums when they were first read."""
        array, unchecked = self._map(number)[name], self._unchecked[number][name]
        if not unchecked.pass_bytes(array, first * array.strides[0], (first + count) * array.strides[0]):
            path = self.shards[number].path
            raise CacheError(f"{path} is damaged: {name} is not what was written; run embedkit verify")
        self._resident += max(count * array.strides[0], unchecked.block_bytes)
        if self._resident > _MOST_RESIDENT:
            self._resident = 0
            for arrays in list(self._maps.values()):
                release_pages(next(iter(arrays.values())))
        return array[first : first + count]

    def _map(self, number: int) -> dict[str, NDArray[Any]]:
        """The arrays of a shard, mapped; the maps longest unused are let go, for each takes a file descriptor.

        Threads that meet here may map a shard twice, which harms nothing; every step on the dict is one of its own.
        """
        arrays = self._maps.pop(number, None)
        if arrays is None:
            arrays = _map_arrays(self.shards[number])
            regions = self.shards[number].seal.regions
            self._unchecked.setdefault(number, {region.name: _all_blocks(region) for region in regions})
        self._maps[number] = arrays
        if len(self._maps) > _MOST_MAPS:
            for longest_unused in list(self._maps)[:-_MOST_MAPS]:
                self._maps.pop(longest_unused, None)
        return arrays


def _all_blocks(region: Region) -> UncheckedBlocks:
    return UncheckedBlocks(region.bytes, region.block_bytes, region.sums, region.sha256)


def _map_arrays(shard: Shard) -> dict[str, NDArray[Any]]:
    try:
        with shard.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        hint = "; raise the limit (ulimit -n) or pack the cache" if error.errno == errno.EMFILE else ""
        raise CacheError(f"cannot map shard: {explain_os_error(error, shard.path)}{hint}") from error
    except ValueError as error:  # an empty file
        raise CacheError(f"{shard.path} changed since the cache was opened: it is empty") from error
    if len(mapped) != shard.seal.file_bytes:
        raise CacheError(
            f"{shard.path} changed since the cache was opened: it has {len(mapped)} bytes, its seal says"
            f" {shard.seal.file_bytes}; run embedkit verify"
        )
    return {
        name: np.ndarray(place.shape, place.dtype, buffer=mapped, offset=place.offset)
        for name, place in shard.arrays.items()
    }


def open_cache(path: Path | str) -> Cache:
    """Opens a cache: the folder that extract made, or one packed file.

    Args:
        path: Folder or file.

    Raises:
        CacheError: not a cache, damaged, of a newer format, or with parts that do not fit together; names the file.
        RecipeError: a shard was made by another recipe than the cache; names the differing fields.
    """
    path = Path(path)
    if path.is_dir():
        recipe, files = stored_recipe(path), list_shards(path)
        if recipe is None:
            raise CacheError(
                f"{path} is no cache: it holds {describe_folder(path) or 'nothing'}, expected recipe.json and shards/;"
                " give the folder that embedkit extract wrote, or a packed file"
            )
        shards = [load_shard(file) for file in files]
    else:
        if not path.exists():
            raise CacheError(f"{path} does not exist; give the folder that embedkit extract wrote, or a packed file")
        shards = [load_shard(path)]
        recipe = parse_recipe(shards[0].recipe_json, path)
    return Cache(path, recipe, shards)


def open_originals(cache: Cache | Path | str) -> Cache:
    """Opens a cache of cases, if it is not open yet.

    Raises:
        CacheError: as `open_cache`; or it holds altered copies, which are there to train on beside their cases.
    """
    opened = cache if isinstance(cache, Cache) else open_cache(cache)
    if opened.recipe.copies:
        raise CacheError(
            f"cache {opened.path} holds {opened.recipe.copies} altered copies of each case, which serve to train on"
            " beside the cases and for nothing else; give the cache of the cases themselves, and this one to train"
            " --copies"
        )
    return opened


def _require_one_recipe(shards: Sequence[Shard], recipe: Recipe, path: Path) -> None:
    expected = recipe.to_json()
    for shard in shards:
        if shard.recipe_json != expected:
            require_same_recipe(
                parse_recipe(shard.recipe_json, shard.path),
                recipe,
                where=f"shard {shard.path}",
                ways_out=f"The shard is of another cache than {path}: move it out of there",
            )
    if recipe.dtype not in TOKEN_DTYPES:
        raise CacheError(
            f"{path} stores {recipe.dtype}, this embedkit reads {' and '.join(TOKEN_DTYPES)}; upgrade embedkit"
        )


def _common_token_sets(shards: Sequence[Shard], recipe: Recipe) -> dict[str, TokenSetInfo]:
    """What every shard stores per slice; a shard that stores anything else raises CacheError."""
    expected = set(array_names(recipe))
    shapes: dict[str, tuple[int, ...]] = {"preview": (recipe.preview, recipe.preview)}
    for shard in shards:
        if shard.arrays.keys() != expected:
            raise CacheError(
                f"{shard.path} holds {', '.join(sorted(shard.arrays))}, its recipe says {', '.join(sorted(expected))}"
            )
        for name, place in shard.arrays.items():
            if shapes.setdefault(name, place.shape[1:]) != place.shape[1:]:
                raise CacheError(
                    f"{shard.path}: {name} has shape {place.shape[1:]} per slice, {shapes[name]} in other shards"
                )
    infos = {}
    for name in recipe.token_sets if shards else ():
        place = shards[0].arrays[f"tokens/{name}"]
        infos[name] = TokenSetInfo(place.shape[1:], place.dtype.name, bytes_per_slice(place.shape[1:], recipe.dtype))
    return infos

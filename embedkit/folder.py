"""Owns the folder of a cache: its recipe file, the names of its shards, making it and adding to it; reads no tokens.

Writers need no lock: each writes shards of its own under random names that begin with a time, so that of two shards
with the same stack the newer is known, on every machine alike.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedkit.errors import CacheError, RecipeError
from embedkit.files import explain_os_error, remove_stale, sync_folder, write_new_file
from embedkit.quantisation import quantise_tokens
from embedkit.recipe import Recipe, require_same_recipe
from embedkit.sealing import array_chunks, write_sealed
from embedkit.shards import array_names, load_shard
from embedkit.spill import allocate_spilled
from embedkit.tables import StackTokens, check_stack, slice_table, stack_table

__all__ = [
    "create_cache",
    "describe_folder",
    "list_shards",
    "parse_recipe",
    "require_room",
    "require_writable",
    "shard_path",
    "stored_recipe",
    "write_shard",
]

_RECIPE_FILE = "recipe.json"
_SHARDS_FOLDER = "shards"
_SHARD_SUFFIX = ".h5"
_LONGEST_LISTING = 4


def create_cache(path: Path | str, recipe: Recipe) -> None:
    """Makes the folder of a cache, or checks that the one there has this recipe, and cleans up after killed writers.

    Raises:
        RecipeError: a cache with another recipe is there.
        CacheError: ``path`` is a file or holds other things, cannot be written, or its recipe is damaged.
    """
    path = Path(path)
    shards = path / _SHARDS_FOLDER
    require_room(path)
    try:
        shards.mkdir(parents=True, exist_ok=True)
        for folder in (path, shards):
            remove_stale(folder)
        _require_recipe(path, recipe)
        if not (path / _RECIPE_FILE).exists():
            _write_recipe(path, recipe)
            _require_recipe(path, recipe)
    except OSError as error:
        raise CacheError(f"cannot make a cache: {explain_os_error(error, path)}") from error


def require_writable(path: Path) -> None:
    """Stops before anything is computed for a cache that could not be kept.

    Raises:
        CacheError: no file can be made in the cache.
    """
    try:
        with tempfile.TemporaryFile(dir=path / _SHARDS_FOLDER):
            pass
    except OSError as error:
        raise CacheError(f"cannot write into the cache: {explain_os_error(error, path)}") from error


def _require_recipe(path: Path, recipe: Recipe) -> None:
    found = stored_recipe(path)
    if found is not None:
        ways_out = "Choose another --out, or pass the options that made it"
        require_same_recipe(found, recipe, where=f"cache {path}", ways_out=ways_out)


def require_room(path: Path) -> None:
    """Checks that a cache is at ``path`` or can be made there.

    Raises:
        CacheError: it is a file, a folder with other things in it, or cannot be read.
    """
    try:
        if not path.is_dir():
            if path.exists():
                raise CacheError(
                    f"{path} is a file, expected a folder: to a packed cache no case can be added; choose a new or"
                    " empty folder, or the cache that was packed"
                )
            found = ""
        elif (path / _RECIPE_FILE).exists() or (path / _SHARDS_FOLDER).is_dir():
            found = ""
        else:
            others = describe_folder(path)
            found = f"holds {others}" if others else ""
    except OSError as error:
        raise CacheError(f"cannot make a cache: {explain_os_error(error, path)}") from error
    if found:
        raise CacheError(f"{path} is no cache and {found}; choose a new or empty folder for the cache")


def _write_recipe(path: Path, recipe: Recipe) -> None:
    try:
        write_new_file(path / _RECIPE_FILE, recipe.to_json().encode() + b"\n")
    except FileExistsError:
        return  # another writer was first; the caller checks that it wrote the same
    sync_folder(path.absolute().parent)


def stored_recipe(path: Path) -> Recipe | None:
    """The recipe of a cache folder, from its file or else from its first shard; None where there is neither."""
    file = path / _RECIPE_FILE
    try:
        text = file.read_bytes().decode().strip()
    except FileNotFoundError:
        shards = list_shards(path)
        return parse_recipe(load_shard(shards[0]).recipe_json, shards[0]) if shards else None
    except UnicodeDecodeError as error:
        raise CacheError(f"{file} is damaged ({error}); delete it, every shard holds a copy") from error
    except OSError as error:
        raise CacheError(f"cannot open cache: {explain_os_error(error, file)}") from error
    try:
        return Recipe.from_json(text)
    except RecipeError as error:
        raise CacheError(f"{file}: {error}; if it is damaged delete it, every shard holds a copy") from error


def parse_recipe(text: str, path: Path) -> Recipe:
    try:
        recipe = Recipe.from_json(text)
    except RecipeError as error:
        raise CacheError(f"{path}: {error}") from error
    if recipe.to_json() != text:
        raise CacheError(f"{path}: its recipe is not in canonical form; embedkit did not write it")
    return recipe


def write_shard(
    cache_path: Path | str, recipe: Recipe, stacks: Sequence[StackTokens], *, clock_ns: Callable[[], int] = time.time_ns
) -> Path:
    """Writes computed stacks as one new shard of a cache and returns its file, complete and durable.

    Args:
        cache_path: Folder made by `create_cache`.
        recipe: The cache's.
        stacks: At least one; none twice.
        clock_ns: Nanoseconds since the epoch.

    Raises:
        RecipeError: the cache has another recipe.
        CacheError: a stack does not fit the recipe or cannot be stored (see `check_stack`), disk full, or read-only.
    """
    cache_path = Path(cache_path)
    found = stored_recipe(cache_path)
    if found is None:
        raise CacheError(f"{cache_path} is no cache; make it with create_cache first")
    require_same_recipe(found, recipe, where=f"cache {cache_path}", ways_out="Write to the cache of this recipe")
    if not stacks:
        raise CacheError("a shard needs at least one stack")
    for stack in stacks:
        check_stack(stack, recipe)
    _require_distinct(stacks)
    columns = _columns(stacks, recipe, spill=cache_path)
    arrays = {name: _joined(name, parts) for name, parts in columns.items()}
    created_ns = _next_created_ns(cache_path, clock_ns())
    final = shard_path(cache_path, created_ns, secrets.token_hex(8))
    try:
        write_sealed(
            final,
            recipe=recipe,
            stacks=stack_table(stacks),
            slices=slice_table(stacks),
            arrays=arrays,
            chunks=lambda name: array_chunks(columns[name]),
            created_ns=created_ns,
        )
    except OSError as error:
        raise CacheError(
            f"cannot write shard: {explain_os_error(error, final.parent)}; what is finished stays, run the same command"
            " again to go on"
        ) from error
    return final


def shard_path(cache_path: Path, created_ns: int, name: str) -> Path:
    """The file of a shard, by which shards sort from the oldest to the newest; ``name`` has 16 hex digits."""
    return cache_path / _SHARDS_FOLDER / f"{created_ns:016x}-{name}{_SHARD_SUFFIX}"


def _columns(stacks: Sequence[StackTokens], recipe: Recipe, *, spill: Path) -> dict[str, list[NDArray[Any]]]:
    """Dataset name to its parts, one per stack, in the order of `array_names`.

    The int8 values of tokens that are kept in a file are kept in one too, in the folder ``spill``.
    """
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in array_names(recipe)}
    for stack in stacks:
        for name, tokens in stack.tokens.items():
            if recipe.dtype == "float16":
                columns[f"tokens/{name}"].append(tokens)
                continue
            if isinstance(tokens, np.memmap):
                stored = quantise_tokens(
                    tokens, stack.blank, allocate=lambda shape: allocate_spilled(shape, np.int8, spill)
                )
            else:
                stored = quantise_tokens(tokens, stack.blank)
            columns[f"tokens/{name}"].append(stored.values)
            columns[f"scales/{name}"].append(stored.scales)
            columns[f"channels/{name}"].append(stored.channels[None])
        if stack.preview is not None:
            columns["preview"].append(stack.preview)
    return columns


def _joined(name: str, parts: Sequence[NDArray[Any]]) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a dataset that holds ``parts`` one after the other."""
    shapes = sorted({part.shape[1:] for part in parts})
    if len(shapes) > 1:
        raise CacheError(f"{name} has shapes {shapes[0]} and {shapes[1]} per slice; one backbone gives one shape")
    return (sum(map(len, parts)), *shapes[0]), parts[0].dtype.newbyteorder("<").str


def _require_distinct(stacks: Sequence[StackTokens]) -> None:
    seen = set()
    for stack in stacks:
        key = (stack.case_id, stack.view, stack.plane)
        if key in seen:
            raise CacheError(f"stack {'/'.join(key)} is given twice for one shard; give it once")
        seen.add(key)


def _next_created_ns(cache_path: Path, now_ns: int) -> int:
    """Now, or just after the newest shard there, should this machine's clock be behind."""
    newest = 0
    for file in list_shards(cache_path):
        prefix = file.name.partition("-")[0]
        if len(prefix) == 16 and not prefix.strip("0123456789abcdef"):
            newest = max(newest, int(prefix, 16))
    return max(now_ns, newest + 1)


def list_shards(path: Path) -> list[Path]:
    """The shards in the folder of a cache, sorted by name; temporary and other files are no shards.

    Raises:
        CacheError: the folder cannot be read.
    """
    folder = path / _SHARDS_FOLDER
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CacheError(f"cannot open cache: {explain_os_error(error, folder)}") from error
    return [folder / name for name in names if name.endswith(_SHARD_SUFFIX) and not name.startswith(".")]


def describe_folder(path: Path) -> str:
    """What a folder holds, for messages: at most four names."""
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    more = ["..."] * (len(names) > _LONGEST_LISTING)
    return ", ".join(names[:_LONGEST_LISTING] + more)

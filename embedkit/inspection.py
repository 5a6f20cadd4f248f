"""Owns what a user asks of a cache as a whole: is it undamaged, and what is in it; changes nothing."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl

from embedkit.blocks import BlockSums
from embedkit.cache import Cache, TokenSetInfo, open_cache
from embedkit.errors import CacheError, RecipeError
from embedkit.failures import Failure, Stray, read_failures
from embedkit.files import explain_os_error
from embedkit.folder import list_shards, parse_recipe, stored_recipe
from embedkit.quantisation import TOKEN_DTYPES, bytes_per_slice, bytes_per_stack
from embedkit.recipe import Recipe, TokenSet
from embedkit.seal import CHUNK_BYTES, Region
from embedkit.shards import Shard, load_shard
from embedkit.tails import check_tail

__all__ = ["CacheSummary", "Damage", "StorageChoice", "describe_cache", "list_choices", "verify_cache"]

_GRIDS = (4, 7)
_TRANSFORMER = re.compile(r"(?:vit|deit|deit3|beit|beitv2|eva02)_.*patch(?P<side>[1-9]\d?)(?:_|\.|$)")
"""timm's names of transformers with one grid throughout, and the side of their patches in pixels."""


@dataclass(frozen=True)
class Damage:
    """One thing wrong with a cache.

    Attributes:
        file: The file it is in; the cache's folder where files do not fit together.
        part: The dataset whose bytes are wrong (``tokens/cls:12``); empty where it is the file itself.
        problem: What is wrong and what to do, in words.
    """

    file: Path
    part: str
    problem: str


@dataclass(frozen=True)
class StorageChoice:
    """What one token set takes, or would have taken, for the slices of a cache.

    Attributes:
        token_set: Of one layer, named without it where all layers are of one shape: ``cls``, ``patch@7``.
        shape: Per slice.
        dtype: float16 or int8.
        slice_bytes: Per slice.
        cache_bytes: For all slices and stacks of the cache.
    """

    token_set: str
    shape: tuple[int, ...]
    dtype: str
    slice_bytes: int
    cache_bytes: int


@dataclass(frozen=True)
class CacheSummary:
    """What a cache holds.

    Attributes:
        path: Folder or file.
        recipe: What made the tokens.
        fingerprint: The recipe's.
        shards: Files.
        bytes: Their size together.
        cases: Distinct case ids.
        patients: Distinct patient ids.
        stacks: Without duplicates.
        slices: In these stacks.
        blank_slices: Of these slices, those that show nothing.
        views: ``view/plane`` to number of stacks, sorted.
        token_sets: What is stored per slice.
        token_bytes: Token set to bytes in all shards, scales included.
        choices: What other token sets and dtypes would have taken, as far as the cache tells; see `list_choices`.
        preview_bytes: In all shards.
        duplicates: Copies of stacks left out, one row each; see `Cache`.
        failures: Cases recorded as failed and not made good.
        strays: Damaged DICOM files of which no series can be told, and the cases that they lie beside.
        unreadable_failures: Lines of the failure record that cannot be read.
    """

    path: Path
    recipe: Recipe
    fingerprint: str
    shards: int
    bytes: int
    cases: int
    patients: int
    stacks: int
    slices: int
    blank_slices: int
    views: dict[str, int]
    token_sets: dict[str, TokenSetInfo]
    token_bytes: dict[str, int]
    choices: tuple[StorageChoice, ...]
    preview_bytes: int
    duplicates: pl.DataFrame
    failures: tuple[Failure, ...]
    strays: tuple[Stray, ...]
    unreadable_failures: tuple[int, ...]


def describe_cache(path: Path | str) -> CacheSummary:
    """Says what a cache holds, without reading a token.

    Raises:
        CacheError: not a cache, or damaged; see `open_cache`.
        RecipeError: a shard was made by another recipe.
    """
    cache = open_cache(path)
    stacks = cache.stacks
    log = read_failures(cache.path) if cache.path.is_dir() else None
    sizes = dict.fromkeys([*cache.token_sets, "preview"], 0)
    for shard in cache.shards:
        for name, place in shard.arrays.items():
            sizes[name.rpartition("/")[2]] += place.bytes
    slices = int(stacks["count"].sum())
    views = stacks.group_by(pl.format("{}/{}", "view", "plane").alias("name")).len().sort("name")
    return CacheSummary(
        path=cache.path,
        recipe=cache.recipe,
        fingerprint=cache.fingerprint,
        shards=len(cache.shards),
        bytes=sum(shard.seal.file_bytes for shard in cache.shards),
        cases=stacks["case_id"].n_unique(),
        patients=stacks["patient_id"].n_unique(),
        stacks=len(stacks),
        slices=slices,
        blank_slices=int(stacks["blank_count"].sum()),
        views=dict(views.iter_rows()),
        token_sets=cache.token_sets,
        token_bytes={name: sizes[name] for name in cache.token_sets},
        choices=list_choices(cache.recipe, cache.token_sets, slices=slices, stacks=len(stacks)),
        preview_bytes=sizes["preview"],
        duplicates=cache.duplicates,
        failures=log.failures if log else (),
        strays=log.strays if log else (),
        unreadable_failures=log.unreadable_lines if log else (),
    )


def list_choices(
    recipe: Recipe, token_sets: Mapping[str, TokenSetInfo], *, slices: int, stacks: int
) -> tuple[StorageChoice, ...]:
    """What each token set would take per layer and dtype, smallest first.

    What cannot be told from the cache is left out: the width of the tokens and the number of patches come from the
    token sets that are there, the latter else from the name of a vision transformer (``patch16`` at 224 pixels).
    """
    choices = [
        StorageChoice(name, shape, dtype, size, size * slices + bytes_per_stack(shape, dtype) * stacks)
        for name, shape in _possible_shapes(recipe, token_sets).items()
        for dtype in TOKEN_DTYPES
        for size in [bytes_per_slice(shape, dtype)]
    ]
    return tuple(sorted(choices, key=lambda choice: (math.prod(choice.shape), choice.token_set, choice.dtype)))


def _possible_shapes(recipe: Recipe, token_sets: Mapping[str, TokenSetInfo]) -> dict[str, tuple[int, ...]]:
    """Token sets that the backbone surely gives, with their shapes per slice."""
    kept = [(TokenSet.parse(name), info.shape) for name, info in token_sets.items()]
    found: dict[str, tuple[int, ...]] = {
        token_set.kind: shape for token_set, shape in kept if token_set.kind in ("attention", "cut")
    }
    widths = {token_set.layer: shape[-1] for token_set, shape in kept if token_set.kind != "attention"}
    alike = len(set(widths.values())) == 1
    for layer, width in widths.items():
        suffix = "" if alike else f":{layer}"
        near = [token_set for token_set, _ in kept if alike or token_set.layer == layer]
        patches = _count_patches(recipe, kept, layer)
        grids = {token_set.grid for token_set in near if token_set.grid is not None}
        for grid in grids.union(grid for grid in _GRIDS if grid**2 < patches):
            found[f"patch@{grid}{suffix}"] = (grid**2, width)
        if patches:
            found[f"patch{suffix}"] = (patches, width)
        if any(token_set.kind == "cls" for token_set in near):
            found[f"cls{suffix}"] = (width,)
    return found


def _count_patches(recipe: Recipe, kept: Sequence[tuple[TokenSet, tuple[int, ...]]], layer: int) -> int:
    """Patches of the full grid of a layer; 0 where the cache does not tell."""
    for token_set, shape in kept:
        if token_set.kind == "patch" and token_set.grid is None and token_set.layer == layer:
            return shape[0]
    match = _TRANSFORMER.match(recipe.backbone)
    side = int(match["side"]) if match else 0
    return (recipe.image_size // side) ** 2 if side and recipe.image_size % side == 0 else 0


def verify_cache(path: Path | str, *, progress: Callable[[int, int], None] | None = None) -> list[Damage]:
    """Checks every byte of every shard against its checksum, and the shards against each other.

    Args:
        path: The cache.
        progress: Called with (bytes done, bytes in all).

    Returns:
        All that is wrong; empty for a sound cache.

    Raises:
        CacheError: there is no cache at ``path``.
    """
    path = Path(path)
    damages: list[Damage] = []
    files = list_shards(path) if path.is_dir() else [path]
    if not path.exists() or (path.is_dir() and not files):
        open_cache(path)  # an empty cache is sound, what is no cache raises
    recipe = None
    try:
        recipe = stored_recipe(path) if path.is_dir() else None
    except CacheError as error:
        damages.append(Damage(path, "", str(error)))
    sizes, sound = [_size(file) for file in files], []
    for number, file in enumerate(files):
        shard, found = _verify_shard(file, recipe, partial(_report, progress, sum(sizes[:number]), sum(sizes)))
        damages += found
        if shard is not None and not found:
            sound.append(shard)
    try:
        if recipe is not None:
            Cache(path, recipe, sound)
        if known := recipe or (parse_recipe(sound[0].recipe_json, path) if sound else None):
            check_tail(path, known.fingerprint)
    except (CacheError, RecipeError) as error:
        damages.append(Damage(path, "", str(error)))
    return damages


def _report(progress: Callable[[int, int], None] | None, before: int, total: int, position: int) -> None:
    if progress is not None:
        progress(before + position, total)


def _size(file: Path) -> int:
    try:
        return file.lstat().st_size
    except OSError:
        return 0


def _verify_shard(
    file: Path, recipe: Recipe | None, report: Callable[[int], None]
) -> tuple[Shard | None, list[Damage]]:
    """A shard, if it can be opened at all, and what is wrong with it."""
    try:
        shard = load_shard(file)
        Cache(file, recipe or Recipe.from_json(shard.recipe_json), [shard])
    except (CacheError, RecipeError) as error:
        return None, [Damage(file, "", str(error))]
    problems = {region.name: _region_problem(shard, region, report) for region in shard.seal.regions}
    report(shard.seal.file_bytes)
    return shard, [Damage(file, name, problem) for name, problem in problems.items() if problem]


def _region_problem(shard: Shard, region: Region, report: Callable[[int], None]) -> str:
    digest, left = hashlib.sha256(), region.bytes
    sums = BlockSums(region.block_bytes) if region.sums else None
    try:
        with shard.path.open("rb", buffering=0) as file:
            file.seek(region.offset)
            while left and (data := file.read(min(CHUNK_BYTES, left))):
                digest.update(data)
                if sums is not None:
                    sums.update(data)
                left -= len(data)
                report(region.offset + region.bytes - left)
    except OSError as error:
        return f"{region.name} cannot be read: {explain_os_error(error, shard.path)}"
    if left or digest.hexdigest() != region.sha256 or (sums is not None and sums.finish() != region.sums):
        return (
            f"{region.name} is not what was written; delete the file and run the same extract again, or restore a copy"
        )
    return ""

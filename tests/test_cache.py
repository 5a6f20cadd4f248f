"""Tests of a cache: many writers, killed writers, resuming, duplicates, damage, packing, and the record of failures."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import xxhash
from embedkit.cli.main import app
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from embedkit import cache as cache_module
from embedkit import packing
from embedkit.blocks import SUM_BYTES, BlockSums, UncheckedBlocks, block_size, count_blocks
from embedkit.cache import Cache, TokenSetInfo, create_cache, open_cache, write_shard
from embedkit.errors import CacheError, OptionError, RecipeError
from embedkit.failures import Failure, clear_failures, read_failures, record_failure
from embedkit.files import STALE_AFTER_S, explain_os_error, remove_stale, temporary_path, write_new_file
from embedkit.inspection import describe_cache, list_choices, verify_cache
from embedkit.packing import pack_cache
from embedkit.quantisation import dequantise_tokens, quantise_tokens
from embedkit.recipe import Recipe
from embedkit.seal import Region
from embedkit.sealing import write_sealed
from embedkit.shards import array_names
from embedkit.tables import StackTokens

RECIPE = Recipe("toy", "builtin:1", ("cls:2", "patch@2:1"), 32, (0.5,), (0.25,), preview=4)
INT8 = replace(RECIPE, dtype="int8")
OLD_REGION = ("name", "offset", "bytes", "sha256")

WRITER = """
import sys
import numpy as np
from embedkit.cache import StackTokens, create_cache, open_cache, write_shard
from embedkit.recipe import Recipe

folder, name, shards = sys.argv[1], sys.argv[2], int(sys.argv[3])
recipe = Recipe("toy", "builtin:1", ("cls:2",), 32, (0.5,), (0.25,), preview=0)
create_cache(folder, recipe)
done = {key[0] for key in open_cache(folder).finished()}
print("ready", flush=True)
for number in range(shards):
    case = f"{name}-{number:03d}"
    if case in done:
        continue
    tokens = np.full((50, 2000), number, np.float16)
    places = np.arange(50)
    write_shard(folder, recipe, [StackTokens(case, case, "image", "axial", ("image",), places.astype(np.int32),
        places.astype(np.float32), places < 0, (8, 8), (0, 0, 8, 8), (50, 8, 8), np.eye(4), 1, "d", {"cls:2": tokens})])
    print(case, flush=True)
"""


def make_stack(number: int, slices: int = 3, *, source: str = "first", **changes: Any) -> StackTokens:
    values = np.random.default_rng([number, slices, len(source)])
    stack = StackTokens(
        case_id=f"case-{number:02d}",
        patient_id=f"patient-{number // 2}",
        view="flair",
        plane="axial",
        sources=("flair",),
        indices=np.arange(slices, dtype=np.int32),
        positions_mm=np.arange(slices, dtype=np.float32) * 2,
        blank=np.arange(slices) == 0,
        plane_shape=(20, 30),
        box=(-5, 0, 30, 30),
        source_shape=(9, 20, 30),
        source_affine=np.diag([2.0, 1.0, 1.0, 1.0]),
        source_bytes=4000 + number,
        source_digest=hashlib.sha256(f"{source}{number}".encode()).hexdigest(),
        tokens={
            "cls:2": values.standard_normal((slices, 6)).astype(np.float16),
            "patch@2:1": values.standard_normal((slices, 4, 6)).astype(np.float16),
        },
        preview=values.integers(0, 256, (slices, 4, 4), dtype=np.uint8),
    )
    return replace(stack, **changes)


def make_folder(path: Path, recipe: Recipe) -> Path:
    """A cache of five cases in two shards."""
    create_cache(path, recipe)
    write_shard(path, recipe, [make_stack(3), make_stack(1, 5)])
    write_shard(path, recipe, [make_stack(0, 2), make_stack(4), make_stack(2, 7)])
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache of five cases in two shards, of float16."""
    return make_folder(tmp_path / "cache", RECIPE)


@pytest.fixture
def int8_folder(tmp_path: Path) -> Path:
    """The same of int8."""
    return make_folder(tmp_path / "cache", INT8)


@pytest.fixture(params=[RECIPE, INT8], ids=["float16", "int8"])
def either_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same, once of float16 and once of int8."""
    return make_folder(tmp_path / "cache", request.param)


def same_tokens(one: Cache, other: Cache) -> bool:
    """Whether two caches hold the same stacks with the same tokens, bit by bit."""
    columns = ["case_id", "view", "plane", "count", "source_digest"]
    return one.stacks.select(columns).equals(other.stacks.select(columns)) and all(
        np.array_equal(one.read(stack, name), other.read(stack, name))
        for stack in range(len(one))
        for name in one.token_sets
    )


def shard_files(folder: Path) -> list[Path]:
    return sorted((folder / "shards").glob("*.h5"))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_cache_gives_every_stack_in_an_order_that_no_writer_decides(folder: Path) -> None:
    cache = open_cache(folder)
    assert cache.recipe == RECIPE and cache.fingerprint == RECIPE.fingerprint and len(cache) == 5
    assert cache.stacks["stack"].to_list() == [0, 1, 2, 3, 4]
    assert cache.stacks["case_id"].to_list() == [f"case-{number:02d}" for number in range(5)]
    assert cache.stacks["count"].to_list() == [2, 5, 7, 3, 3]
    assert cache.stacks["blank_count"].to_list() == [1, 1, 1, 1, 1]
    for number, count in enumerate([2, 5, 7, 3, 3]):
        written, slices = make_stack(number, count), cache.slices(number)
        for name in RECIPE.token_sets:
            assert np.array_equal(cache.read(number, name), written.tokens[name])
        assert np.array_equal(cache.preview(number), written.preview)
        assert np.array_equal(slices.indices, written.indices) and slices.indices.dtype == np.int32
        assert np.array_equal(slices.positions_mm, written.positions_mm)
        assert np.array_equal(slices.blank, written.blank) and slices.blank.dtype == bool


def test_a_record_holds_geometry_and_source(folder: Path) -> None:
    record, written = open_cache(folder).record(2), make_stack(2, 7)
    assert (record.case_id, record.patient_id, record.view, record.plane) == ("case-02", "patient-1", "flair", "axial")
    assert record.sources == ("flair",) and record.box == (-5, 0, 30, 30) and record.plane_shape == (20, 30)
    assert record.source_shape == (9, 20, 30) and np.array_equal(record.source_affine, written.source_affine)
    assert (record.source_bytes, record.source_digest) == (written.source_bytes, written.source_digest)


def test_token_sets_are_described_per_slice(folder: Path) -> None:
    kept = open_cache(folder).token_sets
    assert kept["cls:2"].shape == (6,) and kept["cls:2"].bytes == 12
    assert kept["patch@2:1"].shape == (4, 6) and kept["patch@2:1"].bytes == 48
    assert kept["cls:2"].dtype == "float16"


def test_tokens_are_read_only_views_of_one_map(folder: Path) -> None:
    cache = open_cache(folder)
    first, second = cache.read(0, "cls:2"), cache.read(4, "cls:2")
    assert not first.flags.writeable and not first.flags.owndata
    assert first.base is second.base  # both stacks are in the second shard
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1


def test_int8_tokens_follow_from_their_stack_alone(int8_folder: Path) -> None:
    cache = open_cache(int8_folder)
    assert cache.token_sets["cls:2"] == TokenSetInfo((6,), "int8", 6 + 4)
    assert cache.token_sets["patch@2:1"] == TokenSetInfo((4, 6), "int8", 24 + 16)
    for number, count in enumerate([2, 5, 7, 3, 3]):
        written = make_stack(number, count)
        for name in INT8.token_sets:
            alone = quantise_tokens(written.tokens[name], written.blank)
            tokens = cache.read(number, name)
            assert tokens.dtype == np.float16 and not tokens.flags.writeable
            restored = dequantise_tokens(alone.values, alone.scales, alone.channels, what="alone")
            assert np.array_equal(tokens, restored)
            shown = ~written.blank
            assert np.abs(tokens[shown].astype(float) - written.tokens[name][shown].astype(float)).max() < 0.05
        assert np.array_equal(cache.preview(number), written.preview)


def test_an_int8_cache_is_the_same_however_its_stacks_came_into_shards(int8_folder: Path, tmp_path: Path) -> None:
    resumed = tmp_path / "resumed"
    create_cache(resumed, INT8)
    for number, count in ((4, 3), (2, 7), (0, 2), (1, 5), (3, 3)):
        write_shard(resumed, INT8, [make_stack(number, count)])
    assert same_tokens(open_cache(resumed), open_cache(int8_folder))
    anew = make_stack(1, 5, source="second!")
    write_shard(resumed, INT8, [anew])
    cache = open_cache(resumed)
    assert cache.duplicates["source_changed"].to_list() == [True]
    assert np.abs(cache.read(1, "cls:2").astype(float) - anew.tokens["cls:2"].astype(float))[1:].max() < 0.05
    assert np.array_equal(pickle.loads(pickle.dumps(cache)).read(1, "cls:2"), cache.read(1, "cls:2"))  # noqa: S301


def test_a_writer_refuses_a_dtype_that_the_format_does_not_have(tmp_path: Path) -> None:
    recipe = replace(RECIPE, dtype="int4")
    create_cache(tmp_path, recipe)
    with pytest.raises(CacheError, match="recipe stores int4, the format has float16 and int8; choose one"):
        write_shard(tmp_path, recipe, [make_stack(0)])


def test_maps_are_let_go_and_made_again_without_harm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_MOST_MAPS", 1)
    with open_cache(folder) as cache:
        kept = [cache.read(stack, "cls:2") for stack in (0, 1, 0, 1)]
    assert np.array_equal(kept[0], make_stack(0, 2).tokens["cls:2"])
    assert np.array_equal(kept[1], make_stack(1, 5).tokens["cls:2"])
    assert np.array_equal(cache.read(0, "cls:2"), kept[2])


@pytest.fixture
def three_shards(tmp_path: Path) -> Path:
    """A cache of three cases, each in a shard of its own."""
    create_cache(tmp_path / "cache", RECIPE)
    for number in range(3):
        write_shard(tmp_path / "cache", RECIPE, [make_stack(number)])
    return tmp_path / "cache"


def test_the_map_longest_unused_is_let_go(three_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_MOST_MAPS", 2)
    made: list[str] = []
    map_arrays = cache_module._map_arrays

    def count(shard: Any) -> Any:
        made.append(shard.path.name)
        return map_arrays(shard)

    monkeypatch.setattr(cache_module, "_map_arrays", count)
    cache = open_cache(three_shards)
    names = [file.name for file in shard_files(three_shards)]
    for stack in (0, 1, 0, 2, 0):  # 0 is used all the time, so that 2 takes the place of 1
        assert np.array_equal(cache.read(stack, "cls:2"), make_stack(stack).tokens["cls:2"])
    assert made == names
    cache.read(1, "cls:2")
    cache.read(0, "cls:2")
    assert made == [*names, names[1]]


def test_a_block_is_checked_when_it_is_first_read_and_once_however_often_it_is_mapped(
    three_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_MOST_MAPS", 1)
    cache = open_cache(three_shards)
    written = [make_stack(number).tokens["cls:2"] for number in range(3)]
    hashed: list[int] = []
    digest = xxhash.xxh3_64_digest

    def count(data: Any) -> Any:
        hashed.append(len(data))
        return digest(data)

    monkeypatch.setattr(xxhash, "xxh3_64_digest", count)
    for stack in (0, 1, 2, 0, 1, 2):
        assert np.array_equal(cache.read(stack, "cls:2"), written[stack])
    assert hashed == [tokens.nbytes for tokens in written]
    pickle.loads(pickle.dumps(cache)).read(0, "cls:2")  # noqa: S301 - another process may see other files
    assert len(hashed) == 4
    cache.read(0, "patch@2:1")
    assert len(hashed) == 5


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_what_was_read_does_not_stay_in_the_memory_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile"))

    recipe = replace(RECIPE, token_sets=("cls:2",), preview=0)
    create_cache(tmp_path, recipe)
    for number in range(4):
        tokens = {"cls:2": np.full((500, 10_000), number, np.float16)}
        write_shard(tmp_path, recipe, [make_stack(number, 500, tokens=tokens, preview=None)])
    grown = []
    for most in (1 << 20, 1 << 40):
        monkeypatch.setattr(cache_module, "_MOST_RESIDENT", most)
        cache, before = open_cache(tmp_path), resident()
        found = [cache.read(stack, "cls:2") for stack in range(4)]
        grown.append(resident() - before)
        assert [float(tokens[-1, -1]) for tokens in found] == [0, 1, 2, 3]
        cache.close()
        del found
    assert grown[0] < 15 << 20 < 35 << 20 < grown[1]


def test_threads_that_share_few_maps_read_what_was_written(three_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_MOST_MAPS", 1)
    cache = open_cache(three_shards)

    def read(number: int) -> bool:
        return np.array_equal(cache.read(number % 3, "cls:2"), make_stack(number % 3).tokens["cls:2"])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(300)))


def test_a_cache_can_be_sent_to_another_process(folder: Path) -> None:
    cache = open_cache(folder)
    cache.read(0, "cls:2")
    copy = pickle.loads(pickle.dumps(cache))  # noqa: S301 - made here
    assert np.array_equal(copy.read(2, "patch@2:1"), cache.read(2, "patch@2:1"))
    assert np.array_equal(copy.slices(2).positions_mm, cache.slices(2).positions_mm)


def test_a_cache_without_previews_has_none(tmp_path: Path) -> None:
    recipe = replace(RECIPE, preview=0)
    create_cache(tmp_path, recipe)
    write_shard(tmp_path, recipe, [make_stack(0, preview=None)])
    assert open_cache(tmp_path).preview(0) is None


def test_an_empty_cache_opens_and_has_nothing(tmp_path: Path) -> None:
    create_cache(tmp_path / "new" / "cache", RECIPE)
    cache = open_cache(tmp_path / "new" / "cache")
    assert len(cache) == 0 and cache.token_sets == {} and cache.finished() == set()
    assert cache.stacks.columns == open_cache(tmp_path / "new" / "cache").stacks.columns
    assert verify_cache(cache.path) == []
    assert describe_cache(cache.path).slices == 0


def test_asking_for_what_is_not_there_says_what_is(folder: Path) -> None:
    cache = open_cache(folder)
    with pytest.raises(CacheError, match="has no token set cls:9; it holds cls:2, patch@2:1"):
        cache.read(0, "cls:9")
    for stack in (-1, 5):
        with pytest.raises(CacheError, match=f"has no stack {stack}; it has 5, counted from 0"):
            cache.read(stack, "cls:2")
        with pytest.raises(CacheError, match=f"has no stack {stack}"):
            cache.record(stack)


def test_a_shard_that_changes_while_the_cache_is_open_is_noticed(folder: Path) -> None:
    cache = open_cache(folder)
    first, second = shard_files(folder)
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    with pytest.raises(CacheError, match=f"{first.name} changed since the cache was opened"):
        cache.read(1, "cls:2")
    with pytest.raises(CacheError, match=f"cannot map shard: .*{second.name}"):
        cache.read(0, "cls:2")
    first.write_bytes(b"")
    with pytest.raises(CacheError, match="it is empty"):
        cache.read(1, "cls:2")


def test_too_many_open_files_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(folder)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(cache_module.mmap, "mmap", fail)
    with pytest.raises(CacheError, match=r"raise the limit \(ulimit -n\) or pack the cache"):
        cache.read(0, "cls:2")


# --- resuming and many writers ---------------------------------------------------------------------------------------


def test_finished_names_each_stack_with_its_source(folder: Path) -> None:
    finished = open_cache(folder).finished()
    assert len(finished) == 5
    assert ("case-03", "flair", "axial", make_stack(3).source_digest) in finished


def test_the_same_stack_twice_is_harmless_and_reported(folder: Path) -> None:
    write_shard(folder, RECIPE, [make_stack(1, 5)])
    cache = open_cache(folder)
    assert len(cache) == 5 and np.array_equal(cache.read(1, "cls:2"), make_stack(1, 5).tokens["cls:2"])
    names = [file.name for file in shard_files(folder)]
    assert cache.duplicates.to_dicts() == [
        {
            "case_id": "case-01",
            "view": "flair",
            "plane": "axial",
            "shard": names[0],
            "kept_shard": names[2],
            "source_changed": False,
        }
    ]


@pytest.mark.parametrize("now_ns", [10**9, 2 * 10**18])
def test_a_stack_extracted_anew_replaces_the_old_whatever_the_clock_says(folder: Path, now_ns: int) -> None:
    anew = make_stack(1, 6, source="second")
    write_shard(folder, RECIPE, [anew], clock_ns=lambda: now_ns)
    cache = open_cache(folder)
    assert np.array_equal(cache.read(1, "cls:2"), anew.tokens["cls:2"])
    assert cache.duplicates["source_changed"].to_list() == [True]
    assert ("case-01", "flair", "axial", anew.source_digest) in cache.finished()


def test_shards_of_one_instant_are_told_apart_by_name_on_every_machine(tmp_path: Path) -> None:
    caches = [tmp_path / "a", tmp_path / "b"]
    files = []
    for number, path in enumerate(caches):
        create_cache(path, RECIPE)
        files.append(write_shard(path, RECIPE, [make_stack(1, 3 + number)], clock_ns=lambda: 5))
    for source, path in zip(files, reversed(caches), strict=True):
        (path / "shards" / source.name).write_bytes(source.read_bytes())
    newest = max(range(2), key=lambda number: files[number].name)
    for path in caches:
        assert open_cache(path).stacks["count"].to_list() == [3 + newest]


def test_creating_a_cache_again_changes_nothing(folder: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    create_cache(folder, RECIPE)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_two_writers_at_once_need_no_lock(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "cache"), name, "12"], stdout=subprocess.PIPE)
        for name in ("one", "two")
    ]
    assert [writer.communicate()[1] for writer in writers] == [None, None]
    assert [writer.returncode for writer in writers] == [0, 0]
    cache = open_cache(tmp_path / "cache")
    assert len(cache) == 24 and len(cache.duplicates) == 0
    assert all(cache.read(stack, "cls:2")[49, 1999] == stack % 12 for stack in range(24))


def test_a_killed_writer_loses_at_most_the_shard_in_progress(tmp_path: Path) -> None:
    path, announced, chance = tmp_path / "cache", set(), random.Random(11)
    for kill in (True, True, True, False):
        arguments = [sys.executable, "-c", WRITER, str(path), "case", "40"]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            left = [file.name for file in (path / "shards").glob(".*") if f".{writer.pid}." not in file.name]
            assert left == []  # what the writer before was killed over is gone
            if kill:
                announced |= {writer.stdout.readline().strip() for _ in range(chance.randrange(1, 8))}
                time.sleep(chance.random() * 0.01)
                writer.send_signal(signal.SIGKILL)
            announced |= set(writer.stdout.read().split("\n")[:-1])
        cache = open_cache(path)
        assert announced <= set(cache.stacks["case_id"])
        assert verify_cache(path) == [] and len(cache.duplicates) == 0
    assert len(cache) == 40 and all(cache.read(stack, "cls:2")[0, 0] == stack for stack in range(40))


def test_only_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    final = tmp_path / "x.h5"
    mine = temporary_path(final)
    host, pid, token = mine.name.split(".")[-4:-1]
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        pass
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as alive:
        kept = [
            mine,
            tmp_path / f".x.h5.{host}.{alive.pid}.{token}.tmp",
            tmp_path / f".x.h5.elsewhere.{ended.pid}.{token}.tmp",
            tmp_path / "x.h5",
            tmp_path / ".hidden",
            tmp_path / "notes.tmp",
        ]
        stale = [
            tmp_path / f".x.h5.{host}.{ended.pid}.{token}.tmp",
            tmp_path / f".x.h5.{host}.{pid}.00000000.tmp",  # this process's id, but from an earlier life
            tmp_path / f".x.h5.elsewhere.{ended.pid}.11111111.tmp",
        ]
        for file in kept + stale:
            file.write_bytes(b"x")
        old = time.time() - STALE_AFTER_S - 60
        os.utime(stale[2], (old, old))
        assert remove_stale(tmp_path) == sorted(stale)
        assert sorted(tmp_path.iterdir()) == sorted(kept)
        alive.communicate()
    assert int(pid) == os.getpid()


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    write_new_file(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        write_new_file(tmp_path / "a", b"second")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"first")]


def test_a_file_system_without_hard_links_is_served_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", fail)
    create_cache(tmp_path, RECIPE)
    write_shard(tmp_path, RECIPE, [make_stack(0)])
    assert len(open_cache(tmp_path)) == 1
    with pytest.raises(FileExistsError):
        write_new_file(tmp_path / "recipe.json", b"other")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["recipe.json", "shards"]


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_another_recipe_is_refused_with_field_values_and_ways_out(folder: Path) -> None:
    other = replace(RECIPE, image_size=64)
    message = "image_size is 32 there and 64 here.*Choose another --out, or pass the options that made it"
    with pytest.raises(RecipeError, match=message):
        create_cache(folder, other)
    with pytest.raises(RecipeError, match="image_size is 32 there and 64 here"):
        write_shard(folder, other, [make_stack(9)])


def test_a_shard_of_another_recipe_is_named(folder: Path, tmp_path: Path) -> None:
    other = replace(RECIPE, backbone="other")
    create_cache(tmp_path / "other", other)
    shard = write_shard(tmp_path / "other", other, [make_stack(9)])
    shard.rename(folder / "shards" / shard.name)
    with pytest.raises(RecipeError, match=f"{shard.name} has recipe .*backbone is 'other' there and 'toy' here"):
        open_cache(folder)
    damages = verify_cache(folder)
    assert [damage.file.name for damage in damages] == [shard.name] and "backbone" in damages[0].problem


def test_a_missing_recipe_file_is_made_up_for_by_the_shards(folder: Path) -> None:
    (folder / "recipe.json").unlink()
    assert open_cache(folder).recipe == RECIPE
    with pytest.raises(RecipeError, match="image_size is 32 there and 64 here"):
        create_cache(folder, replace(RECIPE, image_size=64))
    assert not (folder / "recipe.json").exists()
    create_cache(folder, RECIPE)
    assert (folder / "recipe.json").read_text() == RECIPE.to_json() + "\n"


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]", b'{"backbone": "toy"}'])
def test_a_damaged_recipe_file_says_that_shards_hold_copies(folder: Path, damage: bytes) -> None:
    (folder / "recipe.json").write_bytes(damage)
    for use in (open_cache, lambda path: create_cache(path, RECIPE)):
        with pytest.raises(CacheError, match=r"recipe.json.*every shard holds a copy"):
            use(folder)
    assert [damage.file for damage in verify_cache(folder)] == [folder]


def test_a_cache_of_a_newer_embedkit_says_to_upgrade(folder: Path) -> None:
    text = RECIPE.to_json().replace('"image_size"', '"image_scale":1,"image_size"')
    (folder / "recipe.json").write_text(text)
    with pytest.raises(CacheError, match="unknown image_scale; a newer embedkit wrote it: upgrade"):
        open_cache(folder)
    recipe = replace(RECIPE, dtype="int4")
    (folder / "recipe.json").write_text(recipe.to_json())
    for file in shard_files(folder):
        file.unlink()
    with pytest.raises(CacheError, match="stores int4, this embedkit reads float16 and int8; upgrade embedkit"):
        open_cache(folder)


def test_shards_that_store_other_shapes_are_refused(folder: Path) -> None:
    stack = make_stack(9)
    tokens = {name: np.concatenate([array, array], axis=-1) for name, array in stack.tokens.items()}
    shard = write_shard(folder, RECIPE, [replace(stack, tokens=tokens)])
    with pytest.raises(CacheError, match=rf"{shard.name}: tokens/cls:2 has shape \(12,\) per slice, \(6,\) in other"):
        open_cache(folder)
    assert "in other shards" in verify_cache(folder)[0].problem


# --- what is no cache ------------------------------------------------------------------------------------------------


def test_what_is_no_cache_is_said_to_be_none(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(CacheError, match=r"is no cache: it holds nothing, expected recipe.json and shards/"):
        open_cache(run)
    for name in ("metrics.json", "run.json", "weights.safetensors", "a", "b"):
        (run / name).touch()
    with pytest.raises(CacheError, match=r"it holds a, b, metrics.json, run.json, \.\.\., expected"):
        open_cache(run)
    with pytest.raises(CacheError, match="is no cache: it holds"):
        verify_cache(run)
    for use in (open_cache, verify_cache):
        with pytest.raises(CacheError, match="does not exist; give the folder that embedkit extract wrote"):
            use(tmp_path / "absent")
    with pytest.raises(CacheError, match=r"run\.json is no embedkit shard"):
        open_cache(run / "run.json")
    with pytest.raises(CacheError, match="is no cache; make it with create_cache first"):
        write_shard(run, RECIPE, [make_stack(0)])


def test_a_cache_is_not_made_among_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CacheError, match=r"is no cache and holds thesis.tex; choose a new or empty folder"):
        create_cache(tmp_path, RECIPE)
    with pytest.raises(
        CacheError,
        match=r"thesis.tex is a file, expected a folder: to a packed cache no case can be added; choose a new",
    ):
        create_cache(tmp_path / "thesis.tex", RECIPE)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_read_only_place_is_said_to_be_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(CacheError, match=r"cannot make a cache: .* is read-only or not permitted to this user; choose"):
        create_cache(tmp_path / "cache", RECIPE)


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "is full"), (errno.EDQUOT, "is full"), (errno.EACCES, "is read-only"), (errno.EIO, "place: Input")],
)
def test_an_error_of_the_system_is_put_in_words(code: int, message: str) -> None:
    assert message in explain_os_error(OSError(code, os.strerror(code)), Path("place"))


def test_files_that_are_no_shards_are_let_be(folder: Path) -> None:
    for name in (".DS_Store", ".x.h5.host.1.00000000.tmp", "notes.txt", ".hidden.h5"):
        (folder / "shards" / name).write_text("x")
    (folder / "README").write_text("mine")
    assert len(open_cache(folder)) == 5 and verify_cache(folder) == []


# --- verifying, describing, packing ----------------------------------------------------------------------------------


def test_verify_finds_every_damaged_part(either_folder: Path) -> None:
    folder = either_folder
    first, second = shard_files(folder)
    parts = array_names(open_cache(folder).recipe)
    data = bytearray(first.read_bytes())
    seal = open_cache(folder).shards[0].seal
    for region in seal.regions:
        data[region.offset + region.bytes - 1] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-7])
    seen: list[tuple[int, int]] = []
    damages = verify_cache(folder, progress=lambda done, total: seen.append((done, total)))
    assert {(damage.file, damage.part) for damage in damages} == {(second, "")} | {(first, part) for part in parts}
    assert len(parts) in (3, 7)
    assert "delete the file and run the same extract again" in damages[0].problem
    assert sorted(seen) == seen and seen[-1][1] == sum(file.stat().st_size for file in (first, second))


def test_a_summary_counts_what_is_there(folder: Path) -> None:
    write_shard(folder, RECIPE, [make_stack(1, 5), make_stack(1, 4, plane="sagittal")])
    record_failure(folder, Failure("case-77", "it is truncated", view="flair"))
    summary = describe_cache(folder)
    assert (summary.cases, summary.patients, summary.stacks, summary.slices, summary.blank_slices) == (5, 3, 6, 24, 6)
    assert summary.views == {"flair/axial": 5, "flair/sagittal": 1}
    assert summary.shards == 3 and summary.bytes == sum(file.stat().st_size for file in shard_files(folder))
    assert summary.token_bytes == {"cls:2": 29 * 12, "patch@2:1": 29 * 48} and summary.preview_bytes == 29 * 16
    assert summary.token_sets["patch@2:1"].bytes == 48
    assert summary.recipe == RECIPE and len(summary.duplicates) == 1
    assert summary.failures == (Failure("case-77", "it is truncated", view="flair"),)


def test_a_packed_cache_is_the_cache(either_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = either_folder
    write_shard(folder, open_cache(folder).recipe, [make_stack(2, 4, source="second"), make_stack(8, 2)])
    record_failure(folder, Failure("case-77", "it is truncated"))
    monkeypatch.setattr(packing, "CHUNK_BYTES", 50)  # pieces that end within rows
    seen: list[tuple[int, int]] = []
    packed = pack_cache(folder, tmp_path / "packed.h5", progress=lambda done, total: seen.append((done, total)))
    assert (packed.stacks, packed.shards, packed.duplicates, packed.failures) == (6, 1, 1, 1)
    assert packed.bytes == packed.path.stat().st_size
    assert sorted(set(seen)) == seen and seen[-1][0] == seen[-1][1]
    one, many = open_cache(packed.path), open_cache(folder)
    columns = [name for name in one.stacks.columns if name not in ("shard", "shard_number", "first_row")]
    assert one.stacks.select(columns).equals(many.stacks.select(columns))
    assert one.recipe == many.recipe and one.finished() == many.finished() and len(one.duplicates) == 0
    assert same_tokens(one, many)
    for stack in range(6):
        assert np.array_equal(one.preview(stack), many.preview(stack))
        assert np.array_equal(one.slices(stack).blank, many.slices(stack).blank)
    assert verify_cache(packed.path) == []
    time.sleep(1.05)  # no time of day gets into the file
    pack_cache(folder, tmp_path / "again.h5")
    assert (tmp_path / "again.h5").read_bytes() == packed.path.read_bytes()
    pack_cache(packed.path, tmp_path / "twice.h5")
    assert (tmp_path / "twice.h5").read_bytes() == packed.path.read_bytes()


@pytest.mark.parametrize("shard_bytes", [None, 3_000_000])
def test_packing_takes_no_more_memory_for_more_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int | None
) -> None:
    recipe = replace(RECIPE, token_sets=("cls:2",), preview=0)
    create_cache(tmp_path / "cache", recipe)
    for number in range(4):
        tokens = {"cls:2": np.full((500, 2000), number, np.float16)}
        write_shard(tmp_path / "cache", recipe, [make_stack(number, 500, tokens=tokens, preview=None)])
    monkeypatch.setattr(packing, "CHUNK_BYTES", 1 << 16)
    tracemalloc.start()
    packed = pack_cache(tmp_path / "cache", tmp_path / "packed", shard_bytes=shard_bytes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert packed.bytes > 8e6 and peak < 2e6 and packed.shards == (1 if shard_bytes is None else 4)


@pytest.mark.parametrize("shard_bytes", [None, 10_000])
def test_packing_never_passes_damage_on(either_folder: Path, tmp_path: Path, shard_bytes: int | None) -> None:
    folder = either_folder
    shard = shard_files(folder)[1]
    whole, regions = shard.read_bytes(), open_cache(folder).shards[1].seal.regions
    for region in regions:
        data = bytearray(whole)
        data[region.offset] ^= 4
        shard.write_bytes(data)
        with pytest.raises(CacheError, match=f"{shard.name} is damaged: {region.name} is not what was written"):
            pack_cache(folder, tmp_path / "packed", shard_bytes=shard_bytes)
        assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def make_cases(path: Path, recipe: Recipe, cases: int) -> None:
    """Cases of two stacks of 100 slices, the second plane of each in a shard of its own, one stack twice."""
    create_cache(path, recipe)
    for plane in ("axial", "sagittal"):
        write_shard(path, recipe, [make_stack(number, 100, plane=plane) for number in range(cases)])
    write_shard(path, recipe, [make_stack(2, 100, source="second")])


@pytest.mark.parametrize("recipe", [RECIPE, INT8], ids=["float16", "int8"])
def test_packing_by_size_makes_shards_of_whole_cases_within_it(tmp_path: Path, recipe: Recipe) -> None:
    make_cases(tmp_path / "cache", recipe, 9)
    record_failure(tmp_path / "cache", Failure("case-77", "it is truncated"))
    seen: list[tuple[int, int]] = []
    packed = pack_cache(
        tmp_path / "cache",
        tmp_path / "out",
        shard_bytes=60_000,
        progress=lambda done, total: seen.append((done, total)),
    )
    files = shard_files(tmp_path / "out")
    sizes = [file.stat().st_size for file in files]
    assert (packed.stacks, packed.shards, packed.duplicates, packed.failures) == (18, len(files), 1, 0)
    assert packed.bytes == sum(sizes) and 3 <= len(files) < 9
    per_array = 4096 * len(array_names(recipe))
    assert max(sizes) <= 60_000 + 8192 + 2 * 4096 + per_array  # the seal, HDF5's own, and what begins at a page
    assert sorted(set(seen)) == seen and seen[-1][0] == seen[-1][1]
    one, many = open_cache(tmp_path / "out"), open_cache(tmp_path / "cache")
    assert same_tokens(one, many) and len(one.duplicates) == 0
    assert one.stacks.group_by("case_id").agg(pl.col("shard").n_unique())["shard"].to_list() == [1] * 9
    assert all(np.array_equal(one.preview(stack), many.preview(stack)) for stack in range(18))
    assert all(one.slices(stack).blank.tolist() == many.slices(stack).blank.tolist() for stack in range(18))
    assert read_failures(tmp_path / "out") == read_failures(tmp_path / "cache") and verify_cache(tmp_path / "out") == []
    assert (tmp_path / "out" / "recipe.json").read_bytes() == (tmp_path / "cache" / "recipe.json").read_bytes()
    pack_cache(tmp_path / "cache", tmp_path / "again", shard_bytes=60_000)
    assert [file.read_bytes() for file in shard_files(tmp_path / "again")] == [file.read_bytes() for file in files]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "cache", "out"]
    write_shard(tmp_path / "out", recipe, [make_stack(0, 3, source="later")])  # it goes on as a cache like any other
    assert open_cache(tmp_path / "out").stacks["count"].to_list()[0] == 3


def test_packing_by_size_keeps_a_larger_case_whole_and_one_size_for_all_in_one(folder: Path, tmp_path: Path) -> None:
    assert pack_cache(folder, tmp_path / "small", shard_bytes=1).shards == 5
    assert pack_cache(folder, tmp_path / "large", shard_bytes=10**12).shards == 1
    for path in (tmp_path / "small", tmp_path / "large"):
        assert same_tokens(open_cache(path), open_cache(folder))
    pack_cache(tmp_path / "large", tmp_path / "file.h5")
    assert same_tokens(open_cache(tmp_path / "file.h5"), open_cache(folder))
    pack_cache(tmp_path / "file.h5", tmp_path / "split", shard_bytes=1)
    assert same_tokens(open_cache(tmp_path / "split"), open_cache(folder))


def test_packing_by_size_that_is_interrupted_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def interrupt(*arguments: Any, **options: Any) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        write_sealed(*arguments, **options)

    monkeypatch.setattr(packing, "write_sealed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack_cache(folder, tmp_path / "out", shard_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_packing_by_size_says_what_is_wrong(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (0, -5):
        with pytest.raises(OptionError, match=f"shards of {size} bytes cannot be; give a size above 0, for example"):
            pack_cache(folder, tmp_path / "out", shard_bytes=size)
    with pytest.raises(CacheError, match="lies inside the cache"):
        pack_cache(folder, folder / "out", shard_bytes=1)
    with pytest.raises(CacheError, match="cannot pack"):
        pack_cache(folder, tmp_path / "absent" / "out", shard_bytes=1)
    (tmp_path / "there").mkdir()
    with pytest.raises(CacheError, match="there exists; choose another name"):
        pack_cache(folder, tmp_path / "there", shard_bytes=1)

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CacheError, match="is full; free some space"):
        pack_cache(folder, tmp_path / "out", shard_bytes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "there"]


@pytest.mark.parametrize(("size", "shards"), [("1", 5), ("0.001 kB", 5), ("500MB", 1), ("2gb", 1), ("1 TB", 1)])
def test_the_command_packs_by_a_size_in_words(folder: Path, tmp_path: Path, size: str, shards: int) -> None:
    done = CliRunner().invoke(app, ["pack", str(folder), "-o", str(tmp_path / "out"), "--shard-size", size])
    assert done.exit_code == 0, done.output
    assert f"5 stacks in {shards} shards" in done.output and len(shard_files(tmp_path / "out")) == shards


@pytest.mark.parametrize("options", [[], ["--shard-size", "1"], ["--shard-size", "1GB"]])
def test_the_command_tells_the_end_once(folder: Path, tmp_path: Path, options: Sequence[str]) -> None:
    done = CliRunner().invoke(app, ["pack", str(folder), "-o", str(tmp_path / "out"), *options])
    shares = [line.split()[1].split("/") for line in done.stderr.splitlines() if line.startswith("pack: ")]
    assert len(shares) == 1 and shares[0][0] == shares[0][1]


@pytest.mark.parametrize("shard_bytes", [None, 1])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_packing_onto_a_full_or_read_only_disk_gives_no_advice_of_extract(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, shard_bytes: int | None
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("embedkit.sealing.publish_file", fail)
    with pytest.raises(CacheError) as caught:
        pack_cache(folder, tmp_path / "out", shard_bytes=shard_bytes)
    place = tmp_path if shard_bytes is None else tmp_path / "out"
    assert str(caught.value) == f"cannot pack: {explain_os_error(OSError(code, ''), place)}"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    with pytest.raises(CacheError, match=r"cannot write shard: .*; what is finished stays, run the same command again"):
        write_shard(folder, RECIPE, [make_stack(7)])


@pytest.mark.parametrize(
    "size",
    [
        *("0", "0.1", "-1GB", "GB", "1 XB", "1.5.2GB", "many", "1e9", "1GiB"),
        *("9" * 400, "1." + "9" * 400 + "GB", "1" * 16, "\u0663GB"),
    ],
    ids=lambda size: size[:8],
)
def test_a_size_that_means_nothing_is_refused(folder: Path, tmp_path: Path, size: str) -> None:
    done = CliRunner().invoke(app, ["pack", str(folder), "-o", str(tmp_path / "out"), f"--shard-size={size}"])
    assert done.exit_code == 2
    assert "means nothing; give a number above 0" in " ".join(done.output.split())
    assert size[:16] in done.output and not (tmp_path / "out").exists()


# --- what each choice takes ------------------------------------------------------------------------------------------


def choices(recipe: Recipe, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Token set to bytes per slice as float16 and as int8, of a cache of 10 slices in 2 stacks."""
    infos = {name: TokenSetInfo(shape, recipe.dtype, 0) for name, shape in shapes.items()}
    found = list_choices(recipe, infos, slices=10, stacks=2)
    per_stack = {"float16": 0, "int8": 4}
    for choice in found:
        assert choice.cache_bytes == 10 * choice.slice_bytes + 2 * per_stack[choice.dtype] * choice.shape[-1]
    sizes = {(choice.token_set, choice.dtype): choice.slice_bytes for choice in found}
    return {name: (sizes[name, "float16"], sizes[name, "int8"]) for name, _ in sizes}


def test_the_choices_of_a_vision_transformer_follow_from_its_name_and_one_token_set() -> None:
    recipe = replace(RECIPE, backbone="vit_small_patch14_reg4_dinov2.lvd142m", image_size=224)
    assert choices(recipe, {"cls:12": (384,), "patch@4:8": (16, 384)}) == {
        "cls": (768, 388),
        "patch@4": (12288, 6208),
        "patch@7": (37632, 19012),
        "patch": (196608, 99328),
    }
    assert list(choices(recipe, {"cls:12": (384,)})) == ["cls", "patch@4", "patch@7", "patch"]


def test_the_choices_tell_of_attention_and_cut_only_where_they_are_there() -> None:
    recipe = replace(RECIPE, backbone="toy")
    found = choices(recipe, {"attention:12": (3, 196), "cut:10": (201, 192), "patch:10": (196, 192)})
    assert found["attention"] == (1176, 600) and found["cut"] == (77184, 201 * 196)
    assert found["patch"] == (75264, 196 * 196) and found["patch@7"] == (18816, 49 * 196) and "cls" not in found


@pytest.mark.parametrize("backbone", ["embedkit/scattering", "swin_tiny_patch4_window7_224", "resnet50"])
def test_nothing_is_said_of_a_grid_that_the_cache_does_not_tell(backbone: str) -> None:
    recipe = replace(RECIPE, backbone=backbone, image_size=224)
    assert choices(recipe, {"cls:2": (64,), "patch@5:2": (25, 64)}) == {"cls": (128, 68), "patch@5": (3200, 1700)}


def test_layers_of_different_widths_are_told_apart() -> None:
    recipe = replace(RECIPE, backbone="resnet50", image_size=224)
    found = choices(recipe, {"patch:3": (196, 512), "patch@4:4": (16, 1024), "cls:4": (1024,)})
    assert set(found) == {"patch:3", "patch@4:3", "patch@7:3", "patch@4:4", "cls:4"}
    assert found["patch:3"] == (200704, 101136) and found["cls:4"] == (2048, 1028)


def test_the_command_tells_what_each_choice_takes(int8_folder: Path) -> None:
    printed = CliRunner().invoke(app, ["info", str(int8_folder)]).output
    assert "what one layer of each token set would take here" in printed
    assert any(line.split()[:6] == ["patch@2", "4", "x", "6", "48", "0.0"] for line in printed.splitlines())
    assert any(line.split() == ["cls:2", "6", "int8", "10", "0.0"] for line in printed.splitlines())
    fields = json.loads(CliRunner().invoke(app, ["info", str(int8_folder), "--json"]).output)
    assert {"token_set": "patch@2", "shape": [4, 6], "dtype": "int8", "slice_bytes": 40, "cache_bytes": 920} in (
        fields["choices"]
    )
    assert fields["token_bytes"] == {"cls:2": 20 * 10 + 5 * 24, "patch@2:1": 20 * 40 + 5 * 24}


def test_an_empty_cache_has_no_choices(tmp_path: Path) -> None:
    create_cache(tmp_path, RECIPE)
    assert describe_cache(tmp_path).choices == ()
    assert "would take" not in CliRunner().invoke(app, ["info", str(tmp_path)]).output


def test_packing_writes_over_nothing_and_not_into_the_cache(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.h5").write_text("mine")
    with pytest.raises(CacheError, match=r"mine.h5 exists; choose another name or delete it first"):
        pack_cache(folder, tmp_path / "mine.h5")
    assert (tmp_path / "mine.h5").read_text() == "mine"
    with pytest.raises(CacheError, match="lies inside the cache"):
        pack_cache(folder, folder / "shards" / "packed.h5")
    with pytest.raises(CacheError, match="cannot pack"):
        pack_cache(folder, tmp_path / "absent" / "packed.h5")
    create_cache(tmp_path / "empty", RECIPE)
    with pytest.raises(CacheError, match="holds no stack yet; there is nothing to pack"):
        pack_cache(tmp_path / "empty", tmp_path / "packed.h5")


@pytest.mark.parametrize("sums", ["blocks", "whole"])
def test_a_flipped_bit_is_found_by_whoever_first_reads_its_block(
    tmp_path: Path, sums: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sums == "whole":  # as shards were sealed before there were blocks
        monkeypatch.setattr(Region, "to_json", lambda region: {name: getattr(region, name) for name in OLD_REGION})
    create_cache(tmp_path / "cache", RECIPE)
    slices = 10_000  # patch tokens in six blocks, those of the first stack in two
    shard = write_shard(tmp_path / "cache", RECIPE, [make_stack(number, slices) for number in range(3)])
    place = open_cache(tmp_path / "cache").shards[0].arrays["tokens/patch@2:1"]
    data = bytearray(shard.read_bytes())
    data[place.offset + place.bytes - 1] ^= 1
    shard.write_bytes(data)
    cache = open_cache(tmp_path / "cache")
    assert np.array_equal(cache.read(2, "cls:2"), make_stack(2, slices).tokens["cls:2"])
    told = f"{shard.name} is damaged: tokens/patch@2:1 is not what was written; run embedkit verify"
    if sums == "blocks":
        assert np.array_equal(cache.read(0, "patch@2:1"), make_stack(0, slices).tokens["patch@2:1"])
    for _ in range(2):
        with pytest.raises(CacheError, match=told):
            cache.read(2, "patch@2:1")
    (damage,) = verify_cache(tmp_path / "cache")
    assert (damage.file, damage.part) == (shard, "tokens/patch@2:1")


def test_every_array_of_a_stack_is_checked(either_folder: Path) -> None:
    shard = shard_files(either_folder)[1]
    whole, seal = shard.read_bytes(), open_cache(either_folder).shards[1].seal
    for region in seal.regions:
        for place in (region.offset, region.offset + region.bytes - 1):
            data = bytearray(whole)
            data[place] ^= 4
            shard.write_bytes(data)
            cache = open_cache(either_folder)
            with pytest.raises(CacheError, match=f"{shard.name} is damaged: {region.name} is not what was written"):
                for stack in range(len(cache)):
                    cache.preview(stack)
                    for name in cache.token_sets:
                        cache.read(stack, name)


def test_checksums_of_blocks_that_contradict_those_of_the_whole_are_told_by_verify(folder: Path) -> None:
    shard = shard_files(folder)[0]
    seal, data = open_cache(folder).shards[0].seal, shard.read_bytes()
    first = replace(seal.regions[0], sums=bytes(len(seal.regions[0].sums)))
    shard.write_bytes(replace(seal, regions=(first, *seal.regions[1:])).to_bytes() + data[seal.userblock :])
    assert [damage.part for damage in verify_cache(folder)] == [first.name]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(0, 3000), block=st.integers(1, 700), pieces=st.integers(1, 900), flip=st.integers(0, 2999))
def test_sums_do_not_depend_on_the_pieces_and_tell_the_block_that_changed(
    size: int, block: int, pieces: int, flip: int
) -> None:
    array = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    sums = BlockSums(block)
    for start in range(0, size, pieces):
        sums.update(array[start : start + pieces].data)
    made = sums.finish()
    assert len(made) == SUM_BYTES * count_blocks(size, block)
    assert UncheckedBlocks(size, block, made, "").pass_bytes(array, 0, size)
    if flip < size:
        array[flip] ^= 16
        unchecked, first = UncheckedBlocks(size, block, made, ""), flip // block * block
        assert unchecked.pass_bytes(array, 0, first)
        assert not unchecked.pass_bytes(array, flip, flip + 1)
        assert unchecked.pass_bytes(array, min(size, first + block), size)


def test_blocks_are_of_256_kib_and_larger_where_there_would_be_too_many() -> None:
    assert [block_size(size) for size in (0, 1, 1 << 34)] == [1 << 18] * 3
    assert block_size((1 << 34) + 1) == 1 << 19 and count_blocks(10**12, block_size(10**12)) <= 1 << 16


# --- failures --------------------------------------------------------------------------------------------------------


def test_failures_are_kept_until_made_good(tmp_path: Path) -> None:
    assert read_failures(tmp_path).failures == ()
    record_failure(tmp_path, Failure("a", "truncated\nfile", view="pre"))
    record_failure(tmp_path, Failure("b", "NaN", path="b.nii"))
    record_failure(tmp_path, Failure("a", "still truncated", view="pre"))
    record_failure(tmp_path, Failure("a", "4D", view="post"))
    assert read_failures(tmp_path).failures == (
        Failure("a", "still truncated", view="pre"),
        Failure("b", "NaN", path="b.nii"),
        Failure("a", "4D", view="post"),
    )
    clear_failures(tmp_path, [("a", "pre"), ("never", "failed")])
    assert [failure.reason for failure in read_failures(tmp_path).failures] == ["NaN", "4D"]
    record_failure(tmp_path, Failure("a", "again", view="pre"))
    assert [failure.reason for failure in read_failures(tmp_path).failures] == ["NaN", "4D", "again"]
    clear_failures(tmp_path)
    assert read_failures(tmp_path).failures == ()


def test_half_a_line_loses_only_itself_and_is_reported(tmp_path: Path) -> None:
    record_failure(tmp_path, Failure("a", "NaN"))
    file = tmp_path / "failures.jsonl"
    file.write_bytes(file.read_bytes() + b'{"case_id": "b", "rea')
    assert read_failures(tmp_path).unreadable_lines == (2,)
    record_failure(tmp_path, Failure("c", "4D"))
    log = read_failures(tmp_path)
    assert [failure.case_id for failure in log.failures] == ["a", "c"] and log.unreadable_lines == (2,)


@pytest.mark.parametrize(
    "line", [b"[]", b"5", b'{"case_id": 5, "view": ""}', b'{"case_id": "a", "view": ""}', b"\xff", b"[" * 99999]
)
def test_lines_that_are_no_record_are_reported(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "failures.jsonl").write_bytes(line + b"\n")
    assert read_failures(tmp_path).unreadable_lines == (1,) and read_failures(tmp_path).failures == ()


def test_a_long_reason_is_cut(tmp_path: Path) -> None:
    record_failure(tmp_path, Failure("a", "x" * 10_000))
    assert read_failures(tmp_path).failures[0].reason == "x" * 2000


def test_writers_record_failures_at_once_without_a_lock(tmp_path: Path) -> None:
    code = (
        "import sys; from embedkit.failures import *\n"
        "for n in range(25): record_failure(sys.argv[1], Failure(f'{sys.argv[2]}-{n}', 'r' * 1500))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    log = read_failures(tmp_path)
    expected = {f"{name}-{number}" for name, number in itertools.product("abc", range(25))}
    assert {failure.case_id for failure in log.failures} == expected and log.unreadable_lines == ()


def test_a_failure_that_cannot_be_recorded_says_why(tmp_path: Path) -> None:
    (tmp_path / "failures.jsonl").mkdir()
    with pytest.raises(CacheError, match="cannot record a failure"):
        record_failure(tmp_path, Failure("a", "NaN"))
    with pytest.raises(CacheError, match="cannot read the failure record"):
        read_failures(tmp_path)

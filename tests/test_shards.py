"""Tests of one shard: what is written is read, by embedkit and by anyone, and what is damaged or hostile is refused."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedkit.cache import Cache, create_cache, open_cache, write_shard
from embedkit.errors import CacheError, EmbedkitError
from embedkit.inspection import verify_cache
from embedkit.recipe import Recipe
from embedkit.seal import FORMAT_VERSIONS, Region, Seal, userblock_bytes
from embedkit.shards import array_names, load_shard
from embedkit.tables import StackTokens, check_stack

PROJECT = Path(__file__).resolve().parent.parent
RECIPE = Recipe("toy", "builtin:1", ("cls:2", "patch@2:1"), 32, (0.5,), (0.25,), preview=4)
INT8 = replace(RECIPE, dtype="int8")
FUZZ_COPIES = int(os.environ.get("EMBEDKIT_FUZZ_COPIES", "1000"))


def make_stack(number: int, slices: int = 3, dim: int = 6, **changes: Any) -> StackTokens:
    random = np.random.default_rng([number, slices, dim])
    stack = StackTokens(
        case_id=f"case-{number}",
        patient_id=f"patient-{number // 2}",
        view="flair",
        plane="axial",
        sources=("flair",),
        indices=np.arange(slices, dtype=np.int32) * 2,
        positions_mm=np.arange(slices, dtype=np.float32) * 5.5,
        blank=np.arange(slices) == 1,
        plane_shape=(20, 30),
        box=(-5, 0, 30, 30),
        source_shape=(9, 20, 30),
        source_affine=np.diag([2.75, 1.0, -1.0, 1.0]),
        source_bytes=4000 + number,
        source_digest=hashlib.sha256(str(number).encode()).hexdigest(),
        tokens={
            "cls:2": random.standard_normal((slices, dim)).astype(np.float16),
            "patch@2:1": random.standard_normal((slices, 4, dim)).astype(np.float16),
        },
        preview=random.integers(0, 256, (slices, 4, 4), dtype=np.uint8),
        source_modified_ns=1_700_000_000_000_000_000 + number,
    )
    return replace(stack, **changes)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    create_cache(tmp_path / "cache", RECIPE)
    return write_shard(tmp_path / "cache", RECIPE, [make_stack(0), make_stack(1, slices=5)])


@pytest.fixture
def int8_shard(tmp_path: Path) -> Path:
    create_cache(tmp_path / "int8", INT8)
    return write_shard(tmp_path / "int8", INT8, [make_stack(0), make_stack(1, slices=5)])


def mapped(path: Path, name: str) -> Any:
    place = load_shard(path).arrays[name]
    return np.memmap(path, place.dtype, "r", place.offset, place.shape)


# --- what is written is read -----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6), dim=st.integers(1, 40), preview=st.sampled_from([0, 3])
)
def test_a_shard_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], dim: int, preview: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    recipe = replace(RECIPE, preview=preview)
    pictures = [np.full((count, 3, 3), number, np.uint8) if preview else None for number, count in enumerate(counts)]
    stacks = [make_stack(number, count, dim, preview=pictures[number]) for number, count in enumerate(counts)]
    create_cache(folder, recipe)
    path = write_shard(folder, recipe, stacks)
    shard = load_shard(path)
    for name in recipe.token_sets:
        written = np.concatenate([stack.tokens[name] for stack in stacks])
        assert np.array_equal(mapped(path, f"tokens/{name}"), written)
    assert shard.stacks["count"].tolist() == counts
    assert shard.stacks["case_id"].tolist() == [stack.case_id.encode() for stack in stacks]
    assert np.array_equal(shard.slices["position_mm"], np.concatenate([stack.positions_mm for stack in stacks]))
    assert verify_cache(folder) == []


def test_any_h5py_reads_the_same_numbers_and_tables(shard: Path) -> None:
    with h5py.File(shard, "r") as file:
        assert np.array_equal(file["tokens/patch@2:1"][3:8], make_stack(1, slices=5).tokens["patch@2:1"])
        assert file["tokens/cls:2"].chunks is None and file["tokens/cls:2"].dtype == np.float16
        assert file["stacks"]["case_id"].tolist() == [b"case-0", b"case-1"]
        assert file["stacks"]["source_affine"][1].tolist() == np.diag([2.75, 1.0, -1.0, 1.0]).tolist()
        assert file["stacks"]["box"][0].tolist() == [-5, 0, 30, 30]
        assert file["slices"]["blank"].tolist() == [0, 1, 0, 0, 1, 0, 0, 0]
        assert file.attrs["recipe"].decode() == RECIPE.to_json()
        assert file.attrs["format"] == b"embedkit-cache"
        assert file.attrs["format_version"] == 1
        assert file.attrs["fingerprint"].decode() == RECIPE.fingerprint


def test_the_examples_in_the_format_document_work(shard: Path, int8_shard: Path) -> None:
    document = (PROJECT / "docs" / "cache-format.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    assert len(examples) == 2
    names: dict[str, Any] = {}
    for example in examples:
        exec(example, names)
    restored = names["restore_tokens"](int8_shard, "patch@2:1", "case-1", "flair", "axial")
    assert np.array_equal(restored, open_cache(int8_shard).read(1, "patch@2:1"))
    tokens = names["read_tokens"](shard, "cls:2", "case-1", "flair", "axial")
    assert np.array_equal(tokens, make_stack(1, slices=5).tokens["cls:2"])
    with pytest.raises(KeyError):
        names["read_tokens"](shard, "cls:2", "nobody", "flair", "axial")


def test_the_seal_is_as_the_format_document_says(shard: Path) -> None:
    block = shard.read_bytes()[:8192]
    head, sha256, rest = block[:22], block[22:86], block[87:]
    assert head == b"embedkit-cache 1 8192 "
    assert sha256.decode() == hashlib.sha256(head + rest).hexdigest()
    assert rest.rstrip(b" ").endswith(b"}")


def test_an_int8_shard_is_of_format_2_which_a_reader_of_format_1_refuses(int8_shard: Path) -> None:
    block = int8_shard.read_bytes()[:8192]
    assert block[:22] == b"embedkit-cache 2 8192 "
    assert block[22:86].decode() == hashlib.sha256(block[:22] + block[87:]).hexdigest()
    with h5py.File(int8_shard) as file:
        assert file.attrs["format_version"] == 2
        assert (file["tokens/patch@2:1"].dtype, file["tokens/patch@2:1"].shape) == (np.int8, (8, 4, 6))
        assert (file["scales/patch@2:1"].dtype, file["scales/patch@2:1"].shape) == (np.float32, (8, 4))
        assert (file["scales/cls:2"].dtype, file["scales/cls:2"].shape) == (np.float32, (8,))
        assert (file["channels/cls:2"].dtype, file["channels/cls:2"].shape) == (np.float16, (2, 2, 6))
        assert all(file[name].chunks is None for name in array_names(INT8))
    assert {region.name for region in load_shard(int8_shard).seal.regions} == set(array_names(INT8))


def test_large_arrays_begin_at_page_boundaries_behind_everything_else(tmp_path: Path) -> None:
    create_cache(tmp_path, RECIPE)
    path = write_shard(tmp_path, RECIPE, [make_stack(n, slices=200, dim=64) for n in range(2)])
    seal = load_shard(path).seal
    assert [region.offset % 4096 for region in seal.regions] == [0, 0, 0]
    assert len(list(seal.metadata_spans())) == 1 + 1  # before the first array, and the padding before the previews


def test_tokens_that_are_not_contiguous_in_memory_are_written_right(tmp_path: Path) -> None:
    tokens = np.arange(3 * 6 * 2, dtype=np.float16).reshape(6, 6)[::2]
    create_cache(tmp_path, RECIPE)
    stack = make_stack(0)
    path = write_shard(tmp_path, RECIPE, [replace(stack, tokens=stack.tokens | {"cls:2": tokens})])
    assert np.array_equal(mapped(path, "tokens/cls:2"), tokens)


def test_names_beyond_ascii_survive(tmp_path: Path) -> None:
    create_cache(tmp_path, RECIPE)
    write_shard(tmp_path, RECIPE, [make_stack(0, case_id="Fall-Ä-例", sources=("フレア", "a,b"))])
    cache = open_cache(tmp_path)
    assert cache.stacks["case_id"].to_list() == ["Fall-Ä-例"]
    assert cache.record(0).sources == ("フレア", "a,b")


def test_a_seal_with_many_regions_takes_a_larger_user_block(tmp_path: Path) -> None:
    names = tuple(sorted(f"patch@4:{layer}" for layer in range(1, 90)))
    recipe = replace(RECIPE, token_sets=names, preview=0)
    tokens = {name: np.full((3, 16, 2), layer, np.float16) for layer, name in enumerate(names)}
    create_cache(tmp_path, recipe)
    path = write_shard(tmp_path, recipe, [make_stack(0, tokens=tokens, preview=None)])
    assert load_shard(path).seal.userblock == 32768
    with h5py.File(path) as file:
        assert file.userblock_size == 32768
        assert file["tokens/patch@4:2"][0, 0, 0] == names.index("patch@4:2")
    assert open_cache(tmp_path).read(0, "patch@4:89")[0, 0, 0] == names.index("patch@4:89")


# --- what cannot be stored is refused before anything is written -----------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"case_id": ""}, "case_id has 0 bytes"),
        ({"view": "a\0b"}, "view has 3 bytes or a NUL"),
        ({"patient_id": "p" * 1025}, "1025 bytes"),
        (
            {"tokens": {"cls:2": np.zeros((3, 6), np.float16)}},
            r"has token sets cls:2, its recipe asks for cls:2, patch",
        ),
        ({"preview": None}, "disagree on whether to keep previews"),
        ({"preview": np.zeros((3, 5, 5), np.uint8)}, r"previews have shape \(5, 5\), expected side 4"),
        ({"blank": np.zeros(2, bool)}, r"blank is bool \[2\], expected bool with 3 slices"),
        ({"indices": np.arange(3)}, r"indices is int64 \[3\], expected int32"),
        ({"positions_mm": np.array([0, np.nan, 1], np.float32)}, "out of range"),
        ({"source_affine": np.full((4, 4), np.inf)}, "out of range"),
        ({"source_bytes": 0}, "out of range"),
    ],
)
def test_a_stack_that_does_not_fit_is_named_with_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    stack = replace(make_stack(0), **changes)
    with pytest.raises(CacheError, match=message):
        check_stack(stack, RECIPE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_no_number_is_refused(value: float) -> None:
    stack = make_stack(0)
    stack.tokens["patch@2:1"][2, 3, 5] = value
    with pytest.raises(CacheError, match=r"case-0/flair/axial: patch@2:1 holds NaN or a value beyond float16"):
        check_stack(stack, RECIPE)


def test_no_stack_no_slices_and_a_stack_given_twice_are_refused(tmp_path: Path) -> None:
    create_cache(tmp_path, RECIPE)
    empty = {"indices": np.empty(0, np.int32)}
    with pytest.raises(CacheError, match="at least one stack"):
        write_shard(tmp_path, RECIPE, [])
    with pytest.raises(CacheError, match="has no slices"):
        write_shard(tmp_path, RECIPE, [make_stack(0, **empty)])
    with pytest.raises(CacheError, match="case-0/flair/axial is given twice"):
        write_shard(tmp_path, RECIPE, [make_stack(0), make_stack(0)])
    with pytest.raises(CacheError, match=r"tokens/cls:2 has shapes \(6,\) and \(7,\) per slice"):
        write_shard(tmp_path, RECIPE, [make_stack(0), make_stack(1, dim=7)])
    assert list((tmp_path / "shards").iterdir()) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "is full; free some space or choose another place; what is finished stays, run the same"),
        (errno.EDQUOT, "is full; free some space"),
        (errno.EROFS, "is read-only or not permitted"),
    ],
)
def test_a_full_or_read_only_disk_leaves_nothing_behind(
    shard: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    before = sorted(shard.parent.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(CacheError, match=message):
            write_shard(shard.parent.parent, RECIPE, [make_stack(2)])
    assert sorted(shard.parent.iterdir()) == before


def test_a_writer_that_is_interrupted_leaves_nothing_behind(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    before = sorted(shard.parent.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_shard(shard.parent.parent, RECIPE, [make_stack(2)])
    assert sorted(shard.parent.iterdir()) == before


# --- what is damaged is found ----------------------------------------------------------------------------------------


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """A copy with one kind of damage somewhere."""
    kind, size = random.integers(7), len(data)
    place = int(random.integers(size))
    changed = bytearray(data)
    if kind <= 1:
        changed[place] ^= 1 << int(random.integers(8))
    elif kind == 2:
        changed[place : place + 64] = random.bytes(len(changed[place : place + 64]))
    elif kind == 3:
        page = place // 512 * 512
        changed[page : page + 512] = bytes(len(changed[page : page + 512]))
    elif kind == 4:
        del changed[place:]
    elif kind == 5:
        changed += random.bytes(int(random.integers(1, 5000)))
    else:
        del changed[place : place + int(random.integers(1, 200))]
    return bytes(changed)


def read_all(cache: Cache) -> dict[tuple[int, str], bytes | None]:
    """The tokens of every stack by stack and token set; None where reading them raises CacheError."""
    found: dict[tuple[int, str], bytes | None] = {}
    for stack, count in cache.stacks.select("stack", "count").iter_rows():
        for name, shape in (("cls:2", (6,)), ("patch@2:1", (4, 6))):
            try:
                tokens = cache.read(stack, name)
            except CacheError:
                found[stack, name] = None
                continue
            assert tokens.shape == (count, *shape) and tokens.dtype == np.float16
            found[stack, name] = tokens.tobytes()
    return found


@pytest.mark.parametrize("recipe", [RECIPE, INT8], ids=["float16", "int8"])
def test_no_damage_crashes_the_reader_or_passes_for_sound_or_gives_a_wrong_number(
    tmp_path: Path, recipe: Recipe
) -> None:
    create_cache(tmp_path, recipe)
    shard = write_shard(tmp_path, recipe, [make_stack(number, slices=40) for number in range(3)])
    names = array_names(recipe)
    data, tables, right = shard.read_bytes(), open_cache(tmp_path).stacks.to_dicts(), read_all(open_cache(tmp_path))
    random = np.random.default_rng(2512)
    mutated = opened = refused = unread = 0
    while mutated < FUZZ_COPIES:
        damaged = mutate(data, random)
        if damaged == data:
            continue
        mutated += 1
        shard.write_bytes(damaged)
        damages = verify_cache(tmp_path)
        assert [damage.file for damage in damages] == [shard] * len(damages) and damages
        try:
            cache = open_cache(tmp_path)
        except CacheError as error:
            assert shard.name in str(error) and damages[0].part == ""
            refused += 1
            continue
        opened += 1  # then the damage is in the bytes of tokens or previews alone
        assert cache.stacks.to_dicts() == tables
        assert all(damage.part in names for damage in damages)
        found = read_all(cache)
        assert all(tokens is None or tokens == right[key] for key, tokens in found.items())
        unread += None in found.values()
        assert (None in found.values()) == any(damage.part != "preview" for damage in damages)
    assert mutated == FUZZ_COPIES and opened > FUZZ_COPIES // 50 and refused > FUZZ_COPIES // 2
    assert unread > opened // 2


@pytest.mark.parametrize("written", ["shard", "int8_shard"])
def test_every_byte_outside_the_tokens_is_guarded_at_opening(written: str, request: pytest.FixtureRequest) -> None:
    shard: Path = request.getfixturevalue(written)
    data, seal = shard.read_bytes(), load_shard(shard).seal
    guarded = np.ones(len(data), bool)
    for region in seal.regions:
        guarded[region.offset : region.offset + region.bytes] = False
    places = np.flatnonzero(guarded)
    for place in np.random.default_rng(7).choice(places, 150, replace=False):
        changed = bytearray(data)
        changed[place] ^= 0x20
        shard.write_bytes(changed)
        with pytest.raises(CacheError):
            load_shard(shard)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda data: data[:-1],
            r"is damaged: it has \d+ bytes, its seal says \d+; delete it and run the same extract",
        ),
        (lambda data: data[:0], "is no embedkit shard, or its start is damaged"),
        (lambda data: bytes(len(data)), "is no embedkit shard, or its start is damaged"),
        (lambda data: b"\x89HDF\r\n\x1a\n" + data, "is an HDF5 file without a seal"),
        (lambda data: data.replace(b'"created_ns"', b'"created_nS"'), "is damaged: its seal is broken"),
        (lambda data: data[:8200] + bytes(100) + data[8300:], "its tables or HDF5 structure are not what was written"),
        (lambda data: b"embedkit-cache 1 1000 " + data[22:], "user block of 1000 bytes"),
    ],
)
def test_a_message_says_what_is_wrong_with_a_shard(shard: Path, make: Callable[[bytes], bytes], message: str) -> None:
    shard.write_bytes(make(shard.read_bytes()))
    with pytest.raises(CacheError, match=message) as caught:
        load_shard(shard)
    assert str(shard) in str(caught.value)


def test_a_shard_of_a_newer_format_says_to_upgrade(shard: Path) -> None:
    rest = b'{"something": "else"}'.ljust(8192 - 87)
    head = b"embedkit-cache 3 8192 "
    shard.write_bytes(head + hashlib.sha256(head + rest).hexdigest().encode() + b"\n" + rest)
    with pytest.raises(CacheError, match="has cache format 3, this embedkit reads formats 1 to 2; upgrade embedkit"):
        load_shard(shard)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.h5")
    with pytest.raises(CacheError, match="is not a regular file"):
        load_shard(tmp_path / "pipe.h5")
    with pytest.raises(CacheError, match="is not a regular file"):
        load_shard(tmp_path)
    with pytest.raises(CacheError, match="cannot open shard"):
        load_shard(tmp_path / "absent.h5")


# --- what is hostile, though sealed, is refused ----------------------------------------------------------------------


def seal_file(path: Path, arrays: tuple[str, ...], recipe: Recipe = RECIPE, version: int = 1) -> None:
    """Seals an HDF5 file with a user block of 8192 bytes, as its adversary would."""
    with h5py.File(path, "r") as file:
        places = [(name, file[name].id.get_offset(), file[name].id.get_storage_size()) for name in arrays]
    data = path.read_bytes()
    regions = tuple(
        Region(name, offset, size, hashlib.sha256(data[offset : offset + size]).hexdigest())
        for name, offset, size in sorted(places, key=lambda place: place[1])
    )
    seal = Seal(8192, len(data), 1, recipe.fingerprint, "0" * 64, regions, version)
    metadata = hashlib.sha256(b"".join(data[start:stop] for start, stop in seal.metadata_spans()))
    path.write_bytes(replace(seal, metadata_sha256=metadata.hexdigest()).to_bytes() + data[8192:])


def forge(
    path: Path, shard: Path, change: Callable[[Any], None], recipe: Recipe = RECIPE, version: int | None = None
) -> None:
    """A sealed shard with the content of ``shard`` after ``change``, made with h5py alone."""
    with h5py.File(shard, "r") as source, h5py.File(path, "w", userblock_size=8192, libver=("v108", "v110")) as file:
        file.attrs.update(dict(source.attrs))
        for name in source:
            source.copy(name, file)
        change(file)
        folders = [name for name in ("tokens", "scales", "channels") if name in file]
        arrays = ["preview", *(f"{folder}/{name}" for folder in folders for name in file[folder])]
        hard = [name for name in arrays if isinstance(file.get(name, getlink=True), h5py.HardLink)]
        arrays = [name for name in hard if file[name].id.get_offset() is not None]
    seal_file(path, tuple(arrays), recipe, version or FORMAT_VERSIONS[recipe.dtype])


def set_dataset(name: str, **options: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        data = file[name][()]
        del file[name]
        file.create_dataset(name, **({"data": data} | options))

    return change


def set_table(name: str, column: str, value: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        table = file[name][()]
        table[column] = value
        file[name][...] = table

    return change


def set_soft_link(file: Any) -> None:
    file["hidden"] = file["tokens/cls:2"]
    del file["tokens/cls:2"]
    file["tokens/cls:2"] = h5py.SoftLink("/hidden")


def set_external_link(file: Any) -> None:
    del file["tokens/cls:2"]
    file["tokens/cls:2"] = h5py.ExternalLink("/etc/hostname", "/x")


def set_external_storage(file: Any) -> None:
    del file["tokens/cls:2"]
    file.create_dataset("tokens/cls:2", (8, 6), "<f2", external=[("/etc/hostname", 0, 96)])


def set_virtual(file: Any) -> None:
    del file["tokens/cls:2"]
    layout = h5py.VirtualLayout((8, 6), "<f2")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "x", (8, 6))
    file.create_virtual_dataset("tokens/cls:2", layout)


def set_huge(file: Any) -> None:
    del file["tokens/cls:2"]
    file.create_dataset("tokens/cls:2", (2**45, 6), "<f2")


def set_group(file: Any) -> None:
    del file["stacks"]
    file.create_group("stacks")


def drop(name: str) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[name]

    return change


def set_attribute(name: str, value: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        file.attrs[name] = value

    return change


VLEN = {"data": np.array([b"a", b"b"], dtype=object), "dtype": h5py.string_dtype()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_soft_link, "cls:2 as a soft or external link: refused"),
        (set_external_link, "cls:2 as a soft or external link: refused"),
        (set_external_storage, "cls:2 is not one plain contiguous array"),
        (set_virtual, "cls:2 is not one plain contiguous array"),
        (set_dataset("tokens/cls:2", chunks=(1, 6)), "cls:2 is not one plain contiguous array"),
        (set_dataset("tokens/cls:2", chunks=(1, 6), compression="gzip"), "cls:2 is not one plain contiguous array"),
        (set_dataset("stacks", chunks=(1,), compression="gzip"), "stacks is not one plain contiguous array"),
        (set_dataset("tokens/cls:2", data=np.zeros((8, 6), ">f2")), "expected <f2 with 8 slices"),
        (set_dataset("tokens/cls:2", data=np.zeros((8, 6), np.float64)), "expected <f2 with 8 slices"),
        (set_dataset("tokens/cls:2", data=np.zeros((7, 6), np.float16)), "expected <f2 with 8 slices"),
        (set_dataset("tokens/cls:2", data=np.zeros(8, np.float16)), "expected <f2 with 8 slices"),
        (set_dataset("preview", data=np.zeros((8, 4, 4), np.int8)), "expected uint8 with 8 slices"),
        (set_huge, "cls:2"),
        (set_group, "not what the format says"),
        (drop("tokens"), "not what the format says"),
        (drop("slices"), "not what the format says"),
        (set_dataset("slices", data=np.zeros(8, "<i4")), "its slice table lacks the column index"),
        (set_dataset("slices", data=np.zeros(8, [("index", "<i8")])), "has index of type int64, expected int32"),
        (set_dataset("stacks", **VLEN), "stacks has no storage of its own size"),
        (set_table("stacks", "count", 5), "do not add up to its 8 slices"),
        (set_table("stacks", "count", -1), "do not add up"),
        (set_table("stacks", "first_row", 0), "are not one after the other"),
        (set_table("stacks", "case_id", b"\xff\xfe"), "case_id is not UTF-8"),
        (set_table("stacks", "view", b""), "a stack has no view"),
        (set_table("stacks", "source_affine", np.nan), "out of range"),
        (set_table("slices", "blank", 3), "out of range"),
        (set_attribute("format", np.bytes_("other")), "name another format than its seal"),
        (set_attribute("format_version", 3), "name another format than its seal"),
        (set_attribute("fingerprint", np.bytes_("0" * 16)), "its fingerprint is not that of its recipe"),
        (set_attribute("recipe", np.bytes_(RECIPE.to_json() + " ")), "its fingerprint is not that of its recipe"),
        (set_attribute("recipe", 5), "its recipe is not one text of fixed length"),
        (set_attribute("recipe", RECIPE.to_json()), "its recipe is not one text of fixed length"),
        (set_attribute("format_version", "1"), "its format_version is not one int64"),
    ],
)
def test_a_sealed_file_with_anything_the_format_forbids_is_refused(
    shard: Path, tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    forged = tmp_path / "forged.h5"
    forge(forged, shard, change)
    with pytest.raises(CacheError, match=message):
        open_cache(forged)


INT8_LIES: list[tuple[Callable[[Any], None], str]] = [
    (drop("scales"), "not what the format says"),
    (drop("channels"), "not what the format says"),
    (drop("scales/cls:2"), r"holds .*, its recipe says .*scales/cls:2"),
    (drop("tokens/cls:2"), "scales/cls:2 belongs to no token set"),
    (
        set_dataset("tokens/cls:2", data=np.zeros((8, 6), np.float16)),
        r"cls:2 is float16 \[8, 6\], expected \|i1 with 8",
    ),
    (set_dataset("tokens/cls:2", data=np.zeros((8, 7), np.int8)), r"expected <f2 \[2, 2, 7\]"),
    (set_dataset("scales/cls:2", data=np.ones(7, np.float32)), r"scales/cls:2 is float32 \[7\], expected <f4 \[8\]"),
    (set_dataset("scales/cls:2", data=np.ones(8)), r"scales/cls:2 is float64 \[8\], expected <f4 \[8\]"),
    (set_dataset("scales/patch@2:1", data=np.ones(8, np.float32)), r"expected <f4 \[8, 4\]"),
    (set_dataset("scales/cls:2", chunks=(8,)), "scales/cls:2 is not one plain contiguous array"),
    (set_dataset("channels/cls:2", data=np.ones((8, 2, 6), np.float16)), r"expected <f2 \[2, 2, 6\]"),
    (set_dataset("channels/cls:2", data=np.ones((2, 2, 6), np.float32)), r"is float32 \[2, 2, 6\], expected <f2"),
    (set_attribute("format_version", 1), "name another format than its seal"),
]


@pytest.mark.parametrize(("change", "message"), INT8_LIES)
def test_a_sealed_int8_file_with_anything_the_format_forbids_is_refused(
    int8_shard: Path, tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    forge(tmp_path / "forged.h5", int8_shard, change, INT8)
    with pytest.raises(CacheError, match=message):
        open_cache(tmp_path / "forged.h5")


def set_values(name: str, place: Any, value: float) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        file[name][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((set_values("scales/cls:2", 4, value), "a token scale is NaN") for value in (np.nan, np.inf, -1e-9)),
        *((set_values("channels/cls:2", (1, 0, 5), value), "a channel's centre") for value in (np.nan, np.inf)),
        *((set_values("channels/cls:2", (1, 1, 5), value), "a channel's centre") for value in (np.nan, 0, -2)),
    ],
)
def test_scales_that_are_sealed_but_make_no_sense_are_refused_when_their_stack_is_read(
    int8_shard: Path, tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    forge(tmp_path / "forged.h5", int8_shard, change, INT8)
    cache = open_cache(tmp_path / "forged.h5")
    assert np.isfinite(cache.read(0, "cls:2")).all() and np.isfinite(cache.read(1, "patch@2:1")).all()
    with pytest.raises(CacheError, match=rf"forged.h5, cls:2 of stack 1, is damaged: {message}"):
        cache.read(1, "cls:2")


@pytest.mark.parametrize(
    ("written", "recipe", "version", "message"),
    [
        ("shard", INT8, 2, "not what the format says"),
        ("shard", INT8, 1, r"holds preview, tokens/cls:2, tokens/patch@2:1, its recipe says channels/cls:2, "),
        ("int8_shard", RECIPE, 1, r"tokens/cls:2 is int8 \[8, 6\], expected <f2 with 8 slices"),
        (
            "int8_shard",
            RECIPE,
            2,
            r"holds channels/cls:2, .*, its recipe says preview, tokens/cls:2, tokens/patch@2:1$",
        ),
    ],
)
def test_a_shard_that_stores_otherwise_than_its_recipe_says_is_refused(
    request: pytest.FixtureRequest, written: str, recipe: Recipe, version: int, message: str
) -> None:
    def change(file: Any) -> None:
        file.attrs["recipe"] = np.bytes_(recipe.to_json())
        file.attrs["fingerprint"] = np.bytes_(recipe.fingerprint)
        file.attrs["format_version"] = version

    source: Path = request.getfixturevalue(written)
    forged = source.with_name("forged.h5")
    forge(forged, source, change, recipe, version)
    with pytest.raises(CacheError, match=message):
        open_cache(forged)


def test_an_honest_file_made_with_h5py_alone_opens(shard: Path, tmp_path: Path) -> None:
    forged = tmp_path / "forged.h5"
    forge(forged, shard, lambda file: file.create_dataset("my_notes", data=[1, 2, 3]))
    cache = open_cache(forged)
    assert np.array_equal(cache.read(1, "cls:2"), make_stack(1, slices=5).tokens["cls:2"])


def test_tokens_that_lie_elsewhere_than_the_seal_says_are_refused(shard: Path, tmp_path: Path) -> None:
    forged = tmp_path / "forged.h5"
    forge(forged, shard, lambda file: file.flush())
    seal_file(forged, ("tokens/patch@2:1", "preview"))
    with pytest.raises(CacheError, match="tokens/cls:2 lies elsewhere than its seal says"):
        open_cache(forged)


def test_seals_that_contradict_themselves_are_refused(shard: Path) -> None:
    seal, data = load_shard(shard).seal, shard.read_bytes()
    first, second = seal.regions[:2]
    lies: list[tuple[Seal, str]] = [
        (replace(seal, regions=(first, replace(second, offset=first.offset))), "overlaps"),
        (replace(seal, regions=(first, replace(second, bytes=10**9, sums=b""))), "ends after the file"),
        (replace(seal, regions=(first, replace(second, bytes=10**9))), "8 bytes of checksums for blocks of 262144"),
        (replace(seal, regions=(replace(first, block_bytes=0),)), "8 bytes of checksums for blocks of 0"),
        (replace(seal, regions=(first, replace(second, name=first.name))), "two regions have one name"),
        (replace(seal, regions=(replace(first, bytes=-1),)), "is not a count"),
        (replace(seal, regions=(replace(first, sha256="x"),)), "is not a SHA-256"),
        (replace(seal, regions=(replace(first, offset=8000),)), "overlaps"),
    ]
    for lie, message in lies:
        shard.write_bytes(lie.to_bytes() + data[8192:])
        with pytest.raises(CacheError, match=f"its seal makes no sense.*{message}"):
            load_shard(shard)


@pytest.mark.parametrize("written", ["shard", "int8_shard"])
def test_metadata_that_is_damaged_and_sealed_again_never_crashes_the_reader(
    written: str, request: pytest.FixtureRequest
) -> None:
    shard: Path = request.getfixturevalue(written)
    data, seal = shard.read_bytes(), load_shard(shard).seal
    spans = [place for span in seal.metadata_spans() for place in range(*span)]
    random = np.random.default_rng(5)
    opened = 0
    for _ in range(150):
        changed = bytearray(data)
        for place in random.choice(spans, 2):
            changed[place] = random.integers(256)
        digest = hashlib.sha256(b"".join(bytes(changed[start:stop]) for start, stop in seal.metadata_spans()))
        shard.write_bytes(replace(seal, metadata_sha256=digest.hexdigest()).to_bytes() + bytes(changed[8192:]))
        try:
            cache = open_cache(shard)
        except EmbedkitError:
            continue
        read_all(cache)
        opened += isinstance(cache, Cache)
    assert opened < 150


def test_the_user_block_is_a_power_of_two_that_holds_the_seal() -> None:
    assert userblock_bytes({"tokens/cls:12": 1}) == 8192
    assert userblock_bytes({f"tokens/patch@14:{layer}": 1 for layer in range(400)}) == 131072
    assert userblock_bytes({"tokens/patch:12": 1 << 30}) == 131072  # 4,096 checksums of 16 digits

"""Large arrays in nameless files: the same numbers as in memory, whatever the order of axes, and few pages held."""

from __future__ import annotations

import gzip
import itertools
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedkit import pipeline, sources, spill, volumes, voxels
from embedkit.cache import open_cache
from embedkit.errors import CacheError, VolumeError
from embedkit.extraction import extract
from embedkit.planes import foreground_extent
from embedkit.recipe import Recipe
from embedkit.slices import plan_stacks, render_slices
from embedkit.sources import Case, read_case
from embedkit.spill import allocate, allocate_spilled, copy_slices, is_spilled, release_pages, sample_lattice
from embedkit.volumes import read_volume, write_volume
from embedkit.windows import measure_limits, parse_window

Array = np.ndarray[Any, Any]
LPS = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
RECIPE = Recipe("toy", "builtin:1", ("cls:2",), 32, (0.5,), (0.25,), preview=0)
ORDERS = list(itertools.permutations(range(3)))


def head(shape: tuple[int, ...] = (24, 20, 16), dtype: Any = np.int16) -> Array:
    """Noise around a bright block, so that windows and foreground mean something."""
    values = np.random.default_rng(5).normal(20, 5, shape)
    values[tuple(slice(size // 4, -size // 4) for size in shape)] += 100
    return values.astype(dtype)


def spilled(array: Array, folder: Path) -> Array:
    copy = allocate_spilled(array.shape, array.dtype, folder)
    copy[...] = array
    return copy


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts so small that every loop over them has many rounds, the last one short."""
    monkeypatch.setattr(spill, "_PART", 1000)
    monkeypatch.setattr(voxels, "_PIECE_BYTES", 999)


def resident_pages(array: Array) -> int:
    """Kilobytes of the mapping of a nameless file that this process holds."""
    start = f"{array.__array_interface__['data'][0]:x}-"
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    assert any(line.startswith(start) for line in lines)
    return int(next(line for line in lines if line.startswith("Rss:")).split()[1])


# ---- parts of an array ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("flips", list(itertools.product([1, -1], repeat=3)))
@pytest.mark.usefixtures("small_parts")
def test_parts_of_a_spilled_array_are_those_of_one_in_memory(
    tmp_path: Path, order: tuple[int, int, int], flips: tuple[int, int, int]
) -> None:
    whole = head()
    steps = tuple(slice(None, None, step) for step in flips)
    memory, file = whole.transpose(order)[steps], spilled(whole, tmp_path).transpose(order)[steps]
    assert is_spilled(file) and not is_spilled(memory)
    for chosen in (slice(3, 9), slice(None), np.array([0, 5, 6, 15]), np.array([2])):
        copied = copy_slices(file[:, 2:11], chosen)
        np.testing.assert_array_equal(copied, memory[:, 2:11][chosen])
        assert copied.flags.c_contiguous and not is_spilled(copied)
    np.testing.assert_array_equal(copy_slices(file[::3, ::2, ::5], slice(None)), memory[::3, ::2, ::5])
    for step in (1, 7, 100):
        np.testing.assert_array_equal(sample_lattice(file, step), memory.reshape(-1)[::step])


def test_an_array_is_spilled_where_it_is_large_and_there_is_a_folder(tmp_path: Path) -> None:
    assert not is_spilled(allocate((10, 10), np.int16, folder=tmp_path, most_bytes=200))
    assert not is_spilled(allocate((10, 10), np.int16, folder=None, most_bytes=0))
    assert is_spilled(allocate((10, 10), np.int16, folder=tmp_path, most_bytes=199)[3:, ::-1].T)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0)])
def test_reading_a_spilled_array_holds_few_of_its_pages(
    tmp_path: Path, order: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "_PART", 1 << 17)
    held: list[int] = []
    release = release_pages

    def watched(array: Array) -> None:
        held.append(resident_pages(whole))
        release(array)

    monkeypatch.setattr(spill, "release_pages", watched)
    whole = spilled(np.ones((32, 128, 128), np.int16), tmp_path)
    release(whole)
    turned = whole.transpose(order)
    copy_slices(turned, np.arange(0, len(turned), 3))
    sample_lattice(turned, 37)
    assert len(held) >= 10 and max(held) < whole.nbytes / 1024 / 2
    assert resident_pages(whole) == 0 and whole.sum() == whole.size


# ---- volumes ----


def content(volume: volumes.Volume) -> tuple[Any, ...]:
    own = {name: value for name, value in vars(volume).items() if name not in ("array", "affine", "source_affine")}
    return (*own.values(), volume.affine.tolist(), volume.source_affine.tolist(), volume.array.dtype)


def oriented(order: tuple[int, int, int], flips: tuple[int, int, int]) -> Array:
    """The affine of an array whose axes run along those of a canonical one in this order, some backwards."""
    affine = LPS[:, [*order, 3]].copy()
    affine[:, :3] *= [1.5 * step for step in flips]
    return affine


@given(
    order=st.sampled_from(ORDERS),
    flips=st.tuples(*[st.sampled_from([1, -1])] * 3),
    dtype=st.sampled_from(["u1", "i2", "u2", "i4", "f4"]),
    suffix=st.sampled_from([".nii", ".nii.gz", ".nrrd", ".mha", ".npz"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("small_parts")
def test_a_spilled_volume_is_the_one_in_memory(
    tmp_path: Path, order: tuple[int, int, int], flips: tuple[int, int, int], dtype: str, suffix: str
) -> None:
    path = tmp_path / f"scan{suffix}"
    write_volume(path, head(dtype=dtype), oriented(order, flips))
    memory, file = read_volume(path), read_volume(path, spill=tmp_path, most_bytes=0)
    assert is_spilled(file.array) and not is_spilled(memory.array)
    assert content(file) == content(memory)
    np.testing.assert_array_equal(file.array, memory.array)
    window = parse_window("percentile:0.5:99.5")
    assert measure_limits(file.array, window) == measure_limits(memory.array, window)
    extent = foreground_extent(memory.array)
    assert extent is not None and foreground_extent(file.array) == extent
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()


@pytest.mark.parametrize(
    "stored",
    [
        np.array([0, 1, 2**31 - 1, 3], np.uint32),
        np.array([5, 2**32 - 1, 7, 8], np.uint32),
        np.array([1, 2, 3, -(2**40)], np.int64),
        np.array([0.1, 1e300, 3, 4], np.float64),
        np.array([0.5, 2, 3, 4], np.float16),
        np.array([True, False, True, True]),
        np.array([-128, 0, 127, 1], np.int8),
    ],
)
@pytest.mark.parametrize("fortran", [False, True])
def test_types_that_are_not_kept_become_the_same_in_pieces(
    tmp_path: Path, stored: Array, fortran: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.repeat(stored, 6).reshape(4, 2, 3)
    np.save(tmp_path / "scan.npy", np.asfortranarray(array) if fortran else array)
    found = []
    for piece in (1 << 20, 16):
        monkeypatch.setattr(voxels, "_PIECE_BYTES", piece)
        try:
            volume = read_volume(tmp_path / "scan.npy", spill=tmp_path, most_bytes=0)
        except VolumeError as error:
            found.append(str(error))
        else:
            found.append((volume.array.dtype, volume.array.tolist()))
    assert found[0] == found[1]
    if stored.dtype != np.float64:
        np.testing.assert_array_equal(volume.array, array.astype(volume.array.dtype))
    else:
        assert "6 of 24 values are NaN or infinite (or too large for float32)" in found[0]


NRRD = "NRRD0004\ntype: {kind}\ndimension: 3\nspace: left-posterior-superior\nsizes: 16 20 24\n"
NRRD += "space directions: (1,0,0) (0,1,0) (0,0,1)\n{more}encoding: {encoding}\n\n"
META = "ObjectType = Image\nNDims = 3\nBinaryData = {binary}\n{more}DimSize = 16 20 24\nElementType = {kind}\n"
META += "ElementDataFile = LOCAL\n"
BIG = head(dtype=np.int16).astype(">i2").tobytes()
LITTLE = head(dtype=np.int16).astype("<i2").tobytes()
TEXT = " ".join(map(str, head().ravel().tolist())).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "header", "payload"),
    [
        ("a.nrrd", NRRD.format(kind="short", more="endian: big\n", encoding="raw"), BIG),
        ("a.nrrd", NRRD.format(kind="short", more="Endian: LITTLE\n", encoding="GZ"), gzip.compress(LITTLE)),
        ("a.nrrd", NRRD.format(kind="short", more="endian:=big\nendian: little\n", encoding="raw"), LITTLE),
        ("a.nrrd", NRRD.format(kind="short", more="endian: little\nbyte skip: 5\n", encoding="raw"), b"01234" + LITTLE),
        ("a.nrrd", NRRD.format(kind="short", more="endian: big\nline skip: 1\n", encoding="raw"), b"a line\n" + BIG),
        ("a.nrrd", NRRD.format(kind="short", more="", encoding="text"), TEXT),
        ("a.mha", META.format(kind="MET_SHORT", binary="True", more="BinaryDataByteOrderMSB = True\n"), BIG),
        ("a.mha", META.format(kind="MET_SHORT", binary="True", more="ElementByteOrderMSB = False\n"), LITTLE),
        (
            "a.mha",
            META.format(kind="MET_SHORT", binary="True", more="CompressedData = True\nBinaryDataByteOrderMSB = True\n"),
            zlib.compress(BIG),
        ),
        ("a.mha", META.format(kind="MET_SHORT", binary="False", more=""), TEXT),
    ],
)
def test_voxels_are_found_however_a_text_header_says_they_lie(
    tmp_path: Path, name: str, header: str, payload: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(header.encode() + payload)
    if "CompressedData" not in header:
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), head())
    for folder in (None, tmp_path):
        volume = read_volume(path, spill=folder, most_bytes=0)
        np.testing.assert_array_equal(volume.array, head())
        assert volume.source_bytes == path.stat().st_size


def test_a_case_shares_out_what_it_may_keep_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for view, slices in (("flair", 4), ("post", 6)):
        write_volume(tmp_path / f"{view}.nii", np.zeros((slices, 10, 10), np.int16), LPS)
    images = {view: tmp_path / f"{view}.nii" for view in ("flair", "post")}
    monkeypatch.setattr(sources, "VOXEL_BYTES", 2000)
    found = read_case(Case("a", "a", images), spill=tmp_path).volumes
    assert {view: is_spilled(volume.array) for view, volume in found.items()} == {"flair": False, "post": True}
    assert not is_spilled(read_case(Case("a", "a", images)).volumes["post"].array)


def test_no_room_for_a_large_image_is_told_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_volume(tmp_path / "scan.nii", np.zeros((64, 128, 256), np.int16), LPS)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(CacheError, match=r"cannot keep 4 MiB of voxels of scan.nii: .* is full; free some space"):
        read_volume(tmp_path / "scan.nii", spill=tmp_path, most_bytes=0)


# ---- extraction ----


@pytest.mark.parametrize("slices", ["all", "every:3"])
@pytest.mark.usefixtures("small_parts")
def test_slices_of_a_spilled_volume_are_rendered_to_the_same_bits(tmp_path: Path, slices: str) -> None:
    write_volume(tmp_path / "scan.nii.gz", head(), oriented((2, 0, 1), (1, -1, -1)))
    options = replace(
        RECIPE,
        planes=("axial", "coronal", "sagittal"),
        windows=("percentile:1:99",) * 3,
        crop="foreground",
        slices=slices,
    )
    images = []
    for folder in (None, tmp_path):
        read = {"image": read_volume(tmp_path / "scan.nii.gz", spill=folder, most_bytes=0)}
        stacks = plan_stacks(read, options)
        images.append([render_slices(stack, read, options, 1, 7)[0] for stack in stacks])
    for memory, file in zip(*images, strict=True):
        assert memory.std() > 0.1 and bool((memory == file).all())


def test_a_cache_from_spilled_images_is_the_same_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_volume(tmp_path / "a.nii.gz", head(), oriented((1, 2, 0), (-1, 1, 1)))
    (tmp_path / "cases.csv").write_text("case_id,path\na,a.nii.gz\n")

    def run(name: str) -> list[bytes]:
        options: dict[str, Any] = {"image_size": 32, "planes": ("coronal",), "tokens": ("cls", "patch@2")}
        summary = extract(tmp_path / "cases.csv", tmp_path / name, backbone="embedkit/scattering", **options)
        assert summary.cases_done == 1
        with open_cache(tmp_path / name) as cache:
            return [np.array(cache.read(0, token_set)).tobytes() for token_set in cache.token_sets]

    memory = run("memory")
    kept: list[bool] = []
    read = sources.read_volume

    def watched(*arguments: Any, **options: Any) -> volumes.Volume:
        volume = read(*arguments, **options)
        kept.append(is_spilled(volume.array))
        return volume

    monkeypatch.setattr(sources, "VOXEL_BYTES", 0)
    monkeypatch.setattr(sources, "read_volume", watched)
    assert run("file") == memory and kept == [True]
    monkeypatch.setattr(pipeline, "_PIXELS", 700)  # two slices at a time
    assert run("few") == memory
    assert sorted(path.name for path in (tmp_path / "file").iterdir()) == ["recipe.json", "shards"]

"""Tests of what is behind a case on disk: every file that its voxels come from counts, and no other."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl
import pytest

from embedkit.cache import open_cache
from embedkit.errors import VolumeError
from embedkit.extraction import extract
from embedkit.nrrd import payload_file
from embedkit.recipe import Recipe
from embedkit.sources import CachedSources, Case, SourceStat, stat_source
from embedkit.volumes import read_volume

VOXELS = np.random.default_rng(3).integers(0, 200, (4, 16, 16)).astype("<i2")
RECIPE = Recipe("toy", "builtin:1", ("cls:2",), 32, (0.5,), (0.25,), preview=0, planes=("axial", "coronal"))


def meta_header(payload: str, *, filler: int = 0) -> bytes:
    return (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
        + ("Comment = " + "x" * filler + "\n" if filler else "")
        + "ElementSpacing = 1 1 1\nDimSize = 16 16 4\nElementType = MET_SHORT\n"
        + f"ElementDataFile = {payload}\n"
    ).encode()


def nrrd_header(payload: str, *, filler: int = 0) -> bytes:
    return (
        "NRRD0004\n"
        + ("# " + "x" * filler + "\n" if filler else "")
        + "type: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 16 16 4\n"
        + "space directions: (1,0,0) (0,1,0) (0,0,1)\nendian: little\nencoding: raw\n"
        + (f"data file: {payload}\n" if payload else "")
        + "\n"
    ).encode()


class Header(Protocol):
    """Bytes of a header that names ``payload``."""

    def __call__(self, payload: str, *, filler: int = 0) -> bytes: ...


HEADERS: list[tuple[str, Header]] = [
    ("a.mhd", meta_header),
    ("a.mha", meta_header),
    ("a.nhdr", nrrd_header),
    ("a.nrrd", nrrd_header),
]
either_name = pytest.mark.parametrize(("name", "header"), HEADERS, ids=[name for name, _ in HEADERS])


def touch(path: Path, modified_s: int) -> None:
    os.utime(path, ns=(modified_s * 10**9, modified_s * 10**9))


# --- which files count -----------------------------------------------------------------------------------------------


@either_name
def test_the_file_that_a_header_names_counts_whatever_its_name(tmp_path: Path, name: str, header: Header) -> None:
    path, voxels = tmp_path / name, tmp_path / "voxels.raw"
    path.write_bytes(header("voxels.raw"))
    voxels.write_bytes(VOXELS.tobytes())
    (tmp_path / "a.txt").write_text("notes of the same name are no part of the image")
    touch(path, 1000)
    touch(voxels, 2000)
    latest = max(path.stat().st_ctime_ns, voxels.stat().st_ctime_ns)
    assert stat_source(path) == SourceStat(path.stat().st_size + VOXELS.nbytes, latest)
    assert stat_source(path).bytes == read_volume(path).source_bytes
    for file in (voxels, path):
        before = stat_source(path).modified_ns
        time.sleep(0.02)
        touch(file, 3000)
        assert stat_source(path).modified_ns == file.stat().st_ctime_ns > before


@pytest.mark.parametrize(("name", "content"), [("a.mha", meta_header("LOCAL")), ("a.nrrd", nrrd_header(""))])
def test_a_file_that_holds_its_own_voxels_counts_alone(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content + VOXELS.tobytes())
    (tmp_path / "a.raw").write_bytes(b"another")
    assert payload_file(path, "nrrd" if name == "a.nrrd" else "metaimage") is None
    assert stat_source(path) == SourceStat(path.stat().st_size, path.stat().st_ctime_ns)
    assert stat_source(path).bytes == read_volume(path).source_bytes


@either_name
def test_the_name_in_a_long_header_is_found_whole(tmp_path: Path, name: str, header: Header) -> None:
    (tmp_path / "voxels.raw").write_bytes(VOXELS.tobytes())
    kind = "nrrd" if header is nrrd_header else "metaimage"
    short = len(header("voxels.raw", filler=1))
    for size in (4096 - 5, 4096 - 1, 4096, 4096 + 1, 4096 + 5, 4096 + 12, 30_000):
        content = header("voxels.raw", filler=size - short + 1)
        assert len(content) == size
        (tmp_path / name).write_bytes(content)
        assert payload_file(tmp_path / name, kind) == tmp_path / "voxels.raw"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.mhd", meta_header("../voxels.raw"), "outside its own folder"),
        ("a.mhd", meta_header("gone.raw"), "which is missing; copy both files"),
        ("a.mhd", meta_header("slice%03d.raw 1 4 1"), "spreads its voxels over several files"),
        ("a.mha", meta_header("LOCAL")[:60], "its header does not end"),
        ("a.nrrd", b"NRRD0004\n", "its header does not end"),
    ],
)
def test_a_header_that_names_no_readable_file_counts_alone(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(VolumeError, match=message):
        payload_file(path, "nrrd" if name == "a.nrrd" else "metaimage")
    assert stat_source(path) == SourceStat(len(content), path.stat().st_ctime_ns)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mha")
    assert stat_source(tmp_path / "a.mha").bytes == 0


def test_a_missing_file_says_to_check_the_path(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"gone.mhd: cannot be read \(.*\); check the path in the manifest"):
        stat_source(tmp_path / "gone.mhd")


def test_voxels_that_change_behind_a_header_are_extracted_again(tmp_path: Path) -> None:
    (tmp_path / "a.mhd").write_bytes(meta_header("voxels.raw"))
    (tmp_path / "voxels.raw").write_bytes(VOXELS.tobytes())
    (tmp_path / "cases.csv").write_text("case_id,path\na,a.mhd\n")

    def digest() -> str:
        extract(tmp_path / "cases.csv", tmp_path / "cache", backbone="embedkit/scattering", image_size=64)
        return str(open_cache(tmp_path / "cache").stacks["source_digest"][0])

    first = digest()
    assert first == read_volume(tmp_path / "a.mhd").source_digest
    (tmp_path / "voxels.raw").write_bytes(VOXELS[::-1].tobytes())
    touch(tmp_path / "voxels.raw", 3000)
    second = digest()
    assert second == read_volume(tmp_path / "a.mhd").source_digest
    assert first != second


# --- what the cache knows --------------------------------------------------------------------------------------------


def cached(rows: list[tuple[str, str, str, str]], recipe: Recipe = RECIPE) -> CachedSources:
    """Sources of a cache that holds these (case, view, plane, digest)."""
    case, view, plane, digest = zip(*rows, strict=True)
    return CachedSources(
        pl.DataFrame(
            {
                "case_id": case,
                "view": view,
                "plane": plane,
                "patient_id": case,
                "source_bytes": [1] * len(rows),
                "source_modified_ns": [1] * len(rows),
                "source_digest": digest,
            }
        ),
        recipe,
    )


def test_a_view_that_is_added_is_no_change() -> None:
    sources = cached([("a", "t1", "axial", "one"), ("a", "t1", "coronal", "one"), ("b", "t2", "axial", "else")])
    case = Case("a", "a", {"t1": Path("t1.nii"), "t2": Path("t2.nii")})
    same = {("t1", "axial"): "one", ("t1", "coronal"): "one"}
    assert not sources.changed(case, same)
    assert not sources.changed(case, same | {("t2", "axial"): "two"})
    assert not sources.changed(case, {})
    assert not sources.changed(replace(case, case_id="c"), same)


def test_one_stack_of_other_bytes_is_a_change() -> None:
    sources = cached([("a", "t1", "axial", "one"), ("a", "t1", "coronal", "one")])
    case = Case("a", "a", {"t1": Path("t1.nii")})
    assert sources.changed(case, {("t1", "axial"): "two", ("t1", "coronal"): "two"})
    assert sources.changed(case, {("t1", "axial"): "one", ("t1", "coronal"): "two"})
    assert sources.changed(case, {("t1", "coronal"): "two"})


def test_a_stack_is_held_by_its_case_view_plane_and_bytes() -> None:
    sources = cached([("a", "t1", "axial", "one")])
    assert sources.holds_stack("a", "t1", "axial", "one")
    for other in (("b", "t1", "axial", "one"), ("a", "t2", "axial", "one"), ("a", "t1", "coronal", "one")):
        assert not sources.holds_stack(*other)
    assert not sources.holds_stack("a", "t1", "axial", "two")

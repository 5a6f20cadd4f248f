"""Folders of many DICOM series, looked through once, each judged by its own files; and reading that is stopped."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from embedkit import dicom, dicomfolders, dicomlisting, sources, voxels
from embedkit.cache import open_cache
from embedkit.dicomfolders import SeriesFolders
from embedkit.errors import VolumeError
from embedkit.estimate import estimate_extraction
from embedkit.extraction import ExtractionSummary, extract
from embedkit.failures import read_failures
from embedkit.sources import stat_source
from embedkit.volumes import read_volume, write_volume

SERIES, SLICES = 4, 5


def write_slice(file: Path, series: int, height: int, *, seed: int = 0) -> None:
    pixels = np.random.default_rng([series, height, seed]).integers(0, 900, (8, 8)).astype(np.int16)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.SeriesInstanceUID, data.Modality = f"1.2.3.{series}", "CT"
    data.Rows = data.Columns = 8
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.PixelSpacing, data.ImageOrientationPatient = [1, 1], [1, 0, 0, 0, 1, 0]
    data.ImagePositionPatient = [0, 0, 2 * height]
    data.PixelData = pixels.tobytes()
    data.save_as(file, enforce_file_format=True)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """A folder with the files of four series, and a manifest beside it."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for series in range(SERIES):
        for height in range(SLICES):
            write_slice(folder / f"{series}-{height}.dcm", series, height)
    rows = [{"case_id": f"s{series}", "path": f"flat/{series}-0.dcm"} for series in range(SERIES)]
    pl.DataFrame(rows).write_csv(tmp_path / "cases.csv")
    return folder


@pytest.fixture
def headers_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose headers were read, in order."""
    names: list[str] = []
    read = dicomlisting.read_slice

    def noted(file: Path, reader: Any) -> Any:
        names.append(file.name)
        return read(file, reader)

    monkeypatch.setattr(dicomlisting, "read_slice", noted)
    return names


def extract_small(flat: Path, **options: Any) -> ExtractionSummary:
    arguments: dict[str, Any] = {"backbone": "embedkit/scattering", "image_size": 32, "tokens": ["cls"], "preview": 0}
    return extract(flat.parent / "cases.csv", flat.parent / "cache", **arguments, **options)


def test_a_folder_of_many_series_is_looked_through_once_for_all_cases(flat: Path, headers_read: list[str]) -> None:
    assert extract_small(flat).cases_done == SERIES
    assert len(headers_read) == SERIES * SLICES
    with open_cache(flat.parent / "cache") as cache:
        sizes = [sum(file.stat().st_size for file in flat.glob(f"{number}-*")) for number in range(SERIES)]
        assert cache.stacks["source_bytes"].to_list() == sizes
    headers_read.clear()
    assert extract_small(flat).cases_before == SERIES
    assert len(headers_read) == SERIES * SLICES
    headers_read.clear()
    assert estimate_extraction(flat.parent / "cases.csv", flat.parent / "other", backbone="embedkit/scattering").cases
    assert len(headers_read) == SERIES * SLICES


def test_one_changed_file_has_its_own_series_read_again_and_no_other(
    flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_small(flat)
    read, paths = sources.read_volume, list[str]()

    def noted(path: Path | str, **options: Any) -> Any:
        paths.append(Path(path).name)
        return read(path, **options)

    monkeypatch.setattr(sources, "read_volume", noted)
    write_slice(flat / "2-3.dcm", 2, 3, seed=1)
    assert extract_small(flat).changed == ("s2",)
    assert paths == ["2-0.dcm"]
    write_slice(flat / "1-9.dcm", 1, SLICES)  # the series goes on
    assert extract_small(flat).changed == ("s1",)
    os.utime(flat / "3-1.dcm")
    assert extract_small(flat).cases_before == SERIES
    assert paths == ["2-0.dcm", "1-0.dcm", "3-0.dcm"]


def test_a_file_that_changed_or_came_since_is_looked_for_anew(flat: Path, headers_read: list[str]) -> None:
    folders = SeriesFolders()
    assert len(folders.find(flat / "0-0.dcm").files) == SLICES
    assert len(folders.find(flat / "1-2.dcm").files) == SLICES
    assert len(headers_read) == SERIES * SLICES
    write_slice(flat / "1-2.dcm", 7, 0)  # now of a series of its own
    assert folders.find(flat / "1-2.dcm").files == (flat / "1-2.dcm",)
    assert len(folders.find(flat / "1-0.dcm").files) == SLICES - 1
    write_slice(flat / "new", 8, 0)
    (flat / "3-4.dcm").unlink()
    assert folders.find(flat / "new").files == (flat / "new",)
    assert len(folders.find(flat / "3-0.dcm").files) == SLICES - 1
    headers_read.clear()
    folders.find(flat / "0-1.dcm")
    assert headers_read == []


def test_files_that_come_to_a_series_are_seen_by_who_looked_before(flat: Path) -> None:
    folders = SeriesFolders()
    assert len(folders.find(flat / "0-0.dcm").files) == SLICES
    write_slice(flat / "late.dcm", 0, SLICES)
    assert len(folders.find(flat / "0-0.dcm").files) == SLICES + 1


def test_looking_through_a_folder_ends_once_it_is_told_to(flat: Path, headers_read: list[str]) -> None:
    stop = threading.Event()
    stop.set()
    stat_source(flat / "0-0.dcm", SeriesFolders(), stop=stop)
    assert len(headers_read) <= 1


def test_a_remembered_folder_that_is_gone_or_cannot_be_asked_is_named(
    flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, real = SeriesFolders(), Path.stat
    folders.find(flat / "0-0.dcm")

    def failing(path: Path, **options: Any) -> os.stat_result:
        if path.name == "0-3.dcm":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, **options)

    with (
        monkeypatch.context() as patched,
        pytest.raises(VolumeError, match=r"flat: cannot be read \(Input/output error"),
    ):
        patched.setattr(Path, "stat", failing)
        folders.find(flat / "0-0.dcm")
    folders.find(flat / "0-0.dcm")
    shutil.rmtree(flat)
    with pytest.raises(VolumeError, match=r"flat: cannot be read \(No such file or directory\); check the folder"):
        folders.find(flat / "0-0.dcm")


def test_few_folders_are_remembered(flat: Path, headers_read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    other = flat.parent / "other"
    other.mkdir()
    write_slice(other / "a", 0, 0)
    monkeypatch.setattr(dicomfolders, "_MOST_FILES", SERIES * SLICES)
    folders = SeriesFolders()
    for path in (flat / "0-0.dcm", other / "a", other / "a", flat / "0-0.dcm", flat / "1-0.dcm"):
        folders.find(path)
    assert len(headers_read) == 2 * SERIES * SLICES + 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("notes.txt", lambda _: None, r"notes.txt: no DICOM image; give an image file of the series, or its folder"),
        (
            "",
            lambda _: None,
            r"flat: holds 4 DICOM series, expected one; give one file of it instead \(0-0.dcm \(CT, 5",
        ),
        ("", lambda flat: [file.unlink() for file in flat.glob("*.dcm")], "holds no DICOM image directly"),
        ("9.dcm", lambda flat: (flat / "9.dcm").write_bytes(b"a" * 999), r"9.dcm: damaged, truncated or not DICOM"),
        ("gone/1.dcm", lambda _: None, r"gone: cannot be read \(No such file or directory\); check the folder"),
    ],
)
def test_a_path_that_stands_for_no_series_is_refused(
    flat: Path, name: str, change: Callable[[Path], object], message: str
) -> None:
    (flat / "notes.txt").write_text("none")
    change(flat)
    with pytest.raises(VolumeError, match=message):
        SeriesFolders().find(flat / name)


def test_the_files_of_a_series_are_told_by_content_whatever_their_names(tmp_path: Path) -> None:
    for height in range(3):
        write_slice(tmp_path / f"IM.{height:04d}", 0, height)
    (tmp_path / "notes").write_text("none")
    assert stat_source(tmp_path / "IM.0001").bytes == read_volume(tmp_path / "IM.0001").source_bytes
    assert stat_source(tmp_path / "IM.0001").bytes == sum(file.stat().st_size for file in tmp_path.glob("IM.*"))
    assert stat_source(tmp_path / "notes").bytes == 4


# ---- reading that nobody waits for any more ----


class Late(threading.Event):
    """Is set from the so many-th time on that it is asked."""

    def __init__(self, asked: int) -> None:
        super().__init__()
        self.left = asked

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.npy", "a.npz", "series", "flat/0-0.dcm"])
def test_reading_ends_at_the_next_piece_once_it_is_told_to(
    flat: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = flat.parent / name
    if name == "series":
        path.mkdir()
        for height in range(4):
            write_slice(path / str(height), 0, height)
    elif path.suffix != ".dcm":
        array = np.random.default_rng(0).normal(0, 1, (4, 16, 16)).astype(np.float32)
        write_volume(path, array, np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]))
    monkeypatch.setattr(voxels, "_PIECE_BYTES", 512)
    monkeypatch.setattr(dicom, "_CHUNK", 1)
    patient = Late(10_000)
    whole = read_volume(path, stop=patient)
    asked = 10_000 - patient.left
    assert whole.array.size and asked > 4
    for calls in (0, 1, asked // 2, asked - 1):
        stop = Late(calls)
        with pytest.raises(VolumeError, match="reading was stopped half way; run the same command again"):
            read_volume(path, stop=stop)
        assert stop.left == -1


def test_a_stop_while_one_image_is_being_read_takes_effect_at_once_and_blames_no_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    affine = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    for name, slices in (("a", 2), ("b", 400), ("c", 400)):
        array = np.random.default_rng(slices).normal(100, 30, (slices, 16, 16)).astype(np.float32)
        write_volume(tmp_path / f"{name}.nii", array, affine)
    (tmp_path / "cases.csv").write_text("case_id,path\na,a.nii\nb,b.nii\nc,c.nii\n")
    monkeypatch.setattr(voxels, "_PIECE_BYTES", 512)
    going, stop = voxels.require_going, threading.Event()
    begun: list[Path] = []

    def slowly(path: Path, asked: threading.Event | None) -> None:
        going(path, asked)
        if path.name != "a.nii":
            begun.append(path)
            time.sleep(0.05)  # 800 pieces take 40 s
        if len(begun) == 6:
            stop.set()

    monkeypatch.setattr(voxels, "require_going", slowly)
    arguments: dict[str, Any] = {"backbone": "embedkit/scattering", "image_size": 32, "tokens": ["cls"]}
    started = time.monotonic()
    summary = extract(tmp_path / "cases.csv", tmp_path / "cache", batch_size=2, stop=stop, **arguments)
    assert time.monotonic() - started < 20
    assert summary.interrupted and summary.failures == () and summary.cases_done == 1
    assert read_failures(tmp_path / "cache").failures == ()
    monkeypatch.setattr(voxels, "require_going", going)
    assert extract(tmp_path / "cases.csv", tmp_path / "cache", **arguments).cases_done == 2


def test_pydicom_writes_what_these_tests_read(flat: Path) -> None:
    volume = read_volume(flat / "1-0.dcm")
    heights = [pydicom.dcmread(flat / f"1-{height}.dcm").pixel_array for height in range(SLICES)]
    np.testing.assert_array_equal(volume.array, np.stack(heights))

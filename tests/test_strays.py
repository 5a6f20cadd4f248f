"""Damaged DICOM files among good series: each is of the series its header tells, or told by itself as a stray."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pydicom
import pytest
from embedkit.cli.main import app
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from typer.testing import CliRunner

from embedkit import dicomfolders, sources
from embedkit.cache import open_cache
from embedkit.dicomelements import find_value
from embedkit.dicomfolders import SeriesFolders
from embedkit.dicomheaders import find_series_uid
from embedkit.dicomlisting import find_dicom_series
from embedkit.dicomstacks import order_slices
from embedkit.errors import StrayWarning, VolumeError
from embedkit.estimate import estimate_extraction
from embedkit.extraction import ExtractionSummary, extract
from embedkit.failures import FailureLog, Stray, read_failures, record_strays, settle_strays
from embedkit.inspection import describe_cache
from embedkit.manifest import read_manifest
from embedkit.packing import pack_cache
from embedkit.scanning import scan_folder
from embedkit.sources import Case, group_cases
from embedkit.strays import account_strays, look_again
from embedkit.volumes import Volume, read_volume

SERIES, SLICES = 4, 5
UID = (0x0020, 0x000E)
GARBAGE = b"no image" * 40
HEADER: dict[str, Any] = {"SOPClassUID": CTImageStorage, "SOPInstanceUID": "1.2", "Modality": "CT"}
HEADER |= {"Rows": 8, "Columns": 8, "PixelSpacing": [1, 1], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
HEADER |= {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}
HEADER |= {"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1}


def write_slice(file: Path, series: int, height: int, **tags: Any) -> bytes:
    """One slice of 8 x 8 pixels at 2 mm times ``height``; ``tags`` replace header values. Gives the file's bytes."""
    pixels = np.random.default_rng([series, height]).integers(0, 900, (8, 8)).astype(np.int16)
    meta, data = FileMetaDataset(), Dataset()
    meta.TransferSyntaxUID = tags.pop("syntax", ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    own = {
        "SeriesInstanceUID": f"1.2.3.{series}",
        "InstanceNumber": height + 1,
        "ImagePositionPatient": [0, 0, 2 * height],
        "PixelData": pixels.tobytes(),
    }
    for name, value in (HEADER | own | tags).items():
        setattr(data, name, value)
    data.file_meta = meta
    data.save_as(file, enforce_file_format=True)
    return file.read_bytes()


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """A folder with the files of four series whose names tell a patient, and a manifest beside it."""
    (tmp_path / "flat").mkdir()
    manifest = ["case_id,path"]
    for series in range(SERIES):
        manifest.append(f"s{series},flat/DOE-{series}-0.dcm")
        for height in range(SLICES):
            write_slice(tmp_path / "flat" / f"DOE-{series}-{height}.dcm", series, height)
    (tmp_path / "cases.csv").write_text("\n".join(manifest))
    return tmp_path / "flat"


def run(flat: Path, **options: Any) -> ExtractionSummary:
    arguments: dict[str, Any] = {"backbone": "embedkit/scattering", "image_size": 32, "tokens": ["cls"], "preview": 0}
    return extract(flat.parent / "cases.csv", flat.parent / "cache", **arguments, **options)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def names(strays: tuple[Stray, ...]) -> list[str]:
    return [Path(each.path).name for each in strays]


def on_record(flat: Path) -> FailureLog:
    return read_failures(flat.parent / "cache")


def record_bytes(flat: Path) -> bytes:
    return (flat.parent / "cache" / "failures.jsonl").read_bytes()


# ---- whose a damaged file is ----


def test_a_damaged_file_whose_header_tells_its_series_fails_that_series_alone(flat: Path) -> None:
    cut(flat / "DOE-2-1.dcm", -10)
    cut(flat / "DOE-2-3.dcm", -100)
    summary = run(flat)
    assert (summary.cases_done, summary.strays) == (SERIES - 1, ())
    (failure,) = summary.failures
    assert failure.case_id == "s2" and f"view image: {flat}/DOE-2-1.dcm: damaged, truncated" in failure.reason
    assert failure.reason.endswith("; so is 1 more file of this series")
    (kept,) = on_record(flat).failures
    assert kept.reason.startswith("view image: one of its files: damaged, truncated or not DICOM; copy the file again")
    assert b"DOE-2-1" not in record_bytes(flat)
    for height in (1, 3):
        write_slice(flat / f"DOE-2-{height}.dcm", 2, height)
    assert (run(flat).cases_done, on_record(flat)) == (1, FailureLog((), ()))


def test_files_of_which_no_series_can_be_told_fail_none_and_are_recorded_by_themselves(flat: Path) -> None:
    (flat / "DOE-9-0.dcm").write_bytes(b"")
    (flat / "scan.DCM").write_bytes(GARBAGE)
    cut(flat / "DOE-3-4.dcm", (flat / "DOE-3-4.dcm").read_bytes().index(b"1.2.3.3"))  # before its series is named
    (flat / "notes.txt").write_text("no stray")
    summary = run(flat)
    assert (summary.cases_done, summary.failures) == (SERIES, ())
    assert names(summary.strays) == ["DOE-3-4.dcm", "DOE-9-0.dcm", "scan.DCM"]
    assert {each.beside for each in summary.strays} == {("s0", "s1", "s2", "s3")}
    assert [each.reason.split(";")[0] for each in summary.strays] == [
        "damaged, truncated or not DICOM",
        "is empty (0 bytes)",
        "damaged, truncated or not DICOM",
    ]
    kept = on_record(flat)
    assert kept.failures == () and [each.stray for each in kept.strays] == [each.stray for each in summary.strays]
    assert len({each.stray for each in kept.strays}) == 3
    for name in (b"DOE", b"scan", b"flat"):
        assert name not in record_bytes(flat)
    with open_cache(flat.parent / "cache") as cache:
        assert dict(cache.stacks.select("case_id", "count").iter_rows()) == {"s0": 5, "s1": 5, "s2": 5, "s3": 4}


def test_a_stray_stays_on_record_as_it_is_until_it_is_mended_or_gone(flat: Path) -> None:
    (flat / "scan.dcm").write_bytes(GARBAGE)
    (flat / "DOE-1-5.dcm").write_bytes(b"")
    first, before = run(flat), record_bytes(flat)
    again = run(flat)
    assert (again.cases_before, again.strays) == (SERIES, first.strays)
    assert record_bytes(flat) == before
    write_slice(flat / "DOE-1-5.dcm", 1, 5)  # mended: it was the last slice of a series
    mended = run(flat)
    assert (mended.changed, names(mended.strays)) == (("s1",), ["scan.dcm"])
    assert len(on_record(flat).strays) == 1
    (flat / "scan.dcm").write_bytes(GARBAGE[:-1])  # another stray now
    (other,) = run(flat).strays
    assert other.stray != first.strays[1].stray and [each.stray for each in on_record(flat).strays] == [other.stray]
    (flat / "scan.dcm").unlink()
    assert (run(flat).strays, on_record(flat)) == ((), FailureLog((), ()))


def test_a_stray_that_the_manifest_names_is_a_failed_case_and_no_stray(flat: Path) -> None:
    (flat / "scan.dcm").write_bytes(GARBAGE)
    (flat / "more.dcm").write_bytes(GARBAGE)
    with (flat.parent / "cases.csv").open("a") as manifest:
        manifest.write("\nnamed,flat/scan.dcm")
    summary = run(flat)
    assert [failure.case_id for failure in summary.failures] == ["named"]
    assert (names(summary.strays), summary.cases_done) == (["more.dcm"], SERIES)
    for part in ("1/2", "2/2"):
        assert names(run(flat, part=part).strays) == ["more.dcm"]


def test_parts_of_a_manifest_record_a_stray_once_beside_all_of_its_cases(flat: Path) -> None:
    (flat / "scan.dcm").write_bytes(GARBAGE)
    run(flat, part="1/2")
    before = record_bytes(flat)
    (stray,) = run(flat, part="2/2").strays
    assert stray.beside == ("s0", "s1", "s2", "s3") and record_bytes(flat) == before


def test_a_folder_of_one_series_lands_beside_its_stray_which_is_seen_again_without_reading_the_case(
    flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = flat.parent / "one"
    folder.mkdir()
    for height in range(SLICES):
        write_slice(folder / str(height), 0, height)
    (folder / "5").write_bytes(b"")
    (flat.parent / "cases.csv").write_text("case_id,path\none,one\ntwo,flat/DOE-0-0.dcm\n")
    first = run(flat)
    assert first.cases_done == 2
    (stray,) = first.strays
    assert (stray.path, stray.beside) == (str(folder / "5"), ("one",))
    assert stray.reason == "is empty (0 bytes); copy the file again or remove it"
    with monkeypatch.context() as patched:
        patched.setattr(sources, "read_volume", None)
        assert (run(flat).strays, on_record(flat).strays[0].stray) == (first.strays, stray.stray)
    (folder / "5").unlink()
    gone = run(flat)
    assert (gone.cases_before, gone.strays, on_record(flat)) == (2, (), FailureLog((), ()))


def test_a_stray_beside_cases_of_which_none_was_looked_at_stays_on_record(flat: Path) -> None:
    (flat / "scan.dcm").write_bytes(GARBAGE)
    run(flat)
    (flat.parent / "cases.csv").write_text("case_id,path\nother,gone.nii.gz\n")
    assert run(flat).strays == () and len(on_record(flat).strays) == 1


def test_what_is_no_dicom_is_a_stray_only_where_it_is_named_like_the_images_beside_it(tmp_path: Path) -> None:
    for height in range(3):
        write_slice(tmp_path / f"IM.{height:04}", 0, height)
    for name in ("IM.0003", "IM.0004b", "README", "image_0001.nii.gz", "IMG.0003"):
        (tmp_path / name).write_bytes(b"" if name == "IM.0003" else GARBAGE)
    (tmp_path / "IM.0005").write_bytes(GARBAGE)
    _, others = find_dicom_series(tmp_path)
    assert [(each.file.name, each.problem.split(";")[0]) for each in others] == [
        ("IM.0003", "is empty (0 bytes)"),
        ("IM.0005", "holds no DICOM though it is named like the images beside it"),
    ]
    (tmp_path / "a1.nii").write_bytes(write_slice(tmp_path / "a2.nii", 0, 3))
    (tmp_path / "a1.nii").write_bytes(GARBAGE)  # by its name of a format of its own
    assert len(find_dicom_series(tmp_path)[1]) == 2


def test_a_file_that_may_not_be_read_is_a_stray_and_one_that_is_gone_is_none(
    flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def refusing(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name == "DOE-3-4.dcm":
            raise PermissionError(13, "Permission denied", str(path))
        if path.name == "DOE-2-4.dcm":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refusing)
    series, others = find_dicom_series(flat)
    assert [len(one.files) for one in series] == [5, 5, 4, 4]
    assert [(each.file.name, each.problem) for each in others] == [
        ("DOE-3-4.dcm", "cannot be read (Permission denied); check its rights")
    ]


@pytest.mark.parametrize("target", ["gone.dcm", "DOE-0-4.dcm", "DOE-0-0.dcm/below"])
def test_a_link_that_leads_nowhere_is_a_stray_until_its_file_is_there(flat: Path, target: str) -> None:
    link = flat / "DOE-0-4.dcm"
    link.unlink()
    link.symlink_to(target)
    (flat / "notes").symlink_to("gone")
    (stray,) = run(flat).strays
    assert stray.path == str(link)
    assert stray.reason == "is a link that leads nowhere; fetch the file that it stands for or remove it"
    guessed = hashlib.sha256(f"{link}\0None".encode()).hexdigest()[:16]
    assert on_record(flat).strays[0].stray == stray.stray != guessed
    (flat / "DOE-0-1.dcm").unlink()
    with pytest.raises(VolumeError, match=r"slices may be missing, and a file that cannot be read lies beside it"):
        read_volume(flat / "DOE-0-0.dcm")
    link.unlink()
    write_slice(flat.parent / "there", 0, 4)
    write_slice(flat / "DOE-0-1.dcm", 0, 1)
    link.symlink_to(flat.parent / "there")
    assert (run(flat).changed, on_record(flat)) == (("s0",), FailureLog((), ()))


def test_a_link_whose_file_comes_later_has_its_folder_looked_through_again(flat: Path) -> None:
    (flat / "DOE-0-5.dcm").symlink_to(flat.parent / "there")
    folders = SeriesFolders()
    assert len(folders.find(flat / "DOE-0-0.dcm").files) == SLICES
    write_slice(flat.parent / "there", 0, 5)  # no file came to the folder or left it
    assert len(folders.find(flat / "DOE-0-0.dcm").files) == SLICES + 1


HASHES = [hashlib.md5(bytes([number]), usedforsecurity=False).hexdigest() for number in range(6)]


@pytest.mark.parametrize("hyphens", [False, True])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty (0 bytes)"),
        (bytes(3 << 20), "holds zeros only"),
        (bytes(3 << 20) + b"1", "holds no DICOM though it is named like the images beside it"),
    ],
)
def test_an_image_under_a_hash_that_lost_its_content_is_a_stray(
    tmp_path: Path, content: bytes, problem: str, hyphens: bool
) -> None:
    told = [str(uuid.UUID(each)) if hyphens else each for each in HASHES]
    for height in range(5):
        write_slice(tmp_path / told[height], 0, height)
    (tmp_path / told[5]).write_bytes(content)
    _, others = find_dicom_series(tmp_path)
    assert [(each.file.name, each.problem) for each in others] == [
        (told[5], f"{problem}; copy the file again or remove it")
    ]


def test_a_file_without_content_is_a_stray_beside_dicom_whatever_its_name(tmp_path: Path) -> None:
    for name, content in (("a", b""), ("b", bytes(99)), ("c", bytes(2000) + b"1"), ("d.nii", b"")):
        (tmp_path / name).write_bytes(content)
    assert find_dicom_series(tmp_path) == ([], [])
    write_slice(tmp_path / "z.dcm", 0, 0)
    assert [each.file.name for each in find_dicom_series(tmp_path)[1]] == ["a", "b"]


def test_a_series_without_an_identifier_takes_no_stray_for_its_own(flat: Path) -> None:
    for height in range(4):
        write_slice(flat / f"U-{height}.dcm", 7, height, SeriesInstanceUID="")
    (flat / "scan.dcm").write_bytes(GARBAGE)
    series, others = find_dicom_series(flat)
    assert [(one.uid, len(one.files), one.damaged) for one in series if not one.uid] == [("", 4, ())]
    assert [each.file.name for each in others] == ["scan.dcm"]
    assert (len(read_volume_quietly(flat / "U-0.dcm").array), names(run(flat).strays)) == (4, ["scan.dcm"])


def read_volume_quietly(path: Path) -> Volume:
    with pytest.warns(StrayWarning):
        return read_volume(path)


def test_a_damaged_file_whose_series_no_other_tells_may_be_of_any(flat: Path) -> None:
    for height in range(SLICES):
        write_slice(flat / f"DOE-0-{height}.dcm", 0, height, ImagesInAcquisition=SLICES)
    lost = flat / "DOE-0-4.dcm"
    lost.write_bytes(lost.read_bytes().replace(b"1.2.3.0", b"1.2.7.0")[:-9])
    summary = run(flat)
    assert [(each.case_id, "tell of 1 more" in each.reason) for each in summary.failures] == [("s0", True)]
    assert names(summary.strays) == ["DOE-0-4.dcm"]
    for height in range(SLICES):  # all of one series, which is not that of the slice which is lost
        cut(flat / f"DOE-2-{height}.dcm", -9)
    lost.unlink()
    assert {one.uid: len(one.strays) for one in find_dicom_series(flat)[0]} == {
        "1.2.3.0": 0,
        "1.2.3.1": 0,
        "1.2.3.3": 0,
    }


def test_the_files_of_a_series_that_failed_whole_are_no_strays_where_a_case_is_of_it(flat: Path) -> None:
    for series in (1, 2):
        for height in range(SLICES):
            cut(flat / f"DOE-{series}-{height}.dcm", -30)
    (flat / "scan.dcm").write_bytes(GARBAGE)
    text = (flat.parent / "cases.csv").read_text()
    (flat.parent / "cases.csv").write_text(text.replace("s1,flat/DOE-1-0.dcm\n", ""))
    summary = run(flat)
    assert [each.case_id for each in summary.failures] == ["s2"]
    assert names(summary.strays) == [f"DOE-1-{height}.dcm" for height in range(SLICES)] + ["scan.dcm"]


def test_what_a_damaged_file_says_is_told_and_not_recorded(flat: Path) -> None:
    for name, at in (("DOE-2-1.dcm", b"\xe0\x7f\x10\x00OW"), ("DOE-3-4.dcm", b"\x08\x00\x60\x00CS")):
        content = (flat / name).read_bytes()
        (flat / name).write_bytes(content.replace(at, at[:4] + b"UT\0\0JOHN" if b"CS" in at else at + b"\0\0JOHN", 1))
    (failure,) = (summary := run(flat)).failures
    assert failure.reason.endswith(
        "or remove it (element (7fe0,0010) promises 1313361738 bytes but the file has 134 left)"
    )
    assert names(summary.strays) == ["DOE-3-4.dcm"] and len(on_record(flat).strays) == 1
    assert b"promises" not in record_bytes(flat) and b"1313361738" not in record_bytes(flat)
    (flat / "alone").mkdir()
    (flat / "DOE-3-4.dcm").rename(flat / "alone" / "a.dcm")
    with pytest.raises(VolumeError, match=r"a\.dcm: damaged.* \(element \(0008,0060\) promises 1313361738 bytes"):
        read_volume(flat / "alone")
    assert "promises 1313361738 bytes" in dict(scan_folder(flat).skipped)[str(flat / "DOE-2-1.dcm")]


# ---- slices that a stray may have been ----


def numbered(folder: Path, numbers: list[int | None], heights: list[float] | None = None, **tags: Any) -> None:
    """Writes a series of these instance numbers, and files of garbage beside it."""
    for place, number in enumerate(numbers):
        height = place if heights is None else heights[place]
        changed = {} if number is None else {"InstanceNumber": number}
        write_slice(folder / f"{place}.dcm", 0, place, ImagePositionPatient=[0, 0, 2 * height], **changed, **tags)


MISSING: dict[str, tuple[list[int | None], int, dict[str, Any], str]] = {
    "the first": ([2, 3, 4, 5], 1, {}, "the headers of its 4 slices tell of 1 more by their instance numbers"),
    "the first two": ([3, 4, 5, 6], 2, {}, "and 2 files that cannot be read lie beside it"),
    "far from 1": ([12, 13, 14, 15], 1, {}, ""),
    "from 0": ([0, 1, 2, 3], 1, {}, ""),
    "one within, out of order": (
        [1, 5, 3, 2],
        1,
        {},
        "the headers of its 4 slices tell of 1 more by their instance numbers",
    ),
    "a hole far from 1": ([31, 32, 34, 35], 1, {}, "4 slices tell of 1 more"),
    "every second": ([11, 13, 15, 17], 1, {}, ""),
    "no numbers": ([7, 7, 7, 7], 1, {}, ""),
    "counted": (
        [1, 2, 3, 4],
        1,
        {"ImagesInAcquisition": 5},
        "or their count, and a file that cannot be read lies beside it",
    ),
    "counted of several": ([1, 2, 3, 4], 1, {"ImagesInAcquisition": 50}, ""),
    "counted all": ([1, 2, 3, 4], 1, {"ImagesInAcquisition": 4}, ""),
    "a number beyond all": ([1, 2, 3, 2**31], 1, {}, ""),
    "none beside": ([2, 3, 5, 9], 0, {"ImagesInAcquisition": 5}, ""),
}


@pytest.mark.parametrize("what", MISSING)
def test_a_series_whose_headers_tell_of_more_slices_is_refused_where_a_stray_may_be_one(
    tmp_path: Path, what: str
) -> None:
    found, strays, tags, message = MISSING[what]
    numbered(tmp_path, found, **tags)
    for number in range(strays):
        (tmp_path / f"stray{number}.dcm").write_bytes(GARBAGE)
    (series,), others = find_dicom_series(tmp_path)
    assert len(others) == len(series.strays) == strays
    if not message:
        assert len(order_slices(series)[0]) == len(found)
        return
    with pytest.raises(VolumeError) as caught:
        order_slices(series)
    assert message in str(caught.value) and "stray0.dcm" in caught.value.found
    assert str(caught.value).startswith(f"{tmp_path}: ") and "stray0.dcm" not in caught.value.problem


def test_a_gap_with_a_stray_beside_it_is_refused_in_words_that_name_both(flat: Path) -> None:
    (flat / "DOE-1-2.dcm").write_bytes(GARBAGE)
    summary = run(flat)
    (failure,) = summary.failures
    assert (failure.case_id, summary.cases_done, names(summary.strays)) == ("s1", SERIES - 1, ["DOE-1-2.dcm"])
    told = "about 1 slice is missing between 2.00 and 6.00 mm (usual spacing 2.00 mm), and a file that cannot be read"
    assert f"view image: {flat}: {told} lies beside it; fetch the whole series again" in failure.reason
    assert "(DOE-1-1.dcm and DOE-1-3.dcm, beside DOE-1-2.dcm)" in failure.reason
    assert f"its folder: {told} lies" in on_record(flat).failures[0].reason and b"DOE-" not in record_bytes(
        flat
    ).replace(b"DOE-1-0.dcm", b"")


# ---- what else meets strays ----


def test_a_value_outside_of_sequences_is_found_in_what_is_left_of_a_file(tmp_path: Path) -> None:
    inner = Dataset()
    inner.SeriesInstanceUID = "9.9.9"
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
        for undefined in (False, True):
            write_slice(tmp_path / "a", 7, 0, syntax=syntax, ReferencedSeriesSequence=DicomSequence([inner, inner]))
            data = pydicom.dcmread(tmp_path / "a")
            data["ReferencedSeriesSequence"].is_undefined_length = undefined
            data.ReferencedSeriesSequence[0].is_undefined_length_sequence_item = undefined
            data.save_as(tmp_path / "a")
            content = (tmp_path / "a").read_bytes()
            assert (b"\xfe\xff\xdd\xe0" in content) == undefined  # the end of a sequence of unknown length
            at = content.rindex(b"1.2.3.7")
            assert b"9.9.9" in content[:at] and find_value(tmp_path / "a", UID).strip(b"\0") == b"1.2.3.7"
            cut(tmp_path / "a", at + 8)
            assert find_value(tmp_path / "a", UID).strip(b"\0") == b"1.2.3.7"
            cut(tmp_path / "a", at + 7)
            assert find_value(tmp_path / "a", UID) == b""
    for content in (b"", GARBAGE, bytes(400), bytes(128) + b"DICM", bytes(range(256)) * 9):
        (tmp_path / "a").write_bytes(content)
        assert find_value(tmp_path / "a", UID) == b""


def test_a_header_cut_or_changed_at_any_byte_tells_its_own_series_or_none(tmp_path: Path) -> None:
    content = write_slice(tmp_path / "a", 7, 0)
    chance = np.random.default_rng(0)
    told = []
    for number in range(400):
        copy = bytearray(content[: chance.integers(1, len(content))] if number % 2 else content)
        if not number % 2:
            copy[chance.integers(132, content.rindex(b"1.2.3.7"))] ^= 1 << chance.integers(8)
        (tmp_path / "a").write_bytes(copy)
        told.append(find_series_uid(tmp_path / "a"))
    assert set(told) == {"", "1.2.3.7"} and 100 < told.count("") < 300


def test_a_scan_leaves_out_the_series_of_a_damaged_file_and_lists_strays(flat: Path) -> None:
    cut(flat / "DOE-2-1.dcm", -10)
    (flat / "scan.dcm").write_bytes(GARBAGE)
    found = scan_folder(flat)
    assert [Path(path).name for path in found.rows["path"]] == [f"DOE-{series}-0.dcm" for series in (0, 1, 3)]
    assert [Path(path).name for path, _ in found.skipped] == ["DOE-2-0.dcm", "DOE-2-1.dcm", "scan.dcm"]
    assert found.skipped[0][1].startswith(f"{flat}/DOE-2-1.dcm: damaged")


def test_a_volume_read_by_itself_warns_of_strays(flat: Path) -> None:
    (flat / "scan.dcm").write_bytes(GARBAGE)
    with pytest.warns(StrayWarning, match=r"scan\.dcm, which lies beside .*DOE-0-0\.dcm: damaged"):
        assert len(read_volume(flat / "DOE-0-0.dcm").array) == SLICES


def test_strays_are_told_by_every_command(flat: Path) -> None:
    (flat / "scan.dcm").write_bytes(GARBAGE)
    manifest, cache = flat.parent / "cases.csv", flat.parent / "cache"
    options = ["--backbone", "embedkit/scattering", "--image-size", "32", "--tokens", "cls,patch@2"]

    def call(*arguments: object, code: int) -> tuple[str, str]:
        done = CliRunner().invoke(app, [*map(str, arguments)])
        assert done.exit_code == code, done.output
        return done.stdout, done.stderr

    estimate = json.loads(call("extract", manifest, "-o", cache, *options, "--dry-run", "--json", code=1)[0])
    assert [Path(each["path"]).name for each in estimate["strays"]] == ["scan.dcm"] and not cache.exists()
    out, err = call("extract", manifest, "-o", cache, *options, code=1)
    assert "4 cases extracted" in out and "0 failed, 1 stray file\n" in out
    assert f"  stray {flat}/scan.dcm, beside s0, s1, s2, s3: damaged" in err
    for dry in ([], ["--dry-run"]):
        summary = json.loads(call("extract", manifest, "-o", cache, *options, "--json", *dry, code=1)[0])
        (stray,) = summary["strays"]
        assert stray["path"] == f"{flat}/scan.dcm" and stray["beside"] == ["s0", "s1", "s2", "s3"]
    assert "stray     a file beside s0, s1, s2, s3: damaged" in call("info", cache, code=0)[0]
    (kept,) = json.loads(call("info", cache, "--json", code=0)[0])["strays"]
    assert (kept["stray"], kept["path"]) == (stray["stray"], "")
    assert "1 damaged DICOM files are on record as strays" in call("pack", cache, "-o", flat / "one.h5", code=0)[1]
    call("verify", cache, code=0)
    call("index", cache, "-o", flat.parent / "index", code=0)
    for query in (["--volume", flat / "DOE-1-0.dcm"], ["--manifest", manifest]):
        out, err = call("search", flat.parent / "index", *query, "-k", 1, "--json", code=0)
        assert json.loads(out)[0]["case_id"] in {"s0", "s1"} and err.startswith(f"stray {flat}/scan.dcm, which lies")
    pack_cache(cache, flat.parent / "packed", shard_bytes=1 << 20)
    assert describe_cache(flat.parent / "packed").strays == describe_cache(cache).strays
    assert estimate_extraction(
        manifest, cache, backbone="embedkit/scattering", image_size=32, tokens=["cls", "patch@2"]
    )


def test_strays_on_record_are_read_to_the_end_and_lines_that_are_none_are_counted(tmp_path: Path) -> None:
    one, two = Stray("1" * 16, "damaged", ("a", "b")), Stray("2" * 16, "é" * 3000, ("c",))
    record_strays(tmp_path, [one, two])
    assert read_failures(tmp_path).strays == (one, Stray("2" * 16, "é" * 2000, ("c",)))
    grown = Stray("1" * 16, "damaged", ("a", "b", "c"), path="/never/kept")
    record_strays(tmp_path, [grown])
    settle_strays(tmp_path, [two])
    assert read_failures(tmp_path).strays == (Stray("1" * 16, "damaged", ("a", "b", "c")),)
    before = read_failures(tmp_path)
    wrong = [{"stray": 1}, {"stray": "x"}, {"stray": "x", "reason": "r", "beside": "a"}]
    wrong += [{"stray": "x", "reason": "r", "beside": [1]}, {"stray": "x", "reason": 1, "beside": []}]
    with (tmp_path / "failures.jsonl").open("a") as record:
        record.writelines(json.dumps(each) + "\n" for each in wrong)
    after = read_failures(tmp_path)
    assert (after.strays, len(after.unreadable_lines)) == (before.strays, len(wrong))


def test_a_stray_stays_on_record_until_the_folders_of_all_cases_beside_it_were_looked_through(flat: Path) -> None:
    (flat / "scan.dcm").write_bytes(GARBAGE)
    run(flat)
    other = flat.parent / "other"
    other.mkdir()
    for height in range(SLICES):
        write_slice(other / f"{height}.dcm", 0, height)
    text = (flat.parent / "cases.csv").read_text()
    (flat.parent / "cases.csv").write_text(text.replace("flat/DOE-0-0.dcm", "other/0.dcm"))
    cases = group_cases(read_manifest(flat.parent / "cases.csv"))
    account_strays(flat.parent / "cache", cases, {other: ()})
    assert len(on_record(flat).strays) == 1
    account_strays(flat.parent / "cache", cases, {flat: ()})
    assert len(on_record(flat).strays) == 1
    account_strays(flat.parent / "cache", cases, {other: (), flat: ()})
    assert on_record(flat).strays == ()


# ---- looking through folders ----


def test_no_folder_is_looked_through_for_strays_after_a_stop(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_strays(flat.parent, [Stray("1" * 16, "damaged", ("a", "b"))])
    cases = [Case(name, name, {"image": flat}) for name in ("a", "b")]
    stop, looked = threading.Event(), list[Path]()

    def stopping(_: SeriesFolders, folder: Path, *, stop: threading.Event) -> None:
        looked.append(folder)
        stop.set()

    monkeypatch.setattr(SeriesFolders, "look", stopping)
    look_again(flat.parent, cases, SeriesFolders(), stop=stop)
    assert looked == [flat]


def test_folders_are_looked_through_side_by_side_and_each_by_one_thread(
    flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = flat.parent / "other"
    other.mkdir()
    write_slice(other / "a.dcm", 0, 0)
    both, looked, real = threading.Barrier(2, timeout=20), list[Path](), dicomfolders.find_dicom_series

    def meeting(folder: Path, **options: Any) -> Any:
        looked.append(folder)
        both.wait()  # breaks where one waits for the other to end
        time.sleep(0.05)  # the others of this folder come meanwhile
        return real(folder, **options)

    monkeypatch.setattr(dicomfolders, "find_dicom_series", meeting)
    folders = SeriesFolders()
    paths = [flat / "DOE-0-0.dcm", other / "a.dcm", flat / "DOE-1-0.dcm", flat / "DOE-2-0.dcm"]
    threads = [threading.Thread(target=folders.find, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(looked) == [flat, other] and not both.broken
    assert folders.take_looks() == {flat: (), other: ()} and folders.take_looks() == {}


def test_a_stop_while_a_resumed_run_looks_through_folders_ends_it_and_fails_no_case(
    flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(flat)
    stop, real, looked = threading.Event(), dicomfolders.find_dicom_series, list[Path]()
    for number in range(3):
        (flat.parent / str(number)).mkdir()
        (flat / f"DOE-{number}-0.dcm").rename(flat.parent / str(number) / "0.dcm")
        for height in range(1, SLICES):
            (flat / f"DOE-{number}-{height}.dcm").rename(flat.parent / str(number) / f"{height}.dcm")
    rows = [{"case_id": f"s{number}", "path": f"{number}/0.dcm"} for number in range(3)]
    pl.DataFrame(rows).write_csv(flat.parent / "cases.csv")
    run(flat)

    def stopping(folder: Path, **options: Any) -> Any:
        looked.append(folder)
        if len(looked) == 2:
            stop.set()
        return real(folder, **options)

    monkeypatch.setattr(dicomfolders, "find_dicom_series", stopping)
    summary = run(flat, stop=stop)
    assert (summary.interrupted, summary.cases_before, summary.failures) == (True, 1, ())
    assert [folder.name for folder in looked] == ["0", "1"] and on_record(flat) == FailureLog((), ())


@pytest.mark.parametrize("change", [lambda file: file.write_bytes(GARBAGE * 2), os.utime, Path.unlink])
def test_a_stray_that_changed_has_its_folder_looked_through_again(flat: Path, change: Callable[[Path], object]) -> None:
    (flat / "scan.dcm").write_bytes(GARBAGE)
    folders = SeriesFolders()
    folders.find(flat / "DOE-0-0.dcm")
    ((before,),) = folders.take_looks()[flat]
    folders.find(flat / "DOE-1-0.dcm")
    assert folders.take_looks() == {}
    change(flat / "scan.dcm")
    folders.find(flat / "DOE-1-0.dcm")
    assert before.stray not in {each.stray for (each,) in folders.take_looks()[flat]}

"""DICOM series become one straight, even stack of rescaled values, or an error that says why not."""

from __future__ import annotations

import hashlib
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
    RTStructureSetStorage,
    generate_uid,
)

from embedkit.dicom import check_dicom_series, read_dicom_series
from embedkit.dicomlisting import find_dicom_series, list_dicom_series
from embedkit.errors import StrayWarning, VolumeError
from embedkit.itk import quiet_itk
from embedkit.volumes import check_volume, read_volume

STORED = (np.arange(5 * 3 * 4).reshape(5, 3, 4) * 7).astype(np.int16)


def make_slice(pixels: np.ndarray[Any, Any], position: tuple[float, ...], **tags: Any) -> Dataset:
    """One CT slice with 2 x 3 mm pixels; ``tags`` replace header values, or remove those given as None."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = tags.pop("syntax", ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID = tags.get("SOPClassUID", CTImageStorage)
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = Dataset()
    data.file_meta = meta
    values = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "SeriesInstanceUID": "1.2.3.4",
        "Modality": "CT",
        "PatientName": "DOE^JANE",
        "PatientID": "secret-42",
        "PatientBirthDate": "19700101",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": int(pixels.dtype == np.int16),
        "PixelSpacing": [2, 3],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": list(position),
        "PixelData": pixels.tobytes(),
    }
    for name, value in (values | tags).items():
        if value is not None:
            setattr(data, name, value)
    return data


def make_series(
    folder: Path, stored: np.ndarray[Any, Any] = STORED, *, step_mm: float = 4.0, name: str = "{}.dcm", **tags: Any
) -> Path:
    """A series of slices from the feet up, its file names and instance numbers in another order."""
    folder.mkdir(exist_ok=True)
    for number, index in enumerate(np.random.default_rng(3).permutation(len(stored))):
        one = make_slice(stored[index], (-10, -20, 100 + step_mm * float(index)), InstanceNumber=number, **tags)
        one.save_as(folder / name.format(number), enforce_file_format=True)
    return folder


def at_height(folder: Path, height: float) -> Path:
    """The file of the slice at a height in mm."""
    return next(file for file in folder.iterdir() if float(pydicom.dcmread(file).ImagePositionPatient[2]) == height)


def edit(file: Path, **tags: Any) -> None:
    data = pydicom.dcmread(file)
    for name, value in tags.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    data.save_as(file)


# ---- what is read ----


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_slices_are_ordered_by_place_and_not_by_name_or_number(tmp_path: Path, syntax: str) -> None:
    volume = read_volume(make_series(tmp_path / "ct", syntax=syntax))
    np.testing.assert_array_equal(volume.array, STORED)
    assert volume.array.dtype == np.int16
    assert volume.spacing_mm == (4.0, 2.0, 3.0)
    # DICOM's LPS+ position (-10, -20, 100) is (10, 20, 100) in RAS+
    np.testing.assert_array_equal(volume.affine, [[0, 0, -3, 10], [0, -2, 0, 20], [4, 0, 0, 100], [0, 0, 0, 1]])
    assert volume.source_shape == (5, 3, 4)


def test_the_digest_runs_over_the_files_in_slice_order(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "ct")
    content = b"".join(at_height(folder, 100 + 4.0 * index).read_bytes() for index in range(5))
    volume = read_volume(folder)
    assert volume.source_digest == hashlib.sha256(content).hexdigest()
    assert volume.source_bytes == len(content)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"renamed-{9 - number}.dcm")
    assert read_volume(folder).source_digest == volume.source_digest


def test_an_oblique_or_sagittal_series_has_its_own_axes(tmp_path: Path) -> None:
    # rows run from front to back, columns from head to feet, slices from left to right
    folder = tmp_path / "sagittal"
    folder.mkdir()
    for index in range(5):
        position = (50 - 4.0 * index, -20, 100)
        make_slice(STORED[index], position, ImageOrientationPatient=[0, 1, 0, 0, 0, -1]).save_as(
            folder / f"{index}.dcm"
        )
    volume = read_volume(folder)
    # canonical axes: slices are columns (from the right), rows are reversed (from the feet)
    np.testing.assert_array_equal(volume.array, STORED.transpose(1, 2, 0)[::-1, :, ::-1])
    assert volume.spacing_mm == (2.0, 3.0, 4.0)
    angle = math.radians(20)
    tilted = tmp_path / "oblique"
    tilted.mkdir()
    for index in range(5):
        position = (0, -math.sin(angle) * 4 * index, math.cos(angle) * 4 * index)
        directions = [1, 0, 0, 0, round(math.cos(angle), 6), round(math.sin(angle), 6)]
        make_slice(STORED[index], position, ImageOrientationPatient=directions).save_as(tilted / f"{index}.dcm")
    volume = read_volume(tilted)
    np.testing.assert_array_equal(volume.array, STORED)
    np.testing.assert_allclose(volume.affine[:3, 0], [0, math.sin(angle) * 4, math.cos(angle) * 4], atol=1e-9)
    np.testing.assert_allclose(volume.affine[:3, 1], [0, -math.cos(angle) * 2, math.sin(angle) * 2], atol=1e-5)


def test_the_stack_agrees_with_itk_on_a_well_formed_series(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "ct", RescaleSlope=2, RescaleIntercept=-1024)
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    source = read_dicom_series(list_dicom_series(folder)[0])
    np.testing.assert_array_equal(source.array, sitk.GetArrayFromImage(image))
    origin = np.diag([-1.0, -1, 1, 1]) @ [*image.GetOrigin(), 1]
    np.testing.assert_allclose(source.affine[:, 3], origin)


@pytest.mark.parametrize("storage", [CTImageStorage, MRImageStorage])
@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [
        (1, -1024, np.int16),
        (2, 5, np.int16),
        (-1, 0, np.int16),
        (1000, 0, np.int32),
        (0.5, 0, np.float32),
        (1, 0.25, np.float32),
    ],
)
def test_slope_and_intercept_are_applied(
    tmp_path: Path, slope: float, intercept: float, dtype: Any, storage: str
) -> None:
    folder = make_series(tmp_path / "ct", RescaleSlope=slope, RescaleIntercept=intercept, SOPClassUID=storage)
    array = read_volume(folder).array
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, STORED.astype(np.float64) * slope + intercept)


def test_every_slice_has_its_own_slope_as_in_pet(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "pet", Modality="PT", RescaleIntercept=0, RescaleSlope=1)
    slopes = [1.0, 0.1, 0.5, 2.0, 0.3333]
    for index, slope in enumerate(slopes):
        edit(at_height(folder, 100 + 4.0 * index), RescaleSlope=str(slope))
    array = read_volume(folder).array
    assert array.dtype == np.float32
    expected = STORED.astype(np.float32) * np.array(slopes, np.float32)[:, None, None]
    np.testing.assert_array_equal(array, expected)


def test_whole_values_beyond_int16_stay_whole(tmp_path: Path) -> None:
    stored = STORED.astype(np.uint16) + 60000
    array = read_volume(make_series(tmp_path / "mr", stored, RescaleSlope=1, RescaleIntercept=0)).array
    assert array.dtype == np.int32
    np.testing.assert_array_equal(array, stored)


def test_many_slices_are_read_in_parts_without_a_seam(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(-1000, 1000, (35, 3, 4)).astype(np.int16)
    stored[33] = 32767  # int16 overflows in the last part only
    folder = make_series(tmp_path / "ct", stored, RescaleSlope=1, RescaleIntercept=1)
    array = read_volume(folder).array
    assert array.dtype == np.int32
    np.testing.assert_array_equal(array, stored.astype(np.int32) + 1)


def compress_rle(file: Path) -> None:
    data = pydicom.dcmread(file)
    data.compress(RLELossless, generate_instance_uid=False)
    data.save_as(file)


def compress_jpeg2000(file: Path) -> None:
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG2000")
    writer.SetFileName(str(file))
    writer.Execute(sitk.ReadImage(str(file)))


@pytest.mark.parametrize("compress", [compress_rle, compress_jpeg2000])
def test_compressed_pixels_are_decoded(tmp_path: Path, compress: Callable[[Path], None]) -> None:
    stored = np.random.default_rng(0).integers(-1000, 1000, (3, 16, 20)).astype(np.int16)
    folder = make_series(tmp_path / "ct", stored)
    for file in folder.iterdir():
        compress(file)
    np.testing.assert_array_equal(read_volume(folder).array, stored)


def test_one_slice_takes_its_depth_from_the_header(tmp_path: Path) -> None:
    for number, (tags, depth) in enumerate(
        [({"SliceThickness": 5}, 5.0), ({"SliceThickness": 5, "SpacingBetweenSlices": 6}, 6.0), ({}, 1.0)]
    ):
        volume = read_volume(make_series(tmp_path / str(number), STORED[:1], **tags))
        assert volume.array.shape == (1, 3, 4)
        assert volume.spacing_mm == (depth, 2.0, 3.0)


def test_a_jitter_of_the_scanner_is_no_gap(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "ct")
    edit(at_height(folder, 108.0), ImagePositionPatient=["-10", "-20", "108.02"])
    assert read_volume(folder).spacing_mm == (4.0, 2.0, 3.0)


def test_nothing_of_the_patient_is_kept(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "ct")
    volume = read_volume(folder)
    series = list_dicom_series(folder)[0]
    for text in (repr(volume), repr(series)):
        for secret in ("DOE", "secret-42", "19700101", "1.2.3.4"):
            assert secret not in text


# ---- which series there are ----


def test_series_of_one_folder_are_told_apart_and_other_files_passed_over(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "study", name="a{}.dcm")
    make_series(folder, STORED[:2] + 1, name="b{}", SeriesInstanceUID="1.2.3.5", Modality="MR")
    structure = make_slice(STORED[0], (0, 0, 0), SOPClassUID=RTStructureSetStorage, Modality="RTSTRUCT", PixelData=None)
    for name in ("Rows", "Columns", "BitsAllocated", "PixelSpacing"):
        delattr(structure, name)
    structure.save_as(folder / "RS.dcm", enforce_file_format=True)
    (folder / "notes.txt").write_text("hello")
    (folder / ".hidden.dcm").write_text("hello")
    first, second = list_dicom_series(folder)
    assert ([file.name for file in first.files], first.modality) == ([f"a{number}.dcm" for number in range(5)], "CT")
    assert ([file.name for file in second.files], second.modality) == (["b0", "b1"], "MR")
    _, others = find_dicom_series(folder)
    assert [each[:3] for each in others] == [(folder / "RS.dcm", "a DICOM RTSTRUCT, not an image", False)]
    np.testing.assert_array_equal(read_volume(folder / "b1").array, STORED[:2] + 1)
    np.testing.assert_array_equal(read_volume(folder / "a3.dcm").array, STORED)
    with pytest.raises(
        VolumeError, match=r"holds 2 DICOM series, expected one; give one file of it instead \(a0\.dcm \(CT, 5 "
    ):
        read_volume(folder)
    with pytest.raises(VolumeError, match=r"RS\.dcm: no DICOM image; give an image file of the series, or its folder"):
        read_volume(folder / "RS.dcm")


def test_a_damaged_file_is_named_and_not_passed_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_series(tmp_path / "ct")
    content = (folder / "0.dcm").read_bytes()
    for damaged in (content[:-10], content[:600], content[:400], b"hello", b""):
        (folder / "0.dcm").write_bytes(damaged)
        problem = "damaged, truncated or not DICOM" if damaged else r"is empty \(0 bytes\)"
        told = rf"0\.dcm: {problem}; copy the file again"
        with pytest.raises(VolumeError, match=told) as caught:
            list_dicom_series(folder)
        assert "\n" not in str(caught.value)
        if len(damaged) >= 600:  # its header still tells its series
            with pytest.raises(VolumeError, match=told):
                read_volume(folder)
        else:
            with pytest.warns(StrayWarning, match=rf"0\.dcm, which lies beside .*ct: {problem}"):
                assert len(read_volume(folder).array) == 4
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"gone: cannot be read \(No such file or directory\)"):
        list_dicom_series(tmp_path / "gone")


# ---- what is refused ----


def remove_a_slice(folder: Path) -> None:
    at_height(folder, 108.0).unlink()


def copy_a_slice(folder: Path) -> None:
    shutil.copy(at_height(folder, 108.0), folder / "copy.dcm")


def add_a_phase(folder: Path) -> None:
    make_series(folder, STORED + 1, name="second-{}.dcm")


def move_a_slice(folder: Path) -> None:
    edit(at_height(folder, 108.0), ImagePositionPatient=[-10, -20, 109])


def shift_a_slice(folder: Path) -> None:
    edit(at_height(folder, 108.0), ImagePositionPatient=[-16, -20, 108])


def lean(folder: Path) -> None:
    for index in range(5):
        file = at_height(folder, 100 + 4.0 * index)
        edit(file, ImagePositionPatient=[-10, -20 + index * 1.4558809, 100 + 4.0 * index])


def edit_one(**tags: Any) -> Callable[[Path], None]:
    return lambda folder: edit(at_height(folder, 108.0), **tags)


def edit_all(**tags: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.iterdir():
            edit(file, **tags)

    return change


def make_colour(folder: Path) -> None:
    edit_all(
        SamplesPerPixel=3,
        PhotometricInterpretation="RGB",
        PlanarConfiguration=0,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelRepresentation=0,
        PixelData=bytes(36),
    )(folder)


SHORTER = {"Rows": 2, "PixelData": STORED[0, :2].tobytes()}
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "gap": (
        remove_a_slice,
        r"1 slice is missing between 104\.00 and 112\.00 mm \(usual spacing 4\.00 mm\); .* \(\d\.dcm and \d\.dcm\)",
    ),
    "copy": (copy_a_slice, r"1 slice lies where another one does, for example at 108\.00 mm; remove the copies"),
    "phases": (add_a_phase, "5 slices lie where another one does, .* or give each phase or echo a folder of its own"),
    "uneven": (move_a_slice, r"slices are unevenly spaced \(3\.00 to 5\.00 mm\), expected one spacing"),
    "sideways": (shift_a_slice, "slices are shifted sideways by up to 6.0 mm against each other"),
    "tilt": (lean, r"the stack leans by 20\.0 degrees \(tilted gantry\), expected 0; resample it"),
    "orientations": (
        edit_one(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]),
        r"more than one ImageOrientationPatient \(4 have .*, 1 another, such as .*\); move the slices .* localizer",
    ),
    "sizes": (edit_one(**SHORTER), r"more than one size \(4 have \[3\.0, 4\.0\], 1 another, such as \[2\.0, 4\.0\]\)"),
    "spacings": (edit_one(PixelSpacing=[2, 2]), "more than one PixelSpacing"),
    "huge": (edit_all(Rows=65535, Columns=65535), "its headers promise 21474181125 voxels, more than 2147483648"),
    "frames": (edit_one(NumberOfFrames=2, PixelData=bytes(48)), "holds 2 frames .*; convert it with dcm2niix to NIfTI"),
    "colour": (make_colour, "is a colour image, expected one grey value per pixel"),
    "inverted": (edit_all(PhotometricInterpretation="MONOCHROME1"), r"inverted grey values \(MONOCHROME1\)"),
    "zero slope": (edit_all(RescaleSlope=0, RescaleIntercept=0), "has a rescale slope of 0 or none that is a number"),
    "no place": (
        edit_one(ImagePositionPatient=None),
        "lacks its position or orientation in space; leave this series out",
    ),
    "no orientation": (edit_one(ImageOrientationPatient=None), "lacks its position or orientation in space"),
    "no spacing": (edit_one(PixelSpacing=None), "lacks a positive PixelSpacing"),
    "zero spacing": (edit_all(PixelSpacing=[0, 1]), "lacks a positive PixelSpacing"),
    "not square": (edit_all(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "is not two perpendicular unit vectors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_odd_series_are_refused_in_words_by_their_headers(
    tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, message = REFUSED[case]
    folder = make_series(tmp_path / "ct")
    check_volume(folder)
    spoil(folder)
    with pytest.raises(VolumeError, match=message) as caught:
        check_dicom_series(list_dicom_series(folder)[0])
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)
    with pytest.raises(VolumeError, match=message):
        read_volume(folder)
    assert capfd.readouterr() == ("", "")


def test_pixels_that_the_file_lacks_are_not_made_up(tmp_path: Path) -> None:
    for number, syntax in enumerate([ExplicitVRLittleEndian, ImplicitVRLittleEndian]):
        folder = make_series(tmp_path / str(number), syntax=syntax)
        edit(folder / "2.dcm", PixelData=STORED[0].tobytes()[:10])
        with pytest.raises(VolumeError, match=r"2\.dcm: holds fewer pixels than the 4x3 its header promises"):
            read_volume(folder)


def test_pixels_that_cannot_be_decoded_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_series(tmp_path / "ct", np.ones((3, 16, 20), np.int16))
    compress_rle(folder / "2.dcm")
    content = (folder / "2.dcm").read_bytes()
    segments = content.index(b"\x02\0\0\0\x40\0\0\0")  # an RLE frame of two segments, the first at byte 64
    (folder / "2.dcm").write_bytes(content[:segments] + b"\x63" + content[segments + 1 :])
    with pytest.raises(VolumeError, match=r"2\.dcm: its pixels cannot be decoded; copy the series again.* \(ITK: "):
        read_volume(folder)
    assert capfd.readouterr() == ("", "")


def test_itk_speaks_again_after_the_last_of_several_threads_is_done() -> None:
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(True)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with quiet_itk():
            entered.set()
            leave.wait(5)

    thread = threading.Thread(target=hold)
    try:
        with quiet_itk():
            thread.start()
            assert entered.wait(5)
        assert not sitk.ProcessObject.GetGlobalWarningDisplay()
        leave.set()
        thread.join()
        assert sitk.ProcessObject.GetGlobalWarningDisplay()
    finally:
        leave.set()
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


@pytest.mark.realdata
def test_real_series_are_listed_with_their_modality_and_the_structure_sets_left_out(real_data: Path) -> None:
    found = {}
    for folder in sorted((real_data / "sts" / "dicom").glob("*/*/*")):
        series, others = find_dicom_series(folder)
        assert len(series) + len(others) == 1
        if series:
            found[folder.parts[-3], folder.parts[-2]] = (series[0].modality, len(series[0].files))
    assert found == {
        ("STS_001", "CT"): ("CT", 59),
        ("STS_001", "MR_T1"): ("MR", 59),
        ("STS_001", "PET"): ("PT", 59),
        ("STS_004", "CT"): ("CT", 85),
        ("STS_004", "MR_T1"): ("MR", 60),
        ("STS_004", "PET"): ("PT", 85),
    }


def test_every_file_of_a_series_is_decoded_once_in_calls_of_few_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_series(tmp_path / "ct", np.arange(40 * 12, dtype=np.int16).reshape(40, 3, 4))
    calls: list[list[str]] = []

    class Noting(sitk.ImageSeriesReader):
        def SetFileNames(self, names: list[str]) -> None:  # noqa: N802
            calls.append(names)
            super().SetFileNames(names)

    monkeypatch.setattr(sitk, "ImageSeriesReader", Noting)
    memory, file = read_volume(folder), read_volume(folder, spill=tmp_path, most_bytes=0)
    assert sorted(name for names in calls for name in names) == sorted(2 * [str(each) for each in folder.iterdir()])
    assert max(map(len, calls)) == 16
    assert isinstance(file.array.base, np.memmap) and np.array_equal(file.array, memory.array)
    assert file.source_digest == memory.source_digest


def test_values_beyond_int16_in_a_later_slice_widen_those_before_in_memory_and_in_a_file(tmp_path: Path) -> None:
    stored = np.arange(40 * 12, dtype=np.int16).reshape(40, 3, 4)
    folder = make_series(tmp_path / "pet", stored, RescaleSlope=70)
    memory, file = read_volume(folder), read_volume(folder, spill=tmp_path, most_bytes=0)
    assert memory.array.dtype == file.array.dtype == np.int32
    assert np.array_equal(memory.array, stored.astype(np.int32) * 70) and np.array_equal(file.array, memory.array)

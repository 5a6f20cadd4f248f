"""Files that are damaged, misnamed, of the wrong kind or out of reach among good ones: none stops, none is lost."""

from __future__ import annotations

import base64
import gzip
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import SimpleITK as sitk
from embedkit.cli.main import app
from typer.testing import CliRunner

from embedkit.cache import open_cache
from embedkit.errors import VolumeError
from embedkit.failures import read_failures
from embedkit.phantoms import make_phantoms
from embedkit.volumes import check_volume, read_volume, write_volume

AFFINE = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]])
PNG = b"\x89PNG\r\n\x1a\n" + bytes(200)
MIB = 2**20


def noise(seed: int = 0, shape: tuple[int, ...] = (4, 20, 24)) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(100, 30, shape).astype(np.float32)


def nifti(array: np.ndarray[Any, Any] | None = None, **fields: Any) -> bytes:
    """A NIfTI-1 file by hand; ``fields`` replace dim, datatype, rows (of the sform) and pixdim."""
    array = noise() if array is None else array
    head = bytearray(352)
    struct.pack_into("<i", head, 0, 348)
    dim = fields.get("dim", (3, *array.shape[::-1], 1, 1, 1, 1))[:8]
    struct.pack_into("<8h", head, 40, *(*dim, *[1] * (8 - len(dim))))
    struct.pack_into("<2h", head, 70, fields.get("datatype", 16), 32)
    struct.pack_into("<8f", head, 76, *fields.get("pixdim", (1, 1, 1, 3, 1, 1, 1, 1)))
    struct.pack_into("<3f", head, 108, 352, fields.get("slope", 1), 0)
    struct.pack_into("<2h", head, 252, 0, 1)
    struct.pack_into("<12f", head, 280, *np.ravel(fields.get("rows", [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 3, 0]])))
    head[344:348] = b"n+1\0"
    return bytes(head) + array.tobytes()


def nrrd(sizes: str, voxels: bytes, *, kind: str = "float", encoding: str = "raw") -> bytes:
    axes = len(sizes.split())
    directions = " ".join(("(1,0,0)", "(0,1,0)", "(0,0,3)", "none")[:axes])
    text = f"NRRD0004\ntype: {kind}\ndimension: {axes}\nspace: left-posterior-superior\nsizes: {sizes}\n"
    text += f"space directions: {directions}\nendian: little\nencoding: {encoding}\nspace origin: (0,0,0)\n\n"
    return text.encode() + voxels


def mha(sizes: str, voxels: bytes, *, kind: str = "MET_FLOAT", more: str = "") -> bytes:
    axes = len(sizes.split())
    text = f"ObjectType = Image\nNDims = {axes}\nBinaryData = True\nBinaryDataByteOrderMSB = False\n{more}"
    return f"{text}DimSize = {sizes}\nElementType = {kind}\nElementDataFile = LOCAL\n".encode() + voxels


def npy(shape: str, voxels: bytes, kind: str = "<f4") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    header = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + voxels


def with_value(value: float) -> np.ndarray[Any, Any]:
    array = noise()
    array[1, 2, 3] = value
    return array


GOOD: dict[str, Callable[[], bytes]] = {
    "plain.nii": nifti,
    "packed.nii.gz": lambda: gzip.compress(nifti()),
    "plain.nrrd": lambda: nrrd("24 20 4", noise().tobytes()),
    "packed.nrrd": lambda: nrrd("24 20 4", gzip.compress(noise().tobytes()), encoding="gzip"),
    "plain.mha": lambda: mha("24 20 4", noise().tobytes()),
    "packed.mha": lambda: mha("24 20 4", zlib.compress(noise().tobytes()), more="CompressedData = True\n"),
    "plain.npy": lambda: npy("(4, 20, 24)", noise().tobytes()),
    "one-slice.nii": lambda: nifti(noise(shape=(1, 20, 24))),
    "half-constant.nii": lambda: nifti(np.concatenate([noise(), np.zeros((2, 20, 24), np.float32)])),
}
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.nii": (lambda: b"", "is empty"),
    "empty.nrrd": (lambda: b"", "is empty"),
    "text.nrrd": (lambda: b"a letter\n" * 40, "does not begin like one"),
    "png.nii.gz": (lambda: PNG, "does not begin like one"),
    "png.dcm": (lambda: PNG, "damaged, truncated or not DICOM"),
    "png.npz": (lambda: PNG, "does not begin like one"),
    "nifti.mha": (nifti, "rename it to .nii"),
    "nifti.nii.gz": (nifti, "rename it to .nii"),
    "cut.nii": (lambda: nifti()[:4000], "truncated"),
    "cut.nii.gz": (lambda: gzip.compress(nifti())[:4000], "truncated"),
    "cut-header.nii": (lambda: nifti()[:350], "truncated"),
    "cut.nrrd": (lambda: nrrd("24 20 4", noise().tobytes()[:99]), "truncated"),
    "cut-packed.nrrd": (lambda: nrrd("24 20 4", gzip.compress(noise().tobytes())[:999], encoding="gzip"), "."),
    "cut.mha": (lambda: mha("24 20 4", noise().tobytes()[:99]), "truncated"),
    "cut.npy": (lambda: npy("(4, 20, 24)", noise().tobytes()[:99]), "truncated"),
    "four.nii": (lambda: nifti(noise(shape=(2, 4, 20, 24)), dim=(4, 24, 20, 4, 2)), "has 4 axes"),
    "four.nrrd": (lambda: nrrd("24 20 4 2", noise(shape=(2, 4, 20, 24)).tobytes()), "cannot be read by ITK"),
    "two.mha": (lambda: mha("24 20", noise(shape=(20, 24)).tobytes()), "has 2 axes"),
    "rgb.nii": (lambda: nifti(datatype=128), "colour (RGB)"),
    "vector.nii": (lambda: nifti(noise(shape=(3, 1, 4, 20, 24)), dim=(5, 24, 20, 4, 1, 3)), "RGB colours, or 3 time"),
    "rgba.nii": (lambda: nifti(noise(shape=(4, 4, 20, 24)), dim=(4, 24, 20, 4, 4)), "RGBA colours, or 4 time points"),
    "rgb.npy": (lambda: npy("(4, 20, 24, 3)", bytes(4 * 20 * 24 * 3), "|u1"), "has 4 axes"),
    "rgb.mha": (
        lambda: mha("24 20 4", bytes(5760), kind="MET_UCHAR", more="ElementNumberOfChannels = 3\n"),
        "3 components",
    ),
    "nan.nii": (lambda: nifti(with_value(np.nan)), "NaN or infinite"),
    "inf.nii": (lambda: nifti(with_value(np.inf)), "NaN or infinite"),
    "nan.nrrd": (lambda: nrrd("24 20 4", with_value(np.nan).tobytes()), "NaN or infinite"),
    "inf.npy": (lambda: npy("(4, 20, 24)", with_value(-np.inf).tobytes()), "NaN or infinite"),
    "constant.nii": (lambda: nifti(np.full((4, 20, 24), 7, np.float32)), "no content"),
    "huge.nii": (lambda: nifti(dim=(3, 32767, 32767, 32767)), "promises"),
    "huge.nii.gz": (lambda: gzip.compress(nifti(dim=(3, 20000, 20000, 5))), "promises"),
    "huge.nrrd": (lambda: nrrd("100000 100000 1000", bytes(99)), "promises"),
    "huge.mha": (lambda: mha("100000 100000 1000", bytes(99)), "promises"),
    "huge.npy": (lambda: npy("(100000, 100000, 1000)", bytes(99)), "promises"),
    "zero.npy": (lambda: npy("(0, 20, 24)", b""), "at least one voxel"),
    "half-header.npy": (lambda: npy("(4, 20,", noise().tobytes()), "header is damaged"),
    "singular.nii": (lambda: nifti(rows=[[1, 0, 0, 0], [2, 0, 0, 0], [0, 0, 3, 0]]), "singular"),
    "nan-affine.nii": (lambda: nifti(rows=[[np.nan, 0, 0, 0], [0, 1, 0, 0], [0, 0, 3, 0]]), "singular"),
    "sheared.nii": (lambda: nifti(rows=[[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 3, 0]]), "skewed"),
    "far.nii": (lambda: nifti(rows=[[1, 0, 0, 1e30], [0, 1, 0, 0], [0, 0, 3, 0]]), "expected lengths"),
    "tiny.nii": (lambda: nifti(rows=[[1e-20, 0, 0, 0], [0, 1e-20, 0, 0], [0, 0, 1e-20, 0]]), "expected lengths"),
    "objects.npy": (lambda: npy("(4, 20, 24)", noise().tobytes(), "|O"), "expected real numbers"),
}


@pytest.mark.parametrize("name", [name for name in GOOD if name.startswith(("plain", "packed"))])
def test_every_good_file_gives_the_very_values_it_was_made_of(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(GOOD[name]())
    values = read_volume(tmp_path / name).array
    assert np.array_equal(np.sort(values, axis=None), np.sort(noise(), axis=None))


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_compressed_metaimage_is_read_in_its_byte_order_though_its_header_leaves_out_the_length(
    tmp_path: Path, order: str
) -> None:
    stored = zlib.compress(noise().astype(f"{order}f4").tobytes())
    more = f"CompressedData = True\nElementByteOrderMSB = {order == '>'}\n"
    text = mha("24 20 4", stored, more=more).replace(b"BinaryDataByteOrderMSB = False\n", b"")
    (tmp_path / "image.mha").write_bytes(text)
    assert np.array_equal(np.sort(read_volume(tmp_path / "image.mha").array, axis=None), np.sort(noise(), axis=None))


def run_program(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from embedkit.cli.main import main; main()", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


def extract(manifest: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    options = ["--backbone", "embedkit/scattering", "--image-size", "32", "--tokens", "cls", "--preview", "0", "--json"]
    return run_program("extract", manifest, "-o", cache, *options, "--device", "cpu")


def test_good_files_land_and_bad_ones_are_listed_with_their_reason(tmp_path: Path) -> None:
    scans = tmp_path / "SECRET_FOLDER"
    scans.mkdir()
    for name, make in GOOD.items():
        (scans / name).write_bytes(make())
    for name, (make, _) in BAD.items():
        (scans / name).write_bytes(make())
    (scans / "folder").mkdir()
    (scans / "dangling.nii").symlink_to(scans / "nowhere.nii")
    (scans / "circle.nii").symlink_to(scans / "circle.nii")
    os.mkfifo(scans / "pipe.nii")
    others = {
        "folder": "holds no DICOM image",
        "dangling.nii": "No such file",
        "circle.nii": "cannot be read",
        "pipe.nii": "is a pipe or device",
        "missing.nii.gz": "No such file",
    }
    reasons = {name: reason for name, (_, reason) in BAD.items()} | others
    names = sorted([*GOOD, *reasons])
    pl.DataFrame({"case_id": names, "path": [str(scans / name) for name in names]}).write_csv(tmp_path / "cases.csv")
    done = extract(tmp_path / "cases.csv", tmp_path / "cache")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    failures = {failure.case_id: failure.reason for failure in read_failures(tmp_path / "cache").failures}
    with open_cache(tmp_path / "cache") as cache:
        assert sorted(cache.stacks["case_id"]) == sorted(GOOD)
    assert sorted(failures) == sorted(reasons)
    assert {name: reason for name, reason in failures.items() if reasons[name] not in reason} == {}
    assert {name: reason for name, reason in failures.items() if "SECRET_FOLDER" in reason or "\n" in reason} == {}
    listed = {failure["case_id"] for failure in json.loads(done.stdout)["failures"]}
    assert listed == set(reasons)


@pytest.mark.skipif(os.geteuid() == 0, reason="the rights of a file do not bind root")
def test_a_file_that_this_user_may_not_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "private.nii").write_bytes(nifti())
    (tmp_path / "private.nii").chmod(0)
    with pytest.raises(VolumeError, match=r"cannot be read .*; check its rights"):
        read_volume(tmp_path / "private.nii")


def test_a_file_that_the_system_refuses_to_open_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "private.nii").write_bytes(nifti())
    open_path = Path.open

    def denied(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name == "private.nii":
            raise PermissionError(13, "Permission denied", str(path))
        return open_path(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(VolumeError, match=r"private.nii: cannot be read \(Permission denied\); check its rights"):
        read_volume(tmp_path / "private.nii")


def damage(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """A copy that is cut, or has bits, bytes, a run, a header or digits replaced, or bytes lost or put in."""
    copy, kind = bytearray(data), chance.randrange(8)
    head = min(len(copy), chance.choice([64, 352, 600, len(copy)]))
    if kind == 0:
        return bytes(copy[: chance.randrange(len(copy))])
    if kind == 1:
        for _ in range(chance.randrange(1, 6)):
            copy[chance.randrange(head)] ^= 1 << chance.randrange(8)
    elif kind == 2:
        for _ in range(chance.randrange(1, 20)):
            copy[chance.randrange(head)] = chance.randrange(256)
    elif kind == 3:
        length = min(chance.randrange(1, 400), len(other))
        copy[:length] = other[:length]
    elif kind == 4:
        start, length = chance.randrange(head), chance.randrange(1, 64)
        copy[start : start + length] = bytes([chance.choice([0, 0x7F, 0x80, 255])]) * length
    elif kind == 5:
        start = chance.randrange(head)
        del copy[start : start + chance.randrange(1, 32)]
    elif kind == 6:
        start = chance.randrange(head)
        copy[start:start] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 32)))
    else:
        digits = [place for place in range(head) if 48 <= copy[place] <= 57]
        for _ in range(chance.randrange(1, 8) if digits else 0):
            copy[chance.choice(digits)] = chance.choice(b"0123456789-.eNn ")
    return bytes(copy)


def seeds_of_damage(folder: Path) -> dict[str, bytes]:
    """Good files of every format, those of a DICOM series among them."""
    files = {name: make() for name, make in GOOD.items()}
    image = sitk.GetImageFromArray(noise())
    for name in ("packed.npz", "more.nii.gz"):
        write_volume(folder / name, noise(1), AFFINE)
        files[name] = (folder / name).read_bytes()
    for name, compress in (("apart.mhd", False), ("apart.nhdr", True)):
        sitk.WriteImage(image, str(folder / name), compress)
        files[name] = (folder / name).read_bytes()
    make_phantoms(folder / "phantoms", cases=4, seed=0)
    series = sorted((folder / "phantoms" / "volumes").glob("*/*.dcm"))[:3]
    return files | {f"slice{number}.dcm": file.read_bytes() for number, file in enumerate(series)}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_thousand_damaged_files_give_finite_numbers_or_a_reason_for_little_work_and_memory(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = seeds_of_damage(tmp_path)
    chance, names = random.Random(11), sorted(files)
    read, refused, slowest, before = 0, 0, 0.0, peak_bytes()
    for number in range(1000):
        name = names[number % len(names)]
        file = tmp_path / (f"series/{name}" if name.endswith(".dcm") else name)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(damage(files[name], files[chance.choice(names)], chance))
        started = time.process_time()
        try:
            volume = read_volume(file)
        except VolumeError as error:
            refused += 1
            assert file.name in str(error) or file.parent.name in str(error)
            assert "\n" not in str(error) and len(str(error)) < 600
        else:
            read += 1
            assert np.isfinite(volume.array).all() and np.isfinite(volume.affine).all()
            assert min(volume.spacing_mm) > 0 and np.isfinite(volume.spacing_mm).all()
            check_volume(file)
        slowest = max(slowest, time.process_time() - started)
        file.unlink()
    assert read > 100 and refused > 400
    assert slowest < 10
    assert peak_bytes() - before < 300 * MIB
    assert "Traceback" not in capfd.readouterr().err


def test_damaged_files_in_bulk_are_each_in_the_cache_or_on_record(tmp_path: Path) -> None:
    files = seeds_of_damage(tmp_path)
    chance, names = random.Random(12), sorted(files)
    scans, rows = tmp_path / "scans", []
    for number in range(300):
        name = names[number % len(names)]
        folder = scans / str(number)
        folder.mkdir(parents=True)
        data = files[name]
        (folder / name).write_bytes(data if number % 10 == 0 else damage(data, files[chance.choice(names)], chance))
        for part in tmp_path.glob("apart.*raw*") if name.startswith("apart") else ():
            shutil.copy(part, folder)
        rows.append({"case_id": f"{number:03d}", "path": f"scans/{number}/{name}"})
    pl.DataFrame(rows).write_csv(tmp_path / "cases.csv")
    done = extract(tmp_path / "cases.csv", tmp_path / "cache")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    failed = {failure.case_id for failure in read_failures(tmp_path / "cache").failures}
    with open_cache(tmp_path / "cache") as cache:
        held = set(cache.stacks["case_id"])
        assert all(np.isfinite(cache.read(stack, "cls:2")).all() for stack in cache.stacks["stack"])
    assert held | failed == {row["case_id"] for row in rows} and not held & failed
    assert {f"{number:03d}" for number in range(0, 300, 10)} <= held
    assert len(failed) > 50


def test_a_dicom_element_that_promises_more_than_its_file_reserves_no_memory(tmp_path: Path) -> None:
    make_phantoms(tmp_path, cases=4, seed=0)
    file = sorted((tmp_path / "volumes").glob("*/*.dcm"))[0]
    content = file.read_bytes()
    length_at = content.rfind(b"\xe0\x7f\x10\x00") + 4
    assert struct.unpack_from("<I", content, length_at) == (96 * 96 * 2,)
    forged = bytearray(content)
    forged[length_at : length_at + 4] = struct.pack("<I", 0xF0000000)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "one.dcm").write_bytes(forged)
    before = peak_bytes()
    with pytest.raises(VolumeError, match=r"element \(7fe0,0010\) promises 4026531840 bytes but the file has"):
        read_volume(alone)
    assert peak_bytes() - before < 100 * MIB


IDENTITIES = ("ZYXWVUT", "19310203", "QQ-4711-QQ", "Nightingale Ward", "12 Harbour Lane", "PrivateNoteXYZ")


def anonymity_leaks(folder: Path, words: tuple[str, ...]) -> list[str]:
    """Which of ``words`` show in any file below ``folder``, or in a name: plain, as UTF-16, in base64, or packed."""
    found = []
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        data = path.read_bytes()
        data += b"\n" + str(path.relative_to(folder)).encode()
        if data[:2] == b"\x1f\x8b":
            data += gzip.decompress(path.read_bytes())
        for word in words:
            forms = [word.encode(), word.encode("utf-16-le"), word.encode("utf-16-be")]
            # in base64 the letters depend on where the word begins; the outer ones also on its neighbours
            forms += [base64.b64encode(bytes(shift) + word.encode())[4 if shift else 0 : -4] for shift in range(3)]
            if any(form in data for form in forms):
                found.append(f"{path.relative_to(folder)}: {word}")
    return found


def write_identified_series(folder: Path, seed: int) -> None:
    """A CT series whose every text says who the patient is."""
    import pydicom
    from pydicom.datadict import dictionary_VR, keyword_dict
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir(parents=True)
    for number, pixels in enumerate((noise(seed, (4, 32, 32))).astype(np.int16)):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{seed}.{number}"
        for keyword, tag in keyword_dict.items():
            if tag >> 16 not in (0x0008, 0x0010, 0x0018, 0x0020, 0x0032, 0x0038, 0x0040):
                continue
            word = {"PN": "ZYXWVUT^QQ", "LO": "QQ-4711-QQ", "SH": "QQ-4711-QQ", "LT": "12 Harbour Lane"}
            word |= {"ST": "Nightingale Ward", "UT": "PrivateNoteXYZ", "DA": "19310203"}
            if (kind := dictionary_VR(tag)) in word:
                setattr(data, keyword, word[kind])
        block = data.private_block(0x0011, "ZYXWVUT CLINIC", create=True)
        block.add_new(0x01, "LO", "PrivateNoteXYZ")
        block.add_new(0x02, "UT", "12 Harbour Lane")
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, f"1.2.3.{seed}.{number}"
        data.SeriesInstanceUID, data.Modality, data.SpecificCharacterSet = f"1.2.4.{seed}", "CT", "ISO_IR 192"
        data.Rows, data.Columns, data.SamplesPerPixel = 32, 32, 1
        data.PhotometricInterpretation, data.BitsAllocated, data.BitsStored = "MONOCHROME2", 16, 16
        data.HighBit, data.PixelRepresentation, data.PixelSpacing = 15, 1, [2, 2]
        data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 3 * number]
        data.PixelData = pixels.tobytes()
        pydicom.dcmwrite(folder / f"{number}.dcm", data, enforce_file_format=True)


def write_identified_images(folder: Path) -> Path:
    """A manifest of good and bad images of every format, who the patient is in every free text of their headers."""
    folder.mkdir()
    rows = []
    for number in range(12):
        name, values = f"{number:02d}", noise(number, (4, 20, 24))
        head = bytearray(nifti(values))
        head[148 : 148 + 16] = b"Nightingale Ward"  # descrip
        head[228 : 228 + 7] = b"ZYXWVUT"  # aux_file
        head[328 : 328 + 10] = b"QQ-4711-QQ"  # intent_name
        text = "patient:=ZYXWVUT\nborn:=19310203\nward:=Nightingale Ward\n\n"
        plain = nrrd("24 20 4", values.tobytes()).replace(b"\n\n", b"\n" + text.encode(), 1)
        comment = "Comment = ZYXWVUT, 12 Harbour Lane\nPatientID = QQ-4711-QQ\nAnatomicalOrientation = RAI\n"
        kinds = {".nii": bytes(head), ".nrrd": plain, ".mha": mha("24 20 4", values.tobytes(), more=comment)}
        suffix, content = list(kinds.items())[number % 3]
        if number % 4 == 3:
            write_identified_series(folder / name, number)
            rows.append({"case_id": name, "path": name, "grade": number % 2})
            continue
        (folder / f"{name}{suffix}").write_bytes(content)
        rows.append({"case_id": name, "path": f"{name}{suffix}", "grade": number % 2})
        (folder / f"cut-{name}{suffix}").write_bytes(content[: len(content) - 500])
        rows.append({"case_id": f"cut-{name}", "path": f"cut-{name}{suffix}", "grade": number % 2})
    write_identified_series(folder / "gap", 99)
    (folder / "gap" / "1.dcm").unlink()
    rows.append({"case_id": "gap", "path": "gap", "grade": 0})
    pl.DataFrame(rows).write_csv(folder / "cases.csv")
    return folder / "cases.csv"


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_nothing_that_a_header_says_of_a_patient_enters_any_output(tmp_path: Path) -> None:
    manifest, out = write_identified_images(tmp_path / "scans"), tmp_path / "out"
    out.mkdir()
    assert len(anonymity_leaks(tmp_path / "scans", IDENTITIES)) > 20
    done = extract(manifest, out / "cache")
    assert done.returncode == 1 and len(json.loads(done.stdout)["failures"]) == 10, done.stderr
    (out / "printed-extract").write_text(done.stdout + done.stderr)
    run = out / "runs" / "grade.linear"
    steps: dict[str, tuple[object, ...]] = {
        "train": (out / "cache", "--labels", manifest, "--target", "grade", "--head", "linear", "--folds", "2"),
        "index": (out / "cache", "--labels", manifest, "--json"),
        "predict": (run, out / "cache"),
        "explain": (run, out / "cache", "--case", "03", "--manifest", manifest),
        "info": (out / "cache", "--json"),
        "search": (out / "index", "--case", "00", "--json"),
    }
    places = {"train": out / "runs", "index": out / "index", "predict": out / "p.csv", "explain": out / "shown"}
    for name, arguments in steps.items():
        where = ["-o", places[name]] if name in places else []
        result = CliRunner().invoke(app, [name, *map(str, (*arguments, *where))])
        assert result.exit_code == 0, (name, result.output, result.exception)
        (out / f"printed-{name}").write_text(result.output)
    assert len([path for path in out.rglob("*") if path.is_file()]) > 20
    assert anonymity_leaks(out, IDENTITIES) == []
    assert [leak for leak in anonymity_leaks(out, (str(tmp_path),)) if leak.startswith(("cache", "index"))] == []


NHDR = "NRRD0004\ntype: float\ndimension: 3\nsizes: 24 20 4\nendian: little\nencoding: raw\ndata file: {}\n\n"
MHD = "ObjectType = Image\nNDims = 3\nDimSize = 24 20 4\nElementType = MET_FLOAT\nElementDataFile = {}\n"


def write_failing_images(folder: Path) -> Path:
    """A manifest of images that fail, each with who the patient is in what its reason would quote."""
    import pydicom

    folder.mkdir()
    for name in ("ZYXWVUT gone.raw", "../ZYXWVUT.raw", "LIST ZYXWVUT", "ZYXWVUT%03d.raw 1 4 1", "ZYXWVUT\a.raw"):
        number = len(list(folder.iterdir())) // 2
        (folder / f"named-{number}.mhd").write_bytes(MHD.format(name).encode())
        (folder / f"named-{number}.nhdr").write_bytes(NHDR.format(name).encode())
    (folder / "field.nrrd").write_bytes(
        nrrd("24 20 4", noise().tobytes()).replace(b"space origin: (", b"space origin: ZYXWVUT(")
    )
    (folder / "type.nrrd").write_bytes(nrrd("24 20 4", noise().tobytes(), kind="ZYXWVUT"))
    (folder / "type.mha").write_bytes(mha("24 20 4", noise().tobytes(), kind="ZYXWVUT"))
    (folder / "type.npy").write_bytes(npy("(4, 20, 24)", noise().tobytes(), "ZYXWVUT"))
    np.savez(folder / "members.npz", **{"ZYXWVUT": noise(), "QQ-4711-QQ": noise()})
    np.savez(folder / "affine.npz", array=noise(), affine=np.array(["Nightingale Ward"]))
    for name in ("gap", "two", "copies", "cut", "garbage"):
        write_identified_series(folder / name, 1)
        for file in list((folder / name).iterdir()):
            file.rename(file.with_name(f"ZYXWVUT {file.name}"))
    (folder / "gap" / "ZYXWVUT 1.dcm").unlink()
    write_identified_series(folder / "two" / "more", 2)
    (folder / "two" / "more" / "0.dcm").rename(folder / "two" / "QQ-4711-QQ.dcm")
    shutil.copy(folder / "copies" / "ZYXWVUT 1.dcm", folder / "copies" / "QQ-4711-QQ.dcm")
    cut = folder / "cut" / "ZYXWVUT 2.dcm"
    cut.write_bytes(cut.read_bytes()[:-900])
    forged = pydicom.dcmread(folder / "garbage" / "ZYXWVUT 0.dcm")
    forged.RescaleSlope = 0
    forged.save_as(folder / "garbage" / "ZYXWVUT 0.dcm")
    paths = sorted(path for path in folder.iterdir())
    rows = [{"case_id": f"case-{number}", "path": path.name} for number, path in enumerate(paths)]
    pl.DataFrame(rows).write_csv(folder / "cases.csv")
    return folder / "cases.csv"


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_of_a_failure_nothing_is_kept_that_its_files_say(tmp_path: Path) -> None:
    manifest = write_failing_images(tmp_path / "Nightingale Ward")
    cases = len(pl.read_csv(manifest))
    done = extract(manifest, tmp_path / "cache")
    failures = json.loads(done.stdout)["failures"]
    assert done.returncode == 1 and cases == len(failures) == 21, done.stdout
    kept = read_failures(tmp_path / "cache").failures
    assert len(kept) == cases and all(len(failure.reason) > 30 for failure in kept)
    assert anonymity_leaks(tmp_path / "cache", IDENTITIES) == []
    told = "\n".join(failure["reason"] for failure in failures)
    for words in (
        "it names 'ZYXWVUT gone.raw'",
        "it holds ZYXWVUT.npy, QQ-4711-QQ.npy",
        "QQ-4711-QQ.dcm and ZYXWVUT 1.dcm",
    ):
        assert words in told  # to who runs the program


# ---- interrupted while the libraries load ----

INTERRUPTED = """
import sys

WANTED = sys.argv.pop(1)

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == WANTED:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
from embedkit.cli.start import main
main()
"""


@pytest.mark.parametrize("module", ["typer", "embedkit.cli.verify", "torch"])
def test_ctrl_c_while_libraries_load_gives_one_line_and_130(tmp_path: Path, module: str) -> None:
    (tmp_path / "cases.csv").write_text("case_id,path\na,a.nii\n")
    command = [sys.executable, "-c", INTERRUPTED, module, "extract", tmp_path / "cases.csv", "-o", tmp_path / "cache"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 130
    assert done.stderr.splitlines()[0].startswith("embedkit: interrupted") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "cache").exists()


# ---- everything at once, by command ----


def write_everything(folder: Path) -> tuple[Path, set[str], set[str]]:
    """A manifest of good and bad images, some of each, and of DICOM series in one folder; which are good, which bad."""
    scans = folder / "scans"
    (scans / "flat").mkdir(parents=True)
    makers = dict(list(GOOD.items())[::3]) | {name: BAD[name][0] for name in list(BAD)[::5]}
    for name, make in makers.items():
        (scans / name).write_bytes(make())
    paths = {name: scans / name for name in makers}
    for number in range(4):
        write_identified_series(folder / str(number), number)
        for file in (folder / str(number)).iterdir():
            file.rename(scans / "flat" / f"{number}-{'' if file.name == '0.dcm' else 'ZYXWVUT'}{file.name}")
        paths[f"series{number}"] = scans / "flat" / f"{number}-0.dcm"
    damaged, lost = (scans / "flat" / f"{number}-ZYXWVUT2.dcm" for number in (1, 2))
    damaged.write_bytes(damaged.read_bytes()[:-500])
    lost.write_bytes(b"")
    (scans / "flat" / "png.dcm").write_bytes(PNG)
    rows = [{"case_id": name, "path": str(path)} for name, path in paths.items()]
    pl.DataFrame(rows).write_csv(folder / "cases.csv")
    bad = {*(BAD.keys() & makers), "series1", "series2"}
    return folder / "cases.csv", set(paths) - bad, bad


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_every_command_lands_what_is_good_and_lists_what_is_not(tmp_path: Path) -> None:
    manifest, good, bad = write_everything(tmp_path)
    cache, options = tmp_path / "cache", ["--backbone", "embedkit/scattering", "--image-size", "32", "--tokens", "cls"]

    def call(*arguments: object, code: int) -> str:
        done = CliRunner().invoke(app, [*map(str, arguments)])
        assert done.exit_code == code and "Traceback" not in done.output, (arguments, done.output, done.exception)
        return done.stdout

    def cases(path: Path) -> set[str]:
        with open_cache(path) as opened:
            return set(opened.stacks["case_id"])

    estimate = json.loads(call("extract", manifest, "-o", cache, *options, "--dry-run", "--json", code=1))
    assert estimate["unreadable"] and estimate["cases"] == len(good | bad) and not cache.exists()
    for part in ("1/2", "2/2"):
        call("extract", manifest, "-o", cache, *options, "--part", part, code=1)
    assert cases(cache) == good
    summary = json.loads(call("extract", manifest, "-o", cache, *options, "--json", code=1))
    assert (summary["cases_before"], summary["cases_done"]) == (len(good), 0)
    reasons = {failure["case_id"]: failure["reason"] for failure in summary["failures"]}
    assert set(reasons) == bad
    assert "damaged, truncated or not DICOM" in reasons["series1"]
    assert "slices may be missing, and 2 files that cannot be read lie beside it" in reasons["series2"]
    assert [Path(stray["path"]).name for stray in summary["strays"]] == ["2-ZYXWVUT2.dcm", "png.dcm"]
    assert all(stray["beside"] == [f"series{number}" for number in range(4)] for stray in summary["strays"])
    told = json.loads(call("info", cache, "--json", code=0))
    assert {failure["case_id"] for failure in told["failures"]} == bad and len(told["strays"]) == 2
    call("pack", cache, "-o", tmp_path / "one.h5", code=0)
    call("pack", cache, "-o", tmp_path / "packed", "--shard-size", "1MB", code=0)
    for path in (cache, tmp_path / "one.h5", tmp_path / "packed"):
        call("verify", path, code=0)
        assert cases(path) == good
    for folder in (cache, tmp_path / "packed"):
        assert anonymity_leaks(folder, (*IDENTITIES, str(tmp_path))) == []

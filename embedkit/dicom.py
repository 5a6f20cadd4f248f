"""Owns DICOM series: which there are in a folder, whether one is a single even stack, and its pixels in file order.

Refuses to know orientation conventions other than DICOM's own, and never keeps who the patient is: of the header it
uses geometry, pixel format, rescale, Modality, and SeriesInstanceUID to group files (held in memory, never given out
as a name). Values are ``stored * RescaleSlope + RescaleIntercept`` per slice, in the unit that the header states: HU
for CT, SUV for PET with Units GML, activity for PET with Units BQML.
"""

# SimpleITK ships half-typed wrappers.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813

from embedkit.errors import VolumeError

__all__ = [
    "MAX_VOXELS",
    "DicomSeries",
    "SourceImage",
    "check_dicom_series",
    "explain_itk_error",
    "find_dicom_series",
    "list_dicom_series",
    "looks_like_dicom",
    "quiet_itk",
    "read_dicom_series",
]

MAX_VOXELS = 2**31
"""A header that promises more voxels than this is taken for damaged."""

_CHUNK = 16  # slices per call into GDCM, so that never more than these are held twice
_SAME_VALUE = 1e-3  # direction cosines, and pixel spacings in mm, closer than this are equal
_TILT_DEGREES = 0.5
_UNEVEN = 0.05  # spacing may differ from the median by this fraction
_SAME_POSITION_MM = 1e-3
# Uncompressed little-endian transfer syntaxes (DICOM PS3.5, section 10.1 and A.2), by which a short pixel element shows
_NATIVE_SYNTAXES = (b"1.2.840.10008.1.2\0", b"1.2.840.10008.1.2.1\0")
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")


class SourceImage(NamedTuple):
    """An image as its file or files hold it.

    Attributes:
        array: ``[slices height width]`` in the order of the file, slowest axis first.
        affine: float64 ``[4 4]``, (slice, row, column, 1) of ``array`` to RAS+ world mm.
        source_bytes: Bytes of all its files.
        source_digest: SHA-256 over those bytes, in hex.
    """

    array: np.ndarray[Any, Any]
    affine: np.ndarray[Any, Any]
    source_bytes: int
    source_digest: str


@dataclass(frozen=True)
class _Slice:
    """What one file's header says of its pixels and their place. Positions and directions are LPS+ as in DICOM."""

    file: Path
    shape: tuple[int, int]
    frames: int
    samples: int
    photometric: str
    bits: tuple[int, int]  # allocated, stored
    slope: float
    intercept: float
    position: tuple[float, ...]
    directions: tuple[float, ...]
    pixel_mm: tuple[float, ...]
    thickness_mm: float


@dataclass(frozen=True)
class DicomSeries:
    """Files of one folder that share a SeriesInstanceUID; not yet known to form a readable stack.

    Attributes:
        folder: Where the files lie.
        files: Its image files, sorted by name.
        modality: The header's Modality, such as CT, MR or PT.
    """

    folder: Path
    files: tuple[Path, ...]
    modality: str
    uid: str = field(repr=False)
    slices: tuple[_Slice, ...] = field(repr=False)


class _Quiet:
    """Counts who is inside `quiet_itk`, so that threads that overlap restore ITK's switch once, at the end."""

    lock = threading.Lock()
    inside = 0
    before = True


@contextmanager
def quiet_itk() -> Iterator[None]:
    """Keeps ITK's warnings off stderr while it is entered (ITK has one switch per process); safe across threads."""
    with _Quiet.lock:
        if _Quiet.inside == 0:
            _Quiet.before = sitk.ProcessObject.GetGlobalWarningDisplay()
            sitk.ProcessObject.SetGlobalWarningDisplay(False)
        _Quiet.inside += 1
    try:
        yield
    finally:
        with _Quiet.lock:
            _Quiet.inside -= 1
            if _Quiet.inside == 0:
                sitk.ProcessObject.SetGlobalWarningDisplay(_Quiet.before)


def explain_itk_error(error: RuntimeError) -> str:
    """The last sentence of an ITK exception on one line, without source paths and addresses, 200 characters at most."""
    text = " ".join(str(error).split())
    return text.rpartition("ERROR: ")[2][:200]


def looks_like_dicom(file: Path, head: bytes) -> bool:
    """Whether a file is to be opened as DICOM.

    Args:
        file: Its name counts for files without the DICOM preamble.
        head: Its first 132 bytes or more.
    """
    return head[128:132] == b"DICM" or file.suffix.lower() in _DICOM_SUFFIXES


def list_dicom_series(folder: Path | str) -> list[DicomSeries]:
    """The image series whose files lie directly in ``folder``, in the order of their first file's name.

    DICOM objects without pixels (RTSTRUCT, SR, DICOMDIR) and files of other formats are passed over.

    Raises:
        VolumeError: a DICOM image cannot be opened, or the folder cannot be listed.
    """
    series, others = find_dicom_series(folder)
    for _, reason, is_damage in others:
        if is_damage:
            raise VolumeError(reason)
    return series


def find_dicom_series(
    folder: Path | str, *, files: Sequence[Path] | None = None
) -> tuple[list[DicomSeries], list[tuple[Path, str, bool]]]:
    """Like `list_dicom_series`, but says which DICOM files belong to no series instead of raising.

    Args:
        folder: Where the files lie directly.
        files: Only these of its files; None means all that are not hidden.

    Returns:
        The series, and for every other DICOM file (file, reason, whether it is damaged rather than not an image).

    Raises:
        VolumeError: the folder cannot be listed.
    """
    folder = Path(folder)
    groups: dict[str, list[_Slice]] = {}
    modalities: dict[str, str] = {}
    others: list[tuple[Path, str, bool]] = []
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    try:
        if files is None:
            files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
        with quiet_itk():
            for file in sorted(files):
                with file.open("rb") as stream:
                    head = stream.read(1024)
                if not looks_like_dicom(file, head):
                    continue
                try:
                    reader.SetFileName(str(file))
                    reader.ReadImageInformation()
                except RuntimeError as error:
                    others.append(_without_pixels(file, head, error))
                    continue
                uid = _tag(reader, "0020|000e")
                groups.setdefault(uid, []).append(_read_slice(file, reader))
                modalities.setdefault(uid, _tag(reader, "0008|0060"))
    except OSError as error:
        raise VolumeError(f"{folder}: cannot be read ({error.strerror}); check the folder and its rights") from error
    series = [
        DicomSeries(folder, tuple(item.file for item in slices), modalities[uid], uid, tuple(slices))
        for uid, slices in groups.items()
    ]
    return series, others


def check_dicom_series(series: DicomSeries) -> None:
    """Checks by headers alone that `read_dicom_series` would accept the series.

    Raises:
        VolumeError: as for `read_dicom_series`, except what only the pixels show.
    """
    _order_slices(series)


def read_dicom_series(series: DicomSeries) -> SourceImage:
    """Reads a series as one stack, its slices sorted by position along their normal.

    The values are int16 where all are whole and fit, int32 where they are whole, else float32. Padding values are
    left as they are. One slice alone takes its depth from SpacingBetweenSlices or SliceThickness, else 1 mm.

    Raises:
        VolumeError: multi-frame, colour or inverted-grey files; slices of several sizes, orientations or pixel
            spacings; no position, orientation or pixel spacing; two slices at one place; a gap or uneven spacing;
            tilted gantry; a rescale slope of zero; pixels that are damaged, too few or of an unknown compression.
    """
    slices, affine = _order_slices(series)
    digest, size = hashlib.sha256(), 0
    try:
        for item in slices:
            content = item.file.read_bytes()
            digest.update(content)
            size += len(content)
            _check_pixel_bytes(item, content)
        array = _read_pixels(slices)
    except OSError as error:
        raise VolumeError(f"{error.filename}: cannot be read ({error.strerror}); check the file") from error
    except RuntimeError as error:
        raise VolumeError(
            f"{_undecodable(slices) or series.folder}: its pixels cannot be decoded ({explain_itk_error(error)}); "
            "copy the series again, or decompress it with another tool"
        ) from error
    return SourceImage(array, affine, size, digest.hexdigest())


def _tag(reader: sitk.ImageFileReader, tag: str) -> str:
    """A header value without its padding; empty where the header lacks it."""
    return str(reader.GetMetaData(tag)).strip(" \0") if reader.HasMetaDataKey(tag) else ""


def _numbers(text: str) -> tuple[float, ...]:
    """A backslash-separated decimal string as finite numbers; empty where it is not one."""
    try:
        numbers = tuple(float(part) for part in text.split("\\"))
    except ValueError:
        return ()
    return numbers if np.isfinite(numbers).all() else ()


def _read_slice(file: Path, reader: sitk.ImageFileReader) -> _Slice:
    def number(tag: str, default: float) -> float:
        text = _tag(reader, tag)
        return (_numbers(text) or (0.0,))[0] if text else default

    size = reader.GetSize()
    return _Slice(
        file=file,
        shape=(size[1], size[0]),
        frames=size[2] if len(size) > 2 else 1,
        samples=reader.GetNumberOfComponents(),
        photometric=_tag(reader, "0028|0004"),
        bits=(int(number("0028|0100", 16)), int(number("0028|0101", 16))),
        slope=number("0028|1053", 1.0),
        intercept=number("0028|1052", 0.0),
        position=_numbers(_tag(reader, "0020|0032")),
        directions=_numbers(_tag(reader, "0020|0037")),
        pixel_mm=_numbers(_tag(reader, "0028|0030")),
        thickness_mm=number("0018|0088", 0.0) or number("0018|0050", 0.0) or 1.0,
    )


# DICOM storage classes without pixel data (DICOM PS3.4, table B.5-1), by prefix of the class's identifier.
_PIXELLESS_CLASSES = {
    "1.2.840.10008.1.3.10": "DICOMDIR",
    "1.2.840.10008.5.1.4.1.1.481.3": "RTSTRUCT",
    "1.2.840.10008.5.1.4.1.1.481.": "radiotherapy object",
    "1.2.840.10008.5.1.4.1.1.88.": "structured report",
    "1.2.840.10008.5.1.4.1.1.11.": "presentation state",
    "1.2.840.10008.5.1.4.1.1.104.": "encapsulated document",
    "1.2.840.10008.5.1.4.1.1.66": "registration, fiducials or raw data",
    "1.2.840.10008.5.1.4.1.1.9.": "waveform",
}


def _without_pixels(file: Path, head: bytes, error: RuntimeError) -> tuple[Path, str, bool]:
    """Why a DICOM file gives no image: an object without pixels, or damage."""
    if file.name == "DICOMDIR":
        return file, f"{file}: a DICOMDIR, not an image", False
    # (0002,0002) MediaStorageSOPClassUID, always explicit little endian: tag, VR, 2-byte length, value
    at = head.find(b"\x02\x00\x02\x00UI")
    length = int.from_bytes(head[at + 6 : at + 8], "little")
    storage_class = head[at + 8 : at + 8 + length].decode("ascii", "replace").strip("\0 ") if at >= 0 else ""
    for prefix, name in _PIXELLESS_CLASSES.items():
        if storage_class.startswith(prefix):
            return file, f"{file}: a DICOM {name}, not an image", False
    return (
        file,
        f"{file}: damaged, truncated or not DICOM ({explain_itk_error(error)}); copy the file again or remove it",
        True,
    )


def _order_slices(series: DicomSeries) -> tuple[list[_Slice], np.ndarray[Any, Any]]:
    """The slices by position along their normal, and the affine (slice, row, column, 1) to RAS+ mm."""
    _check_formats(series)
    row, column, normal = _common_directions(series)
    slices = sorted(series.slices, key=lambda item: (float(np.dot(item.position, normal)), item.file))
    positions = np.array([item.position for item in slices], dtype=np.float64)
    if len(slices) > 1:
        _check_spacing(series, slices, positions @ normal)
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
        _check_straight(series, positions, step, normal)
    else:
        step = normal * slices[0].thickness_mm
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = column * slices[0].pixel_mm[0]
    affine[:3, 2] = row * slices[0].pixel_mm[1]
    affine[:3, 3] = positions[0]
    affine[:2] *= -1  # LPS+ to RAS+
    return slices, affine


def _check_formats(series: DicomSeries) -> None:
    for item in series.slices:
        if item.frames > 1:
            problem = f"holds {item.frames} frames (multi-frame or enhanced DICOM); convert it with dcm2niix to NIfTI"
        elif item.samples > 1 or item.photometric == "PALETTE COLOR":
            problem = "is a colour image, expected one grey value per pixel; leave this series out"
        elif item.photometric == "MONOCHROME1":
            problem = "has inverted grey values (MONOCHROME1), expected MONOCHROME2; convert the series"
        elif item.slope == 0:
            problem = "has a rescale slope of 0 or none that is a number; repair the header"
        elif len(item.position) != 3 or len(item.directions) != 6:
            problem = "lacks its position or orientation in space; leave this series out"
        elif len(item.pixel_mm) != 2 or min(item.pixel_mm) <= 0:
            problem = "lacks a positive PixelSpacing; repair the header or leave this series out"
        else:
            continue
        raise VolumeError(f"{item.file}: {problem}")
    _check_same(series, "size", [item.shape for item in series.slices])
    voxels = len(series.slices) * series.slices[0].shape[0] * series.slices[0].shape[1]
    if voxels > MAX_VOXELS:
        raise VolumeError(
            f"{series.folder}: its headers promise {voxels} voxels, more than {MAX_VOXELS}; they are damaged, or the "
            "image must be cropped first"
        )
    _check_same(series, "PixelSpacing", [item.pixel_mm for item in series.slices])


def _check_same(series: DicomSeries, what: str, values: Sequence[tuple[float, ...]]) -> None:
    """Refuses slices that differ in ``values`` by more than a direction cosine's or a spacing's rounding."""
    table = np.asarray(values, dtype=np.float64)
    other = np.abs(table - table[0]).max(axis=1) >= _SAME_VALUE
    if other.any():
        first, second = np.round(table[0], 3).tolist(), np.round(table[int(np.argmax(other))], 3).tolist()
        raise VolumeError(
            f"{series.folder}: a series mixes slices of more than one {what} ({int((~other).sum())} have {first}, "
            f"{int(other.sum())} another, such as {second}); move the slices that do not belong to it (often a "
            "localizer) elsewhere"
        )


def _common_directions(series: DicomSeries) -> tuple[np.ndarray[Any, Any], ...]:
    """Unit vectors along a row, down a column and along the normal (LPS+), equal for all slices."""
    _check_same(series, "ImageOrientationPatient", [item.directions for item in series.slices])
    directions = np.array(series.slices[0].directions)
    row, column = directions[:3], directions[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if not (np.allclose(lengths, 1, atol=1e-2) and abs(float(row @ column)) < 1e-2):
        raise VolumeError(
            f"{series.folder}: ImageOrientationPatient {directions.tolist()} is not two perpendicular unit vectors; "
            "repair the headers"
        )
    row = row / lengths[0]
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    return row, np.cross(normal, row), normal


def _check_spacing(series: DicomSeries, slices: Sequence[_Slice], places: np.ndarray[Any, Any]) -> None:
    """Refuses slices at one place, gaps and uneven steps; ``places`` are sorted mm along the normal."""
    steps = np.diff(places)
    apart = steps > _SAME_POSITION_MM
    if not apart.all():
        first = int(np.argmin(apart))
        raise VolumeError(
            f"{series.folder}: {int((~apart).sum())} slices lie where another one does, for example "
            f"{slices[first].file.name} and {slices[first + 1].file.name} at {places[first]:.2f} mm; "
            "remove the copies, or give each phase or echo a folder of its own"
        )
    usual = float(np.median(steps))
    widest = int(np.argmax(steps))
    if steps[widest] > 1.5 * usual:
        raise VolumeError(
            f"{series.folder}: about {round(steps[widest] / usual) - 1} slices are missing between "
            f"{slices[widest].file.name} at {places[widest]:.2f} mm and {slices[widest + 1].file.name} at "
            f"{places[widest + 1]:.2f} mm (usual spacing {usual:.2f} mm); fetch the whole series again"
        )
    if np.abs(steps - usual).max() > _UNEVEN * usual:
        raise VolumeError(
            f"{series.folder}: slices are unevenly spaced ({steps.min():.2f} to {steps.max():.2f} mm), expected one "
            "spacing; slices may be missing: fetch the series again or resample it"
        )


def _check_straight(
    series: DicomSeries, positions: np.ndarray[Any, Any], step: np.ndarray[Any, Any], normal: np.ndarray[Any, Any]
) -> None:
    """Refuses stacks whose slices do not lie square above each other."""
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    if tilt > _TILT_DEGREES:
        raise VolumeError(
            f"{series.folder}: slices are shifted along their plane, the stack leans by {tilt:.1f} degrees (tilted "
            "gantry), expected 0; resample it to a square grid (dcm2niix does)"
        )
    line = positions[0] + np.arange(len(positions))[:, None] * step
    sideways = positions - line - ((positions - line) @ normal)[:, None] * normal
    worst = float(np.linalg.norm(sideways, axis=1).max())
    if worst > 0.5 * series.slices[0].pixel_mm[0]:
        raise VolumeError(
            f"{series.folder}: slices are shifted sideways by up to {worst:.1f} mm against each other, expected one "
            "straight stack; resample it to one grid"
        )


def _check_pixel_bytes(item: _Slice, content: bytes) -> None:
    """GDCM fills pixels that an uncompressed file lacks with zeros: refuses such a file.

    Raises:
        VolumeError: no pixel element (7FE0,0010) of the file is as long as the header promises.
    """
    if not any(syntax in content[:1024] for syntax in _NATIVE_SYNTAXES):
        return
    expected = item.shape[0] * item.shape[1] * item.bits[0] // 8
    at = content.rfind(b"\xe0\x7f\x10\x00")
    while at >= 0:
        explicit = content[at + 4 : at + 6] in (b"OW", b"OB")
        length = int.from_bytes(content[at + 8 : at + 12] if explicit else content[at + 4 : at + 8], "little")
        if expected <= length <= len(content) - at:
            return
        at = content.rfind(b"\xe0\x7f\x10\x00", 0, at)
    raise VolumeError(
        f"{item.file}: holds fewer pixels than the {item.shape[1]}x{item.shape[0]} its header promises; "
        "fetch the file again"
    )


def _read_pixels(slices: Sequence[_Slice]) -> np.ndarray[Any, Any]:
    """Rescaled values ``[slices height width]`` in the order given."""
    whole = all(
        item.slope.is_integer() and item.intercept.is_integer() and item.bits[1] <= 16 and _largest(item) < 2**31
        for item in slices
    )
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    # The series reader would otherwise take the pixel type of the first slice for all.
    reader.SetOutputPixelType(sitk.sitkInt32 if whole else sitk.sitkFloat64)
    array = np.empty((len(slices), *slices[0].shape), dtype=np.int16 if whole else np.float32)
    with quiet_itk():
        for start in range(0, len(slices), _CHUNK):
            chunk = slices[start : start + _CHUNK]
            reader.SetFileNames([str(item.file) for item in chunk])
            image = reader.Execute()
            values = sitk.GetArrayViewFromImage(image)
            if not whole:
                values = _rescale_in_float32(values, chunk)
            elif array.dtype == np.int16 and (values.min() < -(2**15) or values.max() >= 2**15):
                array = array.astype(np.int32)
            array[start : start + len(chunk)] = values
    return array


def _rescale_in_float32(values: np.ndarray[Any, Any], slices: Sequence[_Slice]) -> np.ndarray[Any, Any]:
    """Undoes GDCM's rescale and applies slope and intercept as the float32 numbers that NIfTI would keep of them.

    DICOM and NIfTI of one image then agree to the last bit.
    """
    slope = np.array([item.slope for item in slices])[:, None, None]
    intercept = np.array([item.intercept for item in slices])[:, None, None]
    stored = np.rint((values - intercept) / slope)
    rescaled: np.ndarray[Any, Any] = stored * slope.astype(np.float32).astype(np.float64) + intercept.astype(np.float32)
    return rescaled


def _undecodable(slices: Sequence[_Slice]) -> Path | None:
    """The first file that GDCM cannot decode by itself."""
    with quiet_itk():
        for item in slices:
            try:
                sitk.ReadImage(str(item.file), imageIO="GDCMImageIO")
            except RuntimeError:
                return item.file
    return None


def _largest(item: _Slice) -> float:
    """No rescaled value of the slice lies further from zero."""
    return abs(item.slope) * 2.0 ** item.bits[1] + abs(item.intercept)

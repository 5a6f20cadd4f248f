"""Owns the pixels of a DICOM series, in file order.

Knows nothing of orientation conventions other than DICOM's own; which series there are is left to
`embedkit.dicomlisting`, whether a series is a single even stack to `embedkit.dicomstacks`. Values are
``stored * RescaleSlope + RescaleIntercept`` per slice, in the unit that the header states: HU for CT, SUV for PET with
Units GML, activity for PET with Units BQML.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from embedkit.dicomheaders import DicomSeries, DicomSlice
from embedkit.dicomstacks import order_slices
from embedkit.errors import VolumeError
from embedkit.itk import explain_itk_error, quiet_itk
from embedkit.sourceimage import Allocate, SourceImage, Stop, require_going
from embedkit.spill import convert, release_pages

__all__ = ["check_dicom_series", "read_dicom_series"]

Array = np.ndarray[Any, Any]

_SMALL_SLICE = 2**26  # bytes that a slice may take however few its file holds: an empty one compresses to nothing
_COMPRESSION = 1000  # a larger slice is not compressed further than this
_CHUNK = 16  # slices per call into GDCM, so that never more than these are held twice
# Uncompressed little-endian transfer syntaxes (DICOM PS3.5, section 10.1 and A.2), by which a short pixel element shows
_NATIVE_SYNTAXES = (b"1.2.840.10008.1.2\0", b"1.2.840.10008.1.2.1\0")


def check_dicom_series(series: DicomSeries) -> None:
    """Checks by headers alone that `read_dicom_series` would accept the series.

    Raises:
        VolumeError: as for `read_dicom_series`, except what only the pixels show.
    """
    order_slices(series)


def read_dicom_series(series: DicomSeries, allocate: Allocate = np.zeros, *, stop: Stop = None) -> SourceImage:
    """Reads a series as one stack, its slices sorted by position along their normal.

    The values are int16 where all are whole and fit, int32 where they are whole, else float32. Padding values are
    left as they are. One slice alone takes its depth from SpacingBetweenSlices or SliceThickness, else 1 mm.

    Args:
        series: Of `embedkit.dicomlisting.find_dicom_series`.
        allocate: Makes the array that the values are put into, a few slices at a time.
        stop: Once set, reading ends with an error.

    Raises:
        VolumeError: one of its files is damaged; its headers count more slices than there are, which a file beside it
            that cannot be read may hold; multi-frame, colour or inverted-grey files; slices of several sizes,
            orientations or pixel spacings; no position, orientation or pixel spacing; two slices at one place; a gap
            or uneven spacing; tilted gantry; a rescale slope of zero; pixels that are damaged, too few or of an
            unknown compression; ``stop`` is set.
        CacheError: there is no room for the array.
    """
    slices, affine = order_slices(series)
    digest, size = hashlib.sha256(), 0
    try:
        for item in slices:
            require_going(series.folder, stop)
            content = item.file.read_bytes()
            digest.update(content)
            size += len(content)
            _check_pixel_bytes(item, content)
        array = _read_pixels(slices, allocate, stop)
    except OSError as error:
        raise VolumeError(
            f"cannot be read ({error.strerror}); check the file", file=Path(error.filename or series.folder)
        ) from error
    except RuntimeError as error:
        raise VolumeError(
            "its pixels cannot be decoded; copy the series again, or decompress it with another tool",
            file=_undecodable(slices) or series.folder,
            found=f"ITK: {explain_itk_error(error)}",
        ) from error
    return SourceImage(array, affine, size, digest.hexdigest())


def _check_pixel_bytes(item: DicomSlice, content: bytes) -> None:
    """GDCM fills pixels that an uncompressed file lacks with zeros, and reserves room for all that a header promises.

    Raises:
        VolumeError: no pixel element (7FE0,0010) of the file is as long as the header promises, or the promise is
            beyond what compressed pixels could hold.
    """
    expected = item.shape[0] * item.shape[1] * item.bits[0] // 8
    if not any(syntax in content[:1024] for syntax in _NATIVE_SYNTAXES):
        if expected > max(_SMALL_SLICE, _COMPRESSION * len(content)):
            raise VolumeError(
                f"its header promises {item.shape[1]}x{item.shape[0]} pixels ({expected} bytes), more than"
                f" {len(content)} compressed bytes can hold; it is damaged: fetch it again",
                file=item.file,
            )
        return
    at = content.rfind(b"\xe0\x7f\x10\x00")
    while at >= 0:
        explicit = content[at + 4 : at + 6] in (b"OW", b"OB")
        length = int.from_bytes(content[at + 8 : at + 12] if explicit else content[at + 4 : at + 8], "little")
        if expected <= length <= len(content) - at:
            return
        at = content.rfind(b"\xe0\x7f\x10\x00", 0, at)
    raise VolumeError(
        f"holds fewer pixels than the {item.shape[1]}x{item.shape[0]} its header promises; fetch the file again",
        file=item.file,
    )


def _read_pixels(slices: Sequence[DicomSlice], allocate: Allocate, stop: Stop) -> Array:
    """Rescaled values ``[slices height width]`` in the order given."""
    whole = all(
        item.slope.is_integer() and item.intercept.is_integer() and item.bits[1] <= 16 and _largest(item) < 2**31
        for item in slices
    )
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    # The series reader would otherwise take the pixel type of the first slice for all.
    reader.SetOutputPixelType(sitk.sitkInt32 if whole else sitk.sitkFloat64)
    shape = (len(slices), *slices[0].shape)
    array = allocate(shape, np.dtype(np.int16 if whole else np.float32))
    with quiet_itk():
        for start in range(0, len(slices), _CHUNK):
            chunk = slices[start : start + _CHUNK]
            require_going(chunk[0].file.parent, stop)
            reader.SetFileNames([str(item.file) for item in chunk])
            image = reader.Execute()
            values = sitk.GetArrayViewFromImage(image)
            if not whole:
                values = _rescale_in_float32(values, chunk)
            elif array.dtype == np.int16 and (values.min() < -(2**15) or values.max() >= 2**15):
                array = convert(array, allocate(shape, np.dtype(np.int32)))
            array[start : start + len(chunk)] = values
            release_pages(array)
    return array


def _rescale_in_float32(values: Array, slices: Sequence[DicomSlice]) -> Array:
    """Undoes GDCM's rescale and applies slope and intercept as the float32 numbers that NIfTI would keep of them.

    DICOM and NIfTI of one image then agree to the last bit.
    """
    slope = np.array([item.slope for item in slices])[:, None, None]
    intercept = np.array([item.intercept for item in slices])[:, None, None]
    stored = np.rint((values - intercept) / slope)
    rescaled: Array = stored * slope.astype(np.float32).astype(np.float64) + intercept.astype(np.float32)
    return rescaled


def _undecodable(slices: Sequence[DicomSlice]) -> Path | None:
    """The first file that GDCM cannot decode by itself."""
    with quiet_itk():
        for item in slices:
            try:
                sitk.ReadImage(str(item.file), imageIO="GDCMImageIO")
            except RuntimeError:
                return item.file
    return None


def _largest(item: DicomSlice) -> float:
    """No rescaled value of the slice lies further from zero."""
    return abs(item.slope) * 2.0 ** item.bits[1] + abs(item.intercept)

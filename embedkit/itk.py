"""Owns how embedkit talks to SimpleITK: its warnings, its errors, and images with an affine to and from ITK's own.

Knows nothing of file formats, DICOM series and the canonical index order.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import SimpleITK as sitk

__all__ = ["affine_of_itk", "explain_itk_error", "quiet_itk", "to_itk"]

Array = np.ndarray[Any, Any]


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
    return re.sub(r"\(0x[0-9a-f]+\)", "", text.rpartition("ERROR: ")[2])[:200]


def affine_of_itk(reader: sitk.ImageFileReader) -> Array:
    """Indices of the array that ITK reads, slowest axis first, to RAS+ mm; axes beyond the third are left out."""
    axes = reader.GetDimension()
    direction = np.array(reader.GetDirection()).reshape(axes, axes)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = (direction * np.array(reader.GetSpacing())[:3])[:, ::-1]
    affine[:3, 3] = np.array(reader.GetOrigin())[:3]
    affine[:2] *= -1  # LPS+ to RAS+
    return affine


def to_itk(array: Array, affine: Array) -> sitk.Image:
    """An ITK image of ``[slices height width]`` and its affine (indices to RAS+ mm)."""
    image = sitk.GetImageFromArray(array)
    lps = np.array(affine, dtype=np.float64)
    lps[:2] *= -1
    directions = lps[:3, 2::-1]
    lengths = np.linalg.norm(directions, axis=0)
    image.SetSpacing(lengths.tolist())
    image.SetDirection((directions / lengths).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image

"""Owns which format an image file is in, by its name and first bytes, and reading its header whatever the format.

Knows nothing of voxel values and of the canonical index order; of DICOM only how such a file begins or is named.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path

from embedkit.errors import VolumeError
from embedkit.nifti import inflate_head, nifti_byte_order, parse_nifti
from embedkit.npy import parse_npy, parse_npz
from embedkit.nrrd import parse_with_itk
from embedkit.orientation import check_affine
from embedkit.sourceimage import DAMAGE, SourceHeader, check_promise

__all__ = ["format_by_name", "image_format", "read_header"]

_SUFFIXES = {
    ".nii.gz": "nifti",
    ".nii": "nifti",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".mha": "metaimage",
    ".mhd": "metaimage",
    ".npy": "npy",
    ".npz": "npz",
    ".dcm": "dicom",
    ".dicom": "dicom",
    ".ima": "dicom",
}


def image_format(path: Path | str) -> str:
    """The format of an image file by its name and its first bytes: nifti, nrrd, metaimage, npy, npz or dicom.

    A folder counts as dicom.

    Raises:
        VolumeError: no such file, an empty or unreadable one, a format that embedkit does not read, or content that
            is not what the name says.
    """
    path = Path(path)
    if path.is_dir():
        return "dicom"
    head = _read_head(path)
    named, suffix = format_by_name(path)
    held, proper = _format_by_content(head)
    if named and held and (named != held or (named == "nifti" and (suffix == ".nii.gz") != (proper == ".nii.gz"))):
        raise VolumeError(f"is named {suffix} but holds {held} data; rename it to {proper}", file=path)
    if not named and held and held != "dicom":
        raise VolumeError(f"holds {held} data under an unknown ending; rename it to {proper}", file=path)
    kind = named or held
    if not kind:
        raise VolumeError(
            "not a format that embedkit reads; expected .nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd, .npy, .npz or DICOM",
            file=path,
        )
    if not held and kind != "dicom":
        raise VolumeError(
            f"is named {suffix} but does not begin like one; it is damaged or of another format", file=path
        )
    return kind


def format_by_name(path: Path) -> tuple[str, str]:
    """(format, ending) that the file's name shows; empty where it shows none."""
    name = path.name.lower()
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")
    return _SUFFIXES.get(suffix, ""), suffix


def read_header(path: Path, kind: str) -> SourceHeader:
    """The header of any format but DICOM; the size that it promises and its geometry are checked."""
    try:
        size = path.stat().st_size
        packed = False
        if kind == "nifti":
            head = _read_head(path)
            packed = head.startswith(b"\x1f\x8b")
            header = parse_nifti(path, inflate_head(head) if packed else head)
            header = header._replace(encoding="gzip" if packed else "raw")
            available = size if packed else size - header.offset
        elif kind == "npy":
            header, available = parse_npy(path)
        elif kind == "npz":
            header, available = parse_npz(path)
        else:
            header, available, packed = parse_with_itk(path, kind, _read_head(path))
    except DAMAGE as error:
        raise VolumeError("damaged or unreadable; copy the file again", file=path, found=str(error)[:120]) from error
    check_promise(path, header, available, packed=packed)
    check_affine(path, header.affine)
    return header


def _format_by_content(head: bytes) -> tuple[str, str]:
    """(format, proper ending) that the first bytes show; empty where they show none."""
    if head.startswith(b"\x1f\x8b"):
        return "nifti", ".nii.gz"
    if nifti_byte_order(head):
        return "nifti", ".nii"
    if head.startswith(b"NRRD000"):
        return "nrrd", ".nrrd"
    if head.startswith(b"\x93NUMPY"):
        return "npy", ".npy"
    if head.startswith(b"PK\x03\x04"):
        return "npz", ".npz"
    if head[128:132] == b"DICM":
        return "dicom", ".dcm"
    if re.search(rb"^\s*NDims\s*=", head, re.MULTILINE):
        return "metaimage", ".mha"
    return "", ""


def _read_head(path: Path, size: int = 2**16) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe waits for its other end
            raise VolumeError("is a pipe or device, expected a file; give the image itself", file=path)
        with path.open("rb") as stream:
            head = stream.read(size)
    except FileNotFoundError as error:
        raise VolumeError(
            "no such file or folder; a path in a manifest is relative to the manifest's folder", file=path
        ) from error
    except OSError as error:
        raise VolumeError(f"cannot be read ({error.strerror}); check its rights", file=path) from error
    if not head:
        raise VolumeError("is empty (0 bytes); copy the file again", file=path)
    return head

"""Owns which DICOM series lie in a folder, and which of its DICOM files give no image: by headers alone.

A damaged file is of the series that its header still names. Where it names none, it could be of any series in the
folder: it is a stray.
"""

from __future__ import annotations

import errno
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import SimpleITK as sitk

from embedkit.dicomelements import find_damage
from embedkit.dicomheaders import (
    DicomSeries,
    DicomSlice,
    UnreadFile,
    explain_no_pixels,
    looks_like_dicom,
    read_slice,
    read_tag,
)
from embedkit.errors import VolumeError
from embedkit.formats import format_by_name
from embedkit.itk import quiet_itk
from embedkit.sourceimage import Stop, require_going

__all__ = ["find_dicom_series", "leads_nowhere", "list_dicom_series", "list_files"]

_NUMBERS = re.compile(r"[0-9A-Fa-f]{8,}(?:-[0-9A-Fa-f]{4,})*|\d+")
"""What names of the files of one series differ in: numbers, hashes and UUIDs."""
_PIECE_BYTES = 2**20


def list_dicom_series(folder: Path | str) -> list[DicomSeries]:
    """The image series whose files lie directly in ``folder``, in the order of their first sound file's name.

    DICOM objects without pixels (RTSTRUCT, SR, DICOMDIR) and files of other formats are passed over.

    Raises:
        VolumeError: a DICOM image cannot be opened, or the folder cannot be listed.
    """
    series, others = find_dicom_series(folder)
    for unread in [*others, *(each for one in series for each in one.damaged)]:
        if unread.is_damage:
            raise unread.error()
    return series


def list_files(folder: Path) -> list[Path]:
    """The files in ``folder`` that are not hidden, and the links in it that lead nowhere, for each lacks a file.

    Raises:
        VolumeError: the folder cannot be listed.
    """
    try:
        shown = [each for each in folder.iterdir() if not each.name.startswith(".")]
        return [each for each in shown if each.is_file() or leads_nowhere(each)]
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); check the folder and its rights"
        raise VolumeError(problem, file=folder) from error


def find_dicom_series(
    folder: Path | str, *, files: Sequence[Path] | None = None, stop: Stop = None
) -> tuple[list[DicomSeries], list[UnreadFile]]:
    """Like `list_dicom_series`, but says which DICOM files are damaged or belong to no series instead of raising.

    Args:
        folder: Where the files lie directly.
        files: Only these of its files; None means all that are not hidden.
        stop: Once set, the search ends with an error.

    Returns:
        The series, each with those of its files that are damaged; and all other DICOM files without an image. What
        shows no DICOM passes for a damaged file where its name differs from that of a DICOM image in numbers alone
        (hexadecimal ones from 8 digits on) or, beside DICOM images, where it holds nothing, or zeros only.

    Raises:
        VolumeError: the folder cannot be listed, or ``stop`` is set.
    """
    folder = Path(folder)
    if files is None:
        files = list_files(folder)
    search = _Search()
    with quiet_itk():
        for file in sorted(files):
            require_going(folder, stop)
            search.take(file)
    return search.finish(folder)


@dataclass
class _Search:
    """What was found in the files of one folder so far."""

    slices: dict[str, list[DicomSlice]] = field(default_factory=dict)
    modalities: dict[str, str] = field(default_factory=dict)
    unread: list[UnreadFile] = field(default_factory=list)
    passed_over: list[UnreadFile] = field(default_factory=list)
    blank: set[Path] = field(default_factory=set)
    reader: sitk.ImageFileReader = field(default_factory=sitk.ImageFileReader)

    def __post_init__(self) -> None:
        self.reader.SetImageIO("GDCMImageIO")

    def take(self, file: Path) -> None:
        """Looks at one file; one that is gone by now is passed over."""
        try:
            self._read(file)
        except OSError as error:
            if leads_nowhere(file):
                self._pass_over(file, "is a link that leads nowhere; fetch the file that it stands for or remove it")
            elif not isinstance(error, FileNotFoundError):
                self._pass_over(file, f"cannot be read ({error.strerror}); check its rights")

    def _read(self, file: Path) -> None:
        with file.open("rb") as stream:
            head = stream.read(1024)
            blank = not head.strip(b"\0") and _is_blank(stream)
        if blank or not looks_like_dicom(file, head):
            if blank:
                self.blank.add(file)
                what = "holds zeros only" if head else "is empty (0 bytes)"
            else:
                what = "holds no DICOM though it is named like the images beside it"
            self._pass_over(file, f"{what}; copy the file again or remove it")
            return
        if damage := find_damage(file):
            self.unread.append(explain_no_pixels(file, head, damage))
            return
        try:
            self.reader.SetFileName(str(file))
            self.reader.ReadImageInformation()
        except RuntimeError:
            self.unread.append(explain_no_pixels(file, head))
            return
        uid = read_tag(self.reader, "0020|000e")
        self.slices.setdefault(uid, []).append(read_slice(file, self.reader))
        self.modalities.setdefault(uid, read_tag(self.reader, "0008|0060"))

    def _pass_over(self, file: Path, problem: str) -> None:
        """Keeps a file that shows no DICOM, until it is known how the images beside it are named."""
        if format_by_name(file)[0] in ("", "dicom"):
            self.passed_over.append(UnreadFile(file, problem, is_damage=True))

    def finish(self, folder: Path) -> tuple[list[DicomSeries], list[UnreadFile]]:
        """The series, and all unread files that are of none of them, by name."""
        unread = sorted([*self.unread, *self._list_lost()])
        known = {uid for uid in self.slices if uid}
        others = [each for each in unread if not each.is_damage or each.uid not in known]
        strays = tuple(_without_own_series([each for each in others if each.is_damage]))
        series = [
            _join(
                folder,
                uid,
                slices,
                self.modalities[uid],
                [each for each in unread if each.is_damage and each.uid == uid and uid in known],
            )
            for uid, slices in self.slices.items()
        ]
        return [replace(one, strays=strays) for one in series], others

    def _list_lost(self) -> list[UnreadFile]:
        """Those passed over that were DICOM images, by their names, or may have been, having no content any more."""
        patterns = {_without_numbers(item.file) for slices in self.slices.values() for item in slices}
        blank = self.blank if self.slices else set()
        return [
            each
            for each in self.passed_over
            if each.file in blank or looks_like_dicom(each.file, b"") or _without_numbers(each.file) in patterns
        ]


def _join(
    folder: Path, uid: str, slices: Sequence[DicomSlice], modality: str, damaged: Sequence[UnreadFile]
) -> DicomSeries:
    files = sorted([*(item.file for item in slices), *(each.file for each in damaged)])
    return DicomSeries(folder, tuple(files), modality, uid, tuple(slices), tuple(damaged))


def _without_own_series(damaged: Sequence[UnreadFile]) -> list[UnreadFile]:
    """Leaves out damaged files that tell one series together: a UID that one file alone tells may be damaged itself."""
    told = Counter(each.uid for each in damaged if each.uid)
    return [each for each in damaged if told[each.uid] < 2]


def leads_nowhere(file: Path) -> bool:
    """Whether a file is a link without a target, or one that leads in circles."""
    if not file.is_symlink():
        return False
    try:
        file.stat()
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
    return False


def _is_blank(stream: BinaryIO) -> bool:
    """Whether what is left of a file is zeros, or nothing."""
    return all(not piece.strip(b"\0") for piece in iter(lambda: stream.read(_PIECE_BYTES), b""))


def _without_numbers(file: Path) -> str:
    return _NUMBERS.sub("#", file.name)

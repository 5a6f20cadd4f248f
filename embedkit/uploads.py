"""Owns files that a stranger sends: kept within a size in one folder, under names of its own; computes nothing.

What is sent is called by number, never by the name it came with, so that no name can lead anywhere; of that name only
an ending among the known ones is used. Headers that name a second file are refused, for that could be any file here.
"""

from __future__ import annotations

import shutil
import stat
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from embedkit.dicomlisting import list_dicom_series
from embedkit.errors import OptionError, RequestError, VolumeError
from embedkit.files import explain_os_error
from embedkit.formats import format_by_name, image_format
from embedkit.nrrd import ITK_READERS, payload_file

__all__ = ["Upload"]

_CHUNK_BYTES = 1 << 20
_MOST_FILES = 20_000
_DETACHED = (".nhdr", ".mhd")
_UNZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


class Upload:
    """The files of one query: received one by one into a folder, then resolved to the one image that they hold.

    Attributes:
        folder: Where they lie; its owner removes it.
        limit_bytes: Most bytes that the files may have together, packed and unpacked.
        received_bytes: So far.
    """

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.received_bytes = 0
        self._unpacked_bytes = 0
        self._names: dict[Path, str] = {}
        self._series = folder / "files"
        self._series.mkdir(parents=True)

    def require_room(self, size: int) -> None:
        """Checks a size that is announced, so that nobody sends in vain.

        Raises:
            RequestError: beyond the limit.
        """
        if self.received_bytes + size > self.limit_bytes:
            raise self._too_large("the upload")

    def begin_file(self, name: str) -> Path:
        """A place for the next file, which came under ``name``.

        Raises:
            RequestError: too many files.
            OptionError: a kind of file that is not taken.
        """
        if len(self._names) >= _MOST_FILES:
            raise RequestError(f"more than {_MOST_FILES} files; send one DICOM series or one image", reason="too_large")
        shown = PurePosixPath(name.replace("\\", "/")).name[:200] or "file"
        ending = ".zip" if shown.lower().endswith(".zip") else format_by_name(Path(shown))[1]
        if ending in _DETACHED:
            raise OptionError(
                f"{shown} keeps its voxels in a second file, which is not taken; save it as .nii.gz, .nrrd or .mha"
            )
        path = self._series / f"part-{len(self._names):05d}{ending}"
        self._names[path] = shown
        return path

    def append(self, path: Path, chunk: bytes) -> None:
        """Adds to a file that `begin_file` gave.

        Raises:
            RequestError: beyond the limit.
            OptionError: the disk refuses.
        """
        self.require_room(len(chunk))
        self.received_bytes += len(chunk)
        try:
            with path.open("ab") as file:
                file.write(chunk)
        except OSError as error:
            raise OptionError(f"cannot keep the upload: {explain_os_error(error, self.folder)}") from error

    def resolve(self) -> Path:
        """The image that was sent: a file, or the folder of one DICOM series; an archive is unpacked first.

        Raises:
            VolumeError: no image, several, or one that is refused; files are called as their sender called them.
            RequestError: an archive that unpacks beyond the limit.
        """
        try:
            for path in [path for path in self._names if path.suffix == ".zip"]:
                self._unpack(path)
            return self._choose()
        except VolumeError as error:
            raise VolumeError(self.reword(error.reason)) from error

    def reword(self, message: str) -> str:
        """``message`` with files called as they were sent, and without this folder."""
        for path, name in self._names.items():
            message = message.replace(str(path), name).replace(path.name, name)
        return message.replace(str(self._series), "the upload").replace(str(self.folder), "the upload")

    def _choose(self) -> Path:
        paths = [path for path in self._names if path.exists()]
        if not paths:
            raise VolumeError("nothing was sent; choose an image file, a .zip, or the files of one DICOM series")
        kinds = {path: _kind(path) for path in paths}
        images = [path for path, kind in kinds.items() if kind not in ("", "dicom")]
        dicoms = [path for path, kind in kinds.items() if kind == "dicom"]
        if len(images) > 1 or (images and dicoms):
            named = ", ".join(self._names[path] for path in (*images, *dicoms)[:3])
            raise VolumeError(f"{len(images) + len(dicoms)} images were sent ({named}); send one image or one series")
        if images:
            _refuse_second_file(images[0], kinds[images[0]])
            return images[0]
        if not dicoms:
            image_format(paths[0])  # says what is wrong with it
            raise VolumeError(f"{paths[0]}: not a format that embedkit reads; send NIfTI, NRRD, MHA, .npy or DICOM")
        series = list_dicom_series(self._series)
        if len(series) != 1:
            found = ", ".join(f"{one.modality} with {len(one.files)} files" for one in series[:5]) or "none with pixels"
            raise VolumeError(f"the files hold {len(series)} DICOM series ({found}), expected one; send one series")
        return self._series

    def _unpack(self, archive: Path) -> None:
        shown = self._names.pop(archive)
        try:
            with zipfile.ZipFile(archive) as opened:
                members = [member for member in opened.infolist() if not _is_chaff(member)]
                for member in members:
                    self._require_tame(member, shown)
                for member in members:
                    self._extract_member(opened, member, shown)
        except _UNZIP_ERRORS as error:
            raise VolumeError(f"{shown}: cannot be unpacked ({error}); pack it again, without a password") from error
        archive.unlink()

    def _require_tame(self, member: zipfile.ZipInfo, shown: str) -> None:
        parts = PurePosixPath(member.filename.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in "".join(parts.parts[:1]):
            raise VolumeError(
                f"{shown}: holds a name that leads out of its folder ({member.filename!r}); it is refused"
            )
        if stat.S_ISLNK(member.external_attr >> 16):
            raise VolumeError(f"{shown}: holds a link ({member.filename!r}); it is refused")

    def _extract_member(self, opened: zipfile.ZipFile, member: zipfile.ZipInfo, shown: str) -> None:
        if member.filename.lower().endswith(".zip"):
            raise VolumeError(f"{shown}: holds another archive ({member.filename!r}); unpack it and send the image")
        path = self.begin_file(member.filename)
        with opened.open(member) as source, path.open("wb") as target:
            while chunk := source.read(_CHUNK_BYTES):  # counted as they come: what an archive says of itself may lie
                self._unpacked_bytes += len(chunk)
                if self._unpacked_bytes > self.limit_bytes:
                    raise self._too_large(f"what {shown} unpacks to")
                target.write(chunk)

    def _too_large(self, what: str) -> RequestError:
        limit = f"{self.limit_bytes / 1e6:.0f} MB" if self.limit_bytes >= 10**6 else f"{self.limit_bytes} bytes"
        message = f"{what} is larger than {limit}; start embedkit serve with a larger --upload-limit"
        return RequestError(message, reason="too_large")

    def remove(self) -> None:
        """Removes all that was sent."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _is_chaff(member: zipfile.ZipInfo) -> bool:
    parts: Sequence[str] = PurePosixPath(member.filename.replace("\\", "/")).parts
    return member.is_dir() or "__MACOSX" in parts or bool(parts and parts[-1].startswith("."))


def _kind(path: Path) -> str:
    """The format of a file; empty where it is no image by name nor by content."""
    try:
        return image_format(path)
    except VolumeError:
        return format_by_name(path)[0]


def _refuse_second_file(path: Path, kind: str) -> None:
    if kind in ITK_READERS and payload_file(path, kind) is not None:
        raise VolumeError(f"{path}: keeps its voxels in a second file, which is not taken; save it as one file")

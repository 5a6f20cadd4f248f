"""Owns which DICOM series an image's path stands for: a folder is looked through once, for all cases that lie in it.

Knows nothing of cases and of what a header says. What was found of a series holds while no file came to the folder or
left it, and the files of that series have the size and time of change that they had then; otherwise the folder is
looked through again.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from embedkit.dicom import DicomSeries, find_dicom_series
from embedkit.errors import VolumeError
from embedkit.files import changed_ns
from embedkit.sourceimage import Stop

__all__ = ["SeriesFolders"]

_MOST_FILES = 1 << 16
"""Files of the folders that are remembered; the latest one is, however many it has."""


@dataclass(frozen=True)
class _Listing:
    """The series of a folder by the name of each file, why other files are damaged, and the state of all of them.

    ``listed_ns`` is when a file last came or left, before the folder was listed.
    """

    listed_ns: int
    series: dict[str, DicomSeries]
    damage: tuple[str, ...]
    states: dict[str, tuple[int, int] | None]

    def holds(self, file: Path) -> bool:
        """Whether what was found of the series of a file in the folder still holds."""
        series = self.series.get(file.name)
        if series is None or file.parent.stat().st_mtime_ns != self.listed_ns:
            return False
        return all(_state(each) == self.states[each.name] for each in series.files)


class SeriesFolders:
    """Remembers the series of the folders that were looked through last; safe to share between threads."""

    def __init__(self) -> None:
        """Begins with none."""
        self._listings: dict[Path, _Listing] = {}
        self._lock = threading.Lock()

    def find(self, path: Path, *, stop: Stop = None) -> DicomSeries:
        """The series of a folder that holds just one, or the series that a file belongs to.

        Args:
            path: Folder or file.
            stop: Once set, the search ends with an error.

        Raises:
            VolumeError: the folder cannot be read; a DICOM image in it is damaged, which could be of this series; it
                holds no series or, where it is a folder that is asked for, several; the file is no DICOM image.
        """
        if path.is_dir():
            return _only_series(path, _look_through(path, stop))
        with self._lock:
            listing = self._listings.pop(path.parent, None)
            if listing is None or not listing.holds(path):
                listing = _look_through(path.parent, stop)
            self._listings[path.parent] = listing
            while len(self._listings) > 1 and sum(len(each.states) for each in self._listings.values()) > _MOST_FILES:
                del self._listings[next(iter(self._listings))]
        _require_sound(listing)
        if path.name not in listing.series:
            raise VolumeError(f"{path}: no DICOM image; give an image file of the series, or its folder")
        return listing.series[path.name]


def _look_through(folder: Path, stop: Stop) -> _Listing:
    try:
        listed_ns = folder.stat().st_mtime_ns
        files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    except OSError as error:
        raise VolumeError(f"{folder}: cannot be read ({error.strerror}); check the folder and its rights") from error
    states = {file.name: _state(file) for file in files}  # before any header is read
    found, others = find_dicom_series(folder, files=files, stop=stop)
    series = {file.name: one for one in found for file in one.files}
    damage = tuple(reason for _, reason, is_damage in others if is_damage)
    return _Listing(listed_ns, series, damage, {name: states[name] for name in series})


def _state(file: Path) -> tuple[int, int] | None:
    """Size and latest change of a file; None where it is gone."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_size, changed_ns(found)


def _require_sound(listing: _Listing) -> None:
    for reason in listing.damage:
        raise VolumeError(reason)


def _only_series(folder: Path, listing: _Listing) -> DicomSeries:
    _require_sound(listing)
    series = list({one.uid: one for one in listing.series.values()}.values())
    if not series:
        raise VolumeError(
            f"{folder}: holds no DICOM image directly; give the folder in which the series' files lie",
            found=_name_folders(folder),
        )
    if len(series) > 1:
        names = ", ".join(f"{one.files[0].name} ({one.modality}, {len(one.files)} files)" for one in series[:5])
        raise VolumeError(
            f"{folder}: holds {len(series)} DICOM series, expected one; give one file of it instead", found=names
        )
    return series[0]


def _name_folders(folder: Path) -> str:
    """A few of the folders below one; nothing where there are none."""
    below = sorted(each.name for each in folder.iterdir() if each.is_dir())
    return ", ".join(below[:5]) + (" ..." if len(below) > 5 else "")

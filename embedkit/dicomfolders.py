"""Owns which DICOM series an image's path stands for: a folder is looked through once, for all cases that lie in it.

Knows nothing of cases and of what a header says. What was found of a series holds while no file came to the folder or
left it, and the files of that series, and those of the folder that could be of it, have the size and time of change
that they had then; otherwise the folder is looked through again.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from embedkit.dicomheaders import DicomSeries, UnreadFile
from embedkit.dicomlisting import find_dicom_series, leads_nowhere, list_files
from embedkit.errors import VolumeError
from embedkit.failures import Stray
from embedkit.files import changed_ns
from embedkit.sourceimage import Stop

__all__ = ["SeriesFolders"]

_MOST_FILES = 1 << 16
"""Files of the folders that are remembered; the latest one is, however many it has."""

_State = tuple[int, int] | None
"""Size and latest change of a file; None where it is gone."""


@dataclass(frozen=True)
class _Listing:
    """The series of a folder by the name of each file, its damaged files of none, and the state of all of these.

    ``listed_ns`` is when a file last came or left, before the folder was listed.
    """

    listed_ns: int
    series: dict[str, DicomSeries]
    strays: dict[str, UnreadFile]
    states: dict[str, _State]

    def holds(self, file: Path) -> bool:
        """Whether what was found of a file in the folder still holds; not where that cannot be told any more."""
        series = self.series.get(file.name)
        if series is None and file.name not in self.strays:
            return False
        of_series = series.files if series else ()
        try:
            return file.parent.stat().st_mtime_ns == self.listed_ns and all(
                _state(each) == self.states[each.name] for each in (*of_series, *self._stray_files())
            )
        except OSError:
            return False

    def _stray_files(self) -> list[Path]:
        return [each.file for each in self.strays.values()]


class SeriesFolders:
    """Remembers the series of the folders that were looked through last; safe to share between threads.

    Each folder is looked through by one thread at a time, several folders by as many.
    """

    def __init__(self) -> None:
        """Begins with none."""
        self._listings: dict[Path, _Listing] = {}
        self._looks: dict[Path, tuple[tuple[Stray, ...], ...]] = {}
        self._in_work: WeakValueDictionary[Path, threading.Lock] = WeakValueDictionary()
        self._lock = threading.Lock()

    def find(self, path: Path, *, stop: Stop = None) -> DicomSeries:
        """The series of a folder that holds just one, or the series that a file belongs to.

        A series of which files are damaged is given with them; reading it says so.

        Args:
            path: Folder or file.
            stop: Once set, the search ends with an error.

        Raises:
            VolumeError: the folder cannot be read; it holds no series or, where it is a folder that is asked for,
                several; the file is damaged and of no series, or no DICOM image.
        """
        if path.is_dir():
            return _only_series(path, self._look(path, stop))
        with self._lock:
            in_work = self._in_work.setdefault(path.parent, threading.Lock())
        with in_work:
            with self._lock:
                listing = self._listings.pop(path.parent, None)
            if listing is None or not listing.holds(path):
                listing = self._look(path.parent, stop)
            self._remember(path.parent, listing)
        if path.name in listing.strays:
            raise listing.strays[path.name].error()
        if path.name not in listing.series:
            raise VolumeError("no DICOM image; give an image file of the series, or its folder", file=path)
        return listing.series[path.name]

    def look(self, folder: Path, *, stop: Stop = None) -> None:
        """Looks through a folder for its strays alone; see `take_looks`.

        Raises:
            VolumeError: the folder cannot be read.
        """
        self._look(folder, stop)

    def take_looks(self) -> dict[Path, tuple[tuple[Stray, ...], ...]]:
        """The folders looked through since the last call, and what strays lie beside the series in each.

        Strays whose headers tell the same series, of which no sound file is there, come together, all others alone.
        A folder without one sound series has none, for there is nothing beside them: who asks for it is told.
        """
        with self._lock:
            looks, self._looks = self._looks, {}
        return looks

    def _look(self, folder: Path, stop: Stop) -> _Listing:
        listing = _look_through(folder, stop)
        described: dict[tuple[str, str], list[Stray]] = {}
        for name, each in listing.strays.items() if listing.series else ():
            described.setdefault((each.uid, "" if each.uid else name), []).append(_describe(each, listing.states[name]))
        with self._lock:
            self._looks[folder] = tuple(map(tuple, described.values()))
        return listing

    def _remember(self, folder: Path, listing: _Listing) -> None:
        with self._lock:
            self._listings[folder] = listing
            while len(self._listings) > 1 and sum(len(each.states) for each in self._listings.values()) > _MOST_FILES:
                del self._listings[next(iter(self._listings))]


def _look_through(folder: Path, stop: Stop) -> _Listing:
    try:
        listed_ns = folder.stat().st_mtime_ns
        files = list_files(folder)
        states = {file.name: _state(file) for file in files}  # before any header is read
    except OSError as error:
        raise VolumeError(f"cannot be read ({error.strerror}); check the folder and its rights", file=folder) from error
    found, others = find_dicom_series(folder, files=files, stop=stop)
    series = {file.name: one for one in found for file in one.files}
    strays = {each.file.name: each for each in others if each.is_damage}
    return _Listing(listed_ns, series, strays, {name: states[name] for name in (*series, *strays)})


def _state(file: Path) -> _State:
    """Of the link itself where it leads nowhere.

    Raises:
        OSError: the file cannot be asked.
    """
    try:
        found = file.stat()
    except OSError as error:
        if leads_nowhere(file):
            found = file.lstat()
        elif isinstance(error, FileNotFoundError):
            return None
        else:
            raise
    return found.st_size, changed_ns(found)


def _describe(unread: UnreadFile, state: _State) -> Stray:
    """A stray by an id that its name cannot be guessed from, for the time of its change is in it too."""
    told = f"{unread.file.absolute()}\0{state}".encode("utf-8", "surrogateescape")
    return Stray(hashlib.sha256(told).hexdigest()[:16], unread.problem, path=str(unread.file))


def _only_series(folder: Path, listing: _Listing) -> DicomSeries:
    series = list({one.uid: one for one in listing.series.values()}.values())
    if not series:
        for stray in listing.strays.values():
            raise stray.error()
        raise VolumeError(
            "holds no DICOM image directly; give the folder in which the series' files lie",
            file=folder,
            found=_name_folders(folder),
        )
    if len(series) > 1:
        names = ", ".join(f"{one.files[0].name} ({one.modality}, {len(one.files)} files)" for one in series[:5])
        raise VolumeError(
            f"holds {len(series)} DICOM series, expected one; give one file of it instead", file=folder, found=names
        )
    return series[0]


def _name_folders(folder: Path) -> str:
    """A few of the folders below one; nothing where there are none."""
    below = sorted(each.name for each in folder.iterdir() if each.is_dir())
    return ", ".join(below[:5]) + (" ..." if len(below) > 5 else "")

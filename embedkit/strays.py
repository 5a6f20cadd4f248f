"""Owns which strays lie beside the series of a manifest's cases, and puts them on record; reads no file.

A stray, a damaged DICOM file of which no series can be told, fails no case. It is told and recorded by itself until it
is mended or removed, once for every state that it is in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from embedkit.dicomfolders import SeriesFolders
from embedkit.errors import VolumeError
from embedkit.failures import Stray, read_failures, record_strays, settle_strays
from embedkit.formats import format_by_name
from embedkit.sourceimage import Stop
from embedkit.sources import Case

__all__ = ["Looks", "account_strays", "find_strays", "look_again"]

Looks = Mapping[Path, Sequence[Sequence[Stray]]]
"""By folder that was looked through, the strays in it, those of one series together: of `SeriesFolders.take_looks`."""

_MOST_BESIDE = 100
"""Cases that are named of those a stray lies beside: the first ones by id."""


def find_strays(cases: Sequence[Case], looks: Looks) -> tuple[Stray, ...]:
    """The strays of folders that were looked through, each with the cases whose series lie there, by path.

    A stray that a case names as its image is left out, and with it those of the same series: that case has failed.
    """
    if not any(looks.values()):
        return ()
    beside: dict[Path, set[str]] = {}
    named = {str(path) for case in cases for path in case.images.values()}
    for case in cases:
        for path in case.images.values():
            folder = _folder(path, looks)
            if folder is not None and looks[folder]:
                beside.setdefault(folder, set()).add(case.case_id)
    found = [
        replace(stray, beside=tuple(sorted(case_ids)[:_MOST_BESIDE]))
        for folder, case_ids in beside.items()
        for together in looks[folder]
        if not any(stray.path in named for stray in together)
        for stray in together
    ]
    return tuple(sorted(found, key=lambda stray: stray.path))


def look_again(cache: Path, cases: Sequence[Case], folders: SeriesFolders, *, stop: Stop = None) -> None:
    """Looks through the DICOM folders of cases that a recorded stray lies beside, where nobody has to read them.

    A folder that cannot be read any more keeps its strays on record: what is wrong with it is its cases' failure.
    """
    known = {case_id for stray in read_failures(cache).strays for case_id in stray.beside}
    for case in cases:
        for path in case.images.values() if case.case_id in known else ():
            if stop is not None and stop.is_set():
                return
            if path.is_dir():
                with suppress(VolumeError):
                    folders.look(path, stop=stop)


def account_strays(cache: Path, cases: Sequence[Case], looks: Looks) -> tuple[Stray, ...]:
    """Puts strays on record that are not, and settles those that are there no more.

    That one is there no more is known once the folders of all cases that it lay beside were looked through.

    Args:
        cache: Its folder.
        cases: All of the manifest, also those that another call does.
        looks: Of this call.

    Returns:
        The strays of `find_strays`.

    Raises:
        CacheError: the record cannot be read or written.
    """
    found = find_strays(cases, looks)
    here = {stray.stray for stray in found}
    known = {stray.stray: stray for stray in read_failures(cache).strays}
    by_id = {case.case_id: case for case in cases}
    gone = []
    for stray in known.values():
        beside = [by_id[each] for each in stray.beside if each in by_id]
        if stray.stray not in here and beside and all(_looked_at(case, looks) for case in beside):
            gone.append(stray)
    settle_strays(cache, gone)
    record_strays(cache, [stray for stray in found if replace(stray, path="") != known.get(stray.stray)])
    return found


def _folder(path: Path, looks: Looks) -> Path | None:
    """The folder looked through in which an image's files lie; None where none was."""
    if path in looks:
        return path
    return path.parent if path.parent in looks and not path.is_dir() else None


def _looked_at(case: Case, looks: Looks) -> bool:
    """Whether every image of a case that can be a DICOM series had its folder looked through."""
    return all(
        format_by_name(path)[0] not in ("", "dicom") or _folder(path, looks) is not None
        for path in case.images.values()
    )

"""Owns what is on disk behind a case: its images, when they last changed, and whether a cache already holds them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import polars as pl

from embedkit.confirmations import Confirmation
from embedkit.dicomfolders import SeriesFolders
from embedkit.errors import ManifestError, VolumeError
from embedkit.files import changed_ns
from embedkit.formats import format_by_name
from embedkit.nrrd import ITK_READERS, payload_file
from embedkit.recipe import Recipe
from embedkit.sourceimage import Stop
from embedkit.volumes import VOXEL_BYTES, Volume, read_volume

__all__ = ["CachedSources", "Case", "CaseImages", "group_cases", "read_case", "tell_absent_channels"]


@dataclass(frozen=True)
class Case:
    """One case of a manifest: ``images`` maps each view to its file or DICOM folder."""

    case_id: str
    patient_id: str
    images: Mapping[str, Path]


class SourceStat(NamedTuple):
    """Size in bytes and latest change (ns since the epoch) of the files behind one image.

    The change is of content or of status, whichever is later: programs can set the time of the first back, as `touch`
    and `rsync` do, but none that of the second (st_ctime of POSIX), which every write and every rename moves on.
    """

    bytes: int
    modified_ns: int


@dataclass(frozen=True)
class CaseImages:
    """What was read for one case: each view's volume, and the state of its files before they were read."""

    volumes: Mapping[str, Volume]
    stats: Mapping[str, SourceStat]


def group_cases(manifest: pl.DataFrame) -> list[Case]:
    """The cases of a manifest in the order of their first row; see `embedkit.manifest.read_manifest`."""
    patients: dict[str, str] = {}
    images: dict[str, dict[str, Path]] = {}
    for case_id, patient_id, view, path in manifest.select("case_id", "patient_id", "view", "path").iter_rows():
        patients.setdefault(case_id, patient_id)
        images.setdefault(case_id, {})[view] = Path(path)
    return [Case(case_id, patients[case_id], paths) for case_id, paths in images.items()]


def tell_absent_channels(cases: Sequence[Case], channels: Sequence[str], fill: str) -> list[str]:
    """A line for every channel that is a view of none of the cases, so that ``fill`` stands for it in all."""
    known = sorted({view for case in cases for view in case.images})
    return [
        f"no case has a view {view!r} (there are {', '.join(known)}): {fill!r} stands for it in all {len(cases)} cases"
        for view in channels
        if fill and view not in known
    ]


def read_case(
    case: Case, *, spill: Path | None = None, folders: SeriesFolders | None = None, stop: Stop = None
) -> CaseImages:
    """Reads every view of a case.

    Args:
        case: The case.
        spill: Folder for the temporary files of images that take more than their share of `VOXEL_BYTES`, the voxels
            of a case that are kept in memory; None keeps all there.
        folders: Remembers the DICOM series of folders that many cases lie in.
        stop: Once set, reading ends with an error, at the next piece of an image.

    Raises:
        VolumeError: one of the images cannot be read, or changed meanwhile, or ``stop`` is set; the message names the
            view.
        CacheError: there is no room for a temporary file.
    """
    folders, share = folders or SeriesFolders(), VOXEL_BYTES // max(1, len(case.images))
    volumes: dict[str, Volume] = {}
    stats: dict[str, SourceStat] = {}
    for view, path in case.images.items():
        try:
            stats[view] = stat_source(path, folders, stop=stop)
            volumes[view] = read_volume(path, spill=spill, most_bytes=share, folders=folders, stop=stop)
            if stat_source(path, folders, stop=stop) != stats[view]:
                raise VolumeError("changed while it was read; run the same command again once it is whole", file=path)
        except VolumeError as error:
            raise VolumeError(error.problem, file=error.file, view=view, found=error.found) from error
    return CaseImages(volumes, stats)


def stat_source(path: Path, folders: SeriesFolders | None = None, *, stop: Stop = None) -> SourceStat:
    """State of the files behind ``path``: one file, a DICOM folder, or a header and the second file that it names.

    One file of a DICOM series stands for the files of that series. A header that names no file that can be read, and a
    file that is of no series, count alone: the reader will say what is wrong with it.

    Args:
        path: As for `embedkit.volumes.read_volume`.
        folders: Remembers the series of folders.
        stop: Once set, no folder is looked through to its end; the file counts alone.

    Raises:
        VolumeError: ``path`` does not exist or may not be read.
    """
    try:
        own = path.stat()
        stats = _stat_more(path, own, folders or SeriesFolders(), stop)
    except OSError as error:
        raise VolumeError(f"cannot be read ({error.strerror}); check the path in the manifest", file=path) from error
    stats = [own] if stats is None else stats
    return SourceStat(sum(each.st_size for each in stats), max(map(changed_ns, stats), default=0))


def _stat_more(path: Path, own: os.stat_result, folders: SeriesFolders, stop: Stop) -> list[os.stat_result] | None:
    """States of all files behind an image that is more than the one file ``path``; None where it is that file alone."""
    if stat.S_ISDIR(own.st_mode):
        return list(_stat_files(path))
    kind, _ = format_by_name(path)
    if not stat.S_ISREG(own.st_mode) or kind not in {"", "dicom", *ITK_READERS}:  # to open a pipe waits for its end
        return None
    try:
        if kind in ITK_READERS:
            payload = payload_file(path, kind)
            return None if payload is None else [own, payload.stat()]
        return [file.stat() for file in folders.find(path, stop=stop).files]
    except VolumeError:
        return None


def _stat_files(folder: Path | str) -> Iterator[os.stat_result]:
    """States of the files in a folder and below it; the listing tells files from folders: each is asked once."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_file(entry):
                yield entry.stat()
            elif entry.is_dir(follow_symlinks=False):
                yield from _stat_files(entry.path)


def _is_file(entry: os.DirEntry[str]) -> bool:
    """False for a link that leads in circles too, of which one among good files must not fail them all."""
    try:
        return entry.is_file()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


class CachedSources:
    """The sources of the stacks that a cache holds, to tell which cases are left to do.

    Attributes:
        folders: Remembers the DICOM series of folders, also for reading.
    """

    def __init__(
        self,
        stacks: pl.DataFrame,
        recipe: Recipe,
        confirmed: Mapping[tuple[str, str], Confirmation] | None = None,
        *,
        folders: SeriesFolders | None = None,
    ) -> None:
        """Takes what the cache says of its stacks.

        Args:
            stacks: Of an open cache.
            recipe: Of the cache.
            confirmed: Of `embedkit.confirmations.read_confirmations`.
            folders: To remember DICOM series in; None begins with none.
        """
        self.folders = folders or SeriesFolders()
        self._recipe = recipe
        self._confirmed = confirmed or {}
        self._known: dict[str, dict[tuple[str, str], _CachedStack]] = {}
        columns = ("case_id", "view", "plane", "patient_id", "source_bytes", "source_modified_ns", "source_digest")
        for case, view, plane, patient, size, modified, digest in stacks.select(columns).iter_rows():
            self._known.setdefault(case, {})[view, plane] = _CachedStack(patient, SourceStat(size, modified), digest)

    def require_same_patients(self, cases: Sequence[Case]) -> None:
        """Stops where a case is cached under another patient, for that would let a patient into two folds.

        Raises:
            ManifestError: names the case, both patients and the way out.
        """
        for case in cases:
            for known in (each for stored in self._stored(case) for each in stored.values()):
                if known.patient_id != case.patient_id:
                    raise ManifestError(
                        f"case {case.case_id} is of patient {case.patient_id} in the manifest but of"
                        f" {known.patient_id} in the cache; correct the manifest, or extract to another --out"
                    )

    def require_same_views(self, cases: Sequence[Case]) -> None:
        """Stops where the cache holds a view of a case that the manifest no longer has: heads would train on it.

        Raises:
            ManifestError: names the case, the view and the way out.
        """
        for case in cases:
            if extra := {key for stored in self._stored(case) for key in stored} - self._expected(case).keys():
                views = ", ".join(sorted({view for view, _ in extra}))
                raise ManifestError(
                    f"the cache holds {views} of case {case.case_id}, which the manifest does not have;"
                    " add it to the manifest again, or extract to another --out"
                )

    def split_cases(self, cases: Sequence[Case], *, stop: Stop = None) -> tuple[list[Case], list[Case]]:
        """The cases that are cached, and those left to do; once ``stop`` is set the rest is left without a look."""
        held: list[Case] = []
        pending: list[Case] = []
        for case in cases:
            stopped = stop is not None and stop.is_set()
            (held if not stopped and self.holds(case, stop=stop) else pending).append(case)
        return held, pending

    def holds(self, case: Case, *, stop: Stop = None) -> bool:
        """True where every stack of the case is cached, and no file behind it changed since, or only in its times.

        Once ``stop`` is set no folder is looked through to its end, and a case in it counts as not held.
        """
        stored = self._stored(case)
        return all(stored) and all(
            self._holds_view(
                [each.get((view, plane)) for each in stored for plane in self._recipe.planes], view, case, stop
            )
            for view in self._views(case)
        )

    def _holds_view(self, known: Sequence[_CachedStack | None], view: str, case: Case, stop: Stop) -> bool:
        """Whether the stacks of a view, of all planes and copies, are there and up to date."""
        sources = self._views(case)[view]
        there = [each for each in known if each is not None]
        cached = {each.stat for each in there}
        if len(there) < len(known) or any(source not in case.images for source in sources):
            return False
        try:
            now = combine_stats([stat_source(case.images[source], self.folders, stop=stop) for source in sources])
        except VolumeError:
            return False  # the reader will say what is wrong with it, and the case goes on record
        if cached == {now}:
            return True
        digests = {each.digest for each in there}
        size, changed_ns, digest = self._confirmed.get((case.case_id, view), (0, 0, ""))
        return now == SourceStat(size, changed_ns) and digests == {digest}

    def holds_same_bytes(self, case: Case, images: CaseImages) -> bool:
        """True where every stack of the case is cached from files of the very same bytes."""
        return all(
            key in known
            and all(view in images.volumes for view in views)
            and known[key].digest == combine_digests([images.volumes[view] for view in views])
            for known in self._stored(case)
            for key, views in self._expected(case).items()
        )

    def confirmations(self, case: Case, images: CaseImages) -> dict[str, Confirmation]:
        """What to keep on record of a case that `holds_same_bytes`, by view, so that it is not read again."""
        return {
            view: (
                *combine_stats([images.stats[source] for source in sources]),
                combine_digests([images.volumes[source] for source in sources]),
            )
            for view, sources in self._views(case).items()
        }

    def holds_stack(self, case_id: str, view: str, plane: str, digest: str) -> bool:
        """True where this stack is cached from files of the very bytes that have this digest (`combine_digests`)."""
        known = self._known.get(case_id, {}).get((view, plane))
        return known is not None and known.digest == digest

    def changed(self, case: Case, digests: Mapping[tuple[str, str], str]) -> bool:
        """True where a stack of the case is cached from other bytes than these; one not cached at all is no change.

        Args:
            case: Of the manifest.
            digests: (view, plane) of each stack computed to the digest of its sources (`combine_digests`).
        """
        return any(
            key in known and known[key].digest != digest
            for known in self._stored(case)
            for key, digest in digests.items()
        )

    def _stored(self, case: Case) -> list[Mapping[tuple[str, str], _CachedStack]]:
        """What is cached of the case, or of each of its copies where the recipe makes some."""
        return [self._known.get(case_id, {}) for case_id in self._recipe.stored_ids(case.case_id)]

    def _expected(self, case: Case) -> dict[tuple[str, str], tuple[str, ...]]:
        """Each (view, plane) that the recipe makes of the case, and the views behind it."""
        return {(view, plane): sources for view, sources in self._views(case).items() for plane in self._recipe.planes}

    def _views(self, case: Case) -> dict[str, tuple[str, ...]]:
        """Each view that the recipe makes of the case, and the views of the manifest behind it."""
        recipe = self._recipe
        if recipe.channels:
            present = (view if view in case.images else recipe.fill for view in recipe.channels)
            return {"+".join(recipe.channels): tuple(dict.fromkeys(present))}
        return {view: (view,) for view in case.images}


class _CachedStack(NamedTuple):
    """What the cache knows of the sources of one stack."""

    patient_id: str
    stat: SourceStat
    digest: str


def combine_stats(stats: Sequence[SourceStat]) -> SourceStat:
    """Total bytes and latest change of several images."""
    if len(stats) == 1:
        return stats[0]
    return SourceStat(sum(stat.bytes for stat in stats), max(stat.modified_ns for stat in stats))


def combine_digests(volumes: list[Volume]) -> str:
    """The digests of several images, joined by ``+`` in order."""
    return "+".join(volume.source_digest for volume in volumes)

"""Owns what is on disk behind a case: its images, when they last changed, and whether a cache already holds them."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from embedkit.errors import ManifestError, VolumeError
from embedkit.recipe import Recipe
from embedkit.volumes import Volume, read_volume

__all__ = ["CachedSources", "Case", "CaseImages", "group_cases", "read_case"]

_DETACHED_HEADERS = (".mhd", ".nhdr")
_ONE_OF_A_SERIES = (".dcm", ".dicom", ".ima", "")


@dataclass(frozen=True)
class Case:
    """One case of a manifest: ``images`` maps each view to its file or DICOM folder."""

    case_id: str
    patient_id: str
    images: Mapping[str, Path]


@dataclass(frozen=True)
class SourceStat:
    """Size in bytes and latest change (ns since the epoch) of the files behind one image."""

    bytes: int
    modified_ns: int


@dataclass(frozen=True)
class CaseImages:
    """What was read for one case: each view's volume, and the state of its files before they were read."""

    volumes: Mapping[str, Volume]
    stats: Mapping[str, SourceStat]


def group_cases(manifest: pl.DataFrame) -> list[Case]:
    """The cases of a manifest in the order of their first row; see `embedkit.manifest.read_manifest`."""
    return [
        Case(rows["case_id"][0], rows["patient_id"][0], dict(zip(rows["view"], map(Path, rows["path"]), strict=True)))
        for rows in manifest.partition_by("case_id", maintain_order=True)
    ]


def read_case(case: Case) -> CaseImages:
    """Reads every view of a case.

    Raises:
        VolumeError: one of the images cannot be read; the message names the view.
    """
    volumes: dict[str, Volume] = {}
    stats: dict[str, SourceStat] = {}
    for view, path in case.images.items():
        try:
            stats[view] = stat_source(path)
            volumes[view] = read_volume(path)
        except VolumeError as error:
            raise VolumeError(f"view {view}: {error}") from error
    return CaseImages(volumes, stats)


def stat_source(path: Path) -> SourceStat:
    """State of the files behind ``path``: one file, a DICOM folder, or a header with its detached data file.

    One file of a DICOM series stands for the files of its folder, since the whole series is read.

    Raises:
        VolumeError: ``path`` does not exist or may not be read.
    """
    try:
        if path.is_dir():
            files = [file for file in path.rglob("*") if file.is_file()]
        elif path.suffix.lower() in _ONE_OF_A_SERIES and path.exists():
            files = [file for file in path.parent.iterdir() if file.is_file()]
        elif path.suffix.lower() in _DETACHED_HEADERS:
            files = [file for file in path.parent.glob(f"{glob.escape(path.stem)}.*") if file.is_file()]
        else:
            files = [path]
        stats = [file.stat() for file in files]
    except OSError as error:
        raise VolumeError(f"{path} cannot be read: {error.strerror}; check the path in the manifest") from error
    return SourceStat(sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0))


class CachedSources:
    """The sources of the stacks that a cache holds, to tell which cases are left to do."""

    def __init__(self, stacks: pl.DataFrame, recipe: Recipe) -> None:
        self._recipe = recipe
        self._known: dict[str, dict[tuple[str, str], _CachedStack]] = {}
        columns = ("case_id", "view", "plane", "patient_id", "source_bytes", "source_modified_ns", "source_digest")
        for case, view, plane, patient, size, modified, digest in stacks.select(columns).iter_rows():
            self._known.setdefault(case, {})[view, plane] = _CachedStack(patient, (size, modified), digest)

    def require_same_patients(self, cases: Sequence[Case]) -> None:
        """Stops where a case is cached under another patient, for that would let a patient into two folds.

        Raises:
            ManifestError: names the case, both patients and the way out.
        """
        for case in cases:
            for known in self._known.get(case.case_id, {}).values():
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
            if extra := self._known.get(case.case_id, {}).keys() - self._expected(case).keys():
                views = ", ".join(sorted({view for view, _ in extra}))
                raise ManifestError(
                    f"the cache holds {views} of case {case.case_id}, which the manifest does not have;"
                    " add it to the manifest again, or extract to another --out"
                )

    def holds(self, case: Case) -> bool:
        """True where every stack of the case is cached and no file behind it changed size or time since."""
        known, stats = self._known.get(case.case_id, {}), dict[str, SourceStat]()
        for key, views in self._expected(case).items():
            if key not in known or any(view not in case.images for view in views):
                return False
            try:
                stats |= {view: stat_source(case.images[view]) for view in views if view not in stats}
            except VolumeError:
                return False  # the reader will say what is wrong with it, and the case goes on record
            if known[key].stat != combine_stats([stats[view] for view in views]):
                return False
        return True

    def holds_same_bytes(self, case: Case, images: CaseImages) -> bool:
        """True where every stack of the case is cached from files of the very same bytes."""
        known = self._known.get(case.case_id, {})
        return all(
            key in known
            and all(view in images.volumes for view in views)
            and known[key].digest == combine_digests([images.volumes[view] for view in views])
            for key, views in self._expected(case).items()
        )

    def holds_some(self, case: Case) -> bool:
        """True where some stack of the case is cached; with `holds_same_bytes` False its sources changed."""
        return bool(self._known.get(case.case_id, {}).keys() & self._expected(case).keys())

    def _expected(self, case: Case) -> dict[tuple[str, str], tuple[str, ...]]:
        """Each (view, plane) that the recipe makes of the case, and the views behind it."""
        recipe = self._recipe
        if recipe.channels:
            present = (view if view in case.images else recipe.fill for view in recipe.channels)
            stacks = {"+".join(recipe.channels): tuple(dict.fromkeys(present))}
        else:
            stacks = {view: (view,) for view in case.images}
        return {(view, plane): views for view, views in stacks.items() for plane in recipe.planes}


@dataclass(frozen=True)
class _CachedStack:
    """What the cache knows of the sources of one stack."""

    patient_id: str
    stat: tuple[int, int]
    digest: str


def combine_stats(stats: list[SourceStat]) -> tuple[int, int]:
    """Total bytes and latest change of several images."""
    return sum(stat.bytes for stat in stats), max(stat.modified_ns for stat in stats)


def combine_digests(volumes: list[Volume]) -> str:
    """The digests of several images, joined by ``+`` in order."""
    return "+".join(volume.source_digest for volume in volumes)

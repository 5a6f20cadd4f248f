"""Owns `scan_folder`: which images lie in a folder, and what cases, views and masks their names suggest.

Names come from folders and files alone; of a DICOM header only Modality is used, and never who the patient is.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from embedkit.dicom import check_dicom_series
from embedkit.dicomheaders import DicomSeries
from embedkit.dicomlisting import find_dicom_series
from embedkit.errors import ManifestError, VolumeError
from embedkit.manifest import MANIFEST_COLUMNS
from embedkit.volumes import check_volume

__all__ = ["ScanResult", "scan_folder"]

_SUFFIX = re.compile(r"\.(nii\.gz|nii|nrrd|nhdr|mha|mhd|npy|npz)$", re.IGNORECASE)
_NEUTRAL = re.compile(r"images?(tr|ts)?|imgs?|vol(ume)?s?|scans?|dicoms?|dcm|niftis?|nii|data", re.IGNORECASE)
_MASK = re.compile(r"\w*masks?|segs?|segmentations?|labels?(tr|ts)?", re.IGNORECASE)
_BETWEEN_WORDS = re.compile(r"[_\-. ]+")
_DETACHED_VOXELS = (".raw", ".zraw", ".img", ".raw.gz")


@dataclass(frozen=True)
class ScanResult:
    """What `scan_folder` found.

    Attributes:
        rows: A manifest (see `embedkit.manifest.read_manifest`) with absolute paths, sorted by case and view.
        skipped: (path, reason) of every file that did not become an image or a mask, sorted by path.
    """

    rows: pl.DataFrame
    skipped: list[tuple[str, str]]


@dataclass(frozen=True)
class _Image:
    """An image found, and the names that it is given."""

    path: Path
    parts: tuple[str, ...]  # names of the folders below the scanned one, then the file's without its ending
    modality: str = ""  # of a DICOM series
    case: str = ""
    view: str = ""


def scan_folder(folder: Path | str) -> ScanResult:
    """Finds every readable image below a folder and proposes a manifest.

    The case is the first folder below the scanned one (a folder around all cases is passed over) or, for files that lie
    together, the file's name; the view is the rest of the name. Words such as ``image``, ``volumes`` or ``dicom`` are
    left out. Files in one folder whose last words recur, such as ``A_flair, A_t1, B_flair``, are views of the cases
    before the word. A DICOM series is one image, named by its folder; by its Modality where the folder tells no
    series apart or where no such name recurs in another case. A file with ``mask``, ``seg`` or ``label`` among its
    words or its folders is a mask, paired with the one image that shares the rest of its name (the one beside it, where
    another folder holds a second).

    Hidden files are passed over. Links that lead out of the folder, and linked folders, are not followed.

    Raises:
        ManifestError: no such folder, or no readable image in it.
    """
    root = Path(folder).absolute()
    if not root.is_dir():
        raise ManifestError(f"{folder}: no such folder; give the folder that holds the images")
    skipped: list[tuple[Path, str]] = []
    found = _find_images(root, skipped)
    masks = [image for image in found if not image.modality and _is_mask(image)]
    images = _name_images(root, [image for image in found if image not in masks])
    if not images:
        first = f", the first: {skipped[0][1]}" if skipped else ""
        raise ManifestError(
            f"{folder}: holds no image that embedkit reads; {len(skipped)} files were left out{first}; expected NIfTI, "
            "NRRD, MetaImage, DICOM or .npy/.npz"
        )
    pairs = _pair_masks(images, masks, skipped)
    rows = pl.DataFrame(
        [(image.case, image.case, image.view, str(image.path), pairs.get(image.path)) for image in images],
        schema=dict.fromkeys(MANIFEST_COLUMNS, pl.String),
        orient="row",
    )
    reasons = sorted((str(path), reason.removeprefix(f"{path}: ")) for path, reason in skipped)
    return ScanResult(rows.sort("case_id", "view"), reasons)


def _find_images(root: Path, skipped: list[tuple[Path, str]]) -> list[_Image]:
    images: list[_Image] = []
    series: list[tuple[DicomSeries, Path]] = []
    for folder, files in _walk(root, skipped):
        parts = folder.relative_to(root).parts
        here, others = find_dicom_series(folder, files=files)
        unread = [*others, *(each for one in here for each in one.damaged)]
        skipped.extend((each.file, str(each.error())) for each in unread)
        series.extend((one, folder if len(here) == 1 else one.slices[0].file) for one in here)
        dicom = {file for one in here for file in one.files} | {each.file for each in unread}
        for file in sorted(set(files) - dicom):
            if _is_detached(file, files):
                continue
            try:
                check_volume(file)
            except VolumeError as error:
                skipped.append((file, str(error)))
            else:
                images.append(_Image(file, (*parts, _SUFFIX.sub("", file.name))))
    return images + _readable_series(root, series, skipped)


def _walk(root: Path, skipped: list[tuple[Path, str]]) -> Iterator[tuple[Path, list[Path]]]:
    """Each folder with the files in it that may be read, in the order of their names."""

    def refuse(error: OSError) -> None:
        skipped.append((Path(error.filename), f"{error.filename}: cannot be listed ({error.strerror})"))

    inside = root.resolve()
    for name, folders, names in os.walk(root, onerror=refuse):
        folder = Path(name)
        folders[:] = sorted(one for one in folders if not one.startswith(".") and one != "__MACOSX")
        for link in [folder / one for one in folders if (folder / one).is_symlink()]:
            folders.remove(link.name)
            skipped.append((link, f"{link}: a link to a folder, which is not followed; scan the folder itself"))
        files = []
        for file in (folder / one for one in sorted(names) if not one.startswith(".")):
            if not _resolve(file).is_relative_to(inside):
                skipped.append((file, f"{file}: a link that leads out of the scanned folder; copy the file into it"))
            elif not file.is_file():
                skipped.append((file, f"{file}: no regular file, or a link that leads nowhere"))
            elif not os.access(file, os.R_OK):
                skipped.append((file, f"{file}: may not be read; check its rights"))
            else:
                files.append(file)
        yield folder, files


def _resolve(file: Path) -> Path:
    """Where a link leads; the link itself where it leads in circles."""
    try:
        return file.resolve()
    except (OSError, RuntimeError):  # the latter before Python 3.13
        return file


def _is_detached(file: Path, files: Sequence[Path]) -> bool:
    """Whether a file holds the voxels of a .mhd or .nhdr header beside it."""
    stem = next((file.name[: -len(end)] for end in _DETACHED_VOXELS if file.name.lower().endswith(end)), "")
    return bool(stem) and any(file.with_name(stem + end) in files for end in (".mhd", ".nhdr"))


def _readable_series(
    root: Path, series: Sequence[tuple[DicomSeries, Path]], skipped: list[tuple[Path, str]]
) -> list[_Image]:
    """One image per series; a series that read_volume would refuse, or that lies in two folders, is left out."""
    folders: dict[str, list[Path]] = defaultdict(list)
    for one, _ in series:
        folders[one.uid].append(one.folder)
    images = []
    for one, path in series:
        try:
            if len(folders[one.uid]) > 1:
                names = " and ".join(str(folder.relative_to(root)) for folder in folders[one.uid])
                raise VolumeError(
                    f"files of one DICOM series lie in {names}; bring them together or remove one", file=path
                )
            check_dicom_series(one)
        except VolumeError as error:
            skipped.append((path, str(error)))
        else:
            images.append(_Image(path, one.folder.relative_to(root).parts, modality=one.modality or "DICOM"))
    return images


# ---- names ----


def _words(text: str) -> list[str]:
    return [word for word in _BETWEEN_WORDS.split(text) if word]


def _is_mask(image: _Image) -> bool:
    return any(_MASK.fullmatch(word) for part in image.parts for word in _words(part))


def _strip(part: str) -> str:
    """A name without neutral words at its ends; empty where nothing else is left."""
    spans = [(match.start(), match.end()) for match in re.finditer(r"[^_\-. ]+", part)]
    telling = [(start, end) for start, end in spans if not _NEUTRAL.fullmatch(part[start:end])]
    return _clean(part[telling[0][0] : telling[-1][1]]) if telling else ""


def _clean(part: str) -> str:
    """A name without what a manifest refuses in one."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f,]", "_", part)


def _name_images(root: Path, images: Sequence[_Image]) -> list[_Image]:
    """The images with case and view filled in, no view of a case twice."""
    names = [tuple(filter(None, map(_strip, image.parts))) for image in images]
    while _lie_in_one_folder(names):
        names = [parts[1:] for parts in names]
    views = _recurring_last_words([parts[0] for parts in names if len(parts) == 1])
    named = []
    for image, parts in zip(images, names, strict=True):
        case, *rest = parts or (_strip(root.name) or "case",)
        stem, _, last = _split_last_word(case)
        if not rest and last in views and stem and not image.modality:
            case, rest = stem, [last]
        view = "_".join(_without_prefix(part, case) for part in rest)
        named.append(replace(image, case=case, view=view))
    return _tell_apart(_name_by_modality(named))


def _lie_in_one_folder(names: Sequence[tuple[str, ...]]) -> bool:
    """Whether the first folder is one around all cases."""
    return (
        bool(names)
        and min(map(len, names)) >= 3
        and len({parts[0] for parts in names}) == 1
        and len({parts[1] for parts in names}) > 1
    )


def _split_last_word(name: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"(.+?)([_\-. ]+)([^_\-. ]+)", name)
    return (match[1], match[2], match[3]) if match else ("", "", name)


def _recurring_last_words(names: Sequence[str]) -> set[str]:
    """Last words that tell the views of several cases apart: shared by two names' beginnings, one of which has two."""
    beginnings: dict[str, set[str]] = defaultdict(set)
    for name in names:
        stem, _, last = _split_last_word(name)
        if stem and re.search("[A-Za-z]", last):
            beginnings[last].add(stem)
    recurring = {last: stems for last, stems in beginnings.items() if len(stems) > 1}
    counts = Counter(stem for stems in recurring.values() for stem in stems)
    return set(recurring) if any(count > 1 for count in counts.values()) else set()


def _without_prefix(part: str, case: str) -> str:
    rest = part.removeprefix(case).lstrip("_-. ")
    return rest or part


def _name_by_modality(images: Sequence[_Image]) -> list[_Image]:
    """DICOM views by Modality where folders name none, or where no folder's name recurs in a second case."""
    cases: dict[str, set[str]] = defaultdict(set)
    for image in images:
        if image.modality:
            cases[image.view].add(image.case)
    several = len({image.case for image in images}) > 1
    unique_names = several and not any(len(found) > 1 for view, found in cases.items() if view)
    counts = Counter((image.case, image.modality) for image in images)

    def named(image: _Image) -> _Image:
        if not image.modality:
            return replace(image, view=image.view or "image")
        alone = counts[image.case, image.modality] == 1
        return replace(image, view=image.modality) if not image.view or (unique_names and alone) else image

    return [named(image) for image in images]


def _tell_apart(images: Sequence[_Image]) -> list[_Image]:
    """Gives images that share case and view the first of these that differs: all folder names, Modality, a number."""
    groups: dict[tuple[str, str], list[_Image]] = defaultdict(list)
    for image in images:
        groups[image.case, image.view].append(image)
    taken = {(case, view) for (case, view), group in groups.items() if len(group) == 1}
    named: list[_Image] = []
    for group in groups.values():
        views = [image.view for image in group]
        ways: list[Callable[[int, _Image], str]] = [
            lambda _, image: "_".join(_clean(part) for part in image.parts if part != image.case),
            lambda _, image: f"{image.view}_{image.modality or 'file'}",
            lambda number, image: f"{image.view}_{number}",
        ]
        for way in ways if len(group) > 1 else []:
            views = [way(number, image) for number, image in enumerate(group, 1)]
            if len(set(views)) == len(views) and all(views) and not {(group[0].case, view) for view in views} & taken:
                break
        taken.update((image.case, view) for image, view in zip(group, views, strict=True))
        named.extend(replace(image, view=view) for image, view in zip(group, views, strict=True))
    return named


def _pair_masks(images: Sequence[_Image], masks: Sequence[_Image], skipped: list[tuple[Path, str]]) -> dict[Path, str]:
    """Image to mask, where just one image shares the rest of the mask's name and just one mask claims the image."""
    keys = {image.path: _key(image) for image in images}
    claims: dict[Path, list[Path]] = defaultdict(list)
    for mask in masks:
        key = _key(mask)
        same = [path for path, other in keys.items() if other == key]
        alike = same or [path for path, other in keys.items() if key and other[: len(key)] == key]
        beside = [path for path in alike if path.parent == mask.path.parent]
        alike = beside if len(beside) == 1 else alike
        if len(alike) == 1:
            claims[alike[0]].append(mask.path)
        elif alike:
            names = ", ".join(path.name for path in alike[:3])
            reason = f"a mask that fits {len(alike)} images ({names}); write it into the manifest where it belongs"
            skipped.append((mask.path, f"{mask.path}: {reason}"))
        else:
            skipped.append((mask.path, f"{mask.path}: a mask, but no image shares the rest of its name"))
    for path, found in claims.items():
        if len(found) > 1:
            skipped.extend(
                (mask, f"{mask}: one of {len(found)} masks that fit {path.name}; keep one") for mask in found
            )
    return {path: str(found[0]) for path, found in claims.items() if len(found) == 1}


def _key(image: _Image) -> tuple[str, ...]:
    """The words that an image and its mask share."""
    words = [word.lower() for part in image.parts for word in _words(part)]
    return tuple(word for word in words if not _NEUTRAL.fullmatch(word) and not _MASK.fullmatch(word))

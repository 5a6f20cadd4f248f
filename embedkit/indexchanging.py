"""Owns how an index follows its cache: cases added, cases withdrawn. Searches nothing, and fits nothing anew.

FAISS's index takes what is new and gives up what goes where its type can; `embedkit.indexwriting` says when. Vectors
are copied block by block into files, so that an index may be larger than the memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.bags import list_views
from embedkit.cache import Cache
from embedkit.casevectors import embed_new_cases
from embedkit.embeddings import parse_embeddings
from embedkit.errors import SearchError
from embedkit.index import Index, open_index
from embedkit.indexbuilding import MadeVectors, list_cases, pack_vectors, part_blank, restrict_cache
from embedkit.indexlabels import append_cases
from embedkit.indexseals import list_damage
from embedkit.indexwriting import rewrite_index
from embedkit.manifest import read_labels
from embedkit.queries import embed_run, open_index_run, open_source
from embedkit.unitvectors import split_rows

__all__ = ["add_cases", "remove_cases"]


def add_cases(
    index: Index | str | Path,
    *,
    cache: str | Path | None = None,
    labels: str | Path | pl.DataFrame | None = None,
    unlabelled: bool = False,
) -> tuple[Index, list[str]]:
    """Takes the cases of a cache that an index lacks, but for those that show nothing; only their tokens are read.

    What was fitted when the index was built (means, whitening) stays, so that a case stands where it would have stood;
    after much growth of another kind build it anew.

    Args:
        index: An index or its folder.
        cache: Of the index's recipe; None is the cache that was indexed.
        labels: Columns of the new cases, those that the index has, as `build_index` takes them.
        unlabelled: Cases without a label, or all of them without a table, may come in: no filter finds these.

    Returns:
        The index as it is now, and the cases taken.

    Raises:
        SearchError: the index is damaged or holds a case without a direction, the cache is gone, the index's run was
            trained again, or labels are lacking or other than the index's.
        RecipeError: the cache has another recipe.
    """
    opened = index if isinstance(index, Index) else open_index(index)
    _require_sound(opened)
    _require_directions(opened)
    source = open_source(opened, cache)
    lacking = sorted(set(source.stacks["case_id"]) - set(opened.cases["case_id"]))
    part, blank = part_blank(restrict_cache(source, lacking))
    new = sorted(set(lacking) - set(blank))
    told_before = opened.details.get("without_usable_slice", [])
    told = sorted({*told_before, *blank} - set(new))
    known, details = np.arange(opened.count), opened.details | {"without_usable_slice": told}
    if not new:
        if told == told_before:
            return opened, []
        return rewrite_index(opened, opened.read_vectors(), opened.cases, opened.rows, kept=known, details=details), []
    table = None if labels is None else read_labels(labels)
    append_cases(opened.cases, list_cases(part), table, unlabelled=unlabelled)  # what is wrong is said at once
    with tempfile.TemporaryDirectory(prefix="embedkit-index-") as folder:
        found = _embed_as(opened, part, Path(folder) / "slices.npy")
        cases = append_cases(opened.cases, found.cases, table, unlabelled=unlabelled)
        rows, extras = _append_slices(opened, found, Path(folder))
        vectors = _append(opened.read_vectors(), found.vectors, Path(folder) / "all.npy")
        return rewrite_index(opened, vectors, cases, rows, kept=known, extras=extras, details=details), new


def _append_slices(
    index: Index, found: MadeVectors, folder: Path
) -> tuple[pl.DataFrame | None, dict[str, NDArray[Any]]]:
    """The rows of an index of slices, or else its slices among the extras, with those of new cases below."""
    shift, extras = len(index.cases), dict(index.extras)
    if index.rows is not None and found.rows is not None:
        return pl.concat([index.rows, found.rows.with_columns(pl.col("case") + shift)]), extras
    moved = found.extras["slice_places"] + np.array([shift, 0, 0, 0], np.int32)
    extras["slice_places"] = _append(extras["slice_places"], moved, folder / "all-places.npy")
    extras["slices"] = _append(extras["slices"], found.extras["slices"], folder / "all-slices.npy")
    return None, extras


def remove_cases(index: Index | str | Path, case_ids: Sequence[str], *, cache: str | Path | None = None) -> Index:
    """Withdraws cases: no vector and no row of theirs is left in the index's files.

    What was fitted on all cases together (means, whitening) stays as it is.

    Args:
        index: An index or its folder.
        case_ids: To withdraw.
        cache: Checked to be of the index's recipe; None checks nothing.

    Raises:
        RecipeError: the cache has another recipe.
        SearchError: the index is damaged, does not hold one of them, or would be left empty.
    """
    opened = index if isinstance(index, Index) else open_index(index)
    _require_sound(opened)
    if cache is not None:
        open_source(opened, cache)
    held = opened.cases["case_id"]
    if unknown := sorted(set(case_ids) - set(held)):
        raise SearchError(f"index {opened.path} has no case {', '.join(unknown[:5])}, so it cannot be withdrawn")
    kept = ~held.is_in(list(case_ids)).to_numpy()
    if not kept.any():
        raise SearchError(f"index {opened.path} would hold no case any more; delete the folder instead")
    numbers = kept.cumsum() - 1
    rows, extras = opened.rows, dict(opened.extras)
    with tempfile.TemporaryDirectory(prefix="embedkit-index-") as folder:
        chosen = np.flatnonzero(kept)
        if rows is not None:
            chosen = np.flatnonzero(kept[rows["case"].to_numpy()])
            rows = rows[chosen].with_columns(case=pl.Series(numbers[rows["case"].to_numpy()[chosen]]))
        else:
            left = np.flatnonzero(kept[extras["slice_places"][:, 0]])
            extras["slices"] = _take(extras["slices"], left, Path(folder) / "slices.npy")
            extras["slice_places"] = _take(extras["slice_places"], left, Path(folder) / "places.npy")
            extras["slice_places"][:, 0] = numbers[extras["slice_places"][:, 0]]
        vectors = _take(opened.read_vectors(), chosen, Path(folder) / "vectors.npy")
        return rewrite_index(opened, vectors, opened.cases.filter(kept), rows, kept=chosen, extras=extras)


def _require_sound(index: Index) -> None:
    """Reads every byte: what is damaged would pass for sound under the checksums of the changed index."""
    for name, problem in list_damage(index.path).items():
        raise SearchError(f"{index.path / name} is damaged: {problem}; build the index again")


def _require_directions(index: Index) -> None:
    """Stops at vectors of zero: an index that was whitened before such cases were refused may hold some."""
    vectors, found = index.read_vectors(), []
    for part in split_rows(*vectors.shape):
        found.append(~np.any(vectors[part], axis=1))
    empty = np.flatnonzero(np.concatenate(found))
    if len(empty):
        places = empty if index.rows is None else np.unique(index.rows["case"].to_numpy()[empty])
        names = ",".join(index.cases["case_id"].gather(places).to_list())
        raise SearchError(
            f"index {index.path} holds cases that show nothing, their vectors are zero: {names}; withdraw them first"
            f" (embedkit index {index.details.get('cache', 'CACHE')} -o {index.path} --remove {names}), then add"
        )


def _embed_as(index: Index, cache: Cache, file: Path) -> MadeVectors:
    """Vectors of new cases, made as those of an index."""
    views = tuple(index.details["views"])
    if unknown := sorted(set(list_views(cache)) - set(views)):
        raise SearchError(
            f"{cache.path} has view {', '.join(unknown)}, but the index knows {', '.join(views)}; build the index anew"
        )
    cases = list_cases(cache)
    vectors: Any = None
    if "run" in index.details:
        cases, vectors = embed_run(open_index_run(index), cache)
    elif index.level == "case":
        parts = parse_embeddings(index.embedding, cache)
        found = embed_new_cases(cache, parts, views, index.extras["view_means"], file=file.with_name("cases.npy"))
        cases, vectors = found.cases, found.vectors
    made = MadeVectors(index.embedding, cases, None, vectors, views, index.extras, index.details)
    return pack_vectors(cache, made, file)


def _append(first: NDArray[Any], second: NDArray[Any], file: Path) -> NDArray[Any]:
    """Both arrays, one after the other, in a file that is mapped."""
    joined = np.lib.format.open_memmap(file, "w+", first.dtype, (len(first) + len(second), first.shape[1]))
    for part in split_rows(*first.shape):
        joined[part] = first[part]
    for part in split_rows(*second.shape):
        joined[len(first) :][part] = second[part]
    return joined


def _take(array: NDArray[Any], rows: NDArray[np.int64], file: Path) -> NDArray[Any]:
    """Some rows of an array, in a file that is mapped."""
    taken = np.lib.format.open_memmap(file, "w+", array.dtype, (len(rows), array.shape[1]))
    for part in split_rows(*taken.shape):
        taken[part] = array[rows[part]]
    return taken

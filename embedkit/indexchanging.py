"""Owns how an index follows its cache: cases added, cases withdrawn. Searches nothing, and fits nothing anew.

Vectors are copied block by block into files, so that an index may be larger than the memory.
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
from embedkit.indexbuilding import MadeVectors, list_cases, pack_vectors, restrict_cache
from embedkit.indexlabels import append_cases
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
    """Takes the cases of a cache that an index lacks; only their tokens are read.

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
        SearchError: the cache is gone, the index's run was trained again, or labels are lacking or other than the
            index's.
        RecipeError: the cache has another recipe.
    """
    opened = index if isinstance(index, Index) else open_index(index)
    source = open_source(opened, cache)
    new = sorted(set(source.stacks["case_id"]) - set(opened.cases["case_id"]))
    if not new:
        return opened, []
    part, table = restrict_cache(source, new), None if labels is None else read_labels(labels)
    append_cases(opened.cases, list_cases(part), table, unlabelled=unlabelled)  # what is wrong is said at once
    with tempfile.TemporaryDirectory(prefix="embedkit-index-") as folder:
        found = _embed_as(opened, part, Path(folder) / "slices.npy")
        cases = append_cases(opened.cases, found.cases, table, unlabelled=unlabelled)
        shift = len(opened.cases)
        rows, extras = opened.rows, dict(opened.extras)
        if rows is not None and found.rows is not None:
            rows = pl.concat([rows, found.rows.with_columns(pl.col("case") + shift)])
        else:
            moved = found.extras["slice_places"] + np.array([shift, 0, 0, 0], np.int32)
            extras["slice_places"] = _append(extras["slice_places"], moved, Path(folder) / "all-places.npy")
            extras["slices"] = _append(extras["slices"], found.extras["slices"], Path(folder) / "all-slices.npy")
        vectors = _append(opened.read_vectors(), found.vectors, Path(folder) / "all.npy")
        return rewrite_index(opened, vectors, cases, rows, extras=extras), new


def remove_cases(index: Index | str | Path, case_ids: Sequence[str], *, cache: str | Path | None = None) -> Index:
    """Withdraws cases: no vector and no row of theirs is left in the index's files.

    What was fitted on all cases together (means, whitening) stays as it is.

    Args:
        index: An index or its folder.
        case_ids: To withdraw.
        cache: Checked to be of the index's recipe; None checks nothing.

    Raises:
        RecipeError: the cache has another recipe.
        SearchError: the index does not hold one of them, or would be left empty.
    """
    opened = index if isinstance(index, Index) else open_index(index)
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
        return rewrite_index(opened, vectors, opened.cases.filter(kept), rows, extras=extras)


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

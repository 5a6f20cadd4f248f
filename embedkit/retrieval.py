"""Owns similar cases: how a case becomes one vector, and search by case, by file or by vector on an index of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.cache import Cache, open_cache
from embedkit.embeddings import Embedding, embed_cases, name_layer
from embedkit.errors import OptionError, SearchError
from embedkit.index import Index, open_index, write_index
from embedkit.manifest import read_labels
from embedkit.matching import ORDERS, Match, Order, match_slices, measure_centres
from embedkit.queries import (
    Query,
    embed_query,
    embed_run,
    extract_query,
    load_query_backbone,
    open_slices,
    open_source,
    query_view,
    read_case_query,
    read_volume_query,
)
from embedkit.runs import open_run

__all__ = [
    "build_index",
    "embed_query",
    "extract_query",
    "join_labels",
    "load_query_backbone",
    "match_cases",
    "open_index",
    "query_view",
    "search",
]

FloatArray = NDArray[np.float32]


def build_index(
    cache: str | Path,
    out: str | Path,
    *,
    embedding: str = "mean:cls",
    run: str | Path | None = None,
    slices: str | None = None,
    labels: str | Path | pl.DataFrame | None = None,
) -> Index:
    """Makes a search index of the cases of a cache.

    Args:
        cache: Folder or packed file.
        out: The folder to write; must not exist, or be empty.
        embedding: ``mean:TOKEN_SET`` or ``grid:TOKEN_SET``; without a layer (``mean:cls``) the last one cached.
        run: A trained run whose pooled vector is used instead, so that "similar" means similar for its task.
        slices: What single slices are compared by in `match_cases`, as ``embedding``; None is the grid of the coarsest
            patch tokens cached, or else the class token.
        labels: A table by case_id whose columns are kept to filter by and to show.

    Raises:
        SearchError: the cache is empty or lacks the token set, or ``out`` exists.
        RunError: the run is damaged, or its head gives no pooled vector.
        RecipeError: the run was trained on another recipe.
    """
    source = open_cache(cache)
    if not len(source):
        raise SearchError(f"cache {source.path} holds no stack yet; extract some cases first")
    compared = Embedding.parse(name_layer(slices or _default_slices(source), source))
    where = {"cache": str(source.path.resolve()), "slices": str(compared)}
    if run is not None:
        opened = open_run(run)
        table, vectors = embed_run(opened, source)
        return write_index(
            vectors,
            join_labels(table, labels),
            embedding=f"run:{opened.name}",
            recipe=source.recipe,
            out=out,
            centre=True,
            details={
                **where,
                "run": str(Path(run).resolve()),
                "run_digest": opened.digest,
                "views": list(opened.views),
            },
            extras={"slice_centres": measure_centres(source, compared, opened.views)},
        )
    chosen = Embedding.parse(name_layer(embedding, source))
    found = embed_cases(source, chosen)
    means = found.view_means()
    return write_index(
        found.fuse(means),
        join_labels(found.cases, labels),
        embedding=str(chosen),
        recipe=source.recipe,
        out=out,
        details={**where, "views": list(found.views)},
        extras={"view_means": means, "slice_centres": measure_centres(source, compared, found.views)},
    )


def search(
    index: Index | str | Path,
    *,
    case_id: str | None = None,
    volume: str | Path | None = None,
    vector: FloatArray | None = None,
    view: str | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    k: int = 10,
    where: str | None = None,
    exclude_same: str | None = None,
) -> pl.DataFrame:
    """The cases most similar to a case of the index, to a new image, or to a vector; give exactly one of the three.

    Args:
        index: An index or its folder.
        case_id: A case that the index holds; it is not among its own results.
        volume: An image file or DICOM folder; extracted on the fly with the recipe stored in the index.
        vector: float32 [dim], made as the vectors of the index.
        view: Which view ``volume`` is; needed only where the index knows several.
        weights: For ``volume``: the backbone's local weights, as they were given to `extract`.
        device: For ``volume``: where the backbone runs.
        k: How many cases at most.
        where: A polars SQL condition on the index's columns, such as ``sex = 1 AND age < 50``.
        exclude_same: Column whose value must differ from the query's, such as ``patient_id``; with ``case_id`` only.

    Returns:
        One row per case found, most similar first: ``rank``, ``case_id``, ``patient_id``, ``similarity`` (cosine),
        and the index's further columns.

    Raises:
        SearchError: no query or several, unknown case, bad filter, or a view that the index does not know.
        VolumeError: ``volume`` cannot be read.
        RecipeError: ``weights`` are not those of the index's recipe.
    """
    opened = index if isinstance(index, Index) else open_index(index)
    given = [name for name, value in (("case", case_id), ("volume", volume), ("vector", vector)) if value is not None]
    if len(given) != 1:
        raise SearchError(
            f"search got {' and '.join(given) or 'no query'}, expected exactly one of case, volume, vector"
        )
    if exclude_same is not None and case_id is None:
        raise SearchError(f"exclude_same {exclude_same!r} needs a query that is a case of the index")
    if case_id is not None:
        found = opened.search_cases([case_id], k, where=where, exclude_same=exclude_same)
    elif volume is not None:
        query = read_volume_query(opened, Path(volume), view=view, weights=weights, device=device)
        found = opened.search(np.asarray(query.vector)[None], k, where=where)
    else:
        found = opened.search(np.asarray(vector, np.float32)[None], k, where=where)
    return found.drop("query")


def match_cases(
    index: Index | str | Path,
    query: str | Query,
    others: Sequence[str],
    *,
    cache: Cache | str | Path | None = None,
    order: Order = "free",
    by_patch: bool = False,
) -> list[Match]:
    """Says which slices of a query match which slices of other cases: why `search` found them.

    Args:
        index: An index or its folder.
        query: A case of the index, or what `embedkit.queries.read_volume_query` gives for a new image.
        others: Cases of the index.
        cache: Where the slices are read; None is the cache that was indexed.
        order: ``free``: each slice of the query takes the slice most like it; ``ordered``: places never run backwards.
        by_patch: Compare slices patch by patch, wherever in the slice they are.

    Returns:
        One match per case of ``others``, in their order.

    Raises:
        SearchError: the cache is gone or lacks a case, or two cases have no view in common.
        RecipeError: ``cache`` is not of the index's recipe.
        OptionError: another ``order``.
    """
    _check_order(order)
    opened = index if isinstance(index, Index) else open_index(index)
    source = open_source(opened, cache)
    asked = read_case_query(opened, source, query) if isinstance(query, str) else query
    reader = open_slices(opened, source)
    return [match_slices(asked.slices, reader.read(case_id), order=order, by_patch=by_patch) for case_id in others]


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise OptionError(f"order {order!r} is unknown; give {' or '.join(ORDERS)}")


def _default_slices(cache: Cache) -> str:
    """The grid of the coarsest patch tokens cached, of their deepest layer; or the class token."""
    patches = [each for each in cache.recipe.parsed_token_sets() if each.kind == "patch" and each.grid is not None]
    if not patches:
        return "mean:cls"
    return f"grid:{min(patches, key=lambda each: (each.grid, -each.layer))}"


def join_labels(table: pl.DataFrame, labels: str | Path | pl.DataFrame | None) -> pl.DataFrame:
    """The case table with the columns of a label table, null where that lacks the case."""
    if labels is None:
        return table
    frame = labels if isinstance(labels, pl.DataFrame) else read_labels(labels)
    if not set(frame["case_id"]) & set(table["case_id"]):
        raise SearchError(
            f"no case_id of the labels ({', '.join(frame['case_id'].head(3))} ...) is a case of the cache"
            f" ({', '.join(table['case_id'].head(3))} ...); spell them alike"
        )
    return table.join(frame.drop("patient_id", strict=False), on="case_id", how="left", maintain_order="left")

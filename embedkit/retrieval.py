"""Owns similar cases: search by case, by file or by vector on an index of them, and why a case was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.cache import Cache
from embedkit.errors import ExtractionError, OptionError, SearchError
from embedkit.index import Index, open_index
from embedkit.indexbuilding import join_labels
from embedkit.matching import ORDERS, Match, Order, has_votes, match_slices
from embedkit.queries import (
    Query,
    embed_query,
    extract_query,
    load_query_backbone,
    open_slices,
    open_source,
    query_view,
    read_case_query,
    read_manifest_queries,
    read_volume_query,
)
from embedkit.regions import Region
from embedkit.slicescores import score_slices
from embedkit.slicestore import SliceStore
from embedkit.textqueries import read_text_queries

__all__ = [
    "RERANKS",
    "embed_query",
    "extract_query",
    "join_labels",
    "load_query_backbone",
    "match_cases",
    "open_index",
    "query_view",
    "search",
    "search_each",
    "search_manifest",
    "search_texts",
]

FloatArray = NDArray[np.float32]

RERANKS = ("none", *ORDERS)
"""How cases found by their vectors are ranked again by their slices."""

_HITS_PER_SLICE = 64


def search(
    index: Index | str | Path,
    *,
    case_id: str | None = None,
    volume: str | Path | None = None,
    vector: FloatArray | None = None,
    query: Query | None = None,
    view: str | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    k: int = 10,
    where: str | None = None,
    exclude_same: str | None = None,
    region: Region | None = None,
    rerank: str | None = None,
    by_patch: bool = False,
    candidates: int = 100,
    cache: Cache | str | Path | None = None,
) -> pl.DataFrame:
    """The cases most similar to a case of the index, to a new image, or to a vector; give exactly one of these.

    Args:
        index: An index or its folder.
        case_id: A case that the index holds; it is not among its own results.
        volume: An image file or DICOM folder; extracted on the fly with the recipe stored in the index.
        vector: float32 [dim], made as the vectors of the index.
        query: What `embedkit.queries` read before: a case or an image that is searched for more than once.
        view: Which view ``volume`` is; needed only where the index knows several.
        weights: For ``volume``: the backbone's local weights, as they were given to `extract`.
        device: For ``volume``: where the backbone runs.
        k: How many cases at most.
        where: A polars SQL condition on the index's columns, such as ``sex = 1 AND age < 50``.
        exclude_same: Column whose value must differ from the query's, such as ``patient_id``; with a case only.
        region: A part of the query; only its patches vote. Ranks again, patch by patch.
        rerank: ``none`` ranks by the vectors, those of slices by the mean over the query's of the best that a case has
            among the nearest 64; ``free`` and ``ordered`` rank the nearest ``candidates`` again by
            their slices, as `match_cases` compares them. None is ``ordered``, which did as well as ``free``
            where that was measured; but ``none`` for a vector, and for the vectors of a run, which know its task.
        by_patch: Rank again patch by patch.
        candidates: How many cases are ranked again, at least ``k``.
        cache: Where slices are read; None is the cache that was indexed.

    Returns:
        One row per case found, most similar first: ``rank``, ``case_id``, ``patient_id``, ``similarity`` (cosine; of
        slices, where they ranked), then ``recall_rank`` (by the vectors alone), and the index's further columns.

    Raises:
        SearchError: no query or several, unknown case, bad filter, a view that the index does not know, or a region
            that it cannot search for.
        VolumeError: ``volume`` cannot be read.
        RecipeError: ``weights`` are not those of the index's recipe.
        OptionError: an option that means nothing.
    """
    opened = index if isinstance(index, Index) else open_index(index)
    rerank = _default_rerank(opened, "none" if rerank is None and vector is not None else rerank)
    votes = region is not None or (query is not None and has_votes(query.slices))
    options = _Ranking(k, where, exclude_same, rerank, by_patch or votes, candidates)
    _require_one({"case": case_id, "volume": volume, "vector": vector, "query": query})
    if exclude_same is not None and case_id is None and (query is None or query.case_id is None):
        raise SearchError(f"exclude_same {exclude_same!r} needs a query that is a case of the index")
    if vector is not None:
        return _search_vector(opened, vector, options)
    if case_id is not None and not options.by_slices and region is None and opened.level == "case":
        return opened.search_cases([case_id], k, where=where, exclude_same=exclude_same).drop("query")
    source = _open_needed(opened, cache, options)
    if case_id is not None:
        query = _read_case(opened, source, case_id, region)
    elif volume is not None:
        query = read_volume_query(opened, Path(volume), view=view, weights=weights, device=device, region=region)
    return _rank(opened, source, cast(Query, query), options)


def _search_vector(index: Index, vector: FloatArray, options: _Ranking) -> pl.DataFrame:
    if options.by_slices or index.level == "slice":
        raise SearchError("a vector has no slices to rank by: search by case or volume, or by the vector alone")
    given = np.asarray(vector)
    if given.dtype.kind not in "fiu" or given.ndim != 1:
        raise SearchError(
            f"the query vector is {given.dtype} of shape {list(given.shape)}, expected {index.dim} numbers in a row;"
            f" make it with the index's embedding, {index.embedding}"
        )
    return index.search(given[None], options.k, where=options.where).drop("query")


def _read_case(index: Index, source: Cache | None, case_id: str, region: Region | None) -> Query:
    """A case of the index as a query: from the cache where patches are needed, else from what the index keeps."""
    if source is not None:
        return read_case_query(index, source, case_id, region=region)
    (number,) = index.number_cases([case_id])
    return Query(case_id, case_id, None, _open_store(index).read(number), None)


def _open_needed(index: Index, cache: Cache | str | Path | None, options: _Ranking) -> Cache | None:
    """The cache where a search needs its patches, or where it was given; else what the index keeps is enough."""
    needed = options.by_patch or index.level == "slice" or cache is not None
    return open_source(index, cache) if needed else None


@dataclass(frozen=True)
class _Ranking:
    """The options of `search` that are not the query."""

    k: int
    where: str | None
    exclude_same: str | None
    rerank: str
    by_patch: bool
    candidates: int

    def __post_init__(self) -> None:
        if self.rerank not in RERANKS:
            raise OptionError(f"rerank {self.rerank!r} is unknown; give {', '.join(RERANKS)}")
        if self.k < 1:
            raise SearchError(f"k is {self.k}, expected at least 1 case")
        if self.candidates < 1:
            raise OptionError(f"candidates is {self.candidates}, expected at least 1 case")

    @property
    def by_slices(self) -> bool:
        return self.rerank != "none" or self.by_patch

    @property
    def order(self) -> Order:
        return "ordered" if self.rerank == "ordered" else "free"


def _rank(index: Index, source: Cache | None, query: Query, options: _Ranking) -> pl.DataFrame:
    """The cases most like a query: by the vectors, then by the slices where that is asked for."""
    found = _recall(index, query, max(options.k, options.candidates) if options.by_slices else options.k, options)
    if not options.by_slices or found.is_empty():
        return found
    scores = _score(index, source, query, found["case_id"].to_list(), options)
    ranked = found.rename({"rank": "recall_rank"}).with_columns(similarity=pl.Series(scores))
    ranked = ranked.sort("similarity", descending=True, maintain_order=True).head(min(options.k, len(ranked)))
    return ranked.select(
        pl.int_range(1, pl.len() + 1).alias("rank"),
        "case_id",
        "patient_id",
        "similarity",
        "recall_rank",
        pl.exclude("case_id", "patient_id", "similarity", "recall_rank"),
    )


def _recall(index: Index, query: Query, wanted: int, options: _Ranking) -> pl.DataFrame:
    """The cases that the vectors find, most similar first."""
    excluded = index.find_same(query.case_id, options.exclude_same) if query.case_id is not None else []
    if index.level == "slice":
        return _recall_by_slices(index, query, wanted, options.where, excluded)
    if query.vector is not None:
        found = index.search(query.vector[None], wanted, where=options.where, exclude_case_ids=excluded)
    else:
        own = [cast(str, query.case_id)]
        found = index.search_cases(own, wanted, where=options.where, exclude_same=options.exclude_same)
    return found.drop("query")


def _score(index: Index, source: Cache | None, query: Query, case_ids: Sequence[str], options: _Ranking) -> FloatArray:
    """How alike the query is to cases of the index: by vectors that the index keeps, or by patches from the cache."""
    if options.by_patch or (source is not None and index.level == "slice"):
        reader = open_slices(index, cast(Cache, source))
        others = [reader.read(case_id) for case_id in case_ids]
        return score_slices(query.slices, others, order=options.order, by_patch=options.by_patch)
    return _open_store(index).score(query.slices, index.number_cases(case_ids), order=options.order)


def _open_store(index: Index) -> SliceStore:
    return SliceStore(index.extras["slices"], index.extras["slice_places"], index.details["views"])


def _recall_by_slices(
    index: Index, query: Query, wanted: int, where: str | None, excluded: Sequence[str]
) -> pl.DataFrame:
    """Candidates from an index of slices: the cases whose slices the slices of the query find, best sum first."""
    vectors = np.concatenate([stack.vectors for stack in query.slices.values()])
    hits = index.search(vectors, _HITS_PER_SLICE, where=where, exclude_case_ids=excluded)
    best = hits.group_by("query", "case_id", maintain_order=True).agg(pl.col("similarity").max())
    cases = best.group_by("case_id", maintain_order=True).agg(similarity=pl.col("similarity").sum() / len(vectors))
    cases = cases.sort("similarity", descending=True, maintain_order=True).head(wanted)
    table = cases.join(index.cases, on="case_id", how="left", maintain_order="left")
    return table.select(
        pl.int_range(1, pl.len() + 1).alias("rank"),
        "case_id",
        "patient_id",
        "similarity",
        pl.exclude("case_id", "patient_id", "similarity"),
    )


def _require_one(given: Mapping[str, object]) -> None:
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise SearchError(f"search got {' and '.join(names) or 'no query'}, expected exactly one of {', '.join(given)}")


def search_each(
    index: Index,
    case_ids: Sequence[str],
    *,
    k: int = 10,
    where: str | None = None,
    exclude_same: str | None = None,
    rerank: str | None = None,
    by_patch: bool = False,
    candidates: int = 100,
    cache: Cache | str | Path | None = None,
) -> pl.DataFrame:
    """The cases most similar to each of many cases of an index; the arguments are those of `search`.

    Returns:
        As `search`, with ``query``, the place in ``case_ids``, in front.

    Raises:
        SearchError, RecipeError, OptionError: as `search`.
    """
    options = _Ranking(k, where, exclude_same, _default_rerank(index, rerank), by_patch, candidates)
    if not options.by_slices and index.level == "case":
        return index.search_cases(case_ids, k, where=where, exclude_same=exclude_same)
    source = _open_needed(index, cache, options)
    frames = [
        _rank(index, source, _read_case(index, source, case_id, None), options).select(
            pl.lit(place, pl.Int64).alias("query"), pl.all()
        )
        for place, case_id in enumerate(case_ids)
    ]
    return pl.concat(frames) if frames else pl.DataFrame(schema={"query": pl.Int64})


def _default_rerank(index: Index, rerank: str | None) -> str:
    """What ranks again where nothing was said: not the vectors of a run, which know its task."""
    return rerank or ("none" if "run" in index.details else "ordered")


def search_manifest(
    index: Index | str | Path,
    manifest: str | Path | pl.DataFrame,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    k: int = 10,
    where: str | None = None,
    rerank: str | None = None,
    by_patch: bool = False,
    candidates: int = 100,
    cache: Cache | str | Path | None = None,
    on_failure: Callable[[str, str], None] | None = None,
) -> pl.DataFrame:
    """The cases most similar to each new case of a manifest, extracted on the fly.

    Args:
        index, weights, device, k, where, rerank, by_patch, candidates, cache: As in `search`.
        manifest: As `embedkit.extract` takes it; a case may have any of the index's views.
        on_failure: Told each case that could not be read, and why; None stops with it, once all others are done.

    Returns:
        As `search`, with ``query``, the case of the manifest, in front.

    Raises:
        SearchError, RecipeError, OptionError: as `search`.
        ManifestError: the manifest is unreadable or contradicts itself.
        ExtractionError: cases could not be read, and ``on_failure`` is None.
    """
    opened = index if isinstance(index, Index) else open_index(index)
    failed: list[str] = []

    def note(case_id: str, reason: str) -> None:
        failed.append(f"{case_id}: {reason}")

    asked = read_manifest_queries(opened, manifest, weights=weights, device=device, on_failure=on_failure or note)
    frames = [
        search(
            opened,
            query=query,
            k=k,
            where=where,
            rerank=rerank,
            by_patch=by_patch,
            candidates=candidates,
            cache=cache,
        ).select(pl.lit(query.name).alias("query"), pl.all())
        for query in asked
    ]
    if failed:
        raise ExtractionError(f"{len(failed)} cases of the manifest cannot be queries: {'; '.join(failed[:3])}")
    return pl.concat(frames) if frames else pl.DataFrame({"query": []}, schema={"query": pl.String})


def search_texts(
    index: Index | str | Path,
    texts: Sequence[str],
    vectors: str | Path | NDArray[np.floating] | None,
    *,
    shared_space: bool = False,
    k: int = 10,
    where: str | None = None,
) -> pl.DataFrame:
    """The cases most like each of some texts: by the cosine of the text's vector and the case's less its view's mean.

    Args:
        index: An index of plain means (``mean:cls``, not whitened), or its folder.
        texts: What the vectors are of.
        vectors, shared_space: As in `embedkit.textqueries.read_text_queries`.
        k, where: As in `search`.

    Returns:
        As `search` without a rerank, with ``query``, the text, in front.

    Raises:
        SearchError: the index and the vectors do not share a space, as far as can be told; a bad filter.
        HeadError: the vectors cannot be read.
    """
    opened = index if isinstance(index, Index) else open_index(index)
    found = opened.search(read_text_queries(opened, texts, vectors, shared_space=shared_space), k, where=where)
    return found.with_columns(query=pl.Series(list(texts), dtype=pl.String).gather(found["query"]))


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
        by_patch: Compare slices patch by patch, wherever in the slice they are; so is a region of a query always.

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
    by_patch = by_patch or has_votes(asked.slices)
    return [match_slices(asked.slices, reader.read(case_id), order=order, by_patch=by_patch) for case_id in others]


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise OptionError(f"order {order!r} is unknown; give {' or '.join(ORDERS)}")

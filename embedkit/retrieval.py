"""Owns similar cases: search by case, by file or by vector on an index of them, and why a case was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.cache import Cache
from embedkit.errors import ExtractionError, OptionError, SearchError
from embedkit.index import Index, open_index
from embedkit.matching import ORDERS, Match, Order, has_votes, match_slices
from embedkit.queries import Query, open_slices, open_source, read_case_query
from embedkit.ranking import RERANKS, Ranking, find_by_slices, list_excluded, open_store, rank_cases
from embedkit.regions import Region
from embedkit.textqueries import embed_text_queries, read_text_queries

__all__ = [
    "RERANKS",
    "match_cases",
    "open_index",
    "search",
    "search_each",
    "search_manifest",
    "search_texts",
]

FloatArray = NDArray[np.float32]


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
    exclude_value: object = None,
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
        vector: float32 [dim], made as the vectors of the index; where these are of slices, a slice's.
        query: What `embedkit.queries` read before: a case or an image that is searched for more than once.
        view: Which view ``volume`` is; needed only where the index knows several.
        weights: For ``volume``: the backbone's local weights, as they were given to `extract`.
        device: For ``volume``: where the backbone runs.
        k: How many cases at most.
        where: A polars SQL condition on the index's columns, such as ``sex = 1 AND age < 50``.
        exclude_same: Column whose value must differ from the query's, such as ``patient_id``.
        exclude_value: The query's value there, where it is no case of the index: the patient of a new image. What
            ``query`` knows of itself is used where this is None.
        region: A part of the query; only its patches vote. Ranks again, patch by patch.
        rerank: ``none`` ranks by the vectors, those of slices by the mean over the query's of the best that a case has
            among the nearest 64 or more; ``free`` and ``ordered`` rank the nearest ``candidates`` again by
            their slices, as `match_cases` compares them; ``both`` by the mean of ``none`` and ``ordered``. None is
            ``ordered``, which by a little did best in `docs/retrieval.md` on patients that nothing was fitted on; but
            ``none`` for a vector, and for the vectors of a run, which know its task.
        by_patch: Rank again patch by patch.
        candidates: How many cases are ranked again, at least ``k``.
        cache: Where slices are read; None is the cache that was indexed.

    Returns:
        One row per case found, most similar first: ``rank``, ``case_id``, ``patient_id``, ``similarity`` (cosine; of
        slices, where they ranked), then ``recall_rank`` (by the vectors alone; of ``both`` also
        ``vectors_similarity``), and the index's further columns.

    Raises:
        SearchError: no query or several, unknown case, bad filter, a view that the index does not know, or a region
            that it cannot search for.
        VolumeError: ``volume`` cannot be read.
        RecipeError: ``weights`` are not those of the index's recipe.
        OptionError: an option that means nothing.

    Warns:
        StrayWarning: a damaged DICOM file lies beside ``volume`` and may be a slice of it.
    """
    opened = index if isinstance(index, Index) else open_index(index)
    _require_one({"case": case_id, "volume": volume, "vector": vector, "query": query})
    votes = region is not None or (query is not None and has_votes(query.slices))
    options = Ranking.for_index(
        opened,
        k=k,
        where=where,
        exclude_same=exclude_same,
        rerank="none" if rerank is None and vector is not None else rerank,
        by_patch=by_patch or votes,
        candidates=candidates,
    )
    own = case_id if query is None else query.case_id
    known = _tell_known(own, exclude_same, exclude_value)
    if vector is not None:
        return _search_vector(opened, vector, options, known)
    if case_id is not None and not options.by_slices and region is None and opened.level == "case":
        return opened.search_cases([case_id], k, where=where, exclude_same=exclude_same).drop("query")
    source = _open_needed(opened, cache, options)
    if case_id is not None:
        query = _read_case(opened, source, case_id, region)
    elif volume is not None:
        from embedkit.imagequeries import read_volume_query  # loads what extracts, which no other query needs

        list_excluded(opened, exclude_same, known=known)  # says what is wrong before anything is computed
        query = read_volume_query(opened, Path(volume), view=view, weights=weights, device=device, region=region)
    asked = cast(Query, query)
    return rank_cases(opened, source, replace(asked, known={**asked.known, **known}), options)


def _tell_known(case_id: str | None, exclude_same: str | None, exclude_value: object) -> dict[str, object]:
    """What the caller tells of a query that is no case of the index."""
    if exclude_value is None:
        return {}
    if exclude_same is None:
        raise SearchError(f"exclude_value {exclude_value!r} is of no column; name it (exclude_same)")
    if case_id is not None:
        raise SearchError(
            f"exclude_value {exclude_value!r}: case {case_id} of the index has its own {exclude_same}; leave the value"
            f" out (--exclude-same {exclude_same})"
        )
    return {exclude_same: exclude_value}


def _search_vector(index: Index, vector: FloatArray, options: Ranking, known: Mapping[str, object]) -> pl.DataFrame:
    if options.by_slices:
        raise SearchError("a vector has no slices to rank by: search by case or volume, or by the vector alone")
    given = np.asarray(vector)
    if given.dtype.kind not in "fiu" or given.ndim != 1:
        raise SearchError(
            f"the query vector is {given.dtype} of shape {list(given.shape)}, expected {index.dim} numbers in a row;"
            f" make it with the index's embedding, {index.embedding}"
        )
    excluded = list_excluded(index, options.exclude_same, known=known)
    if index.level == "slice":
        return find_by_slices(index, given[None], options.k, where=options.where, excluded=excluded)
    return index.search(given[None], options.k, where=options.where, exclude_case_ids=excluded).drop("query")


def _read_case(index: Index, source: Cache | None, case_id: str, region: Region | None) -> Query:
    """A case of the index as a query: from the cache where patches are needed, else from what the index keeps."""
    if source is not None:
        return read_case_query(index, source, case_id, region=region)
    (number,) = index.number_cases([case_id])
    return Query(case_id, case_id, None, open_store(index, [number]).read(number), None)


def _open_needed(index: Index, cache: Cache | str | Path | None, options: Ranking) -> Cache | None:
    """The cache where a search needs its patches, or where it was given; else what the index keeps is enough."""
    needed = options.by_patch or cache is not None
    return open_source(index, cache) if needed else None


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
    options = Ranking.for_index(
        index,
        k=k,
        where=where,
        exclude_same=exclude_same,
        rerank=rerank,
        by_patch=by_patch,
        candidates=candidates,
    )
    if not options.by_slices and index.level == "case":
        return index.search_cases(case_ids, k, where=where, exclude_same=exclude_same)
    source = _open_needed(index, cache, options)
    frames = [
        rank_cases(index, source, _read_case(index, source, case_id, None), options).select(
            pl.lit(place, pl.Int64).alias("query"), pl.all()
        )
        for place, case_id in enumerate(case_ids)
    ]
    return pl.concat(frames) if frames else pl.DataFrame(schema={"query": pl.Int64})


def search_manifest(
    index: Index | str | Path,
    manifest: str | Path | pl.DataFrame,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    k: int = 10,
    where: str | None = None,
    exclude_same: str | None = None,
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
        exclude_same: As in `search`; the manifest must have the column.
        on_failure: Told each case that could not be read, and why; None stops with it, once all others are done.

    Returns:
        As `search`, with ``query``, the case of the manifest, in front.

    Raises:
        SearchError, RecipeError, OptionError: as `search`.
        ManifestError: the manifest is unreadable or contradicts itself.
        ExtractionError: cases could not be read, and ``on_failure`` is None.
    """
    from embedkit.batchqueries import read_manifest_queries

    opened = index if isinstance(index, Index) else open_index(index)
    failed: list[str] = []

    def note(case_id: str, reason: str) -> None:
        failed.append(f"{case_id}: {reason}")

    if exclude_same is not None:
        opened.group_cases(exclude_same)  # says what is wrong with the column before anything is computed
    asked = read_manifest_queries(
        opened, manifest, weights=weights, device=device, needed=exclude_same, on_failure=on_failure or note
    )
    frames = [
        search(
            opened,
            query=query,
            k=k,
            where=where,
            exclude_same=exclude_same,
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
    vectors: str | Path | NDArray[np.floating] | None = None,
    *,
    shared_space: bool = False,
    model: str | None = None,
    weights: str | Path | None = None,
    k: int = 10,
    where: str | None = None,
) -> pl.DataFrame:
    """The cases most like each of some texts: by cosine with the case's mean token less that of its view.

    With a model both are compared as CLIP compares them, where the image tower's last projection leads, and every case
    is. With ``vectors`` they are compared where the tokens are: a text's vector t, given as W^T t for a projection W,
    has another cosine there, so that ranks can differ from the model's.

    Args:
        index: An index of plain means (``mean:cls``, not whitened), or its folder.
        texts: What is looked for.
        vectors, shared_space: As in `embedkit.textqueries.read_text_queries`.
        model, weights: In their place the open_clip model whose image tower is the backbone, and the weights of both of
            its towers; see `embedkit.texttowers.embed_paired_texts`.
        k, where: As in `search`.

    Returns:
        As `search` without a rerank, with ``query``, the text, in front.

    Raises:
        SearchError: the index and the texts do not share a space, as far as can be told; vectors and a model, or a
            model without weights; a bad filter.
        HeadError: the vectors cannot be read.
        BackboneError: the model's image tower does not fit the backbone.
    """
    opened = index if isinstance(index, Index) else open_index(index)
    if model is None and weights is None:
        asked = read_text_queries(opened, texts, vectors, shared_space=shared_space)
        found = opened.search(asked, k, where=where)
    elif model is None or weights is None:
        given, lacking = ("weights", "--text-model") if model is None else (f"model {model}", "--text-weights")
        raise SearchError(f"a text tower needs its model and the weights of both towers; beside {given} give {lacking}")
    elif vectors is not None or shared_space:
        raise SearchError(
            f"texts are read by {model} or given as vectors (--text-vectors, --shared-space), not both; leave one away"
        )
    else:
        paired = embed_text_queries(opened, texts, model, weights)
        found = opened.search_projected(paired.vectors, paired.projection, k, where=where)
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
    reader = open_slices(opened, source, others)
    by_patch = by_patch or has_votes(asked.slices)
    return [match_slices(asked.slices, reader.read(case_id), order=order, by_patch=by_patch) for case_id in others]


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise OptionError(f"order {order!r} is unknown; give {' or '.join(ORDERS)}")

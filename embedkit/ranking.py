"""Owns the ranking of cases for one query: its options, recall by vectors, and the rerank by slices or patches.

Reads no query and no file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.cache import Cache
from embedkit.errors import OptionError, SearchError
from embedkit.index import Index
from embedkit.matching import ORDERS, Order
from embedkit.queries import Query, open_slices
from embedkit.slicescores import score_slices
from embedkit.slicestore import SliceStore

__all__ = ["RERANKS", "Ranking", "find_by_slices", "list_excluded", "open_store", "rank_cases"]

FloatArray = NDArray[np.float32]

RERANKS = ("none", *ORDERS, "both")
"""How cases found by their vectors are ranked again by their slices; ``both`` by the mean of the cosine of the vectors
and of the ordered similarity of the slices, a plain sum of scores (CombSUM; Fox and Shaw 1994)."""

_HITS_PER_SLICE = 64


@dataclass(frozen=True)
class Ranking:
    """The options of `embedkit.search` that are not the query; `for_index` fills in what was not said."""

    k: int
    where: str | None
    exclude_same: str | None
    rerank: str
    by_patch: bool
    candidates: int
    level: str

    @classmethod
    def for_index(
        cls,
        index: Index,
        *,
        k: int = 10,
        where: str | None = None,
        exclude_same: str | None = None,
        rerank: str | None = None,
        by_patch: bool = False,
        candidates: int = 100,
    ) -> Self:
        """The options on an index.

        Without a word slices or patches rank again in order; but the vectors of a run, which know its task, are not
        ranked again.

        Raises:
            OptionError, SearchError: an option that means nothing.
        """
        usual = "none" if "run" in index.details else "ordered"
        said = usual if rerank is None else rerank
        return cls(k, where, exclude_same, said, by_patch, candidates, index.level)

    def __post_init__(self) -> None:
        if self.rerank not in RERANKS:
            raise OptionError(f"rerank {self.rerank!r} is unknown; give {', '.join(RERANKS)}")
        if self.k < 1:
            raise SearchError(f"k is {self.k}, expected at least 1 case")
        if self.candidates < 1:
            raise OptionError(f"candidates is {self.candidates}, expected at least 1 case")

    @property
    def by_slices(self) -> bool:
        """Whether slices rank, and not the vectors alone."""
        return self.rerank != "none" or self.by_patch

    @property
    def order(self) -> Order:
        """How slices choose: as they rank, and in order where they only tell why, since vectors of cases ranked."""
        explains = self.rerank == "none" and not self.by_patch and self.level == "case"
        return "ordered" if self.rerank in ("ordered", "both") or explains else "free"


def rank_cases(index: Index, source: Cache | None, query: Query, options: Ranking) -> pl.DataFrame:
    """The cases most like a query: by the vectors, then by the slices where that is asked for."""
    found = _recall(index, query, max(options.k, options.candidates) if options.by_slices else options.k, options)
    if not options.by_slices or found.is_empty():
        return found
    scores = _score(index, source, query, found["case_id"].to_list(), options)
    ranked = found.rename({"rank": "recall_rank"})
    beside = []
    if options.rerank == "both":
        ranked, beside = ranked.with_columns(vectors_similarity="similarity"), ["vectors_similarity"]
        scores = (scores + ranked["similarity"].to_numpy()) / 2
    ranked = ranked.with_columns(similarity=pl.Series(scores))
    ranked = ranked.sort("similarity", descending=True, maintain_order=True).head(min(options.k, len(ranked)))
    return ranked.select(
        pl.int_range(1, pl.len() + 1).alias("rank"),
        "case_id",
        "patient_id",
        "similarity",
        "recall_rank",
        *beside,
        pl.exclude("case_id", "patient_id", "similarity", "recall_rank", *beside),
    )


def _recall(index: Index, query: Query, wanted: int, options: Ranking) -> pl.DataFrame:
    """The cases that the vectors find, most similar first."""
    excluded = list_excluded(index, options.exclude_same, case_id=query.case_id, known=query.known)
    if index.level == "slice":
        return _recall_by_slices(index, query, wanted, options.where, excluded)
    if query.vector is not None:
        found = index.search(query.vector[None], wanted, where=options.where, exclude_case_ids=excluded)
    else:
        own = [cast(str, query.case_id)]
        found = index.search_cases(own, wanted, where=options.where, exclude_same=options.exclude_same)
    return found.drop("query")


def list_excluded(
    index: Index, column: str | None, *, case_id: str | None = None, known: Mapping[str, object] | None = None
) -> list[str]:
    """The cases that a query may not find: itself, and those with its value in a column.

    Args:
        index: What is searched.
        column: None leaves out the query alone.
        case_id: The query, where the index holds it.
        known: Else what is known of it, by column.

    Raises:
        SearchError: no such column; the query is no case of the index and nobody told its value; no such value.
    """
    if case_id is not None:
        return index.find_same(case_id, column)
    if column is None:
        return []
    index.group_cases(column)  # says what is wrong with the column
    if column not in (known or {}):
        raise SearchError(
            f"exclude_same {column!r} leaves out cases with the query's value, but the query is no case of the index;"
            f" say its value (--exclude-same {column}=VALUE)"
        )
    value, values = (known or {})[column], index.cases[column]
    try:
        wanted = pl.Series([value]).cast(values.dtype)
    except (pl.exceptions.PolarsError, TypeError, OverflowError) as error:
        raise SearchError(
            f"exclude_same: {value!r} is no value of column {column!r}, which holds {values.dtype}; give one such as"
            f" {values.drop_nulls().first()!r}"
        ) from error
    return cast(list[str], index.cases["case_id"].filter((values == wanted[0]).fill_null(False)).to_list())


def _score(index: Index, source: Cache | None, query: Query, case_ids: Sequence[str], options: Ranking) -> FloatArray:
    """How alike the query is to cases of the index: by vectors that the index keeps, or by patches from the cache."""
    if options.by_patch:
        reader = open_slices(index, cast(Cache, source), case_ids)
        others = [reader.read(case_id, patches_alone=True) for case_id in case_ids]
        return score_slices(query.slices, others, order=options.order, by_patch=True)
    numbers = index.number_cases(case_ids)
    return open_store(index, numbers).score(query.slices, numbers, order=options.order)


def open_store(index: Index, numbers: Sequence[int]) -> SliceStore:
    """The slices that an index keeps, of the cases of these numbers at least."""
    views = index.details["views"]
    if index.rows is None:
        return SliceStore(index.extras["slices"], index.extras["slice_places"], views)
    owners, wanted = index.rows["case"].to_numpy(), np.unique(np.asarray(numbers, np.int64))
    starts, stops = np.searchsorted(owners, wanted), np.searchsorted(owners, wanted, "right")
    chosen = np.concatenate([np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)])
    number_of = {name: number for number, name in enumerate(views)}
    places = np.array(
        [
            (case, number_of[f"{view}/{plane}"], row, slice_)
            for case, view, plane, row, slice_ in index.rows[chosen].iter_rows()
        ],
        np.int32,
    )
    return SliceStore(index.read_vectors()[chosen], places.reshape(-1, 4), views)


def _recall_by_slices(
    index: Index, query: Query, wanted: int, where: str | None, excluded: Sequence[str]
) -> pl.DataFrame:
    """Candidates from an index of slices: the cases whose slices the slices of the query find."""
    if not query.slices:
        raise SearchError(f"every slice of {query.name} is blank, so there is nothing to search for")
    return find_by_slices(
        index,
        np.concatenate([stack.vectors for stack in query.slices.values()]),
        wanted,
        where=where,
        excluded=excluded,
    )


def find_by_slices(
    index: Index, vectors: FloatArray, wanted: int, *, where: str | None, excluded: Sequence[str]
) -> pl.DataFrame:
    """The cases whose slices the vectors of slices find in an index of slices, those of the best sum first.

    Each vector finds 64 slices at first, then twice as many until the cases suffice, or there are no more.

    Args:
        index: Of slices.
        vectors: float32 [slices dim].
        wanted: How many cases.
        where, excluded: As `Index.search` takes them.
    """
    hits_per_slice, found = _HITS_PER_SLICE, -1
    while True:
        hits = index.search(vectors, hits_per_slice, where=where, exclude_case_ids=excluded)
        if hits["case_id"].n_unique() >= wanted or len(hits) == found or hits_per_slice >= index.count:
            break
        hits_per_slice, found = 2 * hits_per_slice, len(hits)
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

"""Owns the judgement of an index: how often a search finds cases that share a value, with intervals over patients.

The formulas are those of `embedkit.retrievalmetrics`; draws no picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.bootstrap import Floats, Interval, Statistic, bootstrap_values, form_interval
from embedkit.cache import Cache
from embedkit.errors import OptionError, SearchError
from embedkit.formulas import weigh_balanced_accuracy, weigh_mean
from embedkit.index import Index, open_index
from embedkit.retrieval import search_each
from embedkit.retrievalmetrics import (
    average_precision,
    ndcg,
    precision_at,
    recall_at,
    reciprocal_rank,
    vote_nearest,
)

__all__ = ["SearchScores", "evaluate_search"]

RowArray = NDArray[np.int64]

_DEPTH = 100
_MOST_CLASSES = 50


@dataclass(frozen=True, eq=False)
class SearchScores:
    """What the searches of an index are worth.

    Attributes:
        table: A row per group and measure: ``group`` (null: all queries), ``measure``, ``value``, ``low``, ``high``
            (95%, patients of the queries resampled, the index as it is), ``queries``, ``patients``.
        queries: A row per query: ``case_id``, ``patient_id``, ``group``, ``relevant`` (how many cases share its
            value), ``first`` (place of the first of them; null if none was found).
        skipped: How many cases were no queries, since they have no value or no other case shares it.
        depth: How long the lists were.
    """

    table: pl.DataFrame
    queries: pl.DataFrame
    skipped: int
    depth: int


@dataclass(frozen=True, eq=False)
class _Lists:
    """The ranked list of each query.

    Attributes:
        own: Row of each query, [queries].
        rows: Row of the case at each place, [queries depth]; -1 where the list has ended.
        codes: Number of the value of every case, [cases]; -1 without.
        relevant: How many cases share the query's value, [queries].
        allowed: How many cases could be found, [queries].
    """

    own: RowArray
    rows: RowArray
    codes: RowArray
    relevant: RowArray
    allowed: RowArray

    def select(self, kept: NDArray[np.bool_]) -> _Lists:
        return _Lists(self.own[kept], self.rows[kept], self.codes, self.relevant[kept], self.allowed[kept])


def evaluate_search(
    index: Index | str | Path,
    *,
    relevant: str,
    k: Sequence[int] = (1, 5, 10),
    by: str | None = None,
    where: str | None = None,
    exclude_same: str | None = None,
    rerank: str | None = None,
    by_patch: bool = False,
    candidates: int = 100,
    cache: Cache | str | Path | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> SearchScores:
    """How well an index finds cases that share a value with the query; every case is a query, none finds itself.

    - ``precision@k``, ``recall@k`` for each k; ``chance`` is the precision of a list in random order.
    - ``map``, ``ndcg``, ``mrr`` of lists of 100 places, or of the largest k where it is more; a case beyond is not
      found.
    - ``knn_accuracy@k``, ``knn_balanced_accuracy@k``: the value that most of the k nearest have is taken for the
      query's. Only where there are at most 50 values, and two or more.

    Args:
        index: An index or its folder.
        relevant: A column of the index; cases with the query's value there are relevant.
        k: Places at which precision, recall and votes are taken.
        by: A column of the index; queries of each of its values are also judged apart.
        where, exclude_same, rerank, by_patch, candidates, cache: As in `embedkit.search`; ``where`` says which cases
            may be found, not which are queries.
        resamples: Of the bootstrap over the patients of the queries; 0 leaves the limits NaN.
        seed: Of the bootstrap.

    Raises:
        SearchError: no such column, no value that two cases share, a bad filter, or what `embedkit.search` raises.
        OptionError: an option that means nothing.
    """
    opened = index if isinstance(index, Index) else open_index(index)
    if not k or min(k) < 1 or candidates < 1 or resamples < 0 or seed < 0:
        raise OptionError(
            f"k is {', '.join(map(str, k)) or 'empty'}, candidates {candidates}, resamples {resamples}, seed {seed};"
            " expected some k and candidates of at least 1, resamples and seed of 0 or more"
        )
    groups = None if by is None else _name_groups(opened, by)
    queries = _list_queries(opened, relevant, where, exclude_same)
    depth = max(_DEPTH, *(min(each, len(opened)) for each in k))
    found = search_each(
        opened,
        opened.cases["case_id"].gather(queries.own).to_list(),
        k=depth,
        where=where,
        exclude_same=exclude_same,
        rerank=rerank,
        by_patch=by_patch,
        candidates=max(candidates, depth),
        cache=cache,
    )
    lists = replace(queries, rows=_fill_rows(opened, found, len(queries.own), depth))
    table = _judge_parts(opened, lists, groups, sorted(set(k)), resamples=resamples, seed=seed)
    return SearchScores(table, _describe_queries(opened, lists, groups), len(opened) - len(lists.own), depth)


def _list_queries(index: Index, relevant: str, where: str | None, exclude_same: str | None) -> _Lists:
    """The queries, their lists still empty; at least one."""
    codes = _number_values(index, relevant)
    queries = _count_relevant(index, codes, index.select_cases(where), exclude_same)
    if not len(queries.own):
        raise SearchError(
            f"no case shares its {relevant} with another that may be found, so no search can be right; name a column"
            " of values that repeat, or allow more cases (where, exclude_same)"
        )
    return queries


def _judge_parts(
    index: Index, lists: _Lists, groups: pl.Series | None, ks: Sequence[int], *, resamples: int, seed: int
) -> pl.DataFrame:
    """The measures of all queries, then of each group."""
    parts: list[tuple[str | None, NDArray[np.bool_]]] = [(None, np.ones(len(lists.own), bool))]
    if groups is not None:
        mine = groups.gather(lists.own)
        parts += [(str(name), (mine == name).to_numpy()) for name in sorted(mine.unique())]
    patients = index.cases["patient_id"].cast(pl.String)
    rows = [
        row
        for name, part in parts
        for row in _judge(name, lists.select(part), patients, ks, resamples=resamples, seed=seed)
    ]
    return pl.DataFrame(rows, schema_overrides={"group": pl.String})


def _column(index: Index, name: str, option: str) -> pl.Series:
    if name not in index.cases.columns:
        raise SearchError(
            f"{option} names {name!r}, but the cases of index {index.path} have {', '.join(index.cases.columns)};"
            " build the index with a table of labels that has it"
        )
    return index.cases[name]


def _number_values(index: Index, name: str) -> RowArray:
    """A number per case, equal for equal values, -1 without a value."""
    values = _column(index, name, "relevant")
    try:
        ranks = values.fill_nan(None).rank("dense") if values.dtype.is_float() else values.rank("dense")
    except pl.exceptions.PolarsError as error:
        raise SearchError(f"relevant cannot compare column {name!r} of type {values.dtype}") from error
    return ranks.cast(pl.Int64).fill_null(0).to_numpy() - 1


def _name_groups(index: Index, name: str) -> pl.Series:
    values = _column(index, name, "by").cast(pl.String, strict=False).fill_null("unknown")
    if values.n_unique() > _MOST_CLASSES:
        raise SearchError(
            f"by names {name!r}, which has {values.n_unique()} different values, expected {_MOST_CLASSES} or fewer"
            " to form groups of queries"
        )
    return values


def _count_relevant(index: Index, codes: RowArray, allowed: NDArray[np.bool_], exclude_same: str | None) -> _Lists:
    """The queries: cases with a value that some other case which may be found shares; their lists still empty."""
    same = index.group_cases(exclude_same)
    own = np.arange(len(index))
    group = np.where(same >= 0, same, same.max(initial=-1) + 1 + own)  # a case without a value is alone
    _, alike = np.unique(np.stack([group, codes]), axis=1, return_inverse=True)
    relevant = _count_members(codes, allowed) - _count_members(alike.reshape(-1), allowed)
    free = allowed.sum() - _count_members(group, allowed)
    queries = np.flatnonzero((codes >= 0) & (relevant > 0))
    return _Lists(queries, np.empty((len(queries), 0), np.int64), codes, relevant[queries], free[queries])


def _count_members(numbers: RowArray, allowed: NDArray[np.bool_]) -> RowArray:
    """For each case how many that are allowed have its number, int64 [cases]."""
    shifted = numbers - numbers.min(initial=0)
    return np.asarray(np.bincount(shifted[allowed], minlength=int(shifted.max(initial=0)) + 1)[shifted])


def _fill_rows(index: Index, found: pl.DataFrame, queries: int, depth: int) -> RowArray:
    rows = np.full((queries, depth), -1, np.int64)
    places = np.array(index.number_cases(found["case_id"].to_list()), np.int64)
    rows[found["query"].to_numpy(), found["rank"].to_numpy() - 1] = places
    return rows


def _judge(
    group: str | None, lists: _Lists, patients: pl.Series, ks: Sequence[int], *, resamples: int, seed: int
) -> Iterator[dict[str, object]]:
    """A row of the table for every measure of some queries."""
    mine = patients.gather(lists.own).to_list()
    statistics = _statistics(lists, ks)
    resampled = bootstrap_values(statistics, mine, resamples=resamples, seed=seed)
    plain = np.ones((1, len(mine)))
    for name, statistic in statistics.items():
        found: Interval = form_interval(float(statistic(plain)[0]), resampled[name], mine)
        yield {
            "group": group,
            "measure": name,
            "value": found.value,
            "low": found.low,
            "high": found.high,
            "queries": len(mine),
            "patients": len(set(mine)),
        }


def _statistics(lists: _Lists, ks: Sequence[int]) -> dict[str, Statistic]:
    own = lists.codes[lists.own]
    hits = _find_hits(lists)
    values: dict[str, Floats] = {f"precision@{k}": precision_at(hits, k) for k in ks}
    values |= {f"recall@{k}": recall_at(hits, lists.relevant, k) for k in ks}
    values["map"] = average_precision(hits, lists.relevant)
    values["ndcg"] = ndcg(hits, lists.relevant)
    values["mrr"] = reciprocal_rank(hits)
    values["chance"] = lists.relevant / lists.allowed
    statistics = {name: weigh_mean(each) for name, each in values.items()}
    classes = np.unique(own)
    if 2 <= len(classes) <= _MOST_CLASSES:
        codes = np.where(lists.rows >= 0, lists.codes[lists.rows], -1)
        for k in ks:
            voted = vote_nearest(codes, k)
            statistics[f"knn_accuracy@{k}"] = weigh_mean((voted == own).astype(np.float64))
            statistics[f"knn_balanced_accuracy@{k}"] = weigh_balanced_accuracy(
                own[:, None] == classes, voted[:, None] == classes
            )
    return statistics


def _find_hits(lists: _Lists) -> NDArray[np.bool_]:
    return np.asarray((lists.rows >= 0) & (lists.codes[lists.rows] == lists.codes[lists.own][:, None]))


def _describe_queries(index: Index, lists: _Lists, groups: pl.Series | None) -> pl.DataFrame:
    hits = _find_hits(lists)
    first = pl.Series(np.where(hits.any(1), hits.argmax(1) + 1, 0))
    return index.cases[lists.own].select(
        "case_id",
        "patient_id",
        group=pl.lit(None, pl.String) if groups is None else groups.gather(lists.own),
        relevant=pl.Series(lists.relevant),
        first=first.replace(0, None),
    )

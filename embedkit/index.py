"""Owns a search index: vectors of cases or slices in FAISS beside their case table; knows not how vectors are made.

Similarity is the cosine, after centring and whitening if any. `embedkit.indexfiles` says what lies on disk,
`embedkit.indextypes` which FAISS index is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.errors import SearchError
from embedkit.indexfiles import (
    IndexContent,
    check_table,
    read_index_files,
    read_vectors,
    require_free,
    write_index_files,
)
from embedkit.indextypes import FaissSearcher, IndexOptions, build_faiss, plan_index
from embedkit.recipe import Recipe
from embedkit.tuning import Tuning, choose_held_out, tune_effort
from embedkit.whitening import fit_whitening

__all__ = ["Index", "open_index", "rewrite_index", "write_index"]

FloatArray = NDArray[np.float32]
RowArray = NDArray[np.int64]

_FEW_EXCLUDED = 64
_BATCH = 16_384
_REFINED_AT_ONCE = 64


class Index:
    """An open index; made by `write_index` or `open_index`.

    Attributes:
        path: Its folder.
        embedding: How the vectors were made, in words: ``mean:cls:12``.
        recipe: Of the cache that they were made from.
        fingerprint: The recipe's.
        cases: case_id, patient_id and metadata; row i describes vector i, unless vectors are slices.
        rows: Where vectors are slices: case (row of ``cases``), view, plane, row and slice of each; else None.
        options: What was asked of it.
        tuning: How it is searched, and the recall then measured.
        mean: float32 [dim] subtracted from every vector and query; None where they are not centred.
        whitening: float32 [dim kept] that they are then multiplied with; None where they are not whitened.
        details: What the maker of the vectors noted, as plain JSON values.
        extras: Arrays that the maker of the vectors noted.
        exhaustive: Whether the last search compared every allowed vector.
    """

    def __init__(self, path: Path, content: IndexContent) -> None:
        self.path = path
        self.embedding = content.embedding
        self.recipe = content.recipe
        self.fingerprint = content.recipe.fingerprint
        self.cases = content.cases
        self.rows = content.rows
        self.options = content.options
        self.tuning = content.tuning
        self.mean = content.mean
        self.whitening = content.whitening
        self.details = content.details
        self.extras = content.extras
        self.exhaustive = True
        self._vectors = cast(FaissSearcher, content.vectors)
        self._given: NDArray[Any] | None = None
        self._case_of = None if content.rows is None else content.rows["case"].to_numpy().astype(np.int64)
        self._numbers = {case_id: number for number, case_id in enumerate(self.cases["case_id"].to_list())}

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def kind(self) -> str:
        """The type of FAISS index."""
        return self._vectors.kind

    @property
    def level(self) -> str:
        """What a vector is: ``case`` or ``slice``."""
        return "case" if self.rows is None else "slice"

    @property
    def count(self) -> int:
        """How many vectors it holds: as many as cases, unless vectors are slices."""
        return len(self._vectors)

    @property
    def dim(self) -> int:
        """Length of a vector as it was given, and of a query."""
        if self.whitening is not None:
            return len(self.whitening)
        return int(self._vectors.index.d)

    def read_vectors(self) -> NDArray[Any]:
        """The vectors as they were given to `write_index`: read-only [vectors dim], memory-mapped.

        Raises:
            SearchError: their file is damaged.
        """
        if self._given is None:
            self._given = read_vectors(self.path)
        return self._given

    def search(
        self,
        queries: FloatArray,
        k: int,
        *,
        where: str | None = None,
        exclude_case_ids: Sequence[str] = (),
    ) -> pl.DataFrame:
        """The most similar cases of each query vector.

        Args:
            queries: [queries dim], made like the vectors of the index; any length, not zero.
            k: How many cases (or slices) per query, at most; fewer only where fewer are allowed.
            where: A polars SQL expression over ``cases``: ``sex = 1 AND age < 50``. Applied within the search.
            exclude_case_ids: Never returned; those that the index does not hold are fine.

        Returns:
            Sorted by ``query`` (row of ``queries``) and ``rank`` (1 is the most similar), with ``case_id``,
            ``patient_id``, ``similarity`` (cosine, -1..1), where vectors are slices their ``view``, ``plane`` and
            ``slice``, and all further columns of ``cases``.

        Raises:
            SearchError: queries of another length, with NaN, or zero; a bad filter; k below 1.
        """
        allowed = self.select_cases(where)
        if exclude_case_ids:
            allowed &= ~self.cases["case_id"].is_in(list(exclude_case_ids)).to_numpy()
        similarities, rows = self._nearest(self._prepare(queries), self._check_count(k), allowed)
        return self._frame(similarities, rows, rows >= 0, k)

    def search_cases(
        self,
        case_ids: Sequence[str],
        k: int,
        *,
        where: str | None = None,
        exclude_same: str | None = None,
        include_self: bool = False,
    ) -> pl.DataFrame:
        """The most similar cases of cases that the index holds.

        Args:
            case_ids: The queries.
            k: How many cases per query, at most; fewer only where fewer are allowed.
            where: A polars SQL expression over ``cases``, as in `search`.
            exclude_same: A column; cases with the query's value in it are left out (``patient_id``: other patients
                only). A query without a value leaves out nothing but itself.
            include_self: Also return the query itself; not together with ``exclude_same``.

        Returns:
            As `search`; ``query`` is the place in ``case_ids``.

        Raises:
            SearchError: unknown case or column; a bad filter; k below 1; vectors are slices (`search` by the vectors of
                slices finds slices).
        """
        if include_self and exclude_same is not None:
            raise SearchError(f"exclude_same {exclude_same!r} leaves out the query itself: do not include it")
        self._require_level("case")
        own = self._find_cases(case_ids)
        allowed = self.select_cases(where)
        groups = self.group_cases(exclude_same)
        queries = self._read_prepared(own)
        similarities, rows = self._nearest_of_others(queries, self._check_count(k), allowed, groups, groups[own])
        keep = (rows >= 0) & ((groups[rows] != groups[own][:, None]) | (groups[rows] < 0))
        if not include_self:
            keep &= rows != own[:, None]
        return self._frame(similarities, rows, keep, k)

    def _read_prepared(self, rows: RowArray) -> FloatArray:
        """Vectors of the index as they are compared, float32 [rows dim]: from FAISS where it holds them as they are."""
        if len(rows) and self.kind in ("flat", "hnsw"):
            return cast(FloatArray, self._vectors.index.reconstruct_batch(rows))
        return self._unit(self.read_vectors()[rows])

    def _nearest_of_others(
        self, queries: FloatArray, k: int, allowed: NDArray[np.bool_], groups: RowArray, own: RowArray
    ) -> tuple[FloatArray, RowArray]:
        """At least k of each query's nearest, when those of its own group and itself are taken out afterwards.

        Args:
            queries: [queries dim], unit length.
            k: How many to be left.
            allowed: [cases].
            groups: [cases], group of each case, below 0 for none.
            own: [queries], group of each query.
        """
        sizes = np.bincount(groups[allowed & (groups >= 0)], minlength=1)
        most = int(sizes[own[own >= 0]].max(initial=0)) if sizes.size else 0
        if most <= _FEW_EXCLUDED:
            return self._nearest(queries, k + most + 1, allowed)
        similarities = np.full((len(queries), k + 1), -np.inf, np.float32)
        rows = np.full((len(queries), k + 1), -1, np.int64)
        exhaustive = True
        for group in np.unique(own):
            members = own == group
            others = allowed & (groups != group) if group >= 0 else allowed
            found = self._nearest(queries[members], k + 1, others)
            width = found[1].shape[1]
            similarities[members, :width], rows[members, :width] = found
            exhaustive &= self.exhaustive
        self.exhaustive = exhaustive
        return similarities, rows

    def _nearest(self, queries: FloatArray, k: int, allowed: NDArray[np.bool_]) -> tuple[FloatArray, RowArray]:
        """Similarities and rows of vectors, [queries min(k, allowed)] each.

        Args:
            queries: [queries dim], prepared, of length 1.
            k: At most so many.
            allowed: [cases].
        """
        return self._nearest_rows(queries, k, allowed, self.tuning.effort, self.tuning.refine)

    def _nearest_rows(
        self, queries: FloatArray, k: int, allowed: NDArray[np.bool_] | None, effort: int, refine: int
    ) -> tuple[FloatArray, RowArray]:
        mask = (
            None if allowed is None or allowed.all() else allowed if self._case_of is None else allowed[self._case_of]
        )
        found = self._vectors.search(queries, k * refine, effort=effort, allowed=mask)
        similarities, rows, self.exhaustive = found
        if refine == 1 or rows.shape[1] == 0:
            return similarities, rows
        parts = [
            self._compare_exactly(queries[start : start + _REFINED_AT_ONCE], rows[start : start + _REFINED_AT_ONCE], k)
            for start in range(0, len(queries), _REFINED_AT_ONCE)
        ]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _compare_exactly(self, queries: FloatArray, rows: RowArray, k: int) -> tuple[FloatArray, RowArray]:
        """The k best of the rows that codes found, by the vectors as they were given, [queries k] each."""
        distinct, places = np.unique(rows, return_inverse=True)
        vectors = self._read_prepared(distinct)[places.reshape(rows.shape)]
        similarities = np.einsum("qd,qrd->qr", queries, vectors)
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(similarities, order, 1), np.take_along_axis(rows, order, 1)

    def _frame(self, similarities: FloatArray, rows: RowArray, keep: NDArray[np.bool_], k: int) -> pl.DataFrame:
        """The first k kept of each query as a table."""
        ranks = keep.cumsum(axis=1)
        queries, columns = np.nonzero(keep & (ranks <= k))
        chosen = rows[queries, columns]
        found = self.cases[chosen if self._case_of is None else self._case_of[chosen]]
        where = [] if self.rows is None else self.rows[chosen].select("view", "plane", "slice").get_columns()
        return found.select(
            pl.Series("query", queries.astype(np.int64)),
            pl.Series("rank", ranks[queries, columns].astype(np.int64)),
            "case_id",
            "patient_id",
            pl.Series("similarity", np.clip(similarities[queries, columns], -1, 1)),
            *where,
            pl.exclude("case_id", "patient_id"),
        )

    def _require_level(self, level: str) -> None:
        if self.level != level:
            raise SearchError(
                f"index {self.path} holds vectors of each {self.level}, but this asks for an index of each {level};"
                f" build one of that level"
            )

    def _check_count(self, k: int) -> int:
        """k, and no more than there is."""
        if k < 1:
            raise SearchError(f"k is {k}, expected at least 1 case")
        return min(k, self.count)

    def _unit(self, vectors: NDArray[Any]) -> FloatArray:
        return prepare_vectors(vectors, self.mean, self.whitening)

    def _prepare(self, queries: FloatArray) -> FloatArray:
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            queries = np.atleast_2d(np.asarray(queries, np.float32))
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise SearchError(
                f"query vectors have shape {list(queries.shape)}, index {self.path} holds vectors of length {self.dim};"
                f" make them with its embedding, {self.embedding}"
            )
        if (bad := _find_undirected(queries, self.mean, self.whitening)) is not None:
            raise SearchError(_explain_undirected(f"query {bad[0]}", bad[1], self.mean))
        return self._unit(queries)

    def number_cases(self, case_ids: Sequence[str]) -> list[int]:
        """The rows of ``cases`` of these cases.

        Raises:
            SearchError: the index lacks one.
        """
        return cast(list[int], self._find_cases(case_ids).tolist())

    def find_same(self, case_id: str, column: str | None) -> list[str]:
        """The case itself and, with a column, all cases with its value there.

        Raises:
            SearchError: unknown case or column.
        """
        (own,) = self._find_cases([case_id])
        groups = self.group_cases(column)
        same = groups == groups[own] if groups[own] >= 0 else np.zeros(len(self), bool)
        same[own] = True
        return cast(list[str], self.cases["case_id"].filter(same).to_list())

    def _find_cases(self, case_ids: Sequence[str]) -> RowArray:
        if unknown := [case_id for case_id in case_ids if case_id not in self._numbers]:
            near = ", ".join(list(self._numbers)[:3])
            raise SearchError(
                f"index {self.path} has no case {', '.join(unknown[:5])}; it holds {len(self)} cases such as {near}"
            )
        return np.array([self._numbers[case_id] for case_id in case_ids], np.int64)

    def group_cases(self, column: str | None) -> RowArray:
        """A number per case, int64 [cases], equal for equal values of ``column``, -1 for none.

        Raises:
            SearchError: no such column, or one whose values cannot be compared.
        """
        if column is None:
            return np.full(len(self), -1, np.int64)
        if column not in self.cases.columns:
            raise SearchError(f"exclude_same names {column!r}, but the cases have {', '.join(self.cases.columns)}")
        try:
            ranks = self.cases[column].rank("dense")
        except pl.exceptions.PolarsError as error:
            raise SearchError(
                f"exclude_same cannot compare column {column!r} of type {self.cases[column].dtype}"
            ) from error
        return ranks.cast(pl.Int64).fill_null(0).to_numpy() - 1

    def select_cases(self, where: str | None) -> NDArray[np.bool_]:
        """Which cases a filter allows, bool [cases]; a case for which it is null is not.

        Raises:
            SearchError: the filter does not work; the message tells the columns.
        """
        allowed = np.ones(len(self), bool)
        if where is None:
            return allowed
        try:
            rows = (
                pl.select(pl.int_range(len(self)).alias("#row")).hstack(self.cases).filter(pl.sql_expr(where))["#row"]
            )
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            reason = str(error).splitlines()[0].replace('"#row", ', "")
            raise SearchError(
                f"filter {_shorten(repr(where))} does not work ({_shorten(reason)}); write an SQL condition over"
                f" {', '.join(self.cases.columns)}, for example \"patient_id = 'p1'\""
            ) from error
        allowed[:] = False
        allowed[rows.to_numpy()] = True
        return allowed


def write_index(
    vectors: NDArray[Any],
    table: pl.DataFrame,
    *,
    embedding: str,
    recipe: Recipe,
    out: Path | str,
    rows: pl.DataFrame | None = None,
    centre: bool = False,
    whiten: int | None = None,
    options: IndexOptions | None = None,
    details: Mapping[str, Any] | None = None,
    extras: Mapping[str, NDArray[Any]] | None = None,
) -> Index:
    """Writes an index and opens it. Vectors are read in batches, so that a memory map may be larger than the memory.

    Args:
        vectors: float32 or float16 [vectors dim].
        table: ``case_id`` (unique), ``patient_id``, and metadata to filter by and to show; a row per vector unless
            ``rows`` is given.
        embedding: How the vectors were made, in words.
        recipe: Of the cache that they were made from.
        out: The folder to write; must not exist, or be empty.
        rows: Where vectors are slices: ``case`` (row of ``table``), ``view``, ``plane``, ``row`` and ``slice`` of each.
        centre: Subtract the mean vector from all, which spreads out the narrow cone that the tokens of transformers
            fill (Mu and Viswanath 2018, arXiv 1702.01417).
        whiten: Keep so many principal components, each scaled to unit variance; needs no label. Includes centring.
        options: Type of index, memory and recall. The recall reached is measured on queries that were not tuned on,
            and kept.
        details: Plain JSON values to keep with the index.
        extras: Arrays to keep with the index, by name.

    Raises:
        SearchError: vectors and table do not fit, a vector is zero or has NaN, a column is missing, double or has a
            reserved name; ``out`` exists; disk full; read-only folder.
        OptionError: a number of components that means nothing, too few vectors for the type, or too little memory.
    """
    out = Path(out)
    require_free(out)
    check_table(vectors, table, rows)
    mean = _mean_vector(vectors) if centre or whiten is not None else None
    whitening = None if whiten is None else fit_whitening(vectors, cast(FloatArray, mean), whiten)
    content = _build(
        IndexContent(
            embedding=embedding,
            recipe=recipe,
            cases=table,
            rows=rows,
            vectors=None,
            options=options or IndexOptions(),
            tuning=Tuning(),
            mean=mean,
            whitening=whitening,
            details=dict(details or {}),
            extras=dict(extras or {}),
        ),
        vectors,
    )
    write_index_files(out, content, vectors)
    return open_index(out)


def rewrite_index(
    index: Index,
    vectors: NDArray[Any],
    table: pl.DataFrame,
    rows: pl.DataFrame | None = None,
    *,
    extras: Mapping[str, NDArray[Any]] | None = None,
) -> Index:
    """Puts other vectors in the place of an index's, with all that was fitted for it, and opens it again.

    Mean and whitening stay as they are, so that cases added later stand where they would have stood; FAISS's index is
    built anew, of the type that its new size asks for, and tuned again.

    Raises:
        SearchError, OptionError: as `write_index`; the index is left as it was.
    """
    check_table(vectors, table, rows)
    content = IndexContent(
        embedding=index.embedding,
        recipe=index.recipe,
        cases=table,
        rows=rows,
        vectors=None,
        options=index.options,
        tuning=Tuning(),
        mean=index.mean,
        whitening=index.whitening,
        details=index.details,
        extras=dict(index.extras if extras is None else extras),
    )
    write_index_files(index.path, _build(content, vectors), vectors, replace=True)
    return open_index(index.path)


def _build(content: IndexContent, vectors: NDArray[Any]) -> IndexContent:
    """The content with its FAISS index, built and tuned."""
    mean, whitening, rows = content.mean, content.whitening, content.rows

    def name_of(row: int) -> str:
        case = row if rows is None else rows["case"][row]
        return f"case {content.cases['case_id'][case]}" + ("" if rows is None else f", slice {rows['slice'][row]}")

    for start in range(0, len(vectors), _BATCH):
        block = np.asarray(vectors[start : start + _BATCH])
        if (bad := _find_undirected(block, mean, whitening)) is not None:
            raise SearchError(_explain_undirected(name_of(start + bad[0]), bad[1], mean))

    def prepare(block: NDArray[Any]) -> FloatArray:
        return prepare_vectors(block, mean, whitening)

    dim = vectors.shape[1] if whitening is None else whitening.shape[1]
    plan = plan_index(len(vectors), dim, content.options)
    built = FaissSearcher(build_faiss(plan, vectors, prepare=prepare, held_out=choose_held_out(len(vectors))))
    found = replace(content, vectors=built)
    tried = Index(Path(), found)
    tried._given = vectors

    def search(queries: FloatArray, k: int, effort: int, refine: int) -> RowArray:
        return tried._nearest_rows(queries, k, None, effort, refine)[1]

    return replace(found, tuning=tune_effort(built, vectors, search, recall=content.options.recall, prepare=prepare))


def open_index(path: Path | str) -> Index:
    """Opens an index.

    Raises:
        SearchError: no index, damaged, or of a newer format; names the file.
    """
    return Index(Path(path), read_index_files(Path(path)))


def prepare_vectors(vectors: NDArray[Any], mean: FloatArray | None, whitening: FloatArray | None) -> FloatArray:
    """Vectors less their mean, whitened, of length 1: float32 [vectors dim], as they are compared."""
    moved = _move(vectors, mean, whitening)
    lengths = np.sqrt(np.einsum("ij,ij->i", moved, moved, dtype=np.float64))
    return cast(FloatArray, moved / lengths[:, None].astype(np.float32))


def _move(vectors: NDArray[Any], mean: FloatArray | None, whitening: FloatArray | None) -> FloatArray:
    moved: FloatArray = np.asarray(vectors, np.float32)
    if mean is not None:
        moved = moved - mean
    return moved if whitening is None else moved @ whitening


def _mean_vector(vectors: NDArray[Any]) -> FloatArray:
    blocks = range(0, len(vectors), _BATCH)
    total = sum(vectors[start : start + _BATCH].sum(0, dtype=np.float64) for start in blocks)
    return cast(FloatArray, (total / len(vectors)).astype(np.float32))


def _shorten(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _find_undirected(
    vectors: NDArray[Any], mean: FloatArray | None, whitening: FloatArray | None
) -> tuple[int, float] | None:
    """The first vector that has no direction once it is prepared, and its length; None where all have one."""
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite or NaN is found
        moved = _move(vectors, mean, whitening)
        lengths = np.sqrt(np.einsum("ij,ij->i", moved, moved, dtype=np.float64))
    bad = np.flatnonzero(~(lengths <= np.finfo(np.float32).max) | (lengths == 0))
    return (int(bad[0]), float(lengths[bad[0]])) if len(bad) else None


def _explain_undirected(name: str, length: float, mean: FloatArray | None) -> str:
    about = "zero after centring" if mean is not None else "zero"
    what = about if length == 0 else "not finite (NaN or too large)"
    return f"the vector of {name} is {what}: it has no direction to compare; leave it out"

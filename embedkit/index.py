"""Owns a search index: case vectors in FAISS beside their case table; knows not how vectors are made.

Similarity is the cosine, after centring if any. `embedkit.indexfiles` says what lies on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.errors import SearchError
from embedkit.indexfiles import IndexContent, check_table, faiss, read_index_files, read_vectors, write_index_files
from embedkit.recipe import Recipe

__all__ = ["Index", "open_index", "write_index"]

FloatArray = NDArray[np.float32]

_FEW_EXCLUDED = 64


class Index:
    """An open index; made by `write_index` or `open_index`.

    Attributes:
        path: Its folder.
        embedding: How the vectors were made, in words: ``mean:cls:12``.
        recipe: Of the cache that they were made from.
        fingerprint: The recipe's.
        cases: case_id, patient_id and metadata; row i describes vector i.
        mean: float32 [dim] subtracted from every vector and query; None where they are not centred.
        details: What the maker of the vectors noted, as plain JSON values.
        extras: Arrays that the maker of the vectors noted.
    """

    def __init__(self, path: Path, content: IndexContent) -> None:
        self.path = path
        self.embedding = content.embedding
        self.recipe = content.recipe
        self.fingerprint = content.recipe.fingerprint
        self.cases = content.cases
        self.mean = content.mean
        self.details = content.details
        self.extras = content.extras
        self._faiss = content.vectors
        self._rows = {case_id: row for row, case_id in enumerate(self.cases["case_id"].to_list())}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self._faiss.d)

    def read_vectors(self) -> FloatArray:
        """The vectors as they were given to `write_index`: read-only float32 [cases dim], memory-mapped.

        Raises:
            SearchError: their file is damaged.
        """
        return read_vectors(self.path)

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
            k: How many cases per query, at most; fewer only where fewer are allowed.
            where: A polars SQL expression over ``cases``: ``sex = 1 AND age < 50``. Applied before the search.
            exclude_case_ids: Never returned; those that the index does not hold are fine.

        Returns:
            Sorted by ``query`` (row of ``queries``) and ``rank`` (1 is the most similar), with ``case_id``,
            ``patient_id``, ``similarity`` (cosine, -1..1) and all further columns of ``cases``.

        Raises:
            SearchError: queries of another length, with NaN, or zero; a bad filter; k below 1.
        """
        allowed = self.select_cases(where)
        if exclude_case_ids:
            allowed &= ~self.cases["case_id"].is_in(list(exclude_case_ids)).to_numpy()
        similarities, rows = self._nearest(self._prepare(queries), _checked_count(k), allowed)
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
            SearchError: unknown case or column; a bad filter; k below 1.
        """
        if include_self and exclude_same is not None:
            raise SearchError(f"exclude_same {exclude_same!r} leaves out the query itself: do not include it")
        own = self._find_rows(case_ids)
        allowed = self.select_cases(where)
        groups = self._groups(exclude_same)
        queries = self._faiss.reconstruct_batch(own) if len(own) else np.empty((0, self.dim), np.float32)
        similarities, rows = self._nearest_of_others(queries, _checked_count(k), allowed, groups, groups[own])
        keep = (rows >= 0) & ((groups[rows] != groups[own][:, None]) | (groups[rows] < 0))
        if not include_self:
            keep &= rows != own[:, None]
        return self._frame(similarities, rows, keep, k)

    def _nearest_of_others(
        self, queries: FloatArray, k: int, allowed: NDArray[np.bool_], groups: NDArray[np.int64], own: NDArray[np.int64]
    ) -> tuple[FloatArray, NDArray[np.int64]]:
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
        for group in np.unique(own):
            members = own == group
            others = allowed & (groups != group) if group >= 0 else allowed
            found = self._nearest(queries[members], k + 1, others)
            width = found[1].shape[1]
            similarities[members, :width], rows[members, :width] = found
        return similarities, rows

    def _nearest(self, queries: FloatArray, k: int, allowed: NDArray[np.bool_]) -> tuple[FloatArray, NDArray[np.int64]]:
        """Similarities and rows, [queries min(k, allowed)] each; the row is -1 where there is none."""
        k = min(k, int(allowed.sum()))
        if k == 0 or len(queries) == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        if allowed.all():
            return self._faiss.search(queries, k)  # type: ignore[no-any-return]
        selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        return self._faiss.search(queries, k, params=faiss.SearchParameters(sel=selector))  # type: ignore[no-any-return]

    def _frame(
        self, similarities: FloatArray, rows: NDArray[np.int64], keep: NDArray[np.bool_], k: int
    ) -> pl.DataFrame:
        """The first k kept of each query as a table."""
        ranks = keep.cumsum(axis=1)
        queries, columns = np.nonzero(keep & (ranks <= k))
        found = self.cases[rows[queries, columns]]
        return found.select(
            pl.Series("query", queries.astype(np.int64)),
            pl.Series("rank", ranks[queries, columns].astype(np.int64)),
            "case_id",
            "patient_id",
            pl.Series("similarity", np.clip(similarities[queries, columns], -1, 1)),
            pl.exclude("case_id", "patient_id"),
        )

    def _prepare(self, queries: FloatArray) -> FloatArray:
        queries = np.atleast_2d(np.asarray(queries, np.float32))
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise SearchError(
                f"query vectors have shape {list(queries.shape)}, index {self.path} holds vectors of length {self.dim};"
                f" make them with its embedding, {self.embedding}"
            )
        return _unit_vectors(queries, self.mean, lambda row: f"query {row}")

    def _find_rows(self, case_ids: Sequence[str]) -> NDArray[np.int64]:
        if unknown := [case_id for case_id in case_ids if case_id not in self._rows]:
            near = ", ".join(list(self._rows)[:3])
            raise SearchError(
                f"index {self.path} has no case {', '.join(unknown[:5])}; it holds {len(self)} cases such as {near}"
            )
        return np.array([self._rows[case_id] for case_id in case_ids], np.int64)

    def _groups(self, column: str | None) -> NDArray[np.int64]:
        """A number per case, equal for equal values of ``column``, -1 for none."""
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
            raise SearchError(
                f"filter {where!r} does not work ({str(error).splitlines()[0]}); write an SQL condition over"
                f" {', '.join(self.cases.columns)}, for example \"patient_id = 'p1'\""
            ) from error
        allowed[:] = False
        allowed[rows.to_numpy()] = True
        return allowed


def write_index(
    vectors: FloatArray,
    table: pl.DataFrame,
    *,
    embedding: str,
    recipe: Recipe,
    out: Path | str,
    centre: bool = False,
    details: Mapping[str, Any] | None = None,
    extras: Mapping[str, NDArray[Any]] | None = None,
) -> Index:
    """Writes an index of case vectors and opens it.

    Args:
        vectors: float32 [cases dim].
        table: A row per vector: ``case_id`` (unique), ``patient_id``, and metadata to filter by and to show.
        embedding: How the vectors were made, in words.
        recipe: Of the cache that they were made from.
        out: The folder to write; must not exist, or be empty.
        centre: Subtract the mean vector from all, which spreads out the narrow cone that the tokens of transformers
            fill (Mu and Viswanath 2018, arXiv 1702.01417).
        details: Plain JSON values to keep with the index.
        extras: Arrays to keep with the index, by name.

    Raises:
        SearchError: vectors and table do not fit, a vector is zero or has NaN, a column is missing, double or has a
            reserved name; ``out`` exists; disk full; read-only folder.
    """
    out = Path(out)
    vectors = np.ascontiguousarray(vectors, np.float32)
    check_table(vectors, table)
    mean = vectors.mean(0, dtype=np.float64).astype(np.float32) if centre else None
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(_unit_vectors(vectors, mean, lambda row: f"case {table['case_id'][row]}"))
    content = IndexContent(
        embedding=embedding,
        recipe=recipe,
        cases=table,
        vectors=index,
        mean=mean,
        details=dict(details or {}),
        extras=dict(extras or {}),
    )
    write_index_files(out, content, vectors)
    return open_index(out)


def open_index(path: Path | str) -> Index:
    """Opens an index.

    Raises:
        SearchError: no index, damaged, or of a newer format; names the file.
    """
    return Index(Path(path), read_index_files(Path(path)))


def _checked_count(k: int) -> int:
    if k < 1:
        raise SearchError(f"k is {k}, expected at least 1 case")
    return k


def _unit_vectors(vectors: FloatArray, mean: FloatArray | None, name_of: Callable[[int], str]) -> FloatArray:
    """Vectors less their mean, of length 1; the message names the first that has no direction."""
    centred = vectors if mean is None else vectors - mean
    lengths = np.sqrt(np.einsum("ij,ij->i", centred, centred, dtype=np.float64))
    bad = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
    if len(bad):
        about = "zero after centring" if mean is not None else "zero"
        what = about if lengths[bad[0]] == 0 else "not finite (NaN or too large)"
        raise SearchError(
            f"the vector of {name_of(int(bad[0]))} is {what}: it has no direction to compare; leave it out"
        )
    unit: FloatArray = centred / lengths[:, None].astype(np.float32)
    return unit

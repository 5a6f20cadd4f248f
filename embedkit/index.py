"""Owns an open search index: vectors of cases or slices in FAISS beside their case table; knows not how vectors are
made, nor how an index is.

Similarity is the cosine, after centring and whitening if any. `embedkit.indexfiles` says what lies on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.casetable import CaseTable
from embedkit.errors import SearchError
from embedkit.exactsearch import find_nearest
from embedkit.faisssearching import FaissSearcher, search_exactly
from embedkit.gpusearch import explain_search_refusal
from embedkit.hits import list_hits, pick_first
from embedkit.indexfiles import IndexContent, read_index_files, read_vectors
from embedkit.tuning import DEPTH
from embedkit.unitvectors import Preparation, split_rows

__all__ = ["Index", "open_index"]

FloatArray = NDArray[np.float32]
RowArray = NDArray[np.int64]

_FEW_EXCLUDED = 64


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
        built_on: ``GPU``, or ``CPU: `` and why.
        identity: Tells this content of the folder from any other.
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
        self.built_on = content.built_on
        self.identity = content.identity
        self._vectors = cast(FaissSearcher, content.vectors)
        self._prepare = Preparation(content.mean, content.whitening)
        self._given: NDArray[Any] | None = None
        self._case_of = None if content.rows is None else content.rows["case"].to_numpy().astype(np.int64)
        self._table = CaseTable(content.cases, path)

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def kind(self) -> str:
        """The type of FAISS index."""
        return self._vectors.kind

    @property
    def code_bytes(self) -> int:
        """Bytes of a vector's product code, of ``ivfpq``; else 0."""
        return int(self._vectors.index.pq.code_size) if self.kind == "ivfpq" else 0

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

    @property
    def shortfall(self) -> str | None:
        """In words, by how much less is found than was asked for when it was built; None where it is not."""
        asked, tuning = self.options.recall, self.tuning
        if tuning.reached:
            return None
        return (
            f"index {self.path} finds {tuning.recall:.3f} [{tuning.recall_low:.3f}, {tuning.recall_high:.3f}] of the"
            f" {DEPTH} nearest as {self.kind}; the recall of {asked:g} that was asked for cannot be promised: ask for"
            " less, allow more memory, or choose flat"
        )

    @property
    def searched_on(self) -> str:
        """``GPU``, or ``CPU: `` and why, of a search without a filter."""
        asked = explain_search_refusal(DEPTH * self.tuning.refine, self.tuning.effort)
        stays = asked if self._vectors.stays is None else self._vectors.stays
        return "GPU" if stays is None else f"CPU: {stays}"

    def relabel(self, cases: pl.DataFrame) -> None:
        """Puts other columns beside the same cases, in the same order; in this open index, not in its folder."""
        self.cases, self._table = cases, CaseTable(cases, self.path)

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
        allowed = self._allow(where)
        if exclude_case_ids:
            others = ~self.cases["case_id"].is_in(list(exclude_case_ids)).to_numpy()
            allowed = others if allowed is None else allowed & others
        return self._list(*self._nearest(self._read_queries(queries), self._check_count(k), allowed))

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
        own = self._table.find_rows(case_ids)
        queries, k, allowed = self._read_prepared(own), self._check_count(k), self._allow(where)
        groups = self._table.group(exclude_same)
        similarities, rows = self._nearest_of_others(queries, k, allowed, groups, groups[own])
        keep = (rows >= 0) & ((groups[rows] != groups[own][:, None]) | (groups[rows] < 0))
        if not include_self:
            keep &= rows != own[:, None]
        return self._list(similarities, pick_first(rows, keep, k))

    def search_projected(
        self, queries: FloatArray, projection: FloatArray, k: int, *, where: str | None = None
    ) -> pl.DataFrame:
        """The cases most similar to each query in the space of a linear map: all that are allowed are compared.

        Args:
            queries: float32 [queries out], of length 1.
            projection: float32 [out dim]; maps vectors of the index as they are compared.
            k, where: As in `search`.

        Returns:
            As `search`; ``similarity`` is the cosine of the query and the projected vector.

        Raises:
            SearchError: vectors are slices; a bad filter; k below 1; a case whose projection is zero.
        """
        self._require_level("case")
        k, rows = self._check_count(k), np.flatnonzero(self.select_cases(where))

        def project(own: RowArray) -> FloatArray:
            projected = self._read_prepared(own) @ projection.T
            return Preparation().check(projected, lambda row: f"{self.cases['case_id'][int(own[row])]}, projected,")

        blocks = ((rows[part], project(rows[part])) for part in split_rows(len(rows), max(projection.shape)))
        return self._list(*find_nearest(queries, blocks, k))

    def _allow(self, where: str | None) -> NDArray[np.bool_] | None:
        """Which cases a filter allows, bool [cases]; None for all of them."""
        return None if where is None else self._table.select(where)

    def _read_prepared(self, rows: RowArray) -> FloatArray:
        """Vectors of the index as they are compared, float32 [rows dim]: from FAISS where it holds them as they are."""
        if len(rows) and self.kind in ("flat", "hnsw"):
            return cast(FloatArray, self._vectors.index.reconstruct_batch(rows))
        return self._prepare(np.asarray(self.read_vectors()[rows]))

    def _nearest_of_others(
        self, queries: FloatArray, k: int, allowed: NDArray[np.bool_] | None, groups: RowArray, own: RowArray
    ) -> tuple[FloatArray, RowArray]:
        """At least k of each query's nearest, when those of its own group and itself are taken out afterwards.

        Args:
            queries: [queries dim], unit length.
            k: How many to be left.
            allowed: [cases]; None for all.
            groups: [cases], group of each case, below 0 for none.
            own: [queries], group of each query.
        """
        allowed_groups = groups if allowed is None else groups[allowed]
        sizes = np.bincount(allowed_groups[allowed_groups >= 0], minlength=1)
        most = int(sizes[own[(own >= 0) & (own < len(sizes))]].max(initial=0))
        if most <= _FEW_EXCLUDED:
            return self._nearest(queries, k + most + 1, allowed)
        similarities = np.full((len(queries), k + 1), -np.inf, np.float32)
        rows = np.full((len(queries), k + 1), -1, np.int64)
        for group in np.unique(own):
            members = own == group
            others = groups != group if group >= 0 else np.ones(len(groups), bool)
            found = self._nearest(queries[members], k + 1, others if allowed is None else allowed & others)
            width = found[1].shape[1]
            similarities[members, :width], rows[members, :width] = found
        return similarities, rows

    def _nearest(self, queries: FloatArray, k: int, allowed: NDArray[np.bool_] | None) -> tuple[FloatArray, RowArray]:
        """Similarities and rows of vectors, [queries min(k, allowed)] each, most similar first; row -1 is none.

        Args:
            queries: [queries dim], prepared, of length 1.
            k: At most so many.
            allowed: [cases]; None for all.
        """
        return search_exactly(
            self._vectors,
            queries,
            k,
            effort=self.tuning.effort,
            refine=self.tuning.refine,
            read=self._read_prepared,
            allowed=allowed if allowed is None or self._case_of is None else allowed[self._case_of],
        )

    def _list(self, similarities: FloatArray, rows: RowArray) -> pl.DataFrame:
        return list_hits(similarities, rows, self.cases, slices=self.rows, case_of=self._case_of)

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

    def _read_queries(self, queries: NDArray[Any]) -> FloatArray:
        """Queries as they are compared, float32 [queries kept]."""
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            queries = np.atleast_2d(np.asarray(queries, np.float32))
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise SearchError(
                f"query vectors have shape {list(queries.shape)}, index {self.path} holds vectors of length {self.dim};"
                f" make them with its embedding, {self.embedding}"
            )
        return self._prepare.check(queries, lambda row: f"query {row}")

    def number_cases(self, case_ids: Sequence[str]) -> list[int]:
        """The rows of ``cases`` of these cases.

        Raises:
            SearchError: the index lacks one.
        """
        return cast(list[int], self._table.find_rows(case_ids).tolist())

    def find_same(self, case_id: str, column: str | None) -> list[str]:
        """The case itself and, with a column, all cases with its value there.

        Raises:
            SearchError: unknown case or column.
        """
        (own,) = self._table.find_rows([case_id])
        groups = self._table.group(column)
        same = groups == groups[own] if groups[own] >= 0 else np.zeros(len(self), bool)
        same[own] = True
        return cast(list[str], self.cases["case_id"].filter(same).to_list())

    def group_cases(self, column: str | None) -> RowArray:
        """A number per case, int64 [cases], equal for equal values of ``column``, -1 for none.

        Raises:
            SearchError: no such column, or one whose values cannot be compared.
        """
        return self._table.group(column)

    def select_cases(self, where: str | None) -> NDArray[np.bool_]:
        """Which cases a filter allows, bool [cases]; a case for which it is null is not.

        Raises:
            SearchError: the filter does not work; the message tells the columns.
        """
        allowed = self._allow(where)
        return np.ones(len(self), bool) if allowed is None else allowed


def open_index(path: Path | str) -> Index:
    """Opens an index.

    Raises:
        SearchError: no index, damaged, or of a newer format; names the file.
    """
    return Index(Path(path), read_index_files(Path(path)))

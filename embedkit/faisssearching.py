"""Owns the searching of a FAISS index: under filters, again by exact vectors where it holds codes, on a GPU where it
may. Knows no case and no file, and not how many of the neighbours found are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from embedkit.errors import OptionError, SearchError
from embedkit.exactsearch import find_nearest
from embedkit.gpusearch import explain_search_refusal, explain_stay, send_to_gpu
from embedkit.indextypes import KINDS, Kind, faiss
from embedkit.unitvectors import split_rows

__all__ = ["FaissSearcher", "measure_payload", "search_exactly"]

FloatArray = NDArray[np.float32]
RowArray = NDArray[np.int64]

_RARE = 0.1
_BATCH = 20  # queries from which FAISS too compares by matrix products, but never under a filter
_MOST_WALKED = 64  # vectors that a filter leaves out; a graph can end among more of them, however far it is walked


class FaissSearcher:
    """A FAISS index of inner products, searched under filters; on a GPU where FAISS has one and nothing is filtered.

    Attributes:
        index: On the CPU.
        kind: One of `KINDS`.
        most: The greatest effort that changes anything.
    """

    def __init__(self, index: Any, *, rows: int | None = None, gpu: bool = True) -> None:
        """Takes a FAISS index.

        Args:
            index: Of one of the kinds.
            rows: What its numbers of vectors are below; None is how many it holds.
            gpu: Whether a GPU may search it.

        Raises:
            OptionError: another type of index, or not of inner products.
        """
        self._owner = index  # what downcast_index gives does not keep it alive
        self.index = faiss.downcast_index(index)
        self.kind = _find_kind(self.index)
        self._cells = self.kind in ("ivf", "sq", "ivfpq")
        self.most = int(self.index.nlist) if self._cells else int(self.index.ntotal)
        self._rows = len(self) if rows is None else rows
        self._gpu_wanted = gpu

    def __len__(self) -> int:
        return int(self.index.ntotal)

    @property
    def stays(self) -> str | None:
        """Why a GPU does not search it; None where one does."""
        return self._moved[1]

    @cached_property
    def _moved(self) -> tuple[Any, str | None]:
        """The index on the GPU, or why it is not there; copied at the first search."""
        if not self._gpu_wanted:
            return None, "no GPU was to"
        code_bytes = int(self.index.code_size) if self.kind == "ivfpq" else 0
        stays = explain_stay(self.kind, bytes_=measure_payload(self.index), code_bytes=code_bytes)
        if stays is not None:
            return None, stays
        try:
            return send_to_gpu(self._owner), None
        except RuntimeError as error:  # FAISS's own, where a kernel or the memory falls short
            return None, f"FAISS could not: {str(error).splitlines()[0]}"

    def search(
        self, queries: FloatArray, k: int, *, effort: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[FloatArray, RowArray]:
        """The k nearest of each query by the index's own arithmetic; as many as are allowed, where k asks for them.

        A filter may take away what lies next to a query, so the effort is then that at which as many allowed vectors
        are compared as vectors without it: cells are opened until they hold so many, and a graph is walked as far as
        if those left out were the nearest. Where these are many for a walk (more than 64), where less than a tenth is
        allowed, and for a query that finds fewer than it should, all allowed vectors are compared.

        Args:
            queries: float32 [queries dim], of length 1.
            k: At least 1.
            effort: efSearch of ``hnsw``, cells looked into of ``ivf``, ``sq``, ``ivfpq``; ``flat`` takes none.
            allowed: [vectors], the filter; None allows all.

        Returns:
            Similarities and rows, [queries min(k, allowed)] each.
        """
        count = len(self) if allowed is None else int(allowed.sum())
        k = min(k, count)
        if k == 0 or len(queries) == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        share = count / len(self)
        selector = None
        if allowed is not None and share < 1:
            selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        left_out = len(self) - count
        if self.kind == "flat" or share < _RARE or (self.kind == "hnsw" and left_out > _MOST_WALKED):
            return self._compare_all(queries, k, selector, allowed)
        if self._cells and selector is not None:
            similarities, rows = self._open_cells(queries, k, selector, effort, cast(NDArray[np.bool_], allowed))
        else:
            walked = max(effort + left_out, k) if self.kind == "hnsw" else effort
            similarities, rows = self._ask(queries, k, selector, min(walked, self.most))
        if (short := (rows < 0).any(1)).any():
            similarities[short], rows[short] = self._compare_all(queries[short], k, selector, allowed)
        return similarities, rows

    def _open_cells(
        self, queries: FloatArray, k: int, selector: Any, effort: int, allowed: NDArray[np.bool_]
    ) -> tuple[FloatArray, RowArray]:
        """Looks into the cells nearest to a query until they hold as many allowed vectors as ``effort`` of them hold.

        Queries that need about as many cells, to a power of two, are asked together.
        """
        _, sizes = self._cell_of
        kept = self._count_allowed(allowed)
        depth, needed = effort, np.full(len(queries), self.most + 1)
        while depth < self.most and (needed > depth).any():
            depth = min(4 * depth, self.most)
            _, order = self.index.quantizer.search(queries, depth)
            wanted = sizes[order[:, :effort]].sum(1)
            needed = (np.cumsum(kept[order], 1) < wanted[:, None]).sum(1) + 1
        cells = np.minimum(2 ** np.ceil(np.log2(needed)).astype(np.int64), self.most)
        similarities, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for count in np.unique(cells):
            asked = cells == count
            similarities[asked], rows[asked] = self._ask(queries[asked], k, selector, int(count))
        return similarities, rows

    @cached_property
    def _cell_of(self) -> tuple[NDArray[np.int32], RowArray]:
        """The cell of each row, int32 [rows], one after the last where it has none; and the rows in each cell."""
        lists = self.index.invlists
        sizes = np.array([lists.list_size(cell) for cell in range(self.most)], np.int64)
        cell_of = np.full(self._rows, self.most, np.int32)
        for cell in np.flatnonzero(sizes):
            rows = faiss.rev_swig_ptr(lists.get_ids(int(cell)), int(sizes[cell]))
            self._require_rows(rows)
            cell_of[rows] = cell
        return cell_of, sizes

    def _count_allowed(self, allowed: NDArray[np.bool_]) -> RowArray:
        """How many allowed vectors each cell holds, int64 [cells]."""
        return np.bincount(self._cell_of[0][np.flatnonzero(allowed)], minlength=self.most + 1)[: self.most]

    def _compare_all(
        self, queries: FloatArray, k: int, selector: Any, allowed: NDArray[np.bool_] | None
    ) -> tuple[FloatArray, RowArray]:
        """Compares all that is allowed: under a filter a batch by matrix products, few queries vector by vector."""
        if selector is not None and len(queries) >= _BATCH:
            return find_nearest(queries, self._read_allowed(cast(NDArray[np.bool_], allowed)), k)
        if self.kind != "hnsw":
            return self._ask(queries, k, selector, self.most if self._cells else 0)
        chosen = {} if selector is None else {"sel": selector}
        found = self._storage.search(queries, k, params=faiss.SearchParameters(**chosen))
        return cast(tuple[FloatArray, RowArray], found)

    @property
    def _storage(self) -> Any:
        """Where the vectors lie of an index that is no cells."""
        return faiss.downcast_index(self.index.storage) if self.kind == "hnsw" else self.index

    def _read_allowed(self, allowed: NDArray[np.bool_]) -> Iterator[tuple[RowArray, FloatArray]]:
        """The rows that are allowed and their vectors as the index holds them, in blocks."""
        if not self._cells:
            rows = np.flatnonzero(allowed)
            for part in split_rows(len(rows), self.index.d):
                yield rows[part], self._storage.reconstruct_batch(rows[part])
            return
        counts = self._count_allowed(allowed)
        ends = np.cumsum(counts)
        for part in split_rows(int(ends[-1]), self.index.d):
            first, last = np.searchsorted(ends, [part.start, part.stop - 1], "right")
            cells = np.flatnonzero(counts[first : last + 1]) + first
            starts = ends[cells] - counts[cells]
            bounds = np.clip(np.stack([part.start - starts, part.stop - starts]), 0, counts[cells]).T
            read = [self._read_cell(int(cell), allowed, *bound) for cell, bound in zip(cells, bounds, strict=True)]
            yield np.concatenate([rows for rows, _ in read]), np.concatenate([vectors for _, vectors in read])

    def _read_cell(self, cell: int, allowed: NDArray[np.bool_], start: int, stop: int) -> tuple[RowArray, FloatArray]:
        """Of the allowed rows in a cell those from ``start`` to ``stop``, and their vectors."""
        lists = self.index.invlists
        size, code_bytes = int(lists.list_size(cell)), int(lists.code_size)
        rows = faiss.rev_swig_ptr(lists.get_ids(cell), size)
        codes = faiss.rev_swig_ptr(lists.get_codes(cell), size * code_bytes).reshape(size, code_bytes)
        places = np.flatnonzero(allowed[rows])[start:stop]
        chosen, cells = codes[places], np.full(len(places), cell, np.int64)
        vectors = np.empty((len(places), self.index.d), np.float32)
        self.index.decode_vectors(len(places), faiss.swig_ptr(chosen), faiss.swig_ptr(cells), faiss.swig_ptr(vectors))
        return rows[places], vectors

    def _ask(self, queries: FloatArray, k: int, selector: Any, effort: int) -> tuple[FloatArray, RowArray]:
        """Asks FAISS: the GPU's index where there is one and it can answer, which knows no selector of ours."""
        gpu = None if selector is not None or explain_search_refusal(k, effort) else self._moved[0]
        target = self.index if gpu is None else gpu
        similarities, rows = target.search(queries, k, params=self._params(selector, effort))
        self._require_rows(rows, least=-1)
        return similarities, rows

    def _require_rows(self, rows: RowArray, *, least: int = 0) -> None:
        if rows.min() < least or rows.max() >= self._rows:
            raise SearchError(
                f"index.faiss is damaged: it names vectors other than its {self._rows}; build the index again"
            )

    def _params(self, selector: Any, effort: int) -> Any:
        """Search parameters; a selector that is None is left out."""
        chosen = {} if selector is None else {"sel": selector}
        if self.kind == "flat":
            return faiss.SearchParameters(**chosen) if chosen else None
        if self.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=effort, **chosen)
        if self.kind == "ivfpq":
            return faiss.IVFPQSearchParameters(nprobe=effort, **chosen)
        return faiss.SearchParametersIVF(nprobe=effort, **chosen)


def search_exactly(
    searcher: FaissSearcher,
    queries: FloatArray,
    k: int,
    *,
    effort: int,
    refine: int,
    read: Callable[[RowArray], FloatArray],
    allowed: NDArray[np.bool_] | None = None,
) -> tuple[FloatArray, RowArray]:
    """As `FaissSearcher.search`, and ``refine`` times k rows are found by their codes and then compared exactly.

    Args:
        searcher, queries, k, effort, allowed: As there.
        refine: 1 compares nothing again.
        read: From rows to their vectors as they are compared, float32 [rows dim].
    """
    similarities, rows = searcher.search(queries, k * refine, effort=effort, allowed=allowed)
    if refine == 1 or rows.shape[1] == 0:
        return similarities, rows
    parts = [
        _compare(queries[part], rows[part], min(k, rows.shape[1]), read)
        for part in split_rows(len(queries), queries.shape[1] * rows.shape[1])
    ]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _compare(
    queries: FloatArray, rows: RowArray, k: int, read: Callable[[RowArray], FloatArray]
) -> tuple[FloatArray, RowArray]:
    """The k best of the rows [queries candidates] by exact vectors, each of which is read once."""
    distinct, places = np.unique(rows, return_inverse=True)
    similarities = np.einsum("qd,qrd->qr", queries, read(distinct)[places.reshape(rows.shape)])
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, order, 1), np.take_along_axis(rows, order, 1)


def measure_payload(index: Any) -> int:
    """Bytes that the vectors or codes of an index take with their ids, without what finds them."""
    stored = faiss.downcast_index(index.storage) if hasattr(index, "storage") else index
    return int(index.ntotal) * (int(stored.code_size) + (8 if hasattr(index, "nlist") else 0))


def _find_kind(base: Any) -> Kind:
    kinds: tuple[tuple[Any, Kind], ...] = (
        (faiss.IndexFlat, "flat"),
        (faiss.IndexHNSWFlat, "hnsw"),
        (faiss.IndexIVFFlat, "ivf"),
        (faiss.IndexIVFScalarQuantizer, "sq"),
        (faiss.IndexIVFPQ, "ivfpq"),
    )
    for cls, kind in kinds:
        if isinstance(base, cls) and base.metric_type == faiss.METRIC_INNER_PRODUCT:
            return kind
    raise OptionError(f"FAISS index {type(base).__name__} is none of embedkit's: {', '.join(KINDS)}")

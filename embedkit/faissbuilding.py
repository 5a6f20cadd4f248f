"""Owns the building of a FAISS index in bounded memory: learned on a sample, filled block by block, some vectors held
back until it is tuned; on a GPU where it may; and what is added and withdrawn later. Knows no case and no file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedkit.errors import SearchError
from embedkit.gpusearch import explain_stay, fetch_from_gpu, send_to_gpu
from embedkit.indextypes import IndexPlan, faiss, measure_sample
from embedkit.unitvectors import split_rows

__all__ = ["Prepare", "add_rows", "build_without", "find_rows", "withdraw_rows"]

FloatArray = NDArray[np.float32]
RowArray = NDArray[np.int64]
Prepare = Callable[[NDArray[Any]], FloatArray]

_SEED = 1234


def build_without(
    plan: IndexPlan, vectors: Any, held_out: RowArray, *, prepare: Prepare, gpu: bool = True
) -> tuple[Any, str | None]:
    """Builds an index of all vectors but some, which `add_rows` adds; nothing is learned from these.

    Args:
        plan: The type.
        vectors: [vectors dim], read in blocks; may be a memory map.
        held_out: Rows to leave out, sorted.
        prepare: From a block of ``vectors`` to float32 [vectors dim] of length 1, as they are to be compared.
        gpu: Whether a GPU may build it.

    Returns:
        A FAISS index of inner products, on the CPU; and why no GPU built it, None where one did.
    """
    index = _make_empty(plan, prepare(np.asarray(vectors[:1])).shape[1])
    stays = explain_stay(plan.kind, bytes_=plan.bytes, code_bytes=plan.code_bytes) if gpu else "none was to"
    if stays is None:
        try:
            target = send_to_gpu(index)
            _fill(target, plan, vectors, held_out, prepare)
            return fetch_from_gpu(target), None
        except RuntimeError as error:  # FAISS's own, where a kernel or the memory falls short
            stays = f"FAISS could not: {str(error).splitlines()[0]}"
            index = _make_empty(plan, index.d)
    _fill(index, plan, vectors, held_out, prepare)
    return index, stays


def find_rows(index: Any, found: RowArray, count: int, held_out: RowArray) -> RowArray:
    """The rows of vectors that an index of `build_without` found, as it numbers them; -1 stays.

    Args:
        index: The index.
        found: Of any shape.
        count: How many vectors there are with those held out.
        held_out: These, sorted.
    """
    if _has_ids(index):
        return found
    return np.where(found < 0, -1, _list_kept(count, held_out)[found])


def add_rows(index: Any, vectors: Any, lacking: RowArray, *, prepare: Prepare) -> None:
    """Adds the vectors of the rows that an index lacks, in place; row i is then id i.

    Args:
        index: Of the other rows: of `build_without`, or one that lacks the last rows alone.
        vectors: [vectors dim], all of them.
        lacking: int64, sorted.
        prepare: As in `build_without`.
    """
    base = faiss.downcast_index(index)
    for part in split_rows(len(lacking), vectors.shape[1]):
        block = prepare(np.asarray(vectors[lacking[part]]))
        if _has_ids(base):
            base.add_with_ids(block, lacking[part])
        else:
            base.add(block)
    order = np.concatenate([_list_kept(len(vectors), lacking), lacking])
    if not _has_ids(base) and (np.diff(order) < 0).any():
        base.permute_entries(np.argsort(order))


def withdraw_rows(index: Any, kept: RowArray, count: int) -> None:
    """Takes vectors out of an index that is no graph, in place; row ``kept[i]`` is then id i.

    Args:
        index: Of as many vectors as ``count``.
        kept: int64, sorted.
        count: How many vectors there were.

    Raises:
        SearchError: the index names vectors that there are not.
    """
    base = faiss.downcast_index(index)
    gone = np.ones(count, bool)
    gone[kept] = False
    base.remove_ids(faiss.IDSelectorBitmap(np.packbits(gone, bitorder="little")))
    if not _has_ids(base):
        return
    numbers, lists = np.full(count, -1, np.int64), base.invlists
    numbers[kept] = np.arange(len(kept))
    for cell in range(base.nlist):
        if size := int(lists.list_size(cell)):
            ids = faiss.rev_swig_ptr(lists.get_ids(cell), size)
            if ids.min() < 0 or ids.max() >= count:
                raise SearchError(f"index.faiss is damaged: it names vectors other than its {count}; build it again")
            ids[:] = numbers[ids]


def _has_ids(index: Any) -> bool:
    """Whether an index keeps the number of each vector; another counts them as they come."""
    return hasattr(faiss.downcast_index(index), "nlist")


def _list_kept(count: int, held_out: RowArray) -> RowArray:
    kept = np.ones(count, bool)
    kept[held_out] = False
    return np.flatnonzero(kept)


def _make_empty(plan: IndexPlan, dim: int) -> Any:
    index = faiss.index_factory(dim, plan.factory, faiss.METRIC_INNER_PRODUCT)
    base = faiss.downcast_index(index)
    if plan.cells:
        base.cp.min_points_per_centroid = 1  # the plan saw to it, but for what is held out: no warning on stderr
    if plan.kind == "ivfpq":
        base.pq.cp.min_points_per_centroid = 1
        # Codes ordered for a Hamming filter that nothing here uses; it takes most of the time of learning them.
        base.do_polysemous_training = False
    if plan.kind == "hnsw":
        base.hnsw.efConstruction = plan.breadth
    return index


def _fill(target: Any, plan: IndexPlan, vectors: Any, held_out: RowArray, prepare: Prepare) -> None:
    """Learns what there is to learn, and adds all rows that are not held out."""
    kept = _list_kept(len(vectors), held_out)
    if not target.is_trained:
        target.train(_sample(vectors, kept, target.d, prepare))
    for part in split_rows(len(kept), vectors.shape[1]):
        block = prepare(np.asarray(vectors[kept[part]]))
        if plan.cells:
            target.add_with_ids(block, kept[part])
        else:
            target.add(block)


def _sample(vectors: Any, rows: RowArray, dim: int, prepare: Prepare) -> FloatArray:
    """Vectors to learn cells and codes from, drawn evenly, as they are compared."""
    number = measure_sample(len(rows), dim)
    if number < len(rows):
        rows = np.sort(np.random.default_rng(_SEED).choice(rows, number, replace=False))
    sample = np.empty((len(rows), dim), np.float32)
    for part in split_rows(len(rows), vectors.shape[1]):
        sample[part] = prepare(np.asarray(vectors[rows[part]]))
    return sample

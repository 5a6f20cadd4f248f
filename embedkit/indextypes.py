"""Owns the types of FAISS index: which one suits a number of vectors and a memory budget, how it is built in batches,
and how it is searched under a filter. Knows no case, no file, and not how many of the neighbours found are right.

``flat`` compares with every vector. ``hnsw`` walks a graph of neighbours (Malkov and Yashunin, arXiv 1603.09320).
``ivf`` looks into the nearest of many cells; ``sq`` does so and keeps a byte per dimension, ``ivfpq`` a byte for
several (product quantisation; Jegou et al. 2011, IEEE TPAMI 33:117).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from embedkit.errors import OptionError

with warnings.catch_warnings():
    # The types that SWIG generates for faiss lack __module__, which some Python versions deprecate.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import faiss as _faiss

faiss: Any = _faiss
"""The library; typed as Any because its stubs know the C++ signatures and not the Python ones over them."""

__all__ = [
    "KINDS",
    "FaissSearcher",
    "IndexOptions",
    "IndexPlan",
    "Kind",
    "Prepare",
    "build_faiss",
    "faiss",
    "plan_index",
]

FloatArray = NDArray[np.float32]
Prepare = Callable[[NDArray[Any]], FloatArray]
Kind = Literal["flat", "hnsw", "ivf", "sq", "ivfpq"]
KINDS: tuple[Kind, ...] = ("flat", "hnsw", "ivf", "sq", "ivfpq")

_FLAT_UP_TO, _HNSW_UP_TO = 20_000, 200_000
_LINKS = 32
_POINTS_PER_CELL = 39  # below which FAISS warns that cells are learned from too few
_CODES = 256
_MOST_TRAINING = 200_000
_BATCH = 16_384
_RARE = 0.1
_SEED = 1234


@dataclass(frozen=True)
class IndexOptions:
    """What is asked of an index.

    Attributes:
        kind: One of `KINDS`; None chooses by size and memory.
        memory_bytes: What it may take in memory; None sets no limit.
        recall: The share of the ten nearest to be found, above 0 and at most 1.
    """

    kind: str | None = None
    memory_bytes: int | None = None
    recall: float = 0.95

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise OptionError(
                f"index type {self.kind!r} is unknown; give one of {', '.join(KINDS)}, or none to have one chosen"
            )
        if not 0 < self.recall <= 1:
            raise OptionError(f"recall {self.recall:g} means nothing; give a share above 0 and at most 1, such as 0.95")


@dataclass(frozen=True)
class IndexPlan:
    """A type of index and its sizes.

    Attributes:
        kind: One of `KINDS`.
        bytes: Of memory that its vectors will take, in round figures.
        cells: Of ``ivf``, ``sq`` and ``ivfpq``; else 0.
        code_bytes: Per vector, of ``ivfpq``; else 0.
    """

    kind: Kind
    bytes: int
    cells: int = 0
    code_bytes: int = 0

    @property
    def factory(self) -> str:
        """What FAISS calls it."""
        tail = {"ivf": "Flat", "sq": "SQ8", "ivfpq": f"PQ{self.code_bytes}"}
        return {"flat": "Flat", "hnsw": f"HNSW{_LINKS}"}.get(self.kind) or f"IVF{self.cells},{tail[self.kind]}"


def plan_index(count: int, dim: int, options: IndexOptions) -> IndexPlan:
    """Chooses the type of an index.

    Up to 20,000 vectors are compared one by one, which takes milliseconds; up to 200,000 get a graph; more get cells.
    Where that does not fit the memory, the next smaller type is taken: flat vectors in cells, a byte per dimension, at
    last product codes of ever fewer bytes.

    Args:
        count: Vectors.
        dim: Their length.
        options: What is asked of the index.

    Raises:
        OptionError: too few vectors to learn the codes of the kind from; nothing fits the memory.
    """
    kind, memory_bytes = options.kind, options.memory_bytes
    if kind is None:
        first = 0 if count <= _FLAT_UP_TO else 1 if count <= _HNSW_UP_TO else 2
        wanted: tuple[Kind, ...] = ("flat", *KINDS[3:]) if first == 0 else KINDS[first:]
    else:
        wanted = (cast(Kind, kind),)
    plans = [plan for each in wanted for plan in _plans(each, count, dim)]
    if not plans:
        raise OptionError(
            f"index type {kind} needs {_POINTS_PER_CELL * _CODES:,} vectors or more to learn codes from, and a length"
            f" that 2, 4, 8 or 16 divides; here are {count:,} of length {dim}: choose flat or sq"
        )
    fitting = [plan for plan in plans if memory_bytes is None or plan.bytes <= memory_bytes]
    if not fitting:
        least = min(plans, key=lambda plan: plan.bytes)
        raise OptionError(
            f"{count:,} vectors of length {dim} take {least.bytes / 1e6:,.1f} MB as {least.kind}, more than the"
            f" {cast(int, memory_bytes) / 1e6:,.1f} MB allowed; allow more memory, or give shorter vectors (--whiten)"
        )
    return fitting[0]


def _plans(kind: Kind, count: int, dim: int) -> list[IndexPlan]:
    """What a kind can take, the largest first; none where it cannot be learned."""
    cells = max(1, min(round(4 * math.sqrt(count)), min(count, _MOST_TRAINING) // _POINTS_PER_CELL))
    links = 8 * _LINKS + 8  # 2 M of four bytes on the lowest level, and a little above
    if kind in ("flat", "hnsw"):
        return [IndexPlan(kind, count * (4 * dim + (links if kind == "hnsw" else 0)))]
    fixed = 4 * dim * cells
    if kind != "ivfpq":
        return [IndexPlan(kind, fixed + count * ((4 * dim if kind == "ivf" else dim) + 8), cells)]
    if count < _POINTS_PER_CELL * _CODES:
        return []
    sizes = [dim // part for part in (2, 4, 8, 16) if dim % part == 0]
    tables = 4 * _CODES * dim
    return [IndexPlan(kind, fixed + tables + count * (size + 8), cells, size) for size in sizes]


def build_faiss(plan: IndexPlan, vectors: Any, *, prepare: Prepare, held_out: NDArray[np.int64] | None = None) -> Any:
    """Builds an index in bounded memory: learned on a sample, filled batch by batch; on a GPU where FAISS has one.

    Args:
        plan: The type.
        vectors: float32 [vectors dim], sliced in batches and by sorted rows; may be a memory map.
        prepare: From a block of ``vectors`` to float32 [vectors dim] of length 1, as they are to be compared.
        held_out: Rows that nothing is learned from.

    Returns:
        A FAISS index of inner products, on the CPU; row i is id i.
    """
    count, dim = len(vectors), prepare(np.asarray(vectors[:1])).shape[1]
    index = faiss.index_factory(dim, plan.factory, faiss.METRIC_INNER_PRODUCT)
    if plan.kind == "ivfpq":
        # Codes ordered for a Hamming filter that nothing here uses; it takes most of the time of learning them.
        faiss.downcast_index(index).do_polysemous_training = False
    target = _to_gpu(index) if plan.kind != "hnsw" else index
    if not index.is_trained:
        target.train(_training_sample(plan, vectors, prepare, held_out))
    for start in range(0, count, _BATCH):
        target.add(prepare(np.asarray(vectors[start : start + _BATCH])))
    return index if target is index else faiss.index_gpu_to_cpu(target)


def _to_gpu(index: Any) -> Any:
    """The index on the first GPU, or as it is where there is none."""
    if faiss.get_num_gpus() == 0:
        return index
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)


def _training_sample(plan: IndexPlan, vectors: Any, prepare: Prepare, held_out: NDArray[np.int64] | None) -> FloatArray:
    """Unit vectors to learn cells and codes from, at most 200,000, none of them held out."""
    free = np.ones(len(vectors), bool)
    needed = max(plan.cells, _CODES if plan.code_bytes else 0) * _POINTS_PER_CELL
    if held_out is not None and len(vectors) - len(held_out) >= needed:
        free[held_out] = False
    rows = np.flatnonzero(free)
    most = min(_MOST_TRAINING, max(needed, 256 * plan.cells))
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(_SEED).choice(rows, most, replace=False))
    blocks = [prepare(np.asarray(vectors[part])) for part in _parts(rows)]
    return np.concatenate(blocks)


def _parts(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), _BATCH):
        yield rows[start : start + _BATCH]


class FaissSearcher:
    """A FAISS index of inner products, searched under filters; on a GPU where FAISS has one and nothing is filtered.

    Attributes:
        index: On the CPU.
        kind: One of `KINDS`.
        most: The greatest effort that changes anything.
    """

    def __init__(self, index: Any, *, gpu: bool = True) -> None:
        """Takes an index as `build_faiss` gives it; without ``gpu`` it stays where it is.

        Raises:
            OptionError: another type of index, or not of inner products.
        """
        self._owner = index  # what downcast_index gives does not keep it alive
        self.index = faiss.downcast_index(index)
        self.kind = _find_kind(self.index)
        cells = self.kind in ("ivf", "sq", "ivfpq")
        self.most = int(self.index.nlist) if cells else int(self.index.ntotal)
        self._gpu = _to_gpu(index) if gpu and self.kind != "hnsw" else self.index

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def search(
        self, queries: FloatArray, k: int, *, effort: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[FloatArray, NDArray[np.int64], bool]:
        """The k nearest of each query by the index's own arithmetic; as many as are allowed, where k asks for them.

        Under a filter the effort grows as what is allowed shrinks. Where it allows less than a tenth, and for a query
        that finds fewer than it should, all allowed vectors are compared.

        Args:
            queries: float32 [queries dim], of length 1.
            k: At least 1.
            effort: efSearch of ``hnsw``, cells looked into of ``ivf``, ``sq``, ``ivfpq``; ``flat`` takes none.
            allowed: [vectors], the filter; None allows all.

        Returns:
            Similarities and rows, [queries min(k, allowed)] each, and whether every query was compared with
            every allowed vector.
        """
        count = len(self) if allowed is None else int(allowed.sum())
        k = min(k, count)
        if k == 0 or len(queries) == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), True
        share = count / len(self)
        selector = None
        if allowed is not None and share < 1:
            selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        if self.kind == "flat" or share < _RARE:
            return self._compare_all(queries, k, selector)
        widened = min(max(math.ceil(effort / share), k if self.kind == "hnsw" else 1), self.most)
        target = self._gpu if selector is None else self.index
        similarities, rows = target.search(queries, k, params=self._params(selector, widened))
        short = (rows < 0).any(1)
        if short.any():
            similarities[short], rows[short], _ = self._compare_all(queries[short], k, selector)
        return similarities, rows, bool(short.all()) or (self.kind != "hnsw" and widened == self.most)

    def _compare_all(self, queries: FloatArray, k: int, selector: Any) -> tuple[FloatArray, NDArray[np.int64], bool]:
        if self.kind == "hnsw":
            flat = faiss.downcast_index(self.index.storage)
            chosen = {} if selector is None else {"sel": selector}
            return *flat.search(queries, k, params=faiss.SearchParameters(**chosen)), True
        target = self._gpu if selector is None else self.index
        return *target.search(queries, k, params=self._params(selector, self.most)), True

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

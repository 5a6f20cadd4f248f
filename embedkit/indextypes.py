"""Owns the types of FAISS index: which one suits a number of vectors, a recall and a memory budget, and what is tried
next where that falls short. Builds none, and knows no case and no file.

``flat`` compares with every vector. ``hnsw`` walks a graph of neighbours (Malkov and Yashunin, arXiv 1603.09320).
``ivf`` looks into the nearest of many cells; ``sq`` does so and keeps a byte per dimension, ``ivfpq`` a byte for
several (product quantisation; Jegou et al. 2011, IEEE TPAMI 33:117).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, cast

from embedkit.errors import OptionError
from embedkit.sizes import format_bytes

with warnings.catch_warnings():
    # The types that SWIG generates for faiss lack __module__, which some Python versions deprecate.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import faiss as _faiss

faiss: Any = _faiss
"""The library; typed as Any because its stubs know the C++ signatures and not the Python ones over them."""

__all__ = [
    "CODES",
    "KINDS",
    "POINTS_PER_CELL",
    "IndexOptions",
    "IndexPlan",
    "Kind",
    "faiss",
    "measure_sample",
    "plan_index",
]

Kind = Literal["flat", "hnsw", "ivf", "sq", "ivfpq"]
KINDS: tuple[Kind, ...] = ("flat", "hnsw", "ivf", "sq", "ivfpq")
CODES = 256
"""Centroids of each part of a product code, which so takes one byte."""
POINTS_PER_CELL = 39
"""Below this FAISS warns that cells or codes are learned from too few."""

_FLAT_UP_TO, _HNSW_UP_TO = 20_000, 200_000
_GRAPHS = ((32, 40), (48, 160), (64, 320))  # links of a vector, and candidates while they are chosen; FAISS's own first
_MOST_SAMPLED = 200_000
_SAMPLE_BYTES = 1 << 29


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
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise OptionError(f"memory of {self.memory_bytes} bytes means nothing; give at least 1, or no limit")
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
        links: Of a vector to others, of ``hnsw``; else 0.
        breadth: How many candidates ``hnsw`` looks at to choose the links; else 0.
    """

    kind: Kind
    bytes: int
    cells: int = 0
    code_bytes: int = 0
    links: int = 0
    breadth: int = 0

    @property
    def factory(self) -> str:
        """What FAISS calls it."""
        tail = {"ivf": "Flat", "sq": "SQ8", "ivfpq": f"PQ{self.code_bytes}"}
        whole = {"flat": "Flat", "hnsw": f"HNSW{self.links}"}
        return whole.get(self.kind) or f"IVF{self.cells},{tail[self.kind]}"


def plan_index(count: int, dim: int, options: IndexOptions, *, beside_bytes: int = 0) -> tuple[IndexPlan, ...]:
    """Chooses the type of an index, and what to try after it where it does not find enough.

    Up to 20,000 vectors are compared one by one, which takes milliseconds; up to 200,000 get a graph; more get cells.
    Where that does not fit the memory, the next smaller type is taken: flat vectors in cells, a byte per dimension, at
    last product codes of ever fewer bytes. A graph that falls short gives way to cells, of which all can be looked
    into; or to one of more links where a graph was asked for. A recall of 1 asks for every vector to be compared.

    Args:
        count: Vectors.
        dim: Their length.
        options: What is asked of the index.
        beside_bytes: Of memory that an open index takes beside its vectors.

    Returns:
        At least one plan, all within the memory, in the order in which they are to be tried.

    Raises:
        OptionError: too few vectors to learn the codes of the kind from; nothing fits the memory.
    """
    plans = [plan for each in _list_kinds(count, options) for plan in _size_plans(each, count, dim)]
    if not plans:
        raise OptionError(
            f"index type {options.kind} needs {POINTS_PER_CELL * CODES:,} vectors or more to learn codes from, and a"
            f" length that 2, 4, 8 or 16 divides; here are {count:,} of length {dim}: choose flat or sq"
        )
    limit = math.inf if options.memory_bytes is None else options.memory_bytes
    fitting = [plan for plan in plans if plan.bytes + beside_bytes <= limit]
    if not fitting:
        _refuse(min(plans, key=lambda plan: plan.bytes), count, dim, int(limit), beside_bytes)
    chosen = [plan for plan in fitting if plan.kind == fitting[0].kind]
    if chosen[0].kind != "hnsw":
        return (chosen[0],)
    return tuple(chosen) if options.kind else (chosen[0], *[plan for plan in fitting if plan.kind == "ivf"])


def measure_sample(count: int, dim: int) -> int:
    """From how many vectors cells and codes are learned: 200,000 at most, and 512 MiB of them."""
    return max(1, min(count, _MOST_SAMPLED, _SAMPLE_BYTES // (4 * dim)))


def _list_kinds(count: int, options: IndexOptions) -> tuple[Kind, ...]:
    """The kinds that come into question, the best first."""
    if options.kind is not None:
        return (cast(Kind, options.kind),)
    if count <= _FLAT_UP_TO or options.recall == 1:
        return ("flat", "sq", "ivfpq")
    return KINDS[1:] if count <= _HNSW_UP_TO else KINDS[2:]


def _size_plans(kind: Kind, count: int, dim: int) -> list[IndexPlan]:
    """What a kind can take, in the order in which it is tried; none where it cannot be learned."""
    if kind == "flat":
        return [IndexPlan(kind, count * 4 * dim)]
    if kind == "hnsw":  # 2 links of four bytes on the lowest level, and a little above
        return [
            IndexPlan(kind, count * (4 * dim + 8 * links + 8), links=links, breadth=breadth)
            for links, breadth in _GRAPHS
        ]
    sample = measure_sample(count, dim)
    cells = max(1, min(round(4 * math.sqrt(count)), sample // POINTS_PER_CELL))
    fixed = 4 * dim * cells
    if kind != "ivfpq":
        return [IndexPlan(kind, fixed + count * ((4 * dim if kind == "ivf" else dim) + 8), cells)]
    if sample < POINTS_PER_CELL * CODES:
        return []
    sizes = [dim // part for part in (2, 4, 8, 16) if dim % part == 0]
    tables = 4 * CODES * dim
    return [IndexPlan(kind, fixed + tables + count * (size + 8), cells, size) for size in sizes]


def _refuse(least: IndexPlan, count: int, dim: int, limit: int, beside_bytes: int) -> None:
    beside = f", and tables and arrays beside them {format_bytes(beside_bytes)}" if beside_bytes else ""
    raise OptionError(
        f"{count:,} vectors of length {dim} take {format_bytes(least.bytes)} as {least.kind}{beside}: more than the"
        f" {format_bytes(limit)} allowed; allow more memory, or give shorter vectors (--whiten)"
    )

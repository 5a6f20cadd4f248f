"""Owns the making of a search index from vectors: checked, fitted, built, tuned, written. Searches nothing, and knows
not how vectors are made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.errors import RecallWarning
from embedkit.faissbuilding import add_rows, build_without, find_rows, withdraw_rows
from embedkit.faisssearching import FaissSearcher, search_exactly
from embedkit.index import Index, open_index
from embedkit.indexfiles import (
    IndexContent,
    check_table,
    measure_beside,
    read_faiss_whole,
    require_free,
    write_index_files,
)
from embedkit.indextypes import IndexOptions, IndexPlan, plan_index
from embedkit.recipe import Recipe
from embedkit.tuning import HeldOut, Tuning, choose_held_out, tune_effort
from embedkit.unitvectors import Preparation, measure_mean, split_rows
from embedkit.whitening import fit_whitening

__all__ = ["rewrite_index", "write_index"]

FloatArray = NDArray[np.float32]
RowArray = NDArray[np.int64]

_MOST_CHANGED = 0.1


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
    """Writes an index and opens it. Vectors are read in blocks, so that a memory map may be larger than the memory.

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
        options: Type of index, memory and recall. The recall reached is measured on queries of patients that the index
            did not hold then, and that were not tuned on, and kept; a `RecallWarning` says where it falls short.
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
    mean = measure_mean(vectors) if centre or whiten is not None else None
    whitening = None if whiten is None or mean is None else fit_whitening(vectors, mean, whiten)
    content = IndexContent(
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
    )
    return _write(out, vectors, lambda: _build(content, vectors))


def rewrite_index(
    index: Index,
    vectors: NDArray[Any],
    table: pl.DataFrame,
    rows: pl.DataFrame | None = None,
    *,
    kept: RowArray | None = None,
    extras: Mapping[str, NDArray[Any]] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Index:
    """Puts other vectors in the place of an index's, with all that was fitted for it, and opens it again.

    Mean and whitening stay as they are, so that cases added later stand where they would have stood. Where ``kept``
    tells what is new, FAISS's index takes that and withdraws the rest, and is searched as it was tuned; it is built
    anew, of the type that its new size asks for, and tuned again where that would be of another type, where more than
    a tenth has changed since it was tuned, and where vectors are withdrawn from a graph.

    Args:
        index: To be changed.
        vectors: [vectors dim].
        table, rows: As in `write_index`.
        kept: int64, sorted: the rows of the index's vectors with which ``vectors`` begins; None tells nothing.
        extras, details: In the place of the index's; None keeps them.

    Raises:
        SearchError, OptionError: as `write_index`, or another changed the index meanwhile; it is left as it was.
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
        details=dict(index.details if details is None else details),
        extras=dict(index.extras if extras is None else extras),
    )

    def make() -> IndexContent:
        followed = None if kept is None else _follow(index, content, vectors, kept)
        return _build(content, vectors) if followed is None else followed

    return _write(index.path, vectors, make, replaces=index.identity)


def _write(out: Path, vectors: NDArray[Any], make: Callable[[], IndexContent], *, replaces: str | None = None) -> Index:
    """Makes and writes, says where the recall falls short, and opens; what was made is gone by then."""
    write_index_files(out, make(), vectors, replaces=replaces)
    index = open_index(out)
    if index.shortfall is not None:
        warnings.warn(index.shortfall, RecallWarning, stacklevel=3)
    return index


def _follow(index: Index, content: IndexContent, vectors: NDArray[Any], kept: RowArray) -> IndexContent | None:
    """The content with the index's own FAISS index, changed and not built anew; None where that must not be."""
    changed = index.tuning.changed + index.count - len(kept) + len(vectors) - len(kept)
    withdrawn = len(kept) < index.count
    if index.kind != "flat" and (
        changed > _MOST_CHANGED * index.tuning.vectors or (withdrawn and index.kind == "hnsw")
    ):
        return None
    if not any(_suits(index, plan) for plan in _plan(content, vectors)):
        return None
    prepare = Preparation(content.mean, content.whitening)
    _check_directions(content, vectors, prepare, start=len(kept))
    whole = read_faiss_whole(index.path, index.identity)
    if withdrawn:
        withdraw_rows(whole, kept, index.count)
    add_rows(whole, vectors, np.arange(len(kept), len(vectors)), prepare=prepare)
    tuning = replace(index.tuning, changed=changed)
    return replace(content, vectors=FaissSearcher(whole), tuning=tuning, built_on=index.built_on)


def _suits(index: Index, plan: IndexPlan) -> bool:
    """Whether an index is of the type that is planned; of cells by as many codes, whatever their number."""
    if plan.kind != index.kind:
        return False
    return plan.kind != "ivfpq" or index.code_bytes == plan.code_bytes


def _plan(content: IndexContent, vectors: NDArray[Any]) -> tuple[IndexPlan, ...]:
    dim = vectors.shape[1] if content.whitening is None else content.whitening.shape[1]
    return plan_index(len(vectors), dim, content.options, beside_bytes=measure_beside(content))


def _build(content: IndexContent, vectors: NDArray[Any]) -> IndexContent:
    """The content with its FAISS index, built and tuned."""
    prepare = Preparation(content.mean, content.whitening)
    _check_directions(content, vectors, prepare)
    plans = _plan(content, vectors)
    held_out = HeldOut(*(np.zeros(0, np.int64),) * 3)
    if plans[0].kind != "flat":
        held_out = choose_held_out(_group_vectors(content))
    built = _try(plans[0], content, vectors, held_out, prepare)
    for plan in plans[1:]:
        if built.tuning.reached:
            break
        del built  # its memory is needed
        built = _try(plan, content, vectors, held_out, prepare)
    add_rows(cast(FaissSearcher, built.vectors).index, vectors, held_out.rows, prepare=prepare)
    return built


def _try(
    plan: IndexPlan, content: IndexContent, vectors: NDArray[Any], held_out: HeldOut, prepare: Preparation
) -> IndexContent:
    """The content with an index of that type, which lacks what is held out."""
    index, stays = build_without(plan, vectors, held_out.rows, prepare=prepare)
    searcher = FaissSearcher(index, rows=len(vectors))
    tuning = _tune(searcher, vectors, held_out, prepare, content.options.recall)
    return replace(content, vectors=searcher, tuning=tuning, built_on="GPU" if stays is None else f"CPU: {stays}")


def _check_directions(content: IndexContent, vectors: NDArray[Any], prepare: Preparation, *, start: int = 0) -> None:
    """Stops at the first vector without a direction from row ``start`` on, before anything is built."""
    cases, rows = content.cases["case_id"], content.rows
    for part in split_rows(len(vectors) - start, vectors.shape[1]):
        first = start + part.start

        def name_of(place: int, first: int = first) -> str:
            if rows is None:
                return f"case {cases[first + place]}"
            return f"case {cases[rows['case'][first + place]]}, slice {rows['slice'][first + place]}"

        prepare.check(np.asarray(vectors[first : start + part.stop]), name_of)


def _group_vectors(content: IndexContent) -> RowArray:
    """The patient of each vector as a number, int64 [vectors]."""
    patients = content.cases["patient_id"].rank("dense").cast(pl.Int64).to_numpy()
    return patients if content.rows is None else patients[content.rows["case"].to_numpy()]


def _tune(
    searcher: FaissSearcher, vectors: NDArray[Any], held_out: HeldOut, prepare: Preparation, recall: float
) -> Tuning:
    if searcher.kind == "flat" or not len(held_out.queries):  # a single vector has no neighbours to find
        return Tuning(effort=searcher.most if searcher.kind != "flat" else 0, vectors=len(vectors))

    def read(rows: RowArray) -> FloatArray:
        return prepare(np.asarray(vectors[rows]))

    def search(queries: FloatArray, k: int, effort: int, refine: int) -> RowArray:
        found = search_exactly(searcher, queries, k, effort=effort, refine=refine, read=read)[1]
        return find_rows(searcher.index, found, len(vectors), held_out.rows)

    return tune_effort(
        vectors, held_out, search, kind=searcher.kind, most=searcher.most, recall=recall, prepare=prepare
    )

"""Owns queries: what an index compares of a case in a cache, its vector, its slices and their pictures.

Searches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.cache import Cache, open_cache
from embedkit.casevectors import embed_new_cases
from embedkit.embeddings import Embedding, parse_embeddings
from embedkit.errors import SearchError
from embedkit.index import Index
from embedkit.matching import CaseSlices
from embedkit.patches import measure_image_cover
from embedkit.recipe import require_same_recipe
from embedkit.regions import Region
from embedkit.slicereading import SliceReader

if TYPE_CHECKING:
    from embedkit.runs import Run

__all__ = [
    "Previews",
    "Query",
    "embed_queries",
    "embed_region",
    "embed_run",
    "measure_frames",
    "open_index_run",
    "open_slices",
    "open_source",
    "outline_region",
    "read_case_query",
    "read_previews",
]

FloatArray = NDArray[np.float32]
Previews = Mapping[str, NDArray[np.uint8]]
"""By ``view/plane``, grey pictures of every slice of a stack, uint8 [slices height width]."""


@dataclass(frozen=True, eq=False)
class Query:
    """What is looked for.

    Attributes:
        name: For people: the case, or the file's name.
        case_id: The case, where the index holds it; None for a new image.
        vector: float32 [dim], made as the vectors of the index, not yet centred; None for a case of the index.
        slices: As the index compares slices.
        previews: Pictures of its slices; None where the cache keeps none.
        known: What is known of a new image by column, such as its ``patient_id``: cases alike in it can be left out.
        outlines: By ``view/plane``, how much of each pixel of ``previews`` lies in the region that votes, 0..1 [slices
            height width]; empty without a region.
        frames: By ``view/plane``, how much of each pixel of ``previews`` lies in the image and not beside it, 0..1
            [height width].
    """

    name: str
    case_id: str | None
    vector: FloatArray | None
    slices: CaseSlices
    previews: Previews | None
    known: Mapping[str, object] = field(default_factory=dict)
    outlines: Mapping[str, FloatArray] = field(default_factory=dict)
    frames: Mapping[str, FloatArray] = field(default_factory=dict)


def open_source(index: Index, cache: str | Path | Cache | None = None) -> Cache:
    """The cache that an index was made from, or ``cache`` in its place.

    Raises:
        SearchError: it is gone.
        RecipeError: ``cache`` has another recipe than the index.
    """
    if isinstance(cache, Cache):
        source = cache
    else:
        place = Path(cache or index.details["cache"])
        if not place.exists():
            raise SearchError(
                f"slices and pictures come from the cache that was indexed, but {place} is gone; say where it is"
                " (--cache)"
            )
        source = open_cache(place)
    require_same_recipe(
        source.recipe, index.recipe, where=f"cache {source.path}", ways_out="Give the cache that was indexed (--cache)"
    )
    return source


def open_slices(index: Index, cache: Cache, cases: Sequence[str] | None = None) -> SliceReader:
    """Reads slices from a cache as the index compares them; of these cases alone where they are named."""
    return SliceReader(
        cache,
        Embedding.parse(index.details["slices"]),
        index.details["views"],
        index.extras["slice_centres"],
        index.extras.get("slice_whitening"),
        cases=cases,
    )


def read_case_query(index: Index, cache: Cache, case_id: str, *, region: Region | None = None) -> Query:
    """A case of the index as a query, its slices read from the cache that was indexed; or a region of it.

    Raises:
        SearchError: the cache lacks the case, or it cannot be searched for by a region.
    """
    slices = open_slices(index, cache, [case_id]).read(case_id, region=region)
    vector = None if region is None else embed_region(index, cache, case_id, slices)
    previews = read_previews(cache, case_id)
    return Query(
        case_id,
        case_id,
        vector,
        slices,
        previews,
        outlines=outline_region(cache, case_id, previews, region),
        frames=measure_frames(cache, case_id, previews),
    )


def outline_region(
    cache: Cache, case_id: str, previews: Previews | None, region: Region | None
) -> Mapping[str, FloatArray]:
    """Where a region lies in the previews of a case; see `Query`."""
    if region is None or previews is None:
        return {}
    found = {}
    for name, stack in _list_stacks(cache, case_id).items():
        shape = previews[name].shape
        cover = region.measure_cover(cache.record(stack), cache.slices(stack).indices, shape[1] * shape[2])
        found[name] = cover.reshape(shape)
    return found


def measure_frames(cache: Cache, case_id: str, previews: Previews | None) -> Mapping[str, FloatArray]:
    """Where the image lies in the previews of a case; see `Query`."""
    if previews is None:
        return {}
    found = {}
    for name, stack in _list_stacks(cache, case_id).items():
        record, shape = cache.record(stack), previews[name].shape
        found[name] = measure_image_cover(record.plane_shape, box=record.box, grid=(shape[1], shape[2]))
    return found


def read_previews(cache: Cache, case_id: str) -> Previews | None:
    """Copies of the pictures of a case's slices; None where the cache keeps none."""
    found = {}
    for name, stack in _list_stacks(cache, case_id).items():
        previews = cache.preview(stack)
        if previews is None:
            return None
        found[name] = np.array(previews)
    return found


def _list_stacks(cache: Cache, case_id: str) -> dict[str, int]:
    """The stacks of a case by ``view/plane``."""
    rows = cache.stacks.filter(pl.col("case_id") == case_id).select("stack", "view", "plane").iter_rows()
    return {f"{view}/{plane}": stack for stack, view, plane in rows}


def embed_run(run: Run, cache: Cache) -> tuple[pl.DataFrame, FloatArray]:
    """Case table and pooled vectors [cases dim] of a run on a cache."""
    case_ids, vectors = run.embed(cache)
    patients = dict(cache.stacks.select("case_id", "patient_id").unique().iter_rows())
    table = pl.DataFrame({"case_id": list(case_ids), "patient_id": [patients[case] for case in case_ids]})
    return table, vectors


def embed_region(index: Index, cache: Cache, case_id: str, slices: CaseSlices) -> FloatArray:
    """The vector of the part of a case that votes, [dim]: of its tokens less the view's mean, zero where none votes.

    Raises:
        SearchError: the vectors of the index are not of one patch token set.
    """
    parts = [] if "run" in index.details else parse_embeddings(index.embedding, cache)
    grids = [
        cache.token_sets[each].shape[:-1]
        for each in (*(str(p.token_set) for p in parts), index.details["slices"].partition(":")[2])
    ]
    if len(parts) != 1 or "patch" not in parts[0].token_set or index.level != "case" or len(set(grids)) != 1:
        raise SearchError(
            f"index {index.path} holds {index.embedding} of each {index.level}, in which a region has no part of its"
            " own; search by region in an index of mean, grid or aligned patch tokens"
        )
    stacks, total = _list_stacks(cache, case_id), np.zeros(index.dim, np.float32)
    for name, chosen in slices.items():
        tokens = cache.read(stacks[name], parts[0].token_set)[~cache.slices(stacks[name]).blank]
        votes = np.zeros(tokens.shape[:2], np.float32)
        kept = np.flatnonzero(np.isin(np.flatnonzero(~cache.slices(stacks[name]).blank), chosen.rows))
        votes[kept] = cast(FloatArray, chosen.votes)
        mean = index.extras["view_means"][index.details["views"].index(name)]
        total += parts[0].stack_vector(parts[0].subtract(tokens, mean) * votes[..., None])
    return total


def open_index_run(index: Index) -> Run:
    """The run that made the vectors of an index.

    Raises:
        SearchError: it was trained again since.
        RunError: it is gone or damaged.
    """
    from embedkit.runs import open_run  # slow to load, and only an index of a run needs it

    run = open_run(index.details["run"])
    if run.digest != index.details["run_digest"]:
        raise SearchError(f"run {run.path} was trained again since index {index.path} was made; build the index anew")
    return run


def embed_queries(index: Index, cache: Cache) -> dict[str, FloatArray]:
    """By case of a cache its vector, [dim], made as those of the index.

    Raises:
        SearchError: the cache has a view that the index does not know, or the index's run was trained again.
    """
    if "run" in index.details:
        table, vectors = embed_run(open_index_run(index), cache)
    else:
        parts = parse_embeddings(index.embedding, cache)
        found = embed_new_cases(cache, parts, index.details["views"], index.extras["view_means"])
        table, vectors = found.cases, found.vectors
    return dict(zip(table["case_id"].to_list(), vectors, strict=True))

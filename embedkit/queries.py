"""Owns queries: a case of a cache or a new image as what an index compares, its vector, its slices and their pictures.

Searches nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.backbones import load_backbone
from embedkit.cache import Cache, create_cache, open_cache
from embedkit.embeddings import Embedding, embed_new_cases, parse_embeddings
from embedkit.errors import SearchError
from embedkit.extraction import extract_cases
from embedkit.features import Backbone
from embedkit.index import Index
from embedkit.manifest import read_manifest
from embedkit.matching import CaseSlices
from embedkit.planning import choose_device
from embedkit.recipe import require_same_recipe
from embedkit.regions import Region
from embedkit.runs import Run, open_run
from embedkit.slicereading import SliceReader
from embedkit.sources import Case, group_cases

__all__ = [
    "Previews",
    "Query",
    "embed_run",
    "open_slices",
    "open_source",
    "read_case_query",
    "read_manifest_queries",
    "read_previews",
    "read_volume_query",
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
    """

    name: str
    case_id: str | None
    vector: FloatArray | None
    slices: CaseSlices
    previews: Previews | None


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


def open_slices(index: Index, cache: Cache) -> SliceReader:
    """Reads slices from a cache as the index compares them."""
    return SliceReader(
        cache,
        Embedding.parse(index.details["slices"]),
        index.details["views"],
        index.extras["slice_centres"],
        index.extras.get("slice_whitening"),
    )


def read_case_query(index: Index, cache: Cache, case_id: str, *, region: Region | None = None) -> Query:
    """A case of the index as a query, its slices read from the cache that was indexed; or a region of it.

    Raises:
        SearchError: the cache lacks the case, or it cannot be searched for by a region.
    """
    slices = open_slices(index, cache).read(case_id, region=region)
    vector = None if region is None else _embed_region(index, cache, case_id, slices)
    return Query(case_id, case_id, vector, slices, read_previews(cache, case_id))


def read_volume_query(
    index: Index,
    volume: Path,
    *,
    view: str | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    region: Region | None = None,
) -> Query:
    """A new image as a query, extracted with the recipe that the index keeps; the arguments are those of `search`.

    Raises:
        SearchError: the index does not know the view, or the image cannot be extracted.
        VolumeError: ``volume`` cannot be read.
        RecipeError: ``weights`` are not those of the index's recipe.
    """
    backbone = load_query_backbone(index, weights=weights, device=device)
    with (
        tempfile.TemporaryDirectory(prefix="embedkit-query-") as folder,
        extract_query(index, volume, Path(folder) / "cache", backbone, view=view, device=device) as cache,
    ):
        slices = open_slices(index, cache).read("query", region=region)
        vector: FloatArray | None
        if region is not None:
            vector = _embed_region(index, cache, "query", slices)
        else:
            vector = embed_query(index, cache) if index.level == "case" else None
        return Query(volume.name, None, vector, slices, read_previews(cache, "query"))


def read_previews(cache: Cache, case_id: str) -> Previews | None:
    """Copies of the pictures of a case's slices; None where the cache keeps none."""
    found = {}
    rows = cache.stacks.filter(pl.col("case_id") == case_id).select("stack", "view", "plane").iter_rows()
    for stack, view, plane in rows:
        previews = cache.preview(stack)
        if previews is None:
            return None
        found[f"{view}/{plane}"] = np.array(previews)
    return found


def embed_run(run: Run, cache: Cache) -> tuple[pl.DataFrame, FloatArray]:
    """Case table and pooled vectors [cases dim] of a run on a cache."""
    case_ids, vectors = run.embed(cache)
    patients = dict(cache.stacks.select("case_id", "patient_id").unique().iter_rows())
    table = pl.DataFrame({"case_id": list(case_ids), "patient_id": [patients[case] for case in case_ids]})
    return table, vectors


def _embed_region(index: Index, cache: Cache, case_id: str, slices: CaseSlices) -> FloatArray:
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
    stacks = {
        f"{view}/{plane}": stack
        for view, plane, stack in cache.stacks.filter(pl.col("case_id") == case_id)
        .select("view", "plane", "stack")
        .iter_rows()
    }
    total = np.zeros(index.dim, np.float32)
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
    run = open_run(index.details["run"])
    if run.digest != index.details["run_digest"]:
        raise SearchError(f"run {run.path} was trained again since index {index.path} was made; build the index anew")
    return run


def load_query_backbone(index: Index, *, weights: str | Path | None = None, device: str = "auto") -> Backbone:
    """The backbone that made the cache behind an index, to extract new images with.

    Raises:
        BackboneError: its weights cannot be had.
        RecipeError: ``weights`` are not those of the index's recipe.
    """
    recipe = index.recipe
    backbone = load_backbone(
        recipe.backbone,
        weights=None if weights is None else Path(weights),
        image_size=recipe.image_size,
        channels=max(len(recipe.channels), len(recipe.windows)),
        device=str(choose_device(device)),
    )
    found = replace(recipe, weights=backbone.info.weights)
    require_same_recipe(recipe, found, where=f"index {index.path}", ways_out="Give the weights that made it")
    return backbone


def extract_query(
    index: Index, volume: Path, out: Path, backbone: Backbone, *, view: str | None = None, device: str = "auto"
) -> Cache:
    """Extracts a new image with the recipe of an index: a cache of one case, ``query``, at ``out``.

    Raises:
        SearchError: the image gives no tokens, or ``view`` is not one of the index's.
    """
    case = Case("query", "query", {query_view(index, view): volume.resolve()})
    create_cache(out, index.recipe)
    summary = extract_cases([case], out, backbone, index.recipe, device=choose_device(device))
    if summary.failures:
        raise SearchError(f"{volume} cannot be a query: {summary.failures[0].reason}")
    return open_cache(out)


def embed_query(index: Index, cache: Cache) -> FloatArray:
    """The vector, [dim], of the one case of a cache that `extract_query` made."""
    (vector,) = embed_queries(index, cache).values()
    return vector


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


def read_manifest_queries(
    index: Index,
    manifest: str | Path | pl.DataFrame,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    on_failure: Callable[[str, str], None],
) -> Iterator[Query]:
    """New cases as queries, of any number of views each, extracted with the recipe that the index keeps.

    Args:
        index: What is to be searched.
        manifest: As `embedkit.extract` takes it.
        weights: Of the backbone, as they were given to `extract`.
        device: Where the backbone runs.
        on_failure: Told each case that could not be extracted, and why; the others are given all the same.

    Raises:
        ManifestError: the manifest is unreadable or contradicts itself.
        SearchError: it has a view that the index does not know.
        RecipeError: ``weights`` are not those of the index's recipe.
    """
    cases = group_cases(read_manifest(manifest))
    _require_known_views(index, cases)
    backbone = load_query_backbone(index, weights=weights, device=device)
    with tempfile.TemporaryDirectory(prefix="embedkit-queries-") as folder:
        place = Path(folder) / "cache"
        create_cache(place, index.recipe)
        summary = extract_cases(cases, place, backbone, index.recipe, device=choose_device(device))
        for failure in summary.failures:
            on_failure(failure.case_id, failure.reason)
        with open_cache(place) as cache:
            vectors = embed_queries(index, cache) if len(cache) and index.level == "case" else {}
            reader = open_slices(index, cache)
            for case in cases:
                if reader.holds(case.case_id):
                    slices = reader.read(case.case_id)
                    previews = read_previews(cache, case.case_id)
                    yield Query(case.case_id, None, vectors.get(case.case_id), slices, previews)


def _require_known_views(index: Index, cases: Sequence[Case]) -> None:
    """Stops where new cases have a view that the index does not know; of channels extraction tells by itself."""
    known = sorted({name.rpartition("/")[0] for name in index.details["views"]})
    unknown = sorted({view for case in cases for view in case.images} - set(known))
    if unknown and not index.recipe.channels:
        raise SearchError(
            f"the manifest has view {', '.join(unknown)}, but index {index.path} knows {', '.join(known)}; name the"
            " views in its column view as the index does"
        )


def query_view(index: Index, view: str | None) -> str:
    """Which view a new image is: ``view``, or the only one of the index.

    Raises:
        SearchError: it is not one of the index's, or the index is over several channels.
    """
    recipe = index.recipe
    if recipe.channels:
        raise SearchError(
            f"index {index.path} was made with channels {', '.join(recipe.channels)}, and one image has no such"
            " channels; extract the new case to a cache of its own and search by its vector"
        )
    views = sorted({name.rpartition("/")[0] for name in index.details["views"]})
    if view is None and len(views) == 1:
        return str(views[0])
    if view is None or view not in views:
        raise SearchError(
            f"view {view!r} is not one of the index's: {', '.join(views)}; say which one the image is (--view)"
        )
    return view

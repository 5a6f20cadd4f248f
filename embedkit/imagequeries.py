"""Owns queries by a new image: its view, its extraction with the recipe of an index, its vector. Searches nothing."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedkit.backbones import load_backbone
from embedkit.cache import Cache, create_cache, open_cache
from embedkit.errors import SearchError, StrayWarning
from embedkit.extraction import extract_cases
from embedkit.features import Backbone
from embedkit.index import Index
from embedkit.planning import choose_device
from embedkit.queries import (
    Query,
    embed_queries,
    embed_region,
    measure_frames,
    open_slices,
    outline_region,
    read_previews,
)
from embedkit.recipe import require_same_recipe
from embedkit.regions import Region
from embedkit.sources import Case

__all__ = ["embed_query", "extract_query", "load_query_backbone", "query_view", "read_volume_query"]

FloatArray = NDArray[np.float32]


def read_volume_query(
    index: Index,
    volume: Path,
    *,
    view: str | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    region: Region | None = None,
    known: Mapping[str, object] | None = None,
) -> Query:
    """A new image as a query, extracted with the recipe that the index keeps; the arguments are those of `search`.

    ``known`` is what is known of it, by column of the index. A `StrayWarning` tells of damaged files beside a DICOM
    series that may be slices of it.

    Raises:
        SearchError: the index does not know the view, or the image cannot be extracted.
        VolumeError: ``volume`` cannot be read.
        RecipeError: ``weights`` are not those of the index's recipe.
    """
    if not volume.exists():
        raise SearchError(f"{volume} is not there; give an image file, or the folder of one DICOM series")
    backbone = load_query_backbone(index, weights=weights, device=device)
    with (
        tempfile.TemporaryDirectory(prefix="embedkit-query-") as folder,
        extract_query(index, volume, Path(folder) / "cache", backbone, view=view, device=device) as cache,
    ):
        slices = open_slices(index, cache).read("query", region=region)
        vector: FloatArray | None
        if region is not None:
            vector = embed_region(index, cache, "query", slices)
        else:
            vector = embed_query(index, cache) if index.level == "case" else None
        previews = read_previews(cache, "query")
        return Query(
            volume.name,
            None,
            vector,
            slices,
            previews,
            known=known or {},
            outlines=outline_region(cache, "query", previews, region),
            frames=measure_frames(cache, "query", previews),
        )


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
    chosen = query_view(index, view)
    case = Case("query", "query", {chosen: volume.resolve()})
    create_cache(out, index.recipe)
    summary = extract_cases([case], out, backbone, index.recipe, device=choose_device(device))
    if summary.failures:
        reason = summary.failures[0].reason.removeprefix(f"view {chosen}: ").removeprefix(f"{volume.resolve()}: ")
        raise SearchError(f"{volume} cannot be a query: {reason}")
    for stray in summary.strays:
        warnings.warn(f"{stray.path}, which lies beside {volume}: {stray.reason}", StrayWarning, stacklevel=2)
    return open_cache(out)


def embed_query(index: Index, cache: Cache) -> FloatArray:
    """The vector, [dim], of the one case of a cache that `extract_query` made."""
    (vector,) = embed_queries(index, cache).values()
    return vector


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

"""Owns similar cases: how a case becomes one vector, and search by case, by file or by vector on an index of them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.backbones import load_backbone
from embedkit.cache import Cache, create_cache, open_cache
from embedkit.errors import OptionError, SearchError
from embedkit.extraction import extract_cases
from embedkit.features import Backbone
from embedkit.index import Index, open_index, write_index
from embedkit.manifest import read_labels
from embedkit.planning import choose_device
from embedkit.recipe import TokenSet, require_same_recipe
from embedkit.runs import Run, open_run
from embedkit.sources import Case

__all__ = [
    "CaseVectors",
    "Embedding",
    "build_index",
    "embed_cases",
    "embed_query",
    "embed_volume",
    "extract_query",
    "join_labels",
    "load_query_backbone",
    "open_index",
    "query_view",
    "search",
]

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Embedding:
    """How the tokens of one view become one vector.

    Attributes:
        statistic: ``mean`` averages over slices and patches; ``grid`` averages over slices and keeps each patch place.
        token_set: Name of the token set, ``cls:12`` or ``patch@4:8``.
    """

    statistic: Literal["mean", "grid"]
    token_set: str

    def __str__(self) -> str:
        return f"{self.statistic}:{self.token_set}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads ``mean:cls:12`` or ``grid:patch@4:8``.

        Raises:
            OptionError: ``text`` does not have that form.
        """
        statistic, _, token_set = text.partition(":")
        if statistic not in ("mean", "grid"):
            raise OptionError(
                f"embedding {text!r} is not mean:TOKEN_SET or grid:TOKEN_SET; for example mean:cls:12 or grid:patch@4:8"
            )
        kind = TokenSet.parse(token_set).kind
        if kind not in ("cls", "patch") or (statistic == "grid" and kind != "patch"):
            raise OptionError(f"embedding {text!r}: mean works on cls and patch tokens, grid on patch tokens alone")
        return cls(cast(Literal["mean", "grid"], statistic), token_set)


@dataclass(frozen=True)
class CaseVectors:
    """One vector per case and view; a view is a ``view/plane`` pair.

    Attributes:
        cases: case_id and patient_id, a row per case.
        views: Names along the views axis.
        vectors: float32 [cases views dim]; zero where ``present`` is False.
        present: Bool [cases views].
    """

    cases: pl.DataFrame
    views: tuple[str, ...]
    vectors: FloatArray
    present: NDArray[np.bool_]

    def view_means(self) -> FloatArray:
        """Mean over the cases that have the view, [views dim]; a view of one case takes the mean over all views.

        Zeros where there is one vector in all: nothing could be told apart by its difference to itself.
        """
        counts = self.present.sum(0)
        if counts.sum() < 2:
            return np.zeros(self.vectors.shape[1:], np.float32)
        means = self.vectors.sum(0) / np.maximum(counts, 1)[:, None]
        means[counts < 2] = self.vectors[self.present].mean(0)
        return cast(FloatArray, means.astype(np.float32))

    def fuse(self, view_means: FloatArray) -> FloatArray:
        """One vector per case, [cases dim]: the mean over its views of the vector's difference to the view's mean.

        Taking the difference first keeps a case that lacks a sequence comparable with one that has it.
        """
        centred = np.where(self.present[..., None], self.vectors - view_means, 0.0)
        counts = np.maximum(self.present.sum(1), 1)
        return cast(FloatArray, (centred.sum(1) / counts[:, None]).astype(np.float32))


def embed_cases(cache: Cache, embedding: Embedding, *, views: Sequence[str] | None = None) -> CaseVectors:
    """Reads every stack of a cache once and gives one vector per case and view; blank slices are left out.

    Raises:
        SearchError: the cache lacks the token set, or holds a view that is not among ``views``.
    """
    if embedding.token_set not in cache.token_sets:
        raise SearchError(
            f"embedding {embedding} needs token set {embedding.token_set}, but {cache.path} holds"
            f" {', '.join(sorted(cache.token_sets))}; choose one of these or extract with --tokens"
        )
    stacks = cache.stacks.with_columns(bag_view=pl.concat_str("view", "plane", separator="/"))
    names = tuple(views) if views is not None else tuple(sorted(stacks["bag_view"].unique()))
    if unknown := sorted(set(stacks["bag_view"]) - set(names)):
        raise SearchError(f"{cache.path} has view {', '.join(unknown)}, but the index knows {', '.join(names)}")
    cases = stacks.select("case_id", "patient_id").unique(maintain_order=True)
    place = {case: row for row, case in enumerate(cases["case_id"])}
    shape = cache.token_sets[embedding.token_set].shape
    dim = int(np.prod(shape)) if embedding.statistic == "grid" else int(shape[-1])
    vectors = np.zeros((len(cases), len(names), dim), np.float32)
    present = np.zeros((len(cases), len(names)), bool)
    for stack, case, view in stacks.select("stack", "case_id", "bag_view").iter_rows():
        row, column = place[case], names.index(view)
        vectors[row, column] = _stack_vector(cache, stack, embedding)
        present[row, column] = True
    return CaseVectors(cases, names, vectors, present)


def _stack_vector(cache: Cache, stack: int, embedding: Embedding) -> FloatArray:
    tokens = cache.read(stack, embedding.token_set)[~cache.slices(stack).blank]
    mean: NDArray[Any] = tokens.mean(0, dtype=np.float32)
    if embedding.statistic == "mean" and mean.ndim == 2:
        mean = mean.mean(0)
    return cast(FloatArray, mean.reshape(-1))


def build_index(
    cache: str | Path,
    out: str | Path,
    *,
    embedding: str = "mean:cls",
    run: str | Path | None = None,
    labels: str | Path | pl.DataFrame | None = None,
) -> Index:
    """Makes a search index of the cases of a cache.

    Args:
        cache: Folder or packed file.
        out: The folder to write; must not exist, or be empty.
        embedding: ``mean:TOKEN_SET`` or ``grid:TOKEN_SET``; without a layer (``mean:cls``) the last one cached.
        run: A trained run whose pooled vector is used instead, so that "similar" means similar for its task.
        labels: A table by case_id whose columns are kept to filter by and to show.

    Raises:
        SearchError: the cache is empty or lacks the token set, or ``out`` exists.
        RunError: the run is damaged, or its head gives no pooled vector.
        RecipeError: the run was trained on another recipe.
    """
    source = open_cache(cache)
    if not len(source):
        raise SearchError(f"cache {source.path} holds no stack yet; extract some cases first")
    where = {"cache": str(source.path.resolve())}
    if run is not None:
        opened = open_run(run)
        table, vectors = _run_vectors(opened, source)
        return write_index(
            vectors,
            join_labels(table, labels),
            embedding=f"run:{opened.name}",
            recipe=source.recipe,
            out=out,
            centre=True,
            details={
                **where,
                "run": str(Path(run).resolve()),
                "run_digest": opened.digest,
                "views": list(opened.views),
            },
        )
    chosen = Embedding.parse(_with_layer(embedding, source))
    found = embed_cases(source, chosen)
    means = found.view_means()
    return write_index(
        found.fuse(means),
        join_labels(found.cases, labels),
        embedding=str(chosen),
        recipe=source.recipe,
        out=out,
        details={**where, "views": list(found.views)},
        extras={"view_means": means},
    )


def search(
    index: Index | str | Path,
    *,
    case_id: str | None = None,
    volume: str | Path | None = None,
    vector: FloatArray | None = None,
    view: str | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    k: int = 10,
    where: str | None = None,
    exclude_same: str | None = None,
) -> pl.DataFrame:
    """The cases most similar to a case of the index, to a new image, or to a vector; give exactly one of the three.

    Args:
        index: An index or its folder.
        case_id: A case that the index holds; it is not among its own results.
        volume: An image file or DICOM folder; extracted on the fly with the recipe stored in the index.
        vector: float32 [dim], made as the vectors of the index.
        view: Which view ``volume`` is; needed only where the index knows several.
        weights: For ``volume``: the backbone's local weights, as they were given to `extract`.
        device: For ``volume``: where the backbone runs.
        k: How many cases at most.
        where: A polars SQL condition on the index's columns, such as ``sex = 1 AND age < 50``.
        exclude_same: Column whose value must differ from the query's, such as ``patient_id``; with ``case_id`` only.

    Returns:
        One row per case found, most similar first: ``rank``, ``case_id``, ``patient_id``, ``similarity`` (cosine),
        and the index's further columns.

    Raises:
        SearchError: no query or several, unknown case, bad filter, or a view that the index does not know.
        VolumeError: ``volume`` cannot be read.
        RecipeError: ``weights`` are not those of the index's recipe.
    """
    opened = index if isinstance(index, Index) else open_index(index)
    given = [name for name, value in (("case", case_id), ("volume", volume), ("vector", vector)) if value is not None]
    if len(given) != 1:
        raise SearchError(
            f"search got {' and '.join(given) or 'no query'}, expected exactly one of case, volume, vector"
        )
    if exclude_same is not None and case_id is None:
        raise SearchError(f"exclude_same {exclude_same!r} needs a query that is a case of the index")
    if case_id is not None:
        found = opened.search_cases([case_id], k, where=where, exclude_same=exclude_same)
    elif volume is not None:
        query = embed_volume(opened, Path(volume), view=view, weights=weights, device=device)
        found = opened.search(query[None], k, where=where)
    else:
        found = opened.search(np.asarray(vector, np.float32)[None], k, where=where)
    return found.drop("query")


def embed_volume(
    index: Index, volume: Path, *, view: str | None = None, weights: str | Path | None = None, device: str = "auto"
) -> FloatArray:
    """The vector of a new image, [dim], made as those of the index; the arguments are those of `search`."""
    backbone = load_query_backbone(index, weights=weights, device=device)
    with (
        tempfile.TemporaryDirectory(prefix="embedkit-query-") as folder,
        extract_query(index, volume, Path(folder) / "cache", backbone, view=view, device=device) as cache,
    ):
        return embed_query(index, cache)


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
    if "run" in index.details:
        run = open_run(index.details["run"])
        if run.digest != index.details["run_digest"]:
            raise SearchError(
                f"run {run.path} was trained again since index {index.path} was made; build the index anew"
            )
        _, vectors = _run_vectors(run, cache)
        return cast(FloatArray, vectors[0])
    found = embed_cases(cache, Embedding.parse(index.embedding), views=index.details["views"])
    return cast(FloatArray, found.fuse(index.extras["view_means"])[0])


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


def _run_vectors(run: Run, cache: Cache) -> tuple[pl.DataFrame, FloatArray]:
    """Case table and pooled vectors [cases dim] of a run on a cache."""
    case_ids, vectors = run.embed(cache)
    patients = dict(cache.stacks.select("case_id", "patient_id").unique().iter_rows())
    table = pl.DataFrame({"case_id": list(case_ids), "patient_id": [patients[case] for case in case_ids]})
    return table, vectors


def _with_layer(embedding: str, cache: Cache) -> str:
    """``mean:cls`` with the last cached layer of that token set; anything else as it is."""
    statistic, _, name = embedding.partition(":")
    if ":" in name:
        return embedding
    layers = [kept.layer for kept in cache.recipe.parsed_token_sets() if str(kept).rpartition(":")[0] == name]
    if not layers:
        raise SearchError(
            f"embedding {embedding} needs token set {name}, but {cache.path} holds"
            f" {', '.join(cache.recipe.token_sets)}; choose one of these or extract with --tokens"
        )
    return f"{statistic}:{name}:{max(layers)}"


def join_labels(table: pl.DataFrame, labels: str | Path | pl.DataFrame | None) -> pl.DataFrame:
    """The case table with the columns of a label table, null where that lacks the case."""
    if labels is None:
        return table
    frame = labels if isinstance(labels, pl.DataFrame) else read_labels(labels)
    if not set(frame["case_id"]) & set(table["case_id"]):
        raise SearchError(
            f"no case_id of the labels ({', '.join(frame['case_id'].head(3))} ...) is a case of the cache"
            f" ({', '.join(table['case_id'].head(3))} ...); spell them alike"
        )
    return table.join(frame.drop("patient_id", strict=False), on="case_id", how="left", maintain_order="left")

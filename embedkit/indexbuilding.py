"""Owns how an index comes from a cache: which vectors, what is fitted to them, the slices beside. Searches nothing."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.bags import list_views
from embedkit.cache import Cache, open_originals
from embedkit.casevectors import join_embeddings
from embedkit.embeddings import Embedding, name_layer, parse_embeddings
from embedkit.errors import OptionError, SearchError
from embedkit.index import Index
from embedkit.indexlabels import join_labels
from embedkit.indextypes import IndexOptions
from embedkit.indexwriting import write_index
from embedkit.queries import embed_run
from embedkit.runs import open_run
from embedkit.slicereading import SliceReader, measure_centres, sample_slices
from embedkit.slicestore import pack_slices
from embedkit.whitening import fit_whitening

__all__ = ["LEVELS", "MadeVectors", "build_index", "list_cases", "pack_vectors", "part_blank", "restrict_cache"]

FloatArray = NDArray[np.float32]
LEVELS = ("case", "slice")
"""What a vector of an index stands for."""

_MOST_OF_CASES, _MOST_OF_SLICES, _FEWEST = 64, 256, 8


@dataclass(frozen=True)
class MadeVectors:
    """Vectors of a cache with what a query needs to become one of them.

    Attributes:
        embedding: In words.
        cases: case_id and patient_id.
        rows: Of slices; None where vectors are cases.
        vectors: [vectors dim]; None before slices are read.
        views: ``view/plane`` names.
        extras: Arrays to keep.
        details: Values to keep.
    """

    embedding: str
    cases: pl.DataFrame
    rows: pl.DataFrame | None
    vectors: Any
    views: tuple[str, ...]
    extras: dict[str, NDArray[Any]]
    details: dict[str, Any]


def build_index(
    cache: str | Path,
    out: str | Path,
    *,
    embedding: str | None = None,
    level: str = "case",
    run: str | Path | None = None,
    slices: str | None = None,
    cases: Sequence[str] | None = None,
    labels: str | Path | pl.DataFrame | None = None,
    whiten: int | None = None,
    kind: str | None = None,
    memory_bytes: int | None = None,
    recall: float = 0.95,
) -> Index:
    """Makes a search index of the cases of a cache; one of which every slice is blank is left out, and noted in its
    details as ``without_usable_slice``.

    Args:
        cache: Folder or packed file.
        out: The folder to write; must not exist, or be empty.
        embedding: ``mean:TOKEN_SET``, ``grid:TOKEN_SET`` or ``aligned:TOKEN_SET``, several side by side with ``+``;
            without a layer (``mean:cls``) the last one cached. None is ``aligned`` of the coarsest patch tokens cached,
            or else the mean class token.
        level: ``case`` for a vector per case, ``slice`` for one per slice that is not blank.
        run: A trained run whose pooled vector is used instead, so that "similar" means similar for its task.
        slices: What slices are compared by in `match_cases` and when found cases are ranked again, as ``embedding``;
            None is the grid of the coarsest patch tokens cached, or else the class token. Of level ``slice`` it is the
            embedding itself. They are whitened to 256 components, or an eighth as many as there are slices.
        cases: Only these, and all that is fitted is fitted on them; `add_cases` can take others later. None is all.
        labels: A table by case_id whose columns are kept to filter by and to show.
        whiten: Keep so many whitened principal components of the vectors, fitted on them without labels; 0 keeps the
            vectors. None is 64, or a third as many as there are cases; of a run or of slices 0.
        kind: ``flat``, ``hnsw``, ``ivf``, ``sq`` or ``ivfpq``; None chooses by size and memory.
        memory_bytes: What the index may take in memory.
        recall: The share of the ten nearest that an index which does not compare all must find.

    Raises:
        SearchError: the cache is empty or shows nothing, or lacks the token set or one of ``cases``; or ``out`` exists.
        OptionError: an option that means nothing.
        RunError: the run is damaged, or its head gives no pooled vector.
        RecipeError: the run was trained on another recipe.
    """
    options = IndexOptions(kind=kind, memory_bytes=memory_bytes, recall=recall)
    source, blank = part_blank(_open_filled(cache, cases))
    if source.stacks.is_empty():
        raise SearchError(
            f"every slice of the {len(blank)} cases in {source.path} is blank; there is nothing to compare"
        )
    _check_level(level, embedding, run, slices)
    with tempfile.TemporaryDirectory(prefix="embedkit-index-") as folder:
        made = _make_vectors(source, Path(folder), embedding=embedding, level=level, run=run, slices=slices)
        if whiten is None:
            whiten = 0 if run is not None or level == "slice" else _count_components(made)
        return write_index(
            made.vectors,
            join_labels(made.cases, labels),
            embedding=made.embedding,
            recipe=source.recipe,
            out=out,
            rows=made.rows,
            centre=run is not None,
            whiten=whiten or None,
            options=options,
            details=made.details | {"cache": str(source.path.resolve()), "without_usable_slice": blank},
            extras=made.extras,
        )


def _open_filled(path: str | Path, case_ids: Sequence[str] | None) -> Cache:
    """A cache that holds something: all of it, or some of its cases."""
    cache = open_originals(path)
    if not len(cache):
        raise SearchError(f"cache {cache.path} holds no stack yet; extract some cases first")
    if case_ids is None:
        return cache
    held = set(cache.stacks["case_id"])
    if not case_ids or (unknown := sorted(set(case_ids) - held)):
        lacking = f"has no case {', '.join(unknown[:5])}" if case_ids else "was asked for no case at all"
        raise SearchError(f"cache {cache.path} {lacking}; it holds {len(held)} such as {min(held)}")
    return restrict_cache(cache, case_ids)


def _count_components(made: MadeVectors) -> int:
    """How many whitened components the vectors of cases keep where nothing was said."""
    return _few(min(_MOST_OF_CASES, made.vectors.shape[1], len(made.cases) // 3))


def _make_vectors(
    cache: Cache,
    folder: Path,
    *,
    embedding: str | None,
    level: str,
    run: str | Path | None,
    slices: str | None,
) -> MadeVectors:
    """Vectors of all cases or slices of a cache; all that is fitted is fitted here."""
    coarse = _coarse_patches(cache)
    compared = (embedding if level == "slice" else slices) or (f"grid:{coarse}" if coarse else "mean:cls")
    chosen = Embedding.parse(name_layer(compared, cache))
    if run is not None:
        opened = open_run(run)
        cases, vectors = embed_run(opened, cache)
        name, views, extras = f"run:{opened.name}", opened.views, {}
        details: dict[str, Any] = {"run": str(Path(run).resolve()), "run_digest": opened.digest}
    elif level == "case":
        parts = parse_embeddings(embedding or (f"aligned:{coarse}" if coarse else "mean:cls"), cache)
        found = join_embeddings(cache, parts, file=folder / "cases.npy")
        name, cases, vectors, views = "+".join(map(str, parts)), found.cases, found.vectors, found.views
        extras, details = {"view_means": found.means}, {}
    else:
        cases = list_cases(cache)
        name, views, vectors, extras, details = str(chosen), list_views(cache), None, {}, {}
    extras |= _fit_slices(cache, chosen, views, cases["case_id"].to_list())
    details |= {"views": list(views), "slices": str(chosen)}
    made = MadeVectors(name, cases, None, vectors, tuple(views), extras, details)
    return pack_vectors(cache, made, folder / "slices.npy")


def _fit_slices(
    cache: Cache, embedding: Embedding, views: Sequence[str], case_ids: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """What slices need to be compared: the mean token of each view, and a whitening where slices are many enough."""
    fitted: dict[str, NDArray[Any]] = {"slice_centres": measure_centres(cache, embedding, views)}
    sample = sample_slices(SliceReader(cache, embedding, views, fitted["slice_centres"]), case_ids)
    components = _few(min(_MOST_OF_SLICES, sample.shape[1], len(sample) // 8))
    if components:
        fitted["slice_whitening"] = fit_whitening(sample, np.zeros(sample.shape[1], np.float32), components)
    return fitted


def _few(components: int) -> int:
    """As many, or none where they are too few to tell anything apart."""
    return components if components >= _FEWEST else 0


def pack_vectors(cache: Cache, made: MadeVectors, file: Path) -> MadeVectors:
    """The same with the vectors of all slices, kept in a file: beside those of cases, or in their place."""
    reader = SliceReader(
        cache,
        Embedding.parse(made.details["slices"]),
        made.views,
        made.extras["slice_centres"],
        made.extras.get("slice_whitening"),
    )
    count = int((cache.stacks["count"] - cache.stacks["blank_count"]).sum())
    vectors, places = pack_slices(reader, made.cases["case_id"].to_list(), count, file)
    if made.vectors is not None:
        return replace(made, extras=made.extras | {"slices": vectors, "slice_places": places})
    return replace(made, vectors=vectors, rows=_name_rows(places, made.views))


def _name_rows(places: NDArray[np.int32], views: Sequence[str]) -> pl.DataFrame:
    """A row per slice with the names of its view and plane."""
    split = [view.rpartition("/") for view in views]
    number = pl.Series(places[:, 1])
    return pl.DataFrame(
        {
            "case": places[:, 0].astype(np.int64),
            "view": pl.Series([view for view, _, _ in split])[number],
            "plane": pl.Series([plane for _, _, plane in split])[number],
            "row": places[:, 2],
            "slice": places[:, 3],
        }
    )


def _check_level(level: str, embedding: str | None, run: str | Path | None, slices: str | None) -> None:
    if level not in LEVELS:
        raise OptionError(f"level {level!r} is unknown; give {' or '.join(LEVELS)}")
    if run is not None and embedding is not None:
        raise OptionError(
            f"embedding {embedding!r} was given beside run {run}, whose pooled vector is used instead; leave one out"
        )
    if level == "slice" and (
        run is not None or slices is not None or any(part in (embedding or "") for part in ("+", "aligned"))
    ):
        raise OptionError(
            "an index of slices takes one embedding, mean or grid, and no run: a run pools whole cases, and slices are"
            " compared by the embedding itself"
        )


def list_cases(cache: Cache) -> pl.DataFrame:
    """case_id and patient_id of the cases of a cache, in its order."""
    return cache.stacks.select("case_id", "patient_id").unique(maintain_order=True)


def restrict_cache(cache: Cache, case_ids: Sequence[str]) -> Cache:
    """The same open cache with the stacks of these cases alone in its table; stacks keep their numbers."""
    part = copy.copy(cache)
    part.stacks = cache.stacks.filter(pl.col("case_id").is_in(list(case_ids)))
    return part


def part_blank(cache: Cache) -> tuple[Cache, list[str]]:
    """The same open cache without the cases of which every slice is blank, and these."""
    shown = set(cache.stacks.filter(pl.col("count") > pl.col("blank_count"))["case_id"])
    blank = [case for case in dict.fromkeys(cache.stacks["case_id"].to_list()) if case not in shown]
    return (restrict_cache(cache, sorted(shown)), blank) if blank else (cache, [])


def _coarse_patches(cache: Cache) -> str | None:
    """The coarsest pooled patch tokens cached, of their deepest layer; None where there are none."""
    pooled = [each for each in cache.recipe.parsed_token_sets() if each.kind == "patch" and each.grid is not None]
    return str(min(pooled, key=lambda each: (each.grid or 0, -each.layer))) if pooled else None

"""Owns queries by a manifest: all its cases extracted in one go, then given one by one. Searches nothing."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import polars as pl

from embedkit.cache import create_cache, open_cache
from embedkit.errors import SearchError, StrayWarning
from embedkit.extraction import extract_cases
from embedkit.imagequeries import load_query_backbone
from embedkit.index import Index
from embedkit.manifest import list_columns, read_manifest
from embedkit.planning import choose_device
from embedkit.queries import Query, embed_queries, measure_frames, open_slices, read_previews
from embedkit.sources import Case, group_cases

__all__ = ["read_manifest_queries"]


def read_manifest_queries(
    index: Index,
    manifest: str | Path | pl.DataFrame,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    needed: str | None = None,
    on_failure: Callable[[str, str], None],
) -> Iterator[Query]:
    """New cases as queries, of any number of views each, extracted with the recipe that the index keeps.

    Args:
        index: What is to be searched.
        manifest: As `embedkit.extract` takes it; without a column ``view`` its images are of the index's one view.
        weights: Of the backbone, as they were given to `extract`.
        device: Where the backbone runs.
        needed: A column that the manifest must name, so that it is ``known`` of each case.
        on_failure: Told each case that could not be extracted, and why; the others are given all the same.

    Raises:
        ManifestError: the manifest is unreadable or contradicts itself.
        SearchError: it has a view that the index does not know, lacks the column ``needed``, or tells two values of a
            case there.
        RecipeError: ``weights`` are not those of the index's recipe.

    Warns:
        StrayWarning: a damaged DICOM file lies beside the series of cases and may be a slice of one.
    """
    table, columns = read_manifest(manifest), list_columns(manifest)
    known = {} if needed is None else _read_known(table, needed, columns)
    if "view" not in columns and not index.recipe.channels:
        table = table.with_columns(view=pl.lit(_name_view(index)))
    cases = group_cases(table)
    _require_known_views(index, cases)
    backbone = load_query_backbone(index, weights=weights, device=device)
    with tempfile.TemporaryDirectory(prefix="embedkit-queries-") as folder:
        place = Path(folder) / "cache"
        create_cache(place, index.recipe)
        summary = extract_cases(cases, place, backbone, index.recipe, device=choose_device(device))
        for failure in summary.failures:
            on_failure(failure.case_id, failure.reason)
        for stray in summary.strays:
            beside = ", ".join(stray.beside)
            warnings.warn(f"{stray.path}, which lies beside {beside}: {stray.reason}", StrayWarning, stacklevel=2)
        if len(summary.failures) == len(cases):
            return
        with open_cache(place) as cache:
            vectors = embed_queries(index, cache) if index.level == "case" else {}
            reader = open_slices(index, cache)
            for case in cases:
                if reader.holds(case.case_id):
                    slices = reader.read(case.case_id)
                    previews = read_previews(cache, case.case_id)
                    yield Query(
                        case.case_id,
                        None,
                        vectors.get(case.case_id),
                        slices,
                        previews,
                        known={} if needed is None else {needed: known[case.case_id]},
                        frames=measure_frames(cache, case.case_id, previews),
                    )


def _read_known(table: pl.DataFrame, column: str, columns: Sequence[str]) -> dict[str, object]:
    """By case of a manifest its one value in a column; None where it has none."""
    if column not in columns:
        raise SearchError(
            f"exclude_same names {column!r}, but the manifest has {', '.join(columns)}; add the column, so that it is"
            " told of each new case"
        )
    found: dict[str, object] = {}
    for case_id, value in table.select("case_id", column).iter_rows():
        if found.setdefault(case_id, value) != value:
            raise SearchError(
                f"case {case_id} has {found[case_id]!r} and {value!r} in column {column!r} of the manifest, expected"
                " one value for all its images; make them alike"
            )
    return found


def _list_views(index: Index) -> list[str]:
    return sorted({name.rpartition("/")[0] for name in index.details["views"]})


def _name_view(index: Index) -> str:
    """The one view of an index, which images are of where nobody names it."""
    views = _list_views(index)
    if len(views) > 1:
        raise SearchError(
            f"the manifest has no column view, but index {index.path} knows {', '.join(views)}; add the column, so that"
            " it is told which each image is"
        )
    return views[0]


def _require_known_views(index: Index, cases: Sequence[Case]) -> None:
    """Stops where new cases have a view that the index does not know; of channels extraction tells by itself."""
    known = _list_views(index)
    unknown = sorted({view for case in cases for view in case.images} - set(known))
    if unknown and not index.recipe.channels:
        raise SearchError(
            f"the manifest has view {', '.join(unknown)}, but index {index.path} knows {', '.join(known)}; name the"
            " views in its column view as the index does"
        )

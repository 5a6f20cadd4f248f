"""Owns `embedkit search`: parses, calls `embedkit.search`, prints the similar cases and why; draws them if asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from embedkit.cli.console import print_json, print_table

if TYPE_CHECKING:
    import polars as pl

    from embedkit.matching import Match

__all__ = ["run"]

_PATCHES = 3


def search_command(
    index: Annotated[Path, typer.Argument(help="Folder of the index.")],
    case: Annotated[str | None, typer.Option(help="Query: a case that the index holds.")] = None,
    volume: Annotated[Path | None, typer.Option(help="Query: an image file or DICOM folder.")] = None,
    vector: Annotated[Path | None, typer.Option(help="Query: .npy of one vector made as the index's.")] = None,
    manifest: Annotated[Path | None, typer.Option(help="Queries: every case of a manifest.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many cases.")] = 10,
    where: Annotated[
        str | None, typer.Option(help='SQL condition on the index\'s columns: "sex = 1 AND age < 50".')
    ] = None,
    exclude_same: Annotated[
        str | None, typer.Option(help="Column that must differ from the query's: patient_id.")
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(help="Part of the query that votes: mask file, voxels:I,J,K,I,J,K or mm:X,Y,Z,X,Y,Z (RAS+)."),
    ] = None,
    rerank: Annotated[
        str | None, typer.Option(help="Rank again by slices: none, free or ordered; default: ordered, of a run none.")
    ] = None,
    by_patch: Annotated[bool, typer.Option("--by-patch", help="Compare slices patch by patch, in any place.")] = False,
    candidates: Annotated[int, typer.Option(help="How many cases are ranked again.")] = 100,
    view: Annotated[str | None, typer.Option(help="Which view the volume is, where the index knows several.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Local weights of the backbone, for new images.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda; for new images.")] = "auto",
    montage: Annotated[Path | None, typer.Option(help="PNG of the slices that match, heat where patches do.")] = None,
    pairs: Annotated[int, typer.Option(help="Matched slices per case, with --json and --montage; 0: none.")] = 3,
    cache: Annotated[
        Path | None, typer.Option(help="Where slices and pictures come from; default: the cache indexed.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the cases and the slices that match as JSON.")] = False,
) -> None:
    """Find the cases most similar to a case, to a new image, or to every case of a manifest."""
    from embedkit.index import open_index
    from embedkit.queries import open_source, read_case_query, read_volume_query
    from embedkit.regions import Region
    from embedkit.retrieval import match_cases, search, search_manifest

    opened = open_index(index)
    part = None if region is None else Region.parse(region)
    ranking: dict[str, Any] = {"k": k, "where": where, "rerank": rerank, "by_patch": by_patch, "candidates": candidates}
    if manifest is not None:
        _require_alone(case=case, volume=volume, vector=vector, region=region, exclude_same=exclude_same)
        failed: list[str] = []
        found = search_manifest(
            opened,
            manifest,
            weights=weights,
            device=device,
            cache=cache,
            on_failure=lambda name, reason: failed.append(f"{name}: {reason}"),
            **ranking,
        )
        print_json(found.to_dicts()) if json else _print_found(found)
        for line in failed:
            typer.echo(f"failed {line}", err=True)
        raise typer.Exit(1 if failed else 0)
    query = None
    if volume is not None and case is None and vector is None:
        query = read_volume_query(opened, volume, view=view, weights=weights, device=device, region=part)
    found = search(
        opened,
        case_id=case,
        volume=volume if query is None else None,
        vector=None if vector is None else _read_vector(vector),
        query=query,
        exclude_same=exclude_same,
        region=part if query is None else None,
        cache=cache,
        **ranking,
    )
    explained = (json or montage is not None) and pairs > 0 and vector is None and not found.is_empty()
    if not explained:
        print_json(found.to_dicts()) if json else _print_found(found)
        if montage is not None:
            raise typer.BadParameter("a picture needs a query with slices and a case found", param_hint="--montage")
        return
    source = open_source(opened, cache)
    asked = query or read_case_query(opened, source, str(case), region=part)
    order = "free" if rerank == "free" else "ordered"
    matches = match_cases(
        opened, asked, found["case_id"].to_list(), cache=source, order=order, by_patch=by_patch or part is not None
    )
    if json:
        rows = zip(found.to_dicts(), matches, strict=True)
        print_json([row | {"matches": _describe_match(match, pairs)} for row, match in rows])
    else:
        _print_found(found)
    if montage is not None:
        from embedkit.pictures import draw_similar_cases

        draw_similar_cases(opened, found, montage, query=asked, matches=matches, cache=source, pairs=pairs)
        typer.echo(f"{montage}: slices of the query beside those that match", err=True)


run = search_command


def _require_alone(**options: object) -> None:
    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]:
        raise typer.BadParameter(f"a manifest is a batch of queries of its own; leave out {', '.join(given)}")


def _read_vector(path: Path) -> Any:
    import numpy as np

    from embedkit.errors import SearchError

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SearchError(f"{path} is no readable .npy array; write the query vector with numpy.save") from error


def _describe_match(match: Match, pairs: int) -> list[dict[str, Any]]:
    """The best pairs of slices, each with its best pairs of patches as (row, column) of their grids."""
    return [
        {
            "view": pair.view,
            "query_slice": pair.query_slice,
            "slice": pair.other_slice,
            "similarity": pair.similarity,
            "patches": [
                {"query": mine, "patch": theirs, "similarity": similarity}
                for mine, theirs, similarity in match.patch_pairs(pair, _PATCHES)
            ],
        }
        for pair in match.top(pairs)
    ]


def _print_found(found: pl.DataFrame) -> None:
    def show(value: object) -> str:
        if value is None:
            return ""
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    print_table(found.columns, [[show(value) for value in row] for row in found.iter_rows()])

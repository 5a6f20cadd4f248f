"""Owns `embedkit search`: parses, calls `embedkit.search`, prints the similar cases and why; draws them if asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from embedkit.cli.console import print_json, print_table, tell_strays

if TYPE_CHECKING:
    import polars as pl

    from embedkit.index import Index
    from embedkit.matching import Match, SlicePair
    from embedkit.regions import Region

__all__ = ["run"]

_PATCHES = 3


def search_command(
    index: Annotated[Path, typer.Argument(help="Folder of the index.")],
    case: Annotated[str | None, typer.Option(help="Query: a case that the index holds.")] = None,
    volume: Annotated[Path | None, typer.Option(help="Query: an image file or DICOM folder.")] = None,
    vector: Annotated[Path | None, typer.Option(help="Query: .npy of one vector made as the index's.")] = None,
    manifest: Annotated[Path | None, typer.Option(help="Queries: every case of a manifest.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Query: a text, with --text-model or --text-vectors; may be given several times."),
    ] = None,
    text_model: Annotated[
        str | None, typer.Option(help="open_clip model whose image tower is the backbone: ViT-B-16.")
    ] = None,
    text_weights: Annotated[
        str | None, typer.Option(help="Its weights, of both towers: a file, or a tag: laion2b_s34b_b88k.")
    ] = None,
    text_vectors: Annotated[
        Path | None, typer.Option(help=".npy or .safetensors of one vector per --text, in the tokens' space.")
    ] = None,
    shared_space: Annotated[
        bool, typer.Option("--shared-space", help="The text vectors do lie in the space of the backbone's tokens.")
    ] = False,
    k: Annotated[int, typer.Option("-k", help="How many cases.")] = 10,
    where: Annotated[
        str | None, typer.Option(help='SQL condition on the index\'s columns: "sex = 1 AND age < 50".')
    ] = None,
    exclude_same: Annotated[
        str | None,
        typer.Option(
            help="Column that must differ from the query's: patient_id; of a volume or vector: patient_id=ID."
        ),
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(help="Part of the query that votes: mask file, voxels:I,J,K,I,J,K or mm:X,Y,Z,X,Y,Z (RAS+)."),
    ] = None,
    rerank: Annotated[
        str | None,
        typer.Option(
            help="Rank again by slices: none, free, ordered, or both, with the vectors; default: ordered, of a vector"
            " or a run none."
        ),
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
    """Find the cases most similar to a case, to a new image, to a text, or to every case of a manifest."""
    from embedkit.index import open_index
    from embedkit.regions import Region

    if not any((case, volume, vector, manifest, text, text_vectors)):
        raise typer.BadParameter("name what to search for: --case, --volume, --vector, --manifest or --text")
    opened = open_index(index)
    if pairs < 0:
        raise typer.BadParameter(f"{pairs} pairs are none; give 0 or more", param_hint="--pairs")
    if volume is None and manifest is None:
        _require_alone("only a new image has a view and needs a backbone", "", view=view, weights=weights)
    if manifest is not None:
        _require_alone("a manifest", "names the views itself", view=view)
    if vector is not None:
        _require_alone("a vector has no slices to draw or to compare", "", montage=montage, region=region)
    if montage is not None and pairs == 0:
        raise typer.BadParameter("a picture of 0 pairs shows nothing; give 1 or more", param_hint="--pairs")
    if montage is not None:
        _require_picture(opened, montage)
    part = None if region is None else Region.parse(region)
    ranking: dict[str, Any] = {"k": k, "where": where, "rerank": rerank, "by_patch": by_patch, "candidates": candidates}
    reading: dict[str, Any] = {"weights": weights, "device": device}
    if manifest is not None:
        single = {"case": case, "volume": volume, "vector": vector, "text": text or None}
        towers = {"text_model": text_model, "text_weights": text_weights, "text_vectors": text_vectors}
        _require_alone(
            "a manifest", **single, **towers, shared_space=shared_space or None, region=region, montage=montage
        )
        reading["exclude_same"] = exclude_same
        _search_manifest(opened, manifest, {**ranking, **reading, "cache": cache}, json=json)
    elif text or text_vectors is not None or text_model is not None or text_weights is not None or shared_space:
        others = {"case": case, "volume": volume, "vector": vector, "rerank": rerank, "montage": montage}
        _require_alone("a text", **others, region=region, exclude_same=exclude_same, by_patch=by_patch or None)
        paired: dict[str, Any] = {"model": text_model, "weights": text_weights}
        vouched: dict[str, Any] = {"vectors": text_vectors, "shared_space": shared_space}
        _search_texts(opened, text or [], {**paired, **vouched, "k": k, "where": where}, json=json)
    else:
        excluding = _parse_exclusion(opened, exclude_same, case)
        with tell_strays():
            asked = _read_query(opened, case, volume, vector, view=view, region=part, **reading)
            _search_one(
                opened,
                asked,
                {**ranking, **excluding},
                cache=cache,
                montage=montage,
                pairs=pairs,
                json=json,
            )


def _search_manifest(index: Index, manifest: Path, options: dict[str, Any], *, json: bool) -> None:
    from embedkit.retrieval import search_manifest

    failed: list[str] = []
    with tell_strays():
        found = search_manifest(
            index, manifest, on_failure=lambda name, reason: failed.append(f"{name}: {reason}"), **options
        )
    print_json(found.to_dicts()) if json else _print_found(found)
    for line in failed:
        typer.echo(f"failed {line}", err=True)
    raise typer.Exit(1 if failed else 0)


def _search_texts(index: Index, texts: list[str], options: dict[str, Any], *, json: bool) -> None:
    from embedkit.retrieval import search_texts

    found = search_texts(index, texts, **options)
    if found.is_empty():
        _tell_nothing({"where": options["where"]})
    print_json(found.to_dicts()) if json else _print_found(found)


def _parse_exclusion(index: Index, text: str | None, case: str | None) -> dict[str, Any]:
    """``COLUMN`` or ``COLUMN=VALUE`` as arguments of `embedkit.search`, checked before a new image is computed."""
    from embedkit.ranking import list_excluded

    if text is None:
        return {}
    column, _, value = text.partition("=")
    if case is None and not list_excluded(index, column, known={column: value} if value else {}):
        typer.echo(f"no case of the index has {column} {value!r}, so none is left out", err=True)
    return {"exclude_same": column, "exclude_value": value or None}


def _read_query(
    index: Index,
    case: str | None,
    volume: Path | None,
    vector: Path | None,
    *,
    region: Region | None,
    **reading: Any,
) -> dict[str, Any]:
    """The arguments of `embedkit.search` that say what is looked for; a new image is read once, here."""
    if volume is None or case is not None or vector is not None:
        read = None if vector is None else _read_vector(vector)
        return {"case_id": case, "volume": volume, "vector": read, "region": region}
    from embedkit.imagequeries import read_volume_query

    return {"query": read_volume_query(index, volume, region=region, **reading)}


def _search_one(
    index: Index,
    asked: dict[str, Any],
    options: dict[str, Any],
    *,
    cache: Path | None,
    montage: Path | None,
    pairs: int,
    json: bool,
) -> None:
    """Searches for one query, prints the cases, and what matched where that is asked for and can be told."""
    from embedkit.errors import SearchError
    from embedkit.retrieval import search

    explained = (json or montage is not None) and pairs > 0 and asked.get("vector") is None
    if explained:
        _require_source(index, cache)
    found = search(index, cache=cache, **asked, **options)
    if found.is_empty():
        _tell_nothing(options)
    matches = None
    if explained and not found.is_empty():
        matches = _explain(index, found, asked, options, cache=cache, montage=montage, pairs=pairs)
    if matches is not None and json:
        rows = zip(found.to_dicts(), matches, strict=True)
        print_json(
            [
                row | {"slices_similarity": match.similarity, "matches": _describe_match(match, pairs)}
                for row, match in rows
            ]
        )
    else:
        print_json(found.to_dicts()) if json else _print_found(found)
    if montage is not None and matches is None:
        raise SearchError(f"no case was found, so {montage} was not drawn; loosen the filter")


def _tell_nothing(options: dict[str, Any]) -> None:
    """Says on stderr why there is no result."""
    names = {"--where": options.get("where"), "--exclude-same": options.get("exclude_same")}
    asked = " and ".join(f"{name} {value!r}" for name, value in names.items() if value is not None)
    typer.echo(f"no case is left by {asked}" if asked else "the index holds no other case", err=True)


def _require_picture(index: Index, montage: Path) -> None:
    """Stops before a search whose picture could not be drawn or written."""
    from embedkit.errors import SearchError
    from embedkit.pictures import require_picture_place

    require_picture_place(montage)
    if not index.recipe.preview:
        raise SearchError(
            f"the cache behind index {index.path} keeps no pictures of slices to draw; extract with --preview 64"
        )


def _require_source(index: Index, cache: Path | None) -> None:
    """Stops before a search whose reasons could not be told."""
    from embedkit.errors import SearchError

    place = Path(cache or index.details["cache"])
    if not place.exists():
        raise SearchError(
            f"the slices that matched are read from the cache that was indexed, but {place} is gone; say where it is"
            " (--cache), or leave them out (--pairs 0, and no --montage)"
        )


def _explain(
    index: Index,
    found: pl.DataFrame,
    asked: dict[str, Any],
    options: dict[str, Any],
    *,
    cache: Path | None,
    montage: Path | None,
    pairs: int,
) -> list[Match]:
    """Which slices of the query match which of the cases found; drawn too where a picture is asked for."""
    from embedkit.matching import has_votes
    from embedkit.queries import open_source, read_case_query
    from embedkit.ranking import Ranking
    from embedkit.retrieval import match_cases

    source, part = open_source(index, cache), asked.get("region")
    query = asked.get("query") or read_case_query(index, source, asked["case_id"], region=part)
    by_patch = options["by_patch"] or has_votes(query.slices)
    order = Ranking.for_index(index, rerank=options["rerank"], by_patch=by_patch).order
    matches = match_cases(index, query, found["case_id"].to_list(), cache=source, order=order, by_patch=by_patch)
    if montage is not None:
        from embedkit.pictures import draw_similar_cases

        draw_similar_cases(index, found, montage, query=query, matches=matches, cache=source, pairs=pairs)
        typer.echo(f"{montage}: slices of the query beside those that match", err=True)
    return matches


run = search_command


def _require_alone(what: str, why: str = "is a query of its own", **options: object) -> None:
    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]:
        raise typer.BadParameter(f"{' '.join([what, why]).strip()}; leave out {', '.join(given)}")


def _read_vector(path: Path) -> Any:
    import numpy as np

    from embedkit.errors import SearchError

    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise SearchError(f"{path} is not there; give the .npy file of the query vector") from error
    except (OSError, ValueError, EOFError) as error:
        raise SearchError(f"{path} is no readable .npy array; write the query vector with numpy.save") from error


def _describe_match(match: Match, pairs: int) -> list[dict[str, Any]]:
    """The best pairs of slices, each with its best pairs of patches, and what made the slices alike as wholes.

    Patches are (row, column) of their grids.
    """
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
        | ({} if match.by_patch else {"parts": _describe_parts(match, pair)})
        for pair in match.top(pairs)
    ]


def _describe_parts(match: Match, pair: SlicePair) -> list[dict[str, Any]]:
    """The patches of the query's slice that add most to the similarity of two slices, and how much."""
    heat, _ = match.heat(pair)
    order = heat.reshape(-1).argsort()[::-1][:_PATCHES].tolist()
    return [{"patch": divmod(place, heat.shape[1]), "adds": float(heat.flat[place])} for place in order]


def _print_found(found: pl.DataFrame) -> None:
    def show(value: object) -> str:
        if value is None:
            return ""
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    print_table(found.columns, [[show(value) for value in row] for row in found.iter_rows()])

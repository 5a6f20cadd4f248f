"""Owns `embedkit search-eval`: parses, calls `embedkit.evaluate_search`, prints the measures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from embedkit.cli.console import print_json, print_table, split_list

__all__ = ["run"]


def search_eval_command(
    index: Annotated[Path, typer.Argument(help="Folder of the index.")],
    relevant: Annotated[str, typer.Option(help="Column of the index: cases with the query's value are right.")],
    k: Annotated[str, typer.Option("-k", help="Places at which precision, recall and votes are taken.")] = "1,5,10",
    by: Annotated[str | None, typer.Option(help="Column: judge the queries of each of its values apart, too.")] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition: which cases may be found.")] = None,
    exclude_same: Annotated[
        str | None, typer.Option(help="Column that must differ from the query's: patient_id.")
    ] = None,
    rerank: Annotated[
        str | None, typer.Option(help="Rank again by slices: none, free, ordered or both; default: as search does.")
    ] = None,
    by_patch: Annotated[bool, typer.Option("--by-patch", help="Compare slices patch by patch, in any place.")] = False,
    candidates: Annotated[int, typer.Option(help="How many cases are ranked again.")] = 100,
    cache: Annotated[Path | None, typer.Option(help="Where patches come from; default: the cache indexed.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap over patients.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print measures and queries as JSON.")] = False,
) -> None:
    """Judge an index: do its searches find cases that share a value? Every case is a query, none finds itself."""
    from embedkit import evaluate_search
    from embedkit.errors import OptionError
    from embedkit.index import open_index
    from embedkit.targets import count_noun

    try:
        places = [int(part) for part in split_list(k)]
    except ValueError as error:
        raise OptionError(f"k is {k!r}, expected whole numbers between commas: 1,5,10") from error
    found = evaluate_search(
        index,
        relevant=relevant,
        k=places,
        by=by,
        where=where,
        exclude_same=exclude_same,
        rerank=rerank,
        by_patch=by_patch,
        candidates=candidates,
        cache=cache,
        seed=seed,
    )
    if json:
        print_json(
            {
                "relevant": relevant,
                "depth": found.depth,
                "skipped": found.skipped,
                "measures": found.table.to_dicts(),
                "queries": found.queries.to_dicts(),
            }
        )
        return
    print_table(
        ("queries of", "measure", "value", "95% interval", "queries", "patients"),
        [
            (
                row["group"] or "all",
                row["measure"],
                f"{row['value']:.3f}",
                "undefined" if math.isnan(row["low"]) else f"{row['low']:.3f}..{row['high']:.3f}",
                str(row["queries"]),
                str(row["patients"]),
            )
            for row in found.table.iter_rows(named=True)
        ],
    )
    if open_index(index).embedding.startswith("run:"):
        typer.echo(
            "the vectors are of a run: cases that it was trained on are found more easily than new ones would be",
            err=True,
        )
    if found.skipped:
        noun = count_noun(found.skipped, "case")
        typer.echo(f"no query: {noun} whose {relevant} is unknown, or no other's that may be found", err=True)


run = search_eval_command

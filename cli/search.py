"""Owns `embedkit search`: parses, calls `embedkit.search`, prints the similar cases and draws them if asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from embedkit.cli.console import print_json, print_table

if TYPE_CHECKING:
    import polars as pl

__all__ = ["run"]


def search_command(
    index: Annotated[Path, typer.Argument(help="Folder of the index.")],
    case: Annotated[str | None, typer.Option(help="Query: a case that the index holds.")] = None,
    volume: Annotated[Path | None, typer.Option(help="Query: an image file or DICOM folder.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many cases.")] = 10,
    where: Annotated[
        str | None, typer.Option(help='SQL condition on the index\'s columns: "sex = 1 AND age < 50".')
    ] = None,
    exclude_same: Annotated[
        str | None, typer.Option(help="Column that must differ from the query's: patient_id.")
    ] = None,
    view: Annotated[str | None, typer.Option(help="Which view the volume is, where the index knows several.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Local weights of the backbone, for --volume.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda; for --volume.")] = "auto",
    montage: Annotated[Path | None, typer.Option(help="PNG of the query beside its neighbours.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where the pictures come from; default: the cache indexed.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the cases as JSON.")] = False,
) -> None:
    """Find the cases most similar to a case or to a new image."""
    from embedkit import search
    from embedkit.index import open_index
    from embedkit.pictures import draw_similar_cases

    opened = open_index(index)
    found = search(
        opened,
        case_id=case,
        volume=volume,
        view=view,
        weights=weights,
        device=device,
        k=k,
        where=where,
        exclude_same=exclude_same,
    )
    if json:
        print_json(found.to_dicts())
    else:
        _print_found(found)
    if montage is not None:
        draw_similar_cases(opened, found, montage, case_id=case, volume=volume, cache=cache)
        typer.echo(f"{montage}: the query beside its neighbours", err=True)


run = search_command


def _print_found(found: pl.DataFrame) -> None:
    def show(value: object) -> str:
        if value is None:
            return ""
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    print_table(found.columns, [[show(value) for value in row] for row in found.iter_rows()])

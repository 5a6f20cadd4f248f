"""Owns `embedkit serve`: parses, calls `embedkit.serve`, prints the page's address and opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from embedkit.cli.console import parse_size

__all__ = ["run"]


def serve_command(
    cache: Annotated[Path, typer.Argument(help="Folder or packed file of the cache.")],
    index: Annotated[Path, typer.Argument(help="Folder of an index of that cache.")],
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Folders of runs to show predictions and heatmaps of.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Table by case_id whose columns are added to the index's.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of 127.0.0.1; 0 takes a free one.")] = 0,
    weights: Annotated[Path | None, typer.Option(help="Local weights of the backbone, to query by a new scan.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda: where a new scan is computed.")] = "auto",
    upload_limit: Annotated[str, typer.Option(help="Largest new scan, as 500MB or 2GB.")] = "1GB",
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
) -> None:
    """Open a page to explore a cohort: map, slices, similar cases, heatmaps. It is served to this machine alone."""
    from embedkit import serve

    def open_page(address: str) -> None:
        typer.echo(f"{address}\nopen to whoever has this address on this machine; Ctrl-C ends it")
        if not no_browser:
            typer.launch(address)

    try:
        serve(
            cache,
            index,
            runs or [],
            labels=labels,
            port=port,
            weights=weights,
            device=device,
            upload_limit_bytes=parse_size(upload_limit, "--upload-limit"),
            on_ready=open_page,
        )
    except KeyboardInterrupt:
        typer.echo("stopped; uploads are removed", err=True)
        raise typer.Exit(130) from None


run = serve_command

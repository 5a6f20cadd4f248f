"""Owns `embedkit verify`: parses, calls `embedkit.verify_cache`, lists the damage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from embedkit.cli.console import show_progress

__all__ = ["run"]


def verify_command(cache: Annotated[Path, typer.Argument(help="Folder or packed file of the cache.")]) -> None:
    """Check every byte of a cache against its checksums."""
    from embedkit import verify_cache

    with show_progress("verify", "bytes") as meter:
        damages = verify_cache(cache, progress=meter)
    for damage in damages:
        typer.echo(f"{damage.file} {damage.part}: {damage.problem}", err=True)
    if damages:
        typer.echo(f"{cache}: {len(damages)} damaged; delete the files named and run the extraction again", err=True)
        raise typer.Exit(1)
    typer.echo(f"{cache}: all checksums are right")


run = verify_command

"""Owns `embedkit verify`: parses, calls `embedkit.verify_cache` or `embedkit.verify_index`, lists the damage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from embedkit.cli.console import print_json, show_progress

from embedkit.errors import CacheError

__all__ = ["run"]


def verify_command(
    cache: Annotated[Path, typer.Argument(help="Folder or packed file of a cache, or folder of a search index.")],
    json: Annotated[bool, typer.Option("--json", help="Print the damage as JSON.")] = False,
) -> None:
    """Check every byte of a cache, or of a search index, against its checksums."""
    from embedkit import verify_cache, verify_index

    if not cache.exists():
        raise CacheError(
            f"{cache} does not exist; give the folder or packed file of a cache, or the folder of a search index"
        )
    is_index = (cache / "index.json").exists()
    with show_progress("verify", "bytes") as meter:
        damages = (verify_index if is_index else verify_cache)(cache, progress=meter)
    if json:
        print_json(
            {
                "index" if is_index else "cache": str(cache),
                "damages": [dataclasses.asdict(damage) for damage in damages],
            }
        )
        raise typer.Exit(1 if damages else 0)
    for damage in damages:
        typer.echo(f"{' '.join(filter(None, (str(damage.file), damage.part)))}: {damage.problem}", err=True)
    if damages:
        remedy = "delete the files named and run the extraction again"
        if is_index:
            remedy = "build the index again"
        elif not cache.is_dir():
            remedy = "if it is a packed cache, restore a copy or pack it again"
        typer.echo(f"{cache}: {len(damages)} damaged; {remedy}", err=True)
        raise typer.Exit(1)
    typer.echo(f"{cache}: all checksums are right")


run = verify_command

"""Owns `embedkit pack`: parses, calls `embedkit.pack_cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from embedkit.cli.console import show_progress

__all__ = ["run"]


def pack_command(
    cache: Annotated[Path, typer.Argument(help="Folder of the cache.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The single .h5 file to write.")],
) -> None:
    """Merge all shards of a cache into one file."""
    from embedkit import pack_cache

    with show_progress("pack", "bytes") as meter:
        packed = pack_cache(cache, out, progress=meter)
    typer.echo(
        f"{packed.path}: {packed.stacks} stacks, {packed.bytes / 1e6:.1f} MB, {packed.duplicates} copies dropped"
    )
    if packed.failures:
        typer.echo(
            f"note: {packed.failures} cases are on record as failed in {cache}; the packed file does not say so",
            err=True,
        )


run = pack_command

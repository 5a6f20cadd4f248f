"""Owns `embedkit pack`: parses, calls `embedkit.pack_cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from embedkit.cli.console import parse_size, show_progress

__all__ = ["run"]


def pack_command(
    cache: Annotated[Path, typer.Argument(help="Folder of the cache.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The single .h5 file to write; with --shard-size a new folder.")
    ],
    shard_size: Annotated[
        str, typer.Option(help="Write a cache folder of shards of about this size: 500MB, 2GB, or plain bytes.")
    ] = "",
) -> None:
    """Merge all shards of a cache into one file, or into few of a given size."""
    from embedkit import pack_cache

    shard_bytes = parse_size(shard_size) if shard_size else None
    with show_progress("pack", "bytes") as meter:
        packed = pack_cache(cache, out, shard_bytes=shard_bytes, progress=meter)
    typer.echo(
        f"{packed.path}: {packed.stacks} stacks in {packed.shards} shards, {packed.bytes / 1e6:.1f} MB,"
        f" {packed.duplicates} duplicates dropped"
    )
    untold = [f"{packed.failures} cases are on record as failed"] if packed.failures else []
    untold += [f"{packed.strays} damaged DICOM files are on record as strays"] if packed.strays else []
    if untold:
        typer.echo(f"note: {' and '.join(untold)} in {cache}; the packed file does not say so", err=True)


run = pack_command

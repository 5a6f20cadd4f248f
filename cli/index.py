"""Owns `embedkit index`: parses, calls `embedkit.build_index`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from embedkit.cli.console import print_json

__all__ = ["run"]


def index_command(
    cache: Annotated[Path, typer.Argument(help="Folder or packed file of the cache.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the index to write.")],
    embedding: Annotated[
        str, typer.Option(help="mean:cls, mean:patch@4 or grid:patch@4 (keeps places), optionally with :LAYER.")
    ] = "mean:cls",
    run: Annotated[Path | None, typer.Option(help="Use the pooled vector of this run instead.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Table by case_id whose columns can be filtered by.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Make a search index of the cases of a cache."""
    from embedkit import build_index

    index = build_index(cache, out, embedding=embedding, run=run, labels=labels)
    if json:
        print_json(
            {
                "index": str(out),
                "cases": len(index),
                "embedding": index.embedding,
                "dim": index.dim,
                "fingerprint": index.fingerprint,
                "columns": index.cases.columns,
            }
        )
        return
    columns = ", ".join(index.cases.columns)
    typer.echo(f"{out}: {len(index)} cases, {index.embedding}, {index.dim} dims; columns {columns}")


run = index_command

"""Owns `embedkit heads`: lists the heads that are installed."""

from __future__ import annotations

import typer
from embedkit.cli.console import print_table

__all__ = ["run"]


def heads_command() -> None:
    """List the heads, built-in and from other packages."""
    from embedkit.plugins import list_heads, load_head

    rows = []
    for entry in list_heads().values():
        head = load_head(entry.name)
        summary = (head.__doc__ or "").strip().partition("\n")[0]
        rows.append((entry.name, ", ".join(sorted(head.reads)), entry.distribution, summary))
    print_table(("head", "reads", "from", "what it does"), rows)
    typer.echo("\nA package adds heads through the entry-point group embedkit.heads; embedkit.plugins tells how.")


run = heads_command

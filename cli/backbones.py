"""Owns `embedkit backbones`: lists backbones to start with."""

from __future__ import annotations

import typer
from embedkit.cli.console import print_table

__all__ = ["run"]


def backbones_command() -> None:
    """List backbones to start with; every timm model that gives tokens works."""
    from embedkit.backbones import list_backbones

    rows = [
        (note.name, note.what, note.licence, "hub" if note.download else "built in", str(note.image_size))
        for note in list_backbones()
    ]
    print_table(("backbone", "what it is", "licence of the weights", "weights", "pixels"), rows)
    typer.echo("\nAny other timm model works by its name; weights come from its hub or from --weights FILE.")


run = backbones_command

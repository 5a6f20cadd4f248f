"""Owns `embedkit export`: parses, calls `embedkit.export_run`, says what the file takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from embedkit.cli.console import print_json

__all__ = ["run"]


def export_command(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, as grade.onnx or grade.pt2.")],
    format: Annotated[str, typer.Option(help="onnx (pip install 'embedkit[export]') or torch (torch.export).")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the description that the file holds.")] = False,
) -> None:
    """Write a trained run as one file that runs without embedkit."""
    from embedkit import export_run

    exported = export_run(run, out, format=format, overwrite=overwrite)  # type: ignore[arg-type]  # refused by export_run
    if json:
        print_json(exported.description)
        return
    typer.echo(f"{exported.path}: {', '.join(exported.inputs)} -> scores; differs by {exported.difference:.1g} at most")


run = export_command

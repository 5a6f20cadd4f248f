"""Owns `embedkit explain`: parses, calls `embedkit.explain`, says what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["run"]


def explain_command(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.")],
    cache: Annotated[Path, typer.Argument(help="Cache that holds the case, of the run's recipe.")],
    case: Annotated[str, typer.Option(help="The case to explain.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the heatmaps and the picture.")],
    manifest: Annotated[
        Path | None,
        typer.Option(help="Draw over the images it names, in full resolution; default: the cached previews."),
    ] = None,
    class_name: Annotated[
        str | None, typer.Option("--class", help="Explain this class; default: the positive or the predicted one.")
    ] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Ask only the fold model that was trained without the case.")
    ] = False,
) -> None:
    """Show where a trained run looked: NIfTI heatmaps in the source geometry, and a picture."""
    from embedkit import explain

    shown = explain(run, cache, case, out, manifest=manifest, class_name=class_name, held_out=held_out)
    typer.echo(f"{case}: {shown.answer}")
    for view, weights in shown.slice_weights.items():
        top = ", ".join(f"slice {index} ({weight:.0%})" for index, weight in weights.top(3))
        typer.echo(f"  {view}: most evidence on {top}")
        if shown.slice_attention is not None:
            attention = shown.slice_attention[view]
            place = int(attention.argmax())
            typer.echo(f"  {view}: most attention on slice {weights.indices[place]} ({attention[place]:.0%})")
    for path in (*shown.heatmaps.values(), shown.montage):
        typer.echo(str(path))


run = explain_command

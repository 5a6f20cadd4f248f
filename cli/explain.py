"""Owns `embedkit explain`: parses, calls `embedkit.explain`, says what was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from embedkit.cli.console import print_json

if TYPE_CHECKING:
    from embedkit.explanation import Explanation

__all__ = ["run"]


def explain_command(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.")],
    cache: Annotated[Path, typer.Argument(help="Cache that holds the case, of the run's recipe.")],
    case: Annotated[str, typer.Option(help="The case to explain.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the heatmaps and the picture.")],
    method: Annotated[
        str,
        typer.Option(
            help="How patches are scored: contribution, gradient, occlusion (for the class), attention (of the head),"
            " backbone (its class token's attention)."
        ),
    ] = "contribution",
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
    sanity: Annotated[
        bool,
        typer.Option(
            "--sanity", help="Also say whether the map depends on what the head learned (maps of shuffled heads)."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print answer, weights and files as JSON.")] = False,
) -> None:
    """Show where a trained run looked: NIfTI heatmaps in the source geometry, and a picture."""
    from embedkit import explain

    shown = explain(
        run,
        cache,
        case,
        out,
        method=method,  # type: ignore[arg-type]  # refused with the known ones by find_evidence
        manifest=manifest,
        class_name=class_name,
        held_out=held_out,
        sanity=sanity,
    )
    if json:
        print_json(_as_fields(shown))
        return
    typer.echo(f"{case}: {shown.answer}")
    for view, weights in shown.slice_weights.items():
        top = ", ".join(f"slice {index} ({weight:.0%})" for index, weight in weights.top(3))
        typer.echo(f"  {view}: most {shown.word} on {top}")
        if shown.slice_attention is not None:
            attention = shown.slice_attention[view]
            place = int(attention.argmax())
            typer.echo(f"  {view}: most attention on slice {weights.indices[place]} ({attention[place]:.0%})")
    if shown.sanity is not None:
        typer.echo(f"  sanity check {shown.sanity}")
    for path in (*shown.heatmaps.values(), shown.montage):
        typer.echo(str(path))


run = explain_command


def _as_fields(shown: Explanation) -> dict[str, Any]:
    """Plain values; per ``view/plane`` each slice's index, weight and, where the head has it, attention."""
    views = {}
    for view, weights in shown.slice_weights.items():
        attention = None if shown.slice_attention is None else shown.slice_attention[view].tolist()
        views[view] = {
            "heatmap": shown.heatmaps.get(view),
            "slices": weights.indices.tolist(),
            "weights": weights.weights.tolist(),
            "attention": attention,
        }
    sanity = None
    if shown.sanity is not None:
        sanity = {"passed": shown.sanity.passed, "alike": shown.sanity.alike, "correlations": shown.sanity.correlations}
    return {
        "case_id": shown.case_id,
        "answer": shown.answer,
        "method": shown.method,
        "montage": shown.montage,
        "sanity": sanity,
        "views": views,
    }

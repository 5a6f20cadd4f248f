"""Owns `embedkit segment`: parses, calls `embedkit.segment`, says what was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from embedkit.cli.console import parse_number, print_json, split_list

if TYPE_CHECKING:
    from embedkit.prompts import Click

__all__ = ["run"]


def segment_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run that was trained with --masks.")],
    cache: Annotated[Path, typer.Argument(help="Cache that holds the cases, of the run's recipe.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the masks.")],
    case: Annotated[list[str] | None, typer.Option(help="A case; again for more. Default: all of the cache.")] = None,
    click: Annotated[
        list[str] | None,
        typer.Option(help="I,J,K: a voxel of the source image inside of what is to be found; again for more."),
    ] = None,
    click_mm: Annotated[
        list[str] | None, typer.Option("--click-mm", help="X,Y,Z: the same in world coordinates, RAS+ mm.")
    ] = None,
    click_view: Annotated[
        str, typer.Option("--click-view", help="The view that the clicks are set in; default: all of the case.")
    ] = "",
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Each case only by the fold models that were trained without it.")
    ] = False,
    threshold: Annotated[
        float, typer.Option(help="Share from which on a voxel is in the mask; lower for what is small beside a patch.")
    ] = 0.5,
    json: Annotated[bool, typer.Option("--json", help="Print files and volumes as JSON.")] = False,
) -> None:
    """Write the masks that a run predicts, as NIfTI in the source geometry."""
    from embedkit import segment

    clicks = [
        *_parse_clicks(click or (), "voxel", click_view, option="--click"),
        *_parse_clicks(click_mm or (), "mm", click_view, option="--click-mm"),
    ]
    written = segment(run, cache, out, case_ids=case or None, clicks=clicks, held_out=held_out, threshold=threshold)
    if json:
        print_json([asdict(each) for each in written])
        return
    for each in written:
        typer.echo(f"{each.case_id} {each.view}: {each.volume_ml:g} ml  {each.path}")


run = segment_command


def _parse_clicks(given: Sequence[str], unit: str, view: str, *, option: str) -> list[Click]:
    from embedkit import Click

    clicks = []
    for text in given:
        numbers = [parse_number(part, option) for part in split_list(text)]
        if len(numbers) != 3:
            raise typer.BadParameter(f"{text!r} has {len(numbers)} numbers, expected three", param_hint=option)
        clicks.append(Click((numbers[0], numbers[1], numbers[2]), unit, view))
    return clicks

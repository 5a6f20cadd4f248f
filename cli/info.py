"""Owns `embedkit info`: parses, calls `embedkit.describe_cache`, prints what the cache holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from embedkit.cli.console import name_some, print_json, print_table

if TYPE_CHECKING:
    from embedkit.inspection import CacheSummary, StorageChoice

__all__ = ["run"]


def info_command(
    cache: Annotated[Path, typer.Argument(help="Folder or packed file of the cache.")],
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a cache holds: recipe, cases, token sets, bytes, failures."""
    from embedkit import describe_cache

    summary = describe_cache(cache)
    if json:
        fields = {field.name: getattr(summary, field.name) for field in dataclasses.fields(summary)}
        fields["recipe"] = summary.recipe.to_fields()
        fields["choices"] = [dataclasses.asdict(choice) for choice in summary.choices]
        fields["token_sets"] = {name: dataclasses.asdict(kept) for name, kept in summary.token_sets.items()}
        fields["failures"] = [dataclasses.asdict(failure) for failure in summary.failures]
        fields["strays"] = [dataclasses.asdict(stray) for stray in summary.strays]
        fields["duplicates"] = summary.duplicates.to_dicts()
        print_json(fields)
        return
    _print_summary(summary)


run = info_command


def _print_summary(summary: CacheSummary) -> None:
    from embedkit.failures import FAILURES_FILE

    recipe = summary.recipe
    typer.echo(
        f"{summary.path}: recipe {summary.fingerprint}, {summary.shards} shards, {summary.bytes / 1e6:.1f} MB\n"
        f"backbone  {recipe.backbone} ({recipe.weights[:19]}) at {recipe.image_size} px, {recipe.precision}\n"
        f"slices    {recipe.slices}, planes {', '.join(recipe.planes)}, windows {', '.join(recipe.windows)},"
        f" crop {recipe.crop}, resize {recipe.resize}\n"
        f"holds     {summary.cases} cases of {summary.patients} patients, {summary.stacks} stacks,"
        f" {summary.slices} slices ({summary.blank_slices} blank)\n"
        f"views     {', '.join(f'{view} ({count})' for view, count in summary.views.items())}"
    )
    if recipe.copies:
        mirrored = ", half of them mirrored" if recipe.flips else ""
        typer.echo(
            f"copies    these cases are {recipe.copies} altered copies of each{mirrored}, for train --copies alone"
        )
    rows = [
        (name, " x ".join(map(str, kept.shape)), kept.dtype, str(kept.bytes), f"{summary.token_bytes[name] / 1e6:.1f}")
        for name, kept in summary.token_sets.items()
    ]
    side = recipe.preview
    rows.append(("preview", f"{side} x {side}", "uint8", str(side**2), f"{summary.preview_bytes / 1e6:.1f}"))
    typer.echo()
    print_table(("token set", "per slice", "stored as", "bytes/slice", "MB"), rows)
    _print_choices(summary.choices)
    for failure in summary.failures:
        typer.echo(f"failed    {failure.case_id}: {failure.reason}")
    for stray in summary.strays:
        typer.echo(f"stray     a file beside {name_some(stray.beside)}: {stray.reason}")
    if summary.failures or summary.strays:
        typer.echo(
            f"note      {FAILURES_FILE} keeps a failure until an extraction does the case, and a stray until one finds"
            " it mended or gone; delete the file to forget cases that no manifest has any more"
        )
    if len(summary.duplicates):
        typer.echo(f"note      {len(summary.duplicates)} stacks are stored twice; embedkit pack drops the duplicates")
    if summary.unreadable_failures:
        typer.echo(f"note      {len(summary.unreadable_failures)} lines of the failure record cannot be read")


def _print_choices(choices: Sequence[StorageChoice]) -> None:
    """A row per token set: what one layer of it takes as float16 and as int8."""
    if not choices:
        return
    rows: dict[str, list[str]] = {}
    for choice in choices:
        row = rows.setdefault(choice.token_set, [choice.token_set, " x ".join(map(str, choice.shape))])
        row += [str(choice.slice_bytes), f"{choice.cache_bytes / 1e6:.1f}"]
    typer.echo("\nwhat one layer of each token set would take here (extract --tokens, --dtype)")
    print_table(("token set", "per slice", "float16 bytes/slice", "MB", "int8 bytes/slice", "MB"), list(rows.values()))

"""Owns `embedkit neighbours`: parses, calls `embedkit.probe_neighbours`, prints the scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from embedkit.cli.console import print_json, print_table, split_list

__all__ = ["run"]


def neighbours_command(
    cache: Annotated[Path, typer.Argument(help="Folder or packed file of the cache.")],
    labels: Annotated[Path, typer.Option(help="CSV, TSV or Parquet with case_id and the target.")],
    target: Annotated[str, typer.Option(help="Column to tell from like cases.")],
    embedding: Annotated[str | None, typer.Option(help="As mean:cls:12 or grid:patch@4:8.")] = None,
    classes: Annotated[str, typer.Option(help="Classes to learn, the last one positive: 1,3.")] = "",
    folds: Annotated[int, typer.Option(help="Patient-grouped folds.")] = 5,
    seed: Annotated[int, typer.Option(help="Of folds, inner splits and bootstrap.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Nearest-neighbour probe: how well like cases of other folds tell a target, with nothing trained."""
    import dataclasses

    from embedkit import probe_neighbours
    from embedkit.canvas import describe_interval

    found = probe_neighbours(
        cache,
        labels,
        target=target,
        embedding=embedding,
        classes=split_list(classes) or None,
        folds=folds,
        seed=seed,
    )
    if json:
        print_json(dataclasses.asdict(found))
        return
    asked = ", ".join(map(str, found.neighbours))
    typer.echo(f"{target} by {found.embedding}: {found.cases} cases of {found.patients} patients; neighbours {asked}")
    print_table(("metric", "value"), [(name, describe_interval(each)) for name, each in found.metrics.items()])


run = neighbours_command

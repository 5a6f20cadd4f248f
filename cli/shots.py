"""Owns `embedkit shots`: parses, calls `embedkit.few_shot`, prints the curve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from embedkit.cli.console import print_json, print_table, split_list

__all__ = ["run"]


def shots_command(
    cache: Annotated[Path, typer.Argument(help="Folder or packed file of the cache.")],
    labels: Annotated[Path, typer.Option(help="CSV, TSV or Parquet with case_id and the target.")],
    target: Annotated[str, typer.Option(help="Column with classes.")],
    shots: Annotated[str, typer.Option(help="Training patients per class.")] = "1,2,5,10",
    head: Annotated[list[str] | None, typer.Option(help="Head in closed form; again for more.")] = None,
    draws: Annotated[int, typer.Option(help="How often the patients of each point are drawn.")] = 10,
    folds: Annotated[int, typer.Option(help="Patient-grouped folds.")] = 5,
    classes: Annotated[str, typer.Option(help="Classes to learn, the last one positive: 1,3.")] = "",
    metric: Annotated[str, typer.Option(help="Score of the curve.")] = "auroc",
    plot: Annotated[Path | None, typer.Option(help="Picture of the curve, .png.")] = None,
    seed: Annotated[int, typer.Option(help="Of folds, draws and bootstrap.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the curve as JSON.")] = False,
) -> None:
    """Few-shot curve: scores with a few training patients per class, drawn several times within the folds."""
    from embedkit import few_shot
    from embedkit.charts import plot_shots
    from embedkit.errors import OptionError
    from embedkit.pictures import write_picture
    from embedkit.report import metric_title

    try:
        numbers = [int(part) for part in split_list(shots)]
    except ValueError as error:
        raise OptionError(f"shots are {shots!r}, expected whole numbers between commas: 1,2,5,10") from error
    found = few_shot(
        cache,
        labels,
        target=target,
        shots=numbers,
        heads=head or ("logistic", "raptor"),
        draws=draws,
        folds=folds,
        classes=split_list(classes) or None,
        metric=metric,
        seed=seed,
    )
    if plot is not None:
        full = {name: each.value for name, each in found.full.items()}
        write_picture(plot, plot_shots(found.curves, metric=metric_title(metric), full=full))
    if json:
        print_json(found.table.to_dicts())
        return
    rows = [
        (row["head"], "all" if row["shots"] is None else str(row["shots"]), _interval(row))
        for row in found.table.iter_rows(named=True)
    ]
    print_table(("head", "patients per class", metric), rows)


run = shots_command


def _interval(row: dict[str, float]) -> str:
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"

"""Owns `embedkit evaluate`: parses, calls `embedkit.evaluate`, prints the scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from embedkit.cli.console import print_json, print_table

__all__ = ["run"]


def evaluate_command(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.")],
    cache: Annotated[Path, typer.Argument(help="Cache of cases that the run was not trained on, of its recipe.")],
    labels: Annotated[Path, typer.Option(help="Table by case_id with the run's target.")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score a trained run on other cases, with patient-level intervals."""
    import dataclasses

    from embedkit import evaluate

    metrics = evaluate(run, cache, labels, device=device)
    if json:
        print_json({name: dataclasses.asdict(interval) for name, interval in metrics.items()})
        return
    rows = [(name, f"{each.value:.3f}", f"{each.low:.3f}", f"{each.high:.3f}") for name, each in metrics.items()]
    print_table(("metric", "value", "low", "high"), rows)


run = evaluate_command

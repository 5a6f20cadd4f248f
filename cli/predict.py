"""Owns `embedkit predict`: parses, calls `embedkit.predict`, writes the predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from embedkit.cli.console import print_json

__all__ = ["run"]


def predict_command(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.")],
    cache: Annotated[Path, typer.Argument(help="Cache of the new cases, of the run's recipe.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Table to write: .parquet, .csv or .tsv.")],
    calibrate: Annotated[
        str | None, typer.Option(help="temperature, platt or isotonic, fitted on the inner splits of each fold.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the predictions as JSON too, a row per case.")] = False,
) -> None:
    """Predict the cases of a cache with a trained run."""
    from embedkit import predict
    from embedkit.manifest import write_table

    predictions = predict(
        run,
        cache,
        calibrate=calibrate,  # type: ignore[arg-type]  # refused with the known methods by fit_calibrator
        device=device,
    )
    write_table(predictions, out)
    if json:
        print_json(predictions.to_dicts())
        return
    typer.echo(f"{out}: {len(predictions)} cases; columns {', '.join(predictions.columns)}")


run = predict_command

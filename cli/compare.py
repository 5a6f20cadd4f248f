"""Owns `embedkit compare`: parses, calls `embedkit.compare_runs`, prints the differences."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from embedkit.cli.console import print_json, print_table

__all__ = ["run"]


def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Folders of two or more runs of one target.")],
    metric: Annotated[str | None, typer.Option(help="Metric to compare; default: auroc, of a regression mae.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="One of the runs; the others are compared with it alone, not every pair.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="HTML file with scores, differences and curves.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap over patients.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print scores and differences as JSON.")] = False,
) -> None:
    """Compare runs on the same cases: paired differences with intervals and p-values, corrected for their number."""
    import dataclasses

    from embedkit import compare_runs, write_comparison

    found = compare_runs(runs, metric=metric, reference=reference, seed=seed)
    if report is not None:
        write_comparison(report, found, seed=seed)
    if json:
        scores = {name: dataclasses.asdict(each) for name, each in found.scores.items()}
        counts = {"metric": found.metric, "cases": found.cases, "patients": found.patients}
        print_json(counts | {"scores": scores, "contrasts": found.table.to_dicts(), "notes": list(found.notes)})
        return
    scored = [(name, _interval(each.value, each.low, each.high)) for name, each in found.scores.items()]
    print_table(("run", found.metric), scored)
    typer.echo("")
    rows = [
        (
            f"{row['first']} - {row['second']}",
            _interval(row["difference"], row["low"], row["high"]),
            *("" if row[name] is None else f"{row[name]:.2g}" for name in _P_VALUES),
        )
        for row in found.table.iter_rows(named=True)
    ]
    print_table(("difference", "95% interval", *_P_VALUES.values()), rows)
    for note in found.notes:
        typer.echo(f"note: {note}")
    if report is not None:
        typer.echo(f"report: {report}")


run = compare_command

_P_VALUES = {"p_bootstrap": "p (bootstrap)", "p_delong": "p (DeLong)", "p_holm": "Holm", "p_bh": "Benjamini-Hochberg"}


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"

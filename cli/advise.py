"""Owns `embedkit advise`: parses, calls `embedkit.advise`, prints the evidence and the command it recommends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from embedkit.cli.console import (
    format_seconds,
    parse_duration,
    print_json,
    print_table,
    show_progress,
    split_list,
)

if TYPE_CHECKING:
    from embedkit.advice import Advice

__all__ = ["run"]


def advise_command(
    cache: Annotated[Path, typer.Argument(help="Folder or packed file of the cache.")],
    labels: Annotated[Path, typer.Option(help="CSV, TSV or Parquet with case_id and the target.")],
    target: Annotated[str, typer.Option(help="Column to learn.")],
    budget: Annotated[str, typer.Option(help="Time to spend: 90s, 10m, 2h.")] = "10m",
    kind: Annotated[
        str | None, typer.Option(help="binary, multiclass, multilabel, regression or survival; default: inferred.")
    ] = None,
    classes: Annotated[str, typer.Option(help="Classes to learn, the last one positive: 1,3.")] = "",
    event: Annotated[
        str | None, typer.Option(help="Column that is 1 where the time in --target ended with the event.")
    ] = None,
    folds: Annotated[int, typer.Option(help="Patient-grouped folds.")] = 5,
    split: Annotated[str | None, typer.Option(help="Label column that holds the folds instead.")] = None,
    seed: Annotated[int, typer.Option(help="Of folds, inner splits, weights and batches.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print all that was found as JSON.")] = False,
) -> None:
    """Which head, tokens and options to train with: tries a ladder within a time budget, judged inside the folds."""
    from embedkit import advise
    from embedkit.canvas import describe_interval

    budget_s = parse_duration(budget, "--budget")
    with show_progress("advise", "settings") as meter:
        found = advise(
            cache,
            labels,
            target=target,
            budget_s=budget_s,
            kind=kind,  # type: ignore[arg-type]  # refused with the known kinds by make_task
            classes=split_list(classes) or None,
            event=event,
            folds=folds,
            split=split,
            seed=seed,
            device=device,
            on_progress=lambda at: meter(at.done, at.total, at.setting),
        )
    if json:
        print_json(_as_fields(found))
        return
    columns = ["setting", f"{found.metric}, inner splits", f"{found.metric}, out of fold", "time"]
    print_table(
        columns,
        [
            [
                f"{'* ' if each.setting == found.recommended else '  '}{each.setting}",
                f"{each.inner:.3f}",
                describe_interval(each.score),
                format_seconds(each.seconds),
            ]
            for each in found.trials
        ],
    )
    taken = ", ".join(f"{setting} ({count})" for setting, count in _count_chosen(found).items())
    typer.echo(
        f"choosing by inner splits: {found.metric} {describe_interval(found.score)} out of fold; folds took {taken}"
    )
    for reason in found.untried:
        typer.echo(f"not tried: {reason}")
    typer.echo(f"recommended, * above: {found.recommended}\n{found.command}")


run = advise_command


def _count_chosen(found: Advice) -> dict[str, int]:
    names = [str(setting) for setting in found.chosen.values()]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _as_fields(found: Advice) -> dict[str, object]:
    score = {"value": found.score.value, "low": found.score.low, "high": found.score.high}
    return {
        "target": found.target,
        "metric": found.metric,
        "recommended": str(found.recommended),
        "command": found.command,
        "score": score,
        "chosen": {str(fold): str(setting) for fold, setting in found.chosen.items()},
        "trials": found.table.to_dicts(),
        "untried": list(found.untried),
        "seconds": round(found.seconds, 3),
    }

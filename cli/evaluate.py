"""Owns `embedkit evaluate`: parses, calls `embedkit.evaluate`, prints the scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from embedkit.cli.console import print_json, print_table

if TYPE_CHECKING:
    from embedkit.evaluation import Evaluation

__all__ = ["run"]


def evaluate_command(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.")],
    cache: Annotated[
        Path | None,
        typer.Argument(help="Cache of cases that the run was not trained on; none: the run's own cases, out of fold."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Table by case_id: the target of new cases, the columns of subgroups.")
    ] = None,
    calibrate: Annotated[
        str | None, typer.Option(help="temperature, platt or isotonic, fitted on the inner splits of each fold.")
    ] = None,
    at: Annotated[
        list[str] | None, typer.Option(help="sensitivity=0.95 or specificity=0.9: a threshold from the inner splits.")
    ] = None,
    subgroup: Annotated[
        list[str] | None, typer.Option(help="Label column: scores by its values; again for more.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="HTML file: curves, calibration, subgroups, a map, the worst mistakes.")
    ] = None,
    training_cache: Annotated[
        Path | None, typer.Option(help="Cache of the run's own cases: slices and the map of a report out of fold.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap over patients, and of the map.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Judge a trained run out of fold or on other cases, with patient-level intervals."""
    from embedkit import evaluate, write_evaluation
    from embedkit.cache import open_originals

    if training_cache is not None and (cache is not None or report is None):
        raise typer.BadParameter("goes with --report and without a cache of new cases", param_hint="--training-cache")

    found = evaluate(
        run,
        cache,
        labels,
        calibrate=calibrate,  # type: ignore[arg-type]  # refused with the known methods by fit_calibrator
        at=at or (),
        subgroups=subgroup or (),
        device=device,
        seed=seed,
    )
    shown = cache or training_cache
    if report is not None:
        write_evaluation(report, found, cache=None if shown is None else open_originals(shown), seed=seed)
    if json:
        print_json(found.to_dict())
        return
    _print(found)
    if report is not None:
        typer.echo(f"\nreport: {report}")


run = evaluate_command


def _print(found: Evaluation) -> None:
    from embedkit.canvas import describe_interval

    outcomes = found.outcomes
    source = "out of fold" if found.held_out else "new cases"
    typer.echo(
        f"{found.run.name}, {source}: {len(outcomes.case_ids)} cases of {len(set(outcomes.patient_ids))} patients"
    )
    rows = [(name, describe_interval(each)) for name, each in found.metrics.items()]
    if found.delong is not None:
        rows.insert(1, ("auroc (DeLong)", describe_interval(found.delong)))
    print_table(("metric", "value"), rows)
    if found.method is not None:
        _print_calibration(found)
    if found.operating_points:
        _print_operating_points(found)
    if found.subgroups:
        _print_subgroups(found)


def _print_calibration(found: Evaluation) -> None:
    from embedkit.canvas import describe_interval

    typer.echo(f"\ncalibration: {found.method}, from the inner splits")
    lines = [
        (when, *(describe_interval(value) for value in each.metrics.values()), f"{each.debiased:.3f}")
        for when, each in zip(("before", "after"), found.calibration, strict=True)
    ]
    print_table(("", *found.calibration[0].metrics, "debiased error"), lines)


def _print_operating_points(found: Evaluation) -> None:
    from embedkit.canvas import describe_interval

    typer.echo("\noperating points, thresholds from the inner splits")
    names = ("sensitivity", "specificity", "ppv", "npv", "called")
    lines = [
        (
            str(point.goal),
            f"{sum(point.thresholds) / len(point.thresholds):.3f}",
            *(describe_interval(getattr(point, name)) for name in names),
        )
        for point in found.operating_points
    ]
    print_table(("goal", "mean threshold", *names), lines)


def _print_subgroups(found: Evaluation) -> None:
    from embedkit.canvas import describe_interval
    from embedkit.subgroups import shown_metrics

    shown = shown_metrics(found.outcomes.kind)
    typer.echo("\nsubgroups (small: too few to conclude from)")
    lines = [
        (
            group.column,
            group.value,
            str(group.cases),
            str(group.patients),
            *(describe_interval(group.metrics[name]) for name in shown),
            "small" if group.small else "",
        )
        for group in found.subgroups
    ]
    print_table(("column", "value", "cases", "patients", *shown, ""), lines)

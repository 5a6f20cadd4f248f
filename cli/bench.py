"""Owns `embedkit bench`: parses, calls `embedkit.bench`, prints the table and writes the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from embedkit.cli.console import print_json, print_table, show_progress

if TYPE_CHECKING:
    from embedkit.benching import Bench

__all__ = ["run"]


def bench_command(
    suite: Annotated[str, typer.Argument(help="Suite file (TOML), or one that comes with embedkit: real, medmnist3d.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for caches, runs, indexes and the report.")],
    data: Annotated[Path | None, typer.Option(help="Where paths of the suite begin; default: beside its file.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; again for more.")] = None,
    head: Annotated[list[str] | None, typer.Option(help="Instead of the suite's heads; again for more.")] = None,
    backbone: Annotated[
        list[str] | None, typer.Option(help="Instead of the suite's backbones; again for more.")
    ] = None,
    weights: Annotated[list[str] | None, typer.Option(help="BACKBONE=FILE, local weights; again for more.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print all scores as JSON.")] = False,
) -> None:
    """Run a suite: tasks x heads x backbones in one table, with intervals and mean ranks; resumes where it stopped."""
    from embedkit import bench, write_bench
    from embedkit.allocator import keep_freed_memory
    from embedkit.errors import OptionError

    keep_freed_memory()
    pairs = [each.partition("=") for each in weights or ()]
    if bad := [name for name, _, file in pairs if not (name and file)]:
        raise OptionError(f"weights are {bad[0]!r}, expected BACKBONE=FILE: deit_tiny_patch16_224=deit.safetensors")
    try:
        with show_progress("bench", "steps") as meter:
            found = bench(
                suite,
                out,
                data=data,
                tasks=task or (),
                heads=head or (),
                backbones=backbone or (),
                weights={name: file for name, _, file in pairs},
                device=device,
                on_progress=lambda at: meter(at.done, at.total, at.doing),
            )
    except KeyboardInterrupt:
        typer.echo("interrupted; what is finished is kept, and the same command goes on", err=True)
        raise typer.Exit(130) from None
    report = write_bench(out / "report.html", found)
    if json:
        _print_json(found, report)
    else:
        _print_tables(found)
        typer.echo(f"report: {report}")
    for each in found.failures:
        typer.echo(f"not done: {each.what}{f' on {each.backbone}' if each.backbone else ''}: {each.reason}", err=True)
    if found.failures:
        raise typer.Exit(1)


run = bench_command


def _print_json(found: Bench, report: Path) -> None:
    import dataclasses

    ranks = found.table["rank"].to_list() if found.scores else []
    print_json(
        {
            "suite": found.suite.name,
            "report": report,
            "scores": [
                dataclasses.asdict(each) | {"rank": rank} for each, rank in zip(found.scores, ranks, strict=True)
            ],
            "methods": found.methods.to_dicts(),
            "extractions": found.extractions.to_dicts(),
            "failures": [dataclasses.asdict(each) for each in found.failures],
        }
    )


def _print_tables(found: Bench) -> None:
    from embedkit.bootstrap import Interval
    from embedkit.canvas import describe_interval

    rows = [
        [
            row["task"],
            row["backbone"],
            row["head"],
            row["metric"],
            describe_interval(Interval(row["value"], row["low"], row["high"])),
            _number(row["rank"], 1),
            str(row["parameters"]),
            f"{row['seconds']:.1f}",
        ]
        for row in found.table.iter_rows(named=True)
    ]
    print_table(["task", "backbone", "head", "metric", "score", "rank", "parameters", "seconds"], rows)
    typer.echo("")
    ranked = [
        [
            row["backbone"],
            row["head"],
            _number(row["mean_rank"], 2),
            f"{row['tasks']} of {row['of']}",
            str(row["parameters"]),
            f"{row['seconds']:.1f}",
        ]
        for row in found.methods.iter_rows(named=True)
    ]
    print_table(["backbone", "head", "mean rank", "tasks", "parameters", "seconds"], ranked)


def _number(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"

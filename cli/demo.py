"""Owns `embedkit demo`: parses, calls `embedkit.demo.run_demo`, says where the report is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["run"]


def demo_command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything the demo makes.")] = Path(
        "embedkit-demo"
    ),
    cases: Annotated[int, typer.Option(help="How many phantoms.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the phantoms and the heads.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier demo left there.")] = False,
) -> None:
    """Phantoms, cache, heads, heatmap, search, report: the whole pipeline, offline, in a minute or two."""
    from embedkit.allocator import keep_freed_memory
    from embedkit.demo import run_demo

    keep_freed_memory()
    result = run_demo(out, cases=cases, seed=seed, overwrite=overwrite, on_step=typer.echo)
    typer.echo(f"report: {result.report.resolve()}")


run = demo_command

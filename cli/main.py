"""Owns the `embedkit` program: registers the commands and turns an EmbedkitError into one line and exit code 2."""

from __future__ import annotations

import sys

import typer
from embedkit.cli import (
    advise,
    backbones,
    bench,
    compare,
    demo,
    evaluate,
    explain,
    export,
    extract,
    heads,
    index,
    info,
    neighbours,
    pack,
    predict,
    scan,
    search,
    search_eval,
    segment,
    serve,
    shots,
    train,
    verify,
)

from embedkit.errors import EmbedkitError
from embedkit.termination import end_on_terminate

__all__ = ["app", "main"]

app = typer.Typer(
    name="embedkit",
    help="Run a frozen 2D backbone once over every slice of every 3D scan; train heads and search on its tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    demo,
    scan,
    extract,
    info,
    verify,
    pack,
    train,
    predict,
    evaluate,
    compare,
    shots,
    neighbours,
    advise,
    bench,
    explain,
    segment,
    export,
    index,
    search,
    search_eval,
    serve,
    heads,
    backbones,
):
    app.command(command.run.__name__.removesuffix("_command").replace("_", "-"))(command.run)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and stop.", is_eager=True)) -> None:
    if version:
        from importlib.metadata import version as installed_version

        typer.echo(installed_version("embedkit"))
        raise typer.Exit


def main() -> None:
    """Runs the program; an EmbedkitError becomes one line on stderr and exit code 2, anything else a traceback.

    SIGTERM ends it by way of every clean-up, with code 143.
    """
    try:
        with end_on_terminate():
            app()
    except EmbedkitError as error:
        typer.echo(f"embedkit: {error}", err=True)
        sys.exit(2)

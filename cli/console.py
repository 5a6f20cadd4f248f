"""Owns how commands talk: progress on stderr, tables and JSON on stdout; knows nothing of what they do."""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

import typer

from embedkit.errors import StrayWarning
from embedkit.sizes import format_bytes

__all__ = [
    "Meter",
    "format_bytes",
    "format_seconds",
    "name_some",
    "parse_duration",
    "parse_number",
    "parse_size",
    "print_json",
    "print_table",
    "show_progress",
    "split_list",
    "tell_strays",
]

_PLAIN_EVERY_S = 10.0
_SIZE = re.compile(r"(?P<number>[0-9]{1,15}(?:\.[0-9]{1,9})?)\s*(?P<unit>|B|kB|MB|GB|TB)", re.IGNORECASE)
_DURATION = re.compile(r"(?P<number>[0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(?P<unit>|s|m|min|h)", re.IGNORECASE)
_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


class Meter(Protocol):
    """Takes how far a long work is."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


def split_list(text: str) -> list[str]:
    """``"a, b"`` as ``["a", "b"]``; empty text gives an empty list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def name_some(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def parse_size(text: str, option: str = "--shard-size") -> int:
    """Bytes of a size such as ``500MB``, given to ``option``; units are powers of ten."""
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match["number"]) * _UNITS[match["unit"].lower()]) if match else 0
    if size < 1:
        raise typer.BadParameter(
            f"size {text!r} means nothing; give a number above 0 with B, kB, MB, GB or TB, or plain bytes: 500MB",
            param_hint=option,
        )
    return size


def parse_duration(text: str, option: str) -> float:
    """Seconds of a duration such as ``10m``, given to ``option``."""
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match["number"]) * _SECONDS[match["unit"].lower()] if match else 0.0
    if not seconds > 0:
        raise typer.BadParameter(
            f"duration {text!r} means nothing; give a number above 0 with s, m or h, or plain seconds: 10m",
            param_hint=option,
        )
    return seconds


def parse_number(text: str, option: str) -> float:
    """The number in ``text``, given with ``option``."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number", param_hint=option) from None


def format_seconds(seconds: float) -> str:
    """A duration for people: ``40 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_json(value: Any) -> None:
    """One JSON document on stdout; paths become text."""
    typer.echo(json.dumps(value, indent=2, default=str, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain aligned table on stdout; columns whose every cell looks like a number are set right."""
    widths = [max(len(name), *(len(row[i]) for row in rows)) if rows else len(name) for i, name in enumerate(columns)]
    right = [bool(rows) and all(row[i][:1] in "0123456789-." for row in rows) for i in range(len(columns))]
    for cells in (columns, *rows):
        padded = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(cells, widths, right, strict=True)
        )
        typer.echo("  ".join(padded).rstrip())


@contextmanager
def show_progress(title: str, unit: str) -> Iterator[Meter]:
    """Yields a meter: a progress bar on a terminal, else a plain line every ten seconds and one at the end."""
    if sys.stderr.isatty():
        with _bar(title, unit) as meter:
            yield meter
    else:
        yield _lines(title, unit)


@contextmanager
def tell_strays() -> Iterator[None]:
    """Says on stderr, once each, what damaged files lie beside a DICOM series as it is read; see `StrayWarning`."""
    told: set[str] = set()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def tell(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, StrayWarning):
                show(message, category, filename, lineno, file, line)
            elif str(message) not in told:
                told.add(str(message))
                typer.echo(f"stray {message}", err=True)

        warnings.simplefilter("always", StrayWarning)
        warnings.showwarning = tell
        yield


@contextmanager
def _bar(title: str, unit: str) -> Iterator[Meter]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(
        *columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task(title, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield update


def _lines(title: str, unit: str) -> Meter:
    last, ended = time.monotonic(), False

    def update(done: int, total: int, note: str = "") -> None:
        nonlocal last, ended
        if ended:
            return
        ended = done >= total
        if ended or time.monotonic() - last >= _PLAIN_EVERY_S:
            last = time.monotonic()
            typer.echo(f"{title}: {done}/{total} {unit}{'  ' + note if note else ''}", err=True)

    return update

"""Owns the report: one HTML file with words, pictures and tables that asks nothing of the network.

Composed of plain values; knows no cache, no head and no run. Pictures come from `embedkit.plots` and are offered here
too. All text is data and is escaped.
"""

from __future__ import annotations

import base64
import html
import math
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from embedkit.errors import RunError
from embedkit.files import explain_os_error, temporary_path
from embedkit.metrics import HIGHER_IS_BETTER, Interval
from embedkit.plots import RocLine, Score, describe_interval, plot_montage, plot_roc, plot_scores

__all__ = [
    "Cell",
    "Figure",
    "Report",
    "RocLine",
    "Score",
    "Section",
    "Table",
    "metric_title",
    "plot_montage",
    "plot_roc",
    "plot_scores",
    "render_report",
    "score_table",
    "write_report",
]

Cell = str | int | float | Interval | None
"""A table's cell: text, a number, a value with its interval, or nothing."""

_TITLES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "balanced_accuracy": "Balanced accuracy",
    "accuracy": "Accuracy",
    "f1": "F1",
    "brier": "Brier",
    "ece": "ECE",
    "ece_adaptive": "Adaptive ECE",
    "mae": "MAE",
    "r2": "R²",
    "spearman": "Spearman",
    "c_index": "C-index",
    "c_index_ipcw": "C-index (IPCW)",
    "integrated_brier": "Integrated Brier",
}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        png: The file's bytes; shown at half its size in pixels, or smaller where the page is narrow.
        caption: Below it.
        alt: Says what it shows to those who cannot see it.
    """

    png: bytes
    caption: str
    alt: str


@dataclass(frozen=True)
class Table:
    """A table; columns of numbers and intervals are set right.

    Attributes:
        columns: Heads.
        rows: Each as wide as ``columns``.
        caption: Below it.
        quiet: Rows (counted from 0) in a quieter style: baselines.
        strong: (row, column) of cells in bold: the best of a column.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    quiet: tuple[int, ...] = ()
    strong: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Section:
    """A part of the report: title, text (blank lines part paragraphs), figures, table."""

    title: str
    text: str = ""
    figures: tuple[Figure, ...] = ()
    table: Table | None = None


@dataclass(frozen=True)
class Report:
    """All of a report.

    Attributes:
        title: Of the page.
        lead: What was done and found, in a sentence or two.
        sections: In order; a list of them stands at the top where there are more than two.
        facts: (name, value) pairs under the lead: backbone, recipe, cases, seed.
        footer: The last line.
    """

    title: str
    lead: str
    sections: tuple[Section, ...]
    facts: tuple[tuple[str, str], ...] = ()
    footer: str = ""


def write_report(path: str | os.PathLike[str], report: Report) -> Path:
    """Writes the report as one HTML file, replacing an older one only once the new one is whole.

    Args:
        path: Of the file; its folder is made if need be.
        report: See `render_report`.

    Returns:
        The path.

    Raises:
        RunError: the file cannot be written.
        ValueError: as `render_report`.
    """
    final = Path(path)
    page = render_report(report)
    temporary = temporary_path(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8", newline="\n")
        temporary.replace(final)
    except OSError as error:
        raise RunError(f"report not written: {explain_os_error(error, final)}") from error
    finally:
        if temporary.is_file():
            temporary.unlink()
    return final


def render_report(report: Report) -> str:
    """The report as HTML: styles and pictures inside, and a policy that forbids the browser any request.

    Raises:
        ValueError: a figure is no PNG, or a table's row is not as wide as its columns.
    """
    contents = ""
    if len(report.sections) > 2:
        links = (
            f'<a href="#part-{number}">{html.escape(section.title)}</a>'
            for number, section in enumerate(report.sections, 1)
        )
        contents = f'<nav aria-label="Contents">{"".join(links)}</nav>'
    facts = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in report.facts
    )
    return _PAGE.substitute(
        title=html.escape(report.title),
        lead=_paragraphs(report.lead, ' class="lead"'),
        facts=f"<dl>{facts}</dl>" if facts else "",
        contents=contents,
        sections="\n".join(_section(number, section) for number, section in enumerate(report.sections, 1)),
        footer=f"<footer>{html.escape(report.footer)}</footer>" if report.footer else "",
        style=_STYLE,
    )


def score_table(
    scores: Mapping[str, Mapping[str, Interval]], *, baselines: Collection[str] = (), caption: str = ""
) -> Table:
    """A row per head and a column per metric; the best of each column bold, baselines quiet and named as such.

    Metrics of which less is better bear an arrow down.

    Args:
        scores: Metrics by head, as `compute_metrics` gives them.
        baselines: Which heads are baselines.
        caption: Below the table.
    """
    metrics = list(dict.fromkeys(name for each in scores.values() for name in each))
    heads = list(scores)
    strong = []
    for column, metric in enumerate(metrics, 1):
        sign = 1 if HIGHER_IS_BETTER.get(metric, True) else -1
        values = [sign * each[metric].value if metric in each else math.nan for each in scores.values()]
        best = max((value for value in values if not math.isnan(value)), default=math.nan)
        strong += [(row, column) for row, value in enumerate(values) if value == best]
    return Table(
        columns=("Head", *(metric_title(name) for name in metrics)),
        rows=tuple(
            (f"{head} (baseline)" if head in baselines else head, *(scores[head].get(metric) for metric in metrics))
            for head in heads
        ),
        caption=caption,
        quiet=tuple(row for row, head in enumerate(heads) if head in baselines),
        strong=tuple(strong),
    )


def metric_title(name: str) -> str:
    """The name of a metric for people, with an arrow down where less is better."""
    return f"{_TITLES.get(name, name)}{'' if HIGHER_IS_BETTER.get(name, True) else ' ↓'}"


def _section(number: int, section: Section) -> str:
    figures = "".join(_figure(figure) for figure in section.figures)
    return (
        f'<section id="part-{number}"><h2>{html.escape(section.title)}</h2>{_paragraphs(section.text)}'
        + (f'<div class="figures">{figures}</div>' if figures else "")
        + (_table(section.table) if section.table else "")
        + "</section>"
    )


def _paragraphs(text: str, attributes: str = "") -> str:
    parts = (part.strip() for part in text.split("\n\n"))
    return "".join(f"<p{attributes}>{html.escape(part)}</p>" for part in parts if part)


def _figure(figure: Figure) -> str:
    if figure.png[:8] != _PNG_SIGNATURE:
        raise ValueError(f"figure {figure.caption!r} starts with {figure.png[:8]!r}, expected the bytes of a PNG file")
    width, height = struct.unpack(">II", figure.png[16:24])
    return (
        f'<figure style="width: {width // 2}px">'
        f'<img src="data:image/png;base64,{base64.b64encode(figure.png).decode("ascii")}"'
        f' width="{width // 2}" height="{height // 2}" alt="{html.escape(figure.alt)}">'
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(table.columns)} columns; expected as many")
    right = [
        bool(table.rows) and all(not isinstance(row[column], str) for row in table.rows)
        for column in range(len(table.columns))
    ]
    sides = [' class="number"' if each else "" for each in right]
    head = "".join(f"<th{side}>{html.escape(name)}</th>" for name, side in zip(table.columns, sides, strict=True))
    body = "".join(_row(table, number, sides) for number in range(len(table.rows)))
    caption = f'<p class="caption">{html.escape(table.caption)}</p>' if table.caption else ""
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{caption}'


def _row(table: Table, number: int, sides: list[str]) -> str:
    cells = "".join(
        f"<td{side}>{_cell(cell, strong=(number, column) in table.strong)}</td>"
        for column, (cell, side) in enumerate(zip(table.rows[number], sides, strict=True))
    )
    style = ' class="quiet"' if number in table.quiet else ""
    return f"<tr{style}>{cells}</tr>"


def _cell(cell: Cell, *, strong: bool) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, Interval):
        value, _, limits = describe_interval(cell).partition(" ")
        text = html.escape(value)
        limits = f' <span class="limits">{html.escape(limits)}</span>' if limits else ""
    elif isinstance(cell, float):
        text, limits = "–" if math.isnan(cell) else f"{cell:.4g}", ""
    else:
        text, limits = html.escape(f"{cell:,}" if isinstance(cell, int) else cell), ""
    return f"<strong>{text}</strong>{limits}" if strong else f"{text}{limits}"


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$title</h1>$lead$facts$contents</header>
<main>
$sections
</main>
$footer
</body>
</html>
""")

_STYLE = """
:root { --paper: #ffffff; --ink: #1c2430; --quiet: #667080; --rule: #e2e6eb; --soft: #f6f7f9; --accent: #0a5c9e; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181d; --ink: #dfe4ea; --quiet: #98a3b0; --rule: #2c343d; --soft: #1c2229; --accent: #7cb8ea; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.5rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -0.02em; text-wrap: balance; }
h2 { margin: 0 0 .6rem; font-size: 1.3rem; line-height: 1.3; letter-spacing: -0.01em; }
p { margin: 0 0 1rem; max-width: 44rem; }
.lead { margin: .8rem 0 0; font-size: 1.12rem; color: var(--quiet); }
dl { display: flex; flex-wrap: wrap; gap: .9rem 2.2rem; margin: 1.6rem 0 0; padding: 1rem 1.2rem;
  background: var(--soft); border-radius: 10px; }
dt { font-size: .78rem; color: var(--quiet); }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin-top: 1.4rem; font-size: .95rem; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { margin-top: 2.6rem; padding-top: 2rem; border-top: 1px solid var(--rule); }
.table { overflow-x: auto; margin: 1.2rem 0 .6rem; }
table { border-collapse: collapse; min-width: 50%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: baseline; }
th { border-bottom-width: 2px; color: var(--quiet); font-weight: 600; vertical-align: bottom; line-height: 1.3; }
th:first-child, td:first-child { padding-left: 0; white-space: nowrap; }
.number { text-align: right; }
td.number { white-space: nowrap; }
.quiet td { color: var(--quiet); }
.limits { display: block; color: var(--quiet); font-size: .8em; }
.figures { display: flex; flex-wrap: wrap; gap: 1.4rem; align-items: flex-start; margin-top: 1.4rem; }
figure { margin: 0; max-width: 100%; }
img { display: block; width: 100%; height: auto; border-radius: 8px; border: 1px solid var(--rule); }
figcaption, .caption { margin: .5rem 0 0; color: var(--quiet); font-size: .88rem; line-height: 1.45; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--rule); color: var(--quiet);
  font-size: .85rem; }
@media print { body { max-width: none; padding: 0; } section { break-inside: avoid; } nav { display: none; } }
"""

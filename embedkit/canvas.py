"""Owns how every picture looks: ink, colours, axes, numbers in words, PNG bytes; knows no kind of chart.

Draws through matplotlib's figure objects alone: no pyplot, no window, no global state. Text that comes from data is
never read as markup.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text

from embedkit.bootstrap import Interval

__all__ = [
    "COLOURS",
    "DASHES",
    "DPI",
    "GRID",
    "INK",
    "QUIET",
    "describe_interval",
    "encode_png",
    "format_number",
    "padded_layout",
    "show_plainly",
    "style_axes",
]

DPI = 192
"""Pixels per inch of every picture: two per CSS pixel, sharp on dense screens."""

INK, QUIET, GRID = "#1c2430", "#6b7480", "#e3e6ea"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8860b")  # after Okabe and Ito 2008
DASHES = ("solid", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))


def describe_interval(interval: Interval) -> str:
    """``0.874 [0.812, 0.923]``; without limits ``0.874``; ``undefined`` where there is no value."""
    if math.isnan(interval.value):
        return "undefined"
    if math.isnan(interval.low):
        return format_number(interval.value)
    return f"{format_number(interval.value)} [{format_number(interval.low)}, {format_number(interval.high)}]"


def format_number(value: float) -> str:
    """A number for people: three decimals, or four digits where it is large."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def style_axes(axes: Axes, title: str) -> None:
    """Axes without a box, quiet ticks, the title at the left."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=9, length=0)
    axes.set_axisbelow(True)
    if title:
        show_plainly([axes.set_title(title, loc="left", color=INK, fontsize=10.5, fontweight="bold")])


def padded_layout() -> ConstrainedLayoutEngine:
    """The layout engine of a chart."""
    return ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, hspace=0.0)


def show_plainly(texts: Sequence[Text]) -> None:
    """Shows ``$`` as it stands: names from data are no formulas."""
    for text in texts:
        text.set_parse_math(False)


def encode_png(canvas: Canvas) -> bytes:
    """PNG bytes of a canvas."""
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()

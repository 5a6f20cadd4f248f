"""Owns the charts that judge a run: precision and recall, reliability, confusion, agreement, survival, maps, learning.

Each takes plain arrays and gives PNG bytes in the common style of `embedkit.canvas`. Knows no case and no run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from embedkit.bootstrap import Floats, Interval
from embedkit.calibration import Reliability
from embedkit.canvas import (
    COLOURS,
    DASHES,
    DPI,
    GRID,
    INK,
    QUIET,
    describe_interval,
    encode_png,
    padded_layout,
    show_plainly,
    style_axes,
)
from embedkit.survival import KaplanMeier

__all__ = [
    "BrierLine",
    "PrecisionLine",
    "plot_agreement",
    "plot_brier",
    "plot_confusion",
    "plot_map",
    "plot_precision",
    "plot_reliability",
    "plot_shots",
    "plot_survival",
]

_SQUARE = (4.75, 4.75)
"""Inches; two of them fit beside each other on a page."""


@dataclass(frozen=True, eq=False)
class PrecisionLine:
    """A named precision-recall curve.

    Attributes:
        label: For the legend.
        recall, precision: float64 [points], recall rising.
        auprc: For the legend.
        prevalence: Precision of a guess.
    """

    label: str
    recall: Floats
    precision: Floats
    auprc: Interval | None = None
    prevalence: float = math.nan


@dataclass(frozen=True, eq=False)
class BrierLine:
    """A named Brier score over time.

    Attributes:
        label: For the legend.
        times, values: float64 [times].
        intervals: One per time, drawn as a band; none where there is no band.
    """

    label: str
    times: Floats
    values: Floats
    intervals: tuple[Interval, ...] = ()


def plot_precision(lines: Sequence[PrecisionLine], *, title: str = "") -> bytes:
    """Precision over recall in one square; a dotted line is what guessing gives."""
    canvas, axes = _square(title, "Recall (sensitivity)", "Precision (PPV)")
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        axes.axhline(line.prevalence, color=colour, linewidth=0.8, linestyle=(0, (1, 3)))
        axes.step(
            line.recall,
            line.precision,
            where="pre",
            color=colour,
            linewidth=1.9,
            linestyle=DASHES[number // len(COLOURS) % len(DASHES)],
            label=line.label if line.auprc is None else f"{line.label}   {describe_interval(line.auprc)}",
        )
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    _legend(axes, "lower left")
    return encode_png(canvas)


def plot_reliability(curves: Mapping[str, Reliability], *, title: str = "") -> bytes:
    """How often scores come true over what they say, with 95% intervals; on the diagonal they mean what they say."""
    canvas, axes = _square(title, "Predicted probability", "Share that came true")
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8, linestyle=(0, (1, 3)))
    for number, (label, curve) in enumerate(curves.items()):
        last = number == len(curves) - 1
        colour = COLOURS[0] if last else QUIET
        values = np.array([each.value for each in curve.observed])
        limits = np.array([[each.low, each.high] for each in curve.observed])
        axes.vlines(curve.predicted, limits[:, 0], limits[:, 1], color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(
            curve.predicted,
            values,
            color=colour,
            marker="o" if last else "D",
            markersize=5,
            mfc=colour if last else "white",
            linewidth=1.6 if last else 1.1,
            label=label,
        )
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    _legend(axes, "upper left")
    return encode_png(canvas)


def plot_confusion(counts: NDArray[np.int64], classes: Sequence[str], *, title: str = "") -> bytes:
    """Cases by true class (rows) and answer (columns); the shade is the share of the true class.

    Args:
        counts: int64 [classes classes].
        classes: Names in that order.
        title: Above.
    """
    side = 1.9 + 0.62 * len(classes)
    canvas = Canvas(figsize=(side + 0.9, side), dpi=DPI, layout=padded_layout())
    axes = canvas.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*counts.shape):
        dark = shares[row, column] > 0.55
        text = f"{counts[row, column]}\n{shares[row, column]:.0%}"
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else INK)
    style_axes(axes, title)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks(range(len(classes)), classes, rotation=45 if max(map(len, classes)) > 6 else 0)
    axes.set_yticks(range(len(classes)), classes)
    _name_axes(axes, "Answer", "Truth")
    show_plainly([*axes.get_xticklabels(), *axes.get_yticklabels()])
    return encode_png(canvas)


def plot_agreement(truth: Floats, predicted: Floats, *, title: str = "", name: str = "value") -> bytes:
    """Predictions of a regression over the truth; on the dotted diagonal they agree."""
    canvas, axes = _square(title, f"True {name}", f"Predicted {name}")
    low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
    margin = 0.03 * (high - low) or 0.5
    axes.plot([low, high], [low, high], color=QUIET, linewidth=0.8, linestyle=(0, (1, 3)))
    axes.scatter(truth, predicted, s=16, color=COLOURS[0], alpha=0.6, linewidths=0)
    axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
    return encode_png(canvas)


def plot_survival(curves: Mapping[str, KaplanMeier], *, title: str = "", name: str = "time") -> bytes:
    """Kaplan-Meier curves of some groups, stepwise, each with its pointwise 95% band.

    Args:
        curves: By name, drawn in order.
        title: Above.
        name: Of the time axis.
    """
    canvas, axes = _square(title, name, "Share without the event")
    for number, (label, curve) in enumerate(curves.items()):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        axes.fill_between(curve.times, curve.low, curve.high, step="post", color=colour, alpha=0.15, linewidth=0)
        axes.step(curve.times, curve.survival, where="post", color=colour, linewidth=1.7, linestyle=dash, label=label)
    axes.set(xlim=(0, None), ylim=(-0.01, 1.01))
    _legend(axes, "lower left")
    return encode_png(canvas)


def plot_brier(lines: Sequence[BrierLine], *, title: str = "", name: str = "time") -> bytes:
    """Brier scores over time; ``name`` is that of the time axis."""
    canvas, axes = _square(title, name, "Brier score (0 is best)")
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        if line.intervals:
            low, high = [each.low for each in line.intervals], [each.high for each in line.intervals]
            axes.fill_between(line.times, low, high, color=colour, alpha=0.15, linewidth=0)
        dash = DASHES[number % len(DASHES)]
        axes.plot(line.times, line.values, color=colour, linewidth=1.7, linestyle=dash, label=line.label)
    axes.set_ylim(bottom=0)
    _legend(axes, "upper left")
    return encode_png(canvas)


def plot_map(
    places: Floats, groups: Sequence[str] | Floats, *, ringed: NDArray[np.bool_] | None = None, title: str = ""
) -> bytes:
    """Cases in two dimensions without a unit.

    Args:
        places: float64 [cases 2].
        groups: Class of each case, coloured in sorted order; or a number of each, on a colour scale.
        ringed: bool [cases], those with a ring: the mistakes.
        title: Above.
    """
    canvas = Canvas(figsize=(6.4, 5.4), dpi=DPI, layout=padded_layout())
    axes = canvas.add_subplot()
    if isinstance(groups, np.ndarray):
        dots = axes.scatter(places[:, 0], places[:, 1], c=groups, s=22, cmap="viridis", linewidths=0)
        bar = canvas.colorbar(dots, ax=axes, shrink=0.7)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=QUIET, labelsize=8.5, length=0)
    else:
        for number, name in enumerate(sorted(set(groups))):
            inside = np.array([each == name for each in groups])
            axes.scatter(
                places[inside, 0],
                places[inside, 1],
                s=22,
                color=COLOURS[number % len(COLOURS)],
                label=name,
                linewidths=0,
            )
    if ringed is not None and ringed.any():
        axes.scatter(
            places[ringed, 0],
            places[ringed, 1],
            s=64,
            facecolors="none",
            edgecolors=INK,
            linewidths=0.9,
            label="wrong answer",
        )
    style_axes(axes, title)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    if axes.get_legend_handles_labels()[1]:
        legend = axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8.5, frameon=False)
        show_plainly(legend.get_texts())
    return encode_png(canvas)


def plot_shots(
    curves: Mapping[str, Sequence[tuple[int, Interval]]], *, metric: str, full: Mapping[str, float] | None = None
) -> bytes:
    """Scores over the number of training patients per class, on a logarithmic axis, with the spread over draws.

    Args:
        curves: By head, (patients per class, mean with its interval), rising.
        metric: Name of the score.
        full: By head, the score with all training patients, drawn as a dotted line.
    """
    canvas = Canvas(figsize=(6.6, 4.6), dpi=DPI, layout=padded_layout())
    axes = canvas.add_subplot()
    for number, (label, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        shots = [shot for shot, _ in points]
        axes.fill_between(
            shots, [each.low for _, each in points], [each.high for _, each in points], color=colour, alpha=0.13, lw=0
        )
        axes.plot(shots, [each.value for _, each in points], color=colour, marker="o", markersize=4.5, label=label)
        if full and label in full:
            axes.axhline(full[label], color=colour, linewidth=1, linestyle=(0, (1, 3)))
    style_axes(axes, "")
    axes.set_xscale("log")
    ticks = sorted({shot for points in curves.values() for shot, _ in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color=GRID, linewidth=0.7)
    _name_axes(axes, "Training patients per class" + ("   (dotted: all)" if full else ""), metric)
    _legend(axes, "lower right")
    return encode_png(canvas)


def _square(title: str, across: str, up: str) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=_SQUARE, dpi=DPI, layout=padded_layout())
    axes = canvas.add_subplot()
    style_axes(axes, title)
    axes.grid(color=GRID, linewidth=0.7)
    _name_axes(axes, across, up)
    return canvas, axes


def _name_axes(axes: Axes, across: str, up: str) -> None:
    show_plainly([axes.set_xlabel(across, color=INK, fontsize=9.5), axes.set_ylabel(up, color=INK, fontsize=9.5)])


def _legend(axes: Axes, place: Literal["lower left", "lower right", "upper left"]) -> None:
    legend = axes.legend(loc=place, fontsize=8.5, frameon=True, framealpha=0.9, edgecolor="none")
    show_plainly(legend.get_texts())

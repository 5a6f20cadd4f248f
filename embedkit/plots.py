"""Owns the pictures of a report as PNG bytes: ROC curves, scores with intervals, montages of slices.

Draws through matplotlib's figure objects alone: no pyplot, no window, no global state. Knows no case and no run. Text
that comes from data is never read as markup.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

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
from embedkit.metrics import Interval
from embedkit.roc import RocCurve

__all__ = ["DPI", "RocLine", "Score", "describe_interval", "plot_montage", "plot_roc", "plot_scores"]

_NIGHT, _NIGHT_INK, _OUTLINE, _RIM = "#101418", "#d7dde4", "#f0a830", "#3fd0ff"
_HEAT = "inferno"  # perceptually uniform, legible with any colour vision


@dataclass(frozen=True)
class RocLine:
    """A named ROC curve.

    Attributes:
        label: For the legend.
        curve: Points and band.
        auroc: For the legend.
        baseline: Drawn quietly, without band.
    """

    label: str
    curve: RocCurve
    auroc: Interval | None = None
    baseline: bool = False


@dataclass(frozen=True)
class Score:
    """A named value with its interval; baselines are drawn quietly."""

    label: str
    interval: Interval
    baseline: bool = False


def plot_roc(lines: Sequence[RocLine], *, title: str = "") -> bytes:
    """ROC curves in one square; the 95% band of the first that is no baseline is shaded.

    Args:
        lines: Drawn in order, each in its own colour and dash.
        title: Above the square.

    Returns:
        PNG bytes.
    """
    canvas = Canvas(figsize=(4.75, 4.75), dpi=DPI, layout=padded_layout())
    axes = canvas.add_subplot()
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8, linestyle=(0, (1, 3)))
    heads = [line for line in lines if not line.baseline]
    for number, line in enumerate([*heads, *(line for line in lines if line.baseline)]):
        colour = QUIET if line.baseline else COLOURS[number % len(COLOURS)]
        if number == 0 and heads:
            axes.fill_between(line.curve.grid, line.curve.low, line.curve.high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            line.curve.false_positive_rate,
            line.curve.true_positive_rate,
            color=colour,
            linewidth=1.1 if line.baseline else 1.9,
            linestyle=DASHES[(number - len(heads) + 1 if line.baseline else number // len(COLOURS)) % len(DASHES)],
            label=line.label if line.auroc is None else f"{line.label}   {describe_interval(line.auroc)}",
        )
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set_xlabel("False positive rate (1 − specificity)", color=INK, fontsize=9.5)
    axes.set_ylabel("True positive rate (sensitivity)", color=INK, fontsize=9.5)
    style_axes(axes, title)
    axes.grid(color=GRID, linewidth=0.7)
    if lines:
        legend = axes.legend(loc="lower right", fontsize=8.5, frameon=True, framealpha=0.9, edgecolor="none")
        show_plainly(legend.get_texts())
    return encode_png(canvas)


def plot_scores(
    panels: Mapping[str, Sequence[Score]], *, metric: str, chance: float | None = None, hollow: str = "baseline"
) -> bytes:
    """A dot and its 95% interval for each head, one panel per task on a common axis; baselines hollow and grey.

    Args:
        panels: Scores by task, drawn from the top.
        metric: Name under the axis.
        chance: Value of a guess, drawn as a dotted line.
        hollow: What those that are drawn hollow are, for their label.

    Returns:
        PNG bytes.
    """
    limits = _score_limits(panels, chance)
    heights = [len(scores) + 0.3 for scores in panels.values()]
    canvas = Canvas(figsize=(8.4, 0.31 * sum(heights) + 0.36 * len(heights) + 0.7), dpi=DPI, layout=padded_layout())
    grid = canvas.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (task, scores) in zip(grid[:, 0], panels.items(), strict=True):
        style_axes(axes, task)
        _draw_scores(axes, scores, chance, hollow)
        axes.set_xlim(*limits)
        axes.grid(axis="x", color=GRID, linewidth=0.7)
        axes.tick_params(axis="x", labelbottom=axes is grid[-1, 0])
        show_plainly(axes.get_yticklabels())
    label = metric if chance is None else f"{metric}   (dotted: chance)"
    show_plainly([grid[-1, 0].set_xlabel(label, color=INK, fontsize=9.5)])
    return encode_png(canvas)


def plot_montage(
    images: Sequence[NDArray[np.uint8]],
    titles: Sequence[str],
    *,
    overlays: Sequence[NDArray[np.floating] | None] | None = None,
    columns: int = 6,
    outlined: Collection[int] = (),
    regions: Mapping[int, NDArray[np.floating]] | None = None,
    scale: str = "attention",
) -> bytes:
    """Slices side by side on a dark ground, with a heatmap over them where there is one.

    Args:
        images: Each uint8 [height width].
        titles: One per image; long lines are wrapped.
        overlays: Each float [height width] in 0..1, or None for a bare slice. 0 is clear, 1 is brightest and densest.
        columns: At most so many beside each other.
        outlined: Places of the images that get a frame.
        regions: By place of an image, how much of each pixel lies in a region, 0..1 [height width]; its rim is drawn.
        scale: What an overlay shows, for its colour scale.

    Returns:
        PNG bytes.

    Raises:
        ValueError: images, titles and overlays differ in number or shape, or there is no image.
    """
    heat = list(overlays) if overlays is not None else [None] * len(images)
    if not images or not len(images) == len(titles) == len(heat):
        raise ValueError(f"{len(images)} images, {len(titles)} titles, {len(heat)} overlays; expected as many of each")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    wrapped = ["\n".join(textwrap.fill(line, 22) for line in title.splitlines()) for title in titles]
    side, gap, edge = 1.42, 0.08, 0.12
    above = 0.17 * max(text.count("\n") + 1 for text in wrapped) + 0.07
    below = 0.42 if any(each is not None for each in heat) else 0.0
    width = columns * side + (columns - 1) * gap + 2 * edge
    height = rows * (side + above) + (rows - 1) * gap + 2 * edge + below
    canvas = Canvas(figsize=(width, height), dpi=DPI, facecolor=_NIGHT)
    for number, (image, text, overlay) in enumerate(zip(images, wrapped, heat, strict=True)):
        row, column = divmod(number, columns)
        bottom = height - edge - (row + 1) * (side + above) - row * gap
        place = (edge + column * (side + gap)) / width, bottom / height, side / width, side / height
        axes = canvas.add_axes(place)
        _draw_slice(axes, image, overlay)
        if regions is not None and number in regions:
            _draw_rim(axes, regions[number])
        show_plainly([axes.set_title(text, color=_NIGHT_INK, fontsize=8.5, pad=4, linespacing=1.15)])
        for spine in axes.spines.values():
            spine.set(visible=number in outlined, color=_OUTLINE, linewidth=2.2)
    if below:
        _draw_scale(canvas, (width, height), edge, scale)
    return encode_png(canvas)


def _draw_scores(axes: Axes, scores: Sequence[Score], chance: float | None, hollow: str) -> None:
    if chance is not None:
        axes.axvline(chance, color=QUIET, linewidth=1, linestyle=(0, (1, 2.5)))
    for row, score in enumerate(scores):
        colour = QUIET if score.baseline else COLOURS[0]
        found = score.interval
        axes.plot([found.low, found.high], [row, row], color=colour, linewidth=1.4 if score.baseline else 2.4)
        face = "white" if score.baseline else colour
        axes.plot(found.value, row, marker="D" if score.baseline else "o", markersize=5.5, color=colour, mfc=face)
        axes.annotate(
            describe_interval(found),
            (1.015, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
            color=QUIET if score.baseline else INK,
            annotation_clip=False,
        )
    axes.set_ylim(len(scores) - 0.4, -0.6)
    axes.set_yticks(range(len(scores)), [f"{each.label}{f' ({hollow})' if each.baseline else ''}" for each in scores])
    for label, score in zip(axes.get_yticklabels(), scores, strict=True):
        label.set(color=QUIET if score.baseline else INK, fontsize=9)


def _score_limits(panels: Mapping[str, Sequence[Score]], chance: float | None) -> tuple[float, float]:
    """Limits of the axis that show every dot and interval with a margin."""
    intervals = [score.interval for scores in panels.values() for score in scores]
    values = [value for each in intervals for value in (each.value, each.low, each.high) if math.isfinite(value)]
    values += [] if chance is None else [chance]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.04 * (high - low) or 0.05
    return low - margin, high + margin


def _draw_slice(axes: Axes, image: NDArray[np.uint8], overlay: NDArray[np.floating] | None) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor("black")
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
    if overlay is None:
        return
    if overlay.shape != image.shape:
        raise ValueError(f"overlay {overlay.shape} does not fit its image {image.shape}; expected the same shape")
    strength = np.clip(np.nan_to_num(overlay), 0, 1)
    heat = mpl.colormaps[_HEAT](0.15 + 0.85 * strength)
    heat[..., 3] = 0.75 * np.sqrt(strength) * (strength > 0.02)
    axes.imshow(heat, interpolation="bilinear")


def _draw_rim(axes: Axes, region: NDArray[np.floating]) -> None:
    """The rim of a region, also of one that lies at the edge of the slice or fills no pixel by half."""
    padded = np.pad(np.asarray(region, np.float64), 1)
    most = padded.max()
    if not most > 0:
        return
    height, width = padded.shape
    places = np.arange(width) - 1, np.arange(height) - 1
    axes.contour(*places, padded, levels=[most / 2], colors=[_RIM], linewidths=1.3)
    axes.set(xlim=(-0.5, width - 2.5), ylim=(height - 2.5, -0.5))


def _draw_scale(canvas: Canvas, size: tuple[float, float], edge: float, what: str) -> None:
    """The colour scale of the overlays, below the slices at the right."""
    width, height = size
    length = min(1.4, 0.4 * width)
    place = (width - edge - length - 0.36) / width, 0.16 / height, length / width, 0.1 / height
    axes = canvas.add_axes(place)
    ramp = np.linspace(0, 1, 128)
    axes.imshow(mpl.colormaps[_HEAT](0.15 + 0.85 * ramp)[None], aspect="auto")
    axes.set_axis_off()
    for text, spot, side in ((f"{what}  low", -0.04, "right"), ("high", 1.04, "left")):
        show_plainly(
            [axes.text(spot, 0.5, text, transform=axes.transAxes, ha=side, va="center", color=_NIGHT_INK, fontsize=8)]
        )

"""Owns turning a case's volumes into ordered grey images (planes, slice choice, windows, channels, crop, resize);
knows no file format and no backbone beyond its image size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from embedkit.errors import OptionError, VolumeError
from embedkit.patches import measure_patch_cover, place_patch_scores
from embedkit.planes import PLANES, Extent, common_extents, cut_slices, plane_axes, same_grid, whole_extent, wrap_box
from embedkit.recipe import Recipe
from embedkit.spill import copy_slices
from embedkit.volumes import Volume
from embedkit.windows import WINDOW_PRESETS, Window, measure_limits, parse_window, window_texts

__all__ = [
    "PLANES",
    "WINDOW_PRESETS",
    "Stack",
    "Window",
    "choose_slices",
    "measure_patch_cover",
    "parse_window",
    "place_patch_scores",
    "plan_stacks",
    "render_previews",
    "render_slices",
    "slice_choice_text",
    "window_texts",
]

Array = np.ndarray[Any, Any]

BLANK_STD = 0.01
"""A slice whose grey values in 0..1 deviate less than this from their mean shows nothing."""

_LONGEST_SIDE = 1 << 17
"""Voxels along a side of what becomes an image: beyond any scan, and by few enough that its columns fit in memory."""
_STRIP_PIXELS = 1 << 24
"""Pixels, padding within their rows included, that are brought to the image's width at a time."""


@dataclass(frozen=True, eq=False)
class Stack:
    """Ordered slices of one case, view and plane, before any pixel is read.

    Attributes:
        view: Name of the view, or of the views that feed the channels, as ``pre+flair+post``.
        plane: Axial, coronal or sagittal; see `embedkit.planes.plane_axes` for how images look.
        indices: int32 [slices], ascending, along the plane's axis of the canonical volume.
        positions_mm: float32 [slices], index times spacing along that axis.
        plane_shape: Height and width of the plane's whole image in voxels.
        box: Top, left, height and width in voxels of the rectangle that becomes the backbone's square; what of it
            lies outside the image is black.
        sources: The view that feeds each channel, 1 or 3.
        limits: Per channel, the grey values that become 0 and 1.
    """

    view: str
    plane: str
    indices: Array
    positions_mm: Array
    plane_shape: tuple[int, int]
    box: tuple[int, int, int, int]
    sources: tuple[str, ...]
    limits: tuple[tuple[float, float], ...]


def plan_stacks(volumes: Mapping[str, Volume], recipe: Recipe) -> list[Stack]:
    """Decides which slices of one case are rendered and how; one stack per view (or channel image) and plane.

    Args:
        volumes: The case's views, in the order that their stacks shall have.
        recipe: Planes, slices, windows, channels, fill, crop, resize.

    Raises:
        OptionError: an option has a value that means nothing.
        VolumeError: a channel is missing and has no fill, the views of the channels do not share a grid, or an image
            would have more than 131,072 voxels along a side.
    """
    if recipe.crop not in {"none", "foreground"}:
        raise OptionError(f"crop {recipe.crop!r} is unknown; give none or foreground")
    windows = [parse_window(text) for text in recipe.windows]
    groups = _group_channels(volumes, recipe)
    extents = common_extents(volumes) if recipe.crop == "foreground" else {}
    stacks = []
    for name, views in groups.items():
        sources = views * len(windows) if len(views) == 1 else views
        spread = windows * len(sources) if len(windows) == 1 else windows
        limits = tuple(measure_limits(volumes[view].array, each) for view, each in zip(sources, spread, strict=True))
        first = volumes[sources[0]]
        extent = extents.get(sources[0], whole_extent(first))
        stacks += [
            _plan_stack(first, plane, extent, recipe, view=name, sources=sources, limits=limits)
            for plane in recipe.planes
        ]
    return stacks


def render_slices(
    stack: Stack,
    volumes: Mapping[str, Volume],
    recipe: Recipe,
    start: int,
    stop: int,
    *,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Renders some slices of a stack: window, crop or pad, and antialiased resize. Touches no other slice.

    Args:
        stack: Of `plan_stacks`.
        volumes: The case's views.
        recipe: Gives ``image_size``.
        start: First slice, counted within the stack.
        stop: One past the last slice.
        device: Where the arithmetic runs; slices travel there in the volume's own type.

    Returns:
        Images, float32 [slices channels image_size image_size] in 0..1, and which of them are blank, bool [slices].
    """
    top, left, height, width = stack.box
    rows, columns = _overlap(top, height, stack.plane_shape[0]), _overlap(left, width, stack.plane_shape[1])
    black = (columns.start - left, left + width - columns.stop, rows.start - top, top + height - rows.stop)
    chosen, side = stack.indices[start:stop], recipe.image_size
    images = {
        view: cut_slices(volumes[view].array, stack.plane)[:, rows, columns] for view in dict.fromkeys(stack.sources)
    }
    narrow = [torch.zeros(len(chosen), height, side, device=device) for _ in stack.sources]
    for strip in _strips(rows.stop - rows.start, len(chosen) * width):
        raw = {view: _read_slab(image[:, strip], chosen).to(device).float() for view, image in images.items()}
        place = slice(strip.start + black[2], strip.stop + black[2])
        for target, view, (low, high) in zip(narrow, stack.sources, stack.limits, strict=True):
            grey = (raw[view] - low).mul_(1 / (high - low)).clamp_(0, 1)
            target[:, place] = _resize(F.pad(grey, black[:2]) if any(black[:2]) else grey, grey.shape[1], side)
    channels = [_resize(each, side, side).clamp_(0, 1) for each in narrow]  # weights sum to 1 only to rounding
    rendered = torch.stack(channels, dim=1)
    shown = rendered[:, :, _shown(black[2], black[3], height, side), _shown(black[0], black[1], width, side)]
    return rendered, (shown.flatten(2).std(dim=2, correction=0) < BLANK_STD).all(dim=1)


def render_previews(images: Tensor, size: int) -> Tensor:
    """Small grey pictures of rendered slices for people: the mean of the channels, uint8 [slices size size].

    Args:
        images: [slices channels height width] in 0..1.
        size: Side in pixels.
    """
    grey = F.interpolate(images.mean(dim=1, keepdim=True), size=(size, size), mode="bilinear", antialias=True)
    return (grey[:, 0] * 255).round_().clamp_(0, 255).to(torch.uint8)


def slice_choice_text(text: str) -> str:
    """Gives the one spelling of a slice choice that recipes keep: ``all``, ``every:MM`` or ``count:N``.

    Raises:
        OptionError: another form, or a distance or count that is not positive.
    """
    kind, amount = _parse_choice(text)
    return kind if kind == "all" else f"{kind}:{amount:g}" if kind == "every" else f"{kind}:{int(amount)}"


def choose_slices(count: int, spacing_mm: float, choice: str) -> Array:
    """Picks slices: int32 indices, ascending, each once.

    ``every:MM`` takes the slices nearest to points MM apart that are centred on the stack; ``count:N`` the middles of
    N equal parts of it. Where the volume has no more slices than asked for, all are taken.

    Args:
        count: Slices along the plane's axis.
        spacing_mm: Their distance.
        choice: ``all``, ``every:MM`` or ``count:N``.

    Raises:
        OptionError: another choice.
    """
    kind, amount = _parse_choice(choice)
    if kind == "every" and amount > spacing_mm:
        length = (count - 1) * spacing_mm
        steps = math.floor(length / amount + 1e-6)
        points = (length - steps * amount) / 2 + amount * np.arange(steps + 1)
        return np.unique(np.clip(np.round(points / spacing_mm), 0, count - 1)).astype(np.int32)
    if kind == "count" and amount < count:
        return np.floor((np.arange(int(amount)) + 0.5) * count / int(amount)).astype(np.int32)
    return np.arange(count, dtype=np.int32)


def _parse_choice(text: str) -> tuple[str, float]:
    kind, _, number = text.partition(":")
    try:
        amount = float(number) if kind != "all" or number else math.inf
    except ValueError:
        amount = math.nan
    whole = kind != "count" or amount == math.floor(amount) if math.isfinite(amount) else kind == "all"
    if kind not in {"all", "every", "count"} or (kind == "all" and number) or not amount > 0 or not whole:
        raise OptionError(f"slice choice {text!r} is unknown; give all, every:MM (such as every:5) or count:N")
    return kind, amount


def _group_channels(volumes: Mapping[str, Volume], recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """By stack name, the views that feed its channels: one, or three that share a grid."""
    if not recipe.channels:
        return {view: (view,) for view in volumes}
    if len(recipe.channels) not in {1, 3}:
        raise OptionError(f"{len(recipe.channels)} channels given ({', '.join(recipe.channels)}); give 1 or 3 views")
    have = ", ".join(volumes)
    sources = tuple(view if view in volumes else recipe.fill for view in recipe.channels)
    for view, source in zip(recipe.channels, sources, strict=True):
        if source not in volumes:
            absent = f" and the fill {recipe.fill}" if recipe.fill else ""
            raise VolumeError(
                f"case lacks the view {view}{absent} that a channel needs (it has {have});"
                " name a --fill view that every case has, or leave the case out"
            )
    for source in sources[1:]:
        if not same_grid(volumes[sources[0]], volumes[source]):
            one, other = volumes[sources[0]], volumes[source]
            raise VolumeError(
                f"channels {'+'.join(recipe.channels)} need views on one grid, but {sources[0]} is"
                f" {one.array.shape} at {one.spacing_mm} mm and {source} is {other.array.shape} at"
                f" {other.spacing_mm} mm, or lies elsewhere; resample them, or extract them as views"
            )
    return {"+".join(recipe.channels): sources}


def _plan_stack(
    volume: Volume,
    plane: str,
    extent: Extent,
    recipe: Recipe,
    *,
    view: str,
    sources: tuple[str, ...],
    limits: tuple[tuple[float, float], ...],
) -> Stack:
    axis, row_axis, column_axis = plane_axes(plane)
    shape, spacing_mm = volume.array.shape, volume.spacing_mm[axis]
    indices = choose_slices(shape[axis], spacing_mm, recipe.slices)
    box = wrap_box(extent, volume, plane, resize=recipe.resize)
    if max(box[2:]) > _LONGEST_SIDE:
        row_mm, column_mm = volume.spacing_mm[row_axis], volume.spacing_mm[column_axis]
        raise VolumeError(
            f"its {plane} slices of {shape[row_axis]} x {shape[column_axis]} voxels of {row_mm:g} x"
            f" {column_mm:g} mm make images of {box[2]} x {box[3]} voxels, expected {_LONGEST_SIDE} a side at most;"
            " check the spacing in the header, crop the image, or leave the plane out",
            view=view,
        )
    return Stack(
        view=view,
        plane=plane,
        indices=indices,
        positions_mm=(indices * spacing_mm).astype(np.float32),
        plane_shape=(shape[row_axis], shape[column_axis]),
        box=box,
        sources=sources,
        limits=limits,
    )


def _read_slab(images: Array, chosen: Array) -> Tensor:
    """A copy of the chosen slices, [slices height width], in the volume's own type."""
    one_run = len(chosen) > 0 and chosen[-1] - chosen[0] == len(chosen) - 1
    return torch.from_numpy(copy_slices(images, slice(chosen[0], chosen[-1] + 1) if one_run else chosen))


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    """[slices height width] of [slices rows columns], antialiased; one axis at a time gives the same bits as both."""
    if images.shape[1:] == (height, width):
        return images
    return F.interpolate(images.unsqueeze(1), size=(height, width), mode="bilinear", antialias=True).squeeze(1)


def _strips(rows: int, pixels: int) -> Iterator[slice]:
    """The rows of an image in parts of bounded size, given the pixels that a row of all slices takes."""
    step = max(1, _STRIP_PIXELS // max(1, pixels))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _overlap(first: int, length: int, size: int) -> slice:
    """The part of ``first`` to ``first + length`` that lies within an image of ``size``."""
    return slice(max(0, first), min(size, first + length))


def _shown(before: int, after: int, length: int, side: int) -> slice:
    """Pixels of a rendered axis that show image alone, none that the filter mixed with padding; at least one."""
    scale = side / length
    reach = max(1.0, scale)
    first = math.ceil(before * scale + (reach if before else 0))
    last = math.floor((length - after) * scale - (reach if after else 0))
    if first < last:
        return slice(first, last)
    middle = min(side - 1, int((length + before - after) * scale / 2))
    return slice(middle, middle + 1)

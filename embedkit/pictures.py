"""Owns pictures of cases as the backbone saw them: from a cache's previews, or anew from the image; draws no chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.cache import Cache, open_cache
from embedkit.errors import OptionError, SearchError
from embedkit.files import explain_os_error, temporary_path
from embedkit.index import Index
from embedkit.plots import plot_montage
from embedkit.recipe import Recipe
from embedkit.slices import plan_stacks, render_previews, render_slices
from embedkit.volumes import Volume, read_volume

__all__ = ["draw_similar_cases", "picture_case", "picture_volume", "write_picture"]

_PLACES = (0.3, 0.5, 0.7)
_SIDE = 192

Pictures = list[NDArray[np.uint8]]


def draw_similar_cases(
    index: Index,
    found: pl.DataFrame,
    out: Path,
    *,
    case_id: str | None = None,
    volume: Path | None = None,
    cache: Path | None = None,
) -> None:
    """Writes a PNG: the query in the first column, each similar case in its own, three slices from bottom to top.

    Args:
        index: What was searched.
        found: Of `embedkit.search`.
        out: The file to write.
        case_id: The query, where it is a case of the index.
        volume: The query, where it is an image file.
        cache: Where the pictures come from; None is the cache that was indexed.

    Raises:
        SearchError: that cache is gone, or keeps no previews.
    """
    place = Path(cache or index.details["cache"])
    if not place.exists():
        raise SearchError(
            f"pictures come from the cache that was indexed, but {place} is gone; say where it is (--cache)"
        )
    with open_cache(place) as opened:
        columns = [picture_case(opened, each) for each in found["case_id"]]
        if case_id is not None:
            query, name = picture_case(opened, case_id), case_id
        elif volume is not None:
            query, name = picture_volume(read_volume(volume), index.recipe), volume.name
        else:
            raise SearchError("a picture needs the query's case or image")
    titles = [f"query\n{name}"] + [
        f"{rank}. {case}\n{similarity:.3f}"
        for rank, case, similarity in found.select("rank", "case_id", "similarity").iter_rows()
    ]
    columns = [query, *columns]
    images = [column[row] for row in range(len(_PLACES)) for column in columns]
    captions = titles + [""] * (len(images) - len(titles))
    outlined = range(0, len(images), len(columns))
    write_picture(out, plot_montage(images, captions, columns=len(columns), outlined=outlined))


def write_picture(path: Path, png: bytes) -> None:
    """Writes a PNG, whole or not at all.

    Raises:
        OptionError: ``path`` does not end in .png, or its folder is not there or may not be written.
    """
    if path.suffix.lower() != ".png":
        raise OptionError(f"{path} does not end in .png, the only kind of picture that is written; rename it")
    temporary = temporary_path(path.absolute())
    try:
        temporary.write_bytes(png)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OptionError(f"cannot write the picture: {explain_os_error(error, path)}") from error


def picture_case(cache: Cache, case_id: str, *, places: Sequence[float] = _PLACES) -> Pictures:
    """Previews of a case's first stack at these places (0 first slice, 1 last), each uint8 [height width].

    Raises:
        SearchError: the cache lacks the case or keeps no previews.
    """
    stacks = cache.stacks.filter(pl.col("case_id") == case_id)
    if stacks.is_empty():
        raise SearchError(f"cache {cache.path} has no case {case_id}; give the cache that was indexed (--cache)")
    stack = int(stacks["stack"][0])
    previews = cache.preview(stack)
    if previews is None:
        raise SearchError(f"cache {cache.path} keeps no previews to draw; extract with --preview 64")
    return [np.array(previews[row]) for row in _pick(np.flatnonzero(~cache.slices(stack).blank), places)]


def picture_volume(volume: Volume, recipe: Recipe, *, places: Sequence[float] = _PLACES) -> Pictures:
    """The same of an image that no cache holds."""
    view = recipe.channels[0] if recipe.channels else "image"
    stack = plan_stacks({view: volume}, recipe)[0]
    count = len(stack.indices)
    rows = _pick(np.arange(count), places)
    rendered = [render_slices(stack, {view: volume}, recipe, row, row + 1)[0] for row in rows]
    return [render_previews(images, _SIDE)[0].numpy() for images in rendered]


def _pick(rows: NDArray[Any], places: Sequence[float]) -> list[int]:
    return [int(rows[round(place * (len(rows) - 1))]) for place in places]

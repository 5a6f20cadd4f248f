"""Owns pictures of cases as the backbone saw them, from a cache's previews: slices, and slices beside those that match.

Draws no chart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from embedkit.cache import Cache
from embedkit.errors import OptionError, SearchError
from embedkit.files import explain_os_error, temporary_path
from embedkit.index import Index
from embedkit.matching import Match, SlicePair
from embedkit.plots import plot_montage
from embedkit.queries import Previews, Query, measure_frames, open_source, read_case_query, read_previews
from embedkit.retrieval import match_cases

__all__ = [
    "draw_matches",
    "draw_similar_cases",
    "picture_case",
    "require_picture_place",
    "upsample_heat",
    "write_picture",
]

_PLACES = (0.3, 0.5, 0.7)
_LEAST = 1e-6

Pictures = list[NDArray[np.uint8]]


def draw_similar_cases(
    index: Index,
    found: pl.DataFrame,
    out: Path,
    *,
    query: str | Query,
    matches: Sequence[Match] | None = None,
    cache: Cache | Path | None = None,
    pairs: int = 3,
) -> None:
    """Writes a PNG of why cases were found: in the row of each, slices of the query beside the slices that match them.

    The heat over both is what each patch adds to the similarity of the two slices, the most of the pair brightest;
    where slices were compared patch by patch, the best cosine of each in the other slice, from 0 to 1. Beside an image,
    where its slice was filled up to a square, there is none.

    Args:
        index: What was searched.
        found: Of `embedkit.search`.
        out: The file to write.
        query: A case of the index, or what `embedkit.queries` read.
        matches: Of the query with the cases found; None makes them, in order.
        cache: Where the pictures come from; None is the cache that was indexed.
        pairs: At most so many pairs in a row, the most similar ones.

    Raises:
        SearchError: nothing was found; that cache is gone, or keeps no previews.
        OptionError: ``out`` cannot be written.
    """
    source = open_source(index, cache)
    asked = read_case_query(index, source, query) if isinstance(query, str) else query
    others = found["case_id"].to_list()
    if not others:
        raise SearchError("no case was found, so there is nothing to draw; loosen the filter")
    if matches is None:
        matches = match_cases(index, asked, others, cache=source, order="ordered")
    previews = [_require_previews(read_previews(source, case_id), source) for case_id in others]
    frames = [measure_frames(source, case_id, each) for case_id, each in zip(others, previews, strict=True)]
    titles = _name_scores(found, matches)
    shown = replace(asked, previews=_require_previews(asked.previews, source))
    write_picture(out, draw_matches(matches, previews, frames, titles, query=shown, pairs=pairs))


def _name_scores(found: pl.DataFrame, matches: Sequence[Match]) -> list[str]:
    """Rank and case, by what it was ranked and how similar it is; also how similar its slices are, where they did not.

    Each slice of the query has a part in that similarity: the pairs shown are the best of them.
    """
    what = "patches" if matches[0].by_patch else "slices"
    rows = found.select("rank", "case_id", "similarity").iter_rows()
    if "vectors_similarity" in found.columns:
        return [
            f"{rank}. {case}\n{similarity:.3f}: vectors {vectors:.3f}\nall {what} {match.similarity:.3f}"
            for (rank, case, similarity), vectors, match in zip(rows, found["vectors_similarity"], matches, strict=True)
        ]
    if "recall_rank" in found.columns:
        return [f"{rank}. {case}\nall {what} {similarity:.3f}" for rank, case, similarity in rows]
    return [
        f"{rank}. {case}\nvectors {similarity:.3f}\nall {what} {match.similarity:.3f}"
        for (rank, case, similarity), match in zip(rows, matches, strict=True)
    ]


def draw_matches(
    matches: Sequence[Match],
    previews: Sequence[Previews],
    frames: Sequence[Mapping[str, NDArray[np.floating]]],
    titles: Sequence[str],
    *,
    query: Query,
    pairs: int,
) -> bytes:
    """PNG bytes of the best pairs of slices of each match, one row per match; the query's slices are framed.

    The rim of a query's region is drawn, and in the other slice that of the patches in which it is best found.

    Args:
        matches: Of one query with several cases.
        previews: Of these cases.
        frames: Of these cases, as a query has them.
        titles: Of these cases.
        query: The query, with its previews.
        pairs: Per row at most.
    """
    images: list[NDArray[np.uint8]] = []
    overlays: list[NDArray[np.floating] | None] = []
    captions: list[str] = []
    rims: dict[int, NDArray[np.floating]] = {}
    mine = cast(Previews, query.previews)
    width = max(len(match.top(pairs)) for match in matches)
    for match, theirs, framed, title in zip(matches, previews, frames, titles, strict=True):
        chosen = match.top(pairs)
        for pair in chosen:
            images += [mine[pair.view][pair.query_row], theirs[pair.view][pair.other_row]]
            overlays += _heat(match, pair, (query.frames[pair.view], framed[pair.view]))
            if query.outlines:
                rims[len(images) - 2] = query.outlines[pair.view][pair.query_row]
                rims[len(images) - 1] = _enlarge(match.locate_region(pair), images[-1].shape[0])
            captions += [
                f"{query.name}\n{pair.view} slice {pair.query_slice}",
                f"{title}\nslice {pair.other_slice}: {pair.similarity:.2f}",
            ]
        for _ in range(2 * (width - len(chosen))):
            images.append(np.zeros_like(images[-1]))
            overlays.append(None)
            captions.append("")
    return plot_montage(
        images,
        captions,
        overlays=overlays,
        columns=2 * width,
        outlined=range(0, len(images), 2),
        regions=rims,
        scale="best cosine of each patch" if matches[0].by_patch else "part of each patch in the similarity",
    )


def _enlarge(patches: NDArray[np.bool_], side: int) -> NDArray[np.floating]:
    """Patches of a grid as pixels, float64 [side side]."""
    rows, columns = (np.arange(side) * count // side for count in patches.shape)
    return patches[np.ix_(rows, columns)].astype(np.float64)


def _heat(
    match: Match, pair: SlicePair, frames: tuple[NDArray[np.floating], NDArray[np.floating]]
) -> list[NDArray[np.floating] | None]:
    """The heat over the query's slice and over the other, within their frames; none where slices have no patches."""
    if match.query[pair.view].patches.shape[1] < 2:
        return [None, None]
    both = match.heat(pair)
    highest = 1.0 if match.by_patch else max(float(heat.max()) for heat in both)
    return [
        upsample_heat(np.clip(heat / max(highest, _LEAST), 0, 1), len(frame)) * frame
        for heat, frame in zip(both, frames, strict=True)
    ]


def upsample_heat(heat: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Heat of a patch grid, float32 [side side], interpolated between the centres of the patches."""
    grid = torch.from_numpy(np.ascontiguousarray(heat))[None, None]
    return cast(NDArray[np.float32], F.interpolate(grid, size=(side, side), mode="bilinear")[0, 0].numpy())


def _require_previews(previews: Previews | None, cache: Cache) -> Previews:
    if previews is None:
        raise SearchError(f"cache {cache.path} keeps no previews to draw; extract with --preview 64")
    return previews


def require_picture_place(path: Path) -> None:
    """Stops where no picture could be written.

    Raises:
        OptionError: ``path`` does not end in .png, is a folder, or its folder is not there.
    """
    if path.suffix.lower() != ".png":
        raise OptionError(f"{path} does not end in .png, the only kind of picture that is written; rename it")
    if path.is_dir() or not path.absolute().parent.is_dir():
        problem = "is a folder" if path.is_dir() else f"lies in {path.absolute().parent}, which is not there"
        raise OptionError(f"the picture {path} {problem}; name a file in a folder that is")


def write_picture(path: Path, png: bytes) -> None:
    """Writes a PNG, whole or not at all.

    Raises:
        OptionError: as `require_picture_place`, or its folder may not be written.
    """
    require_picture_place(path)
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


def _pick(rows: NDArray[Any], places: Sequence[float]) -> list[int]:
    return [int(rows[round(place * (len(rows) - 1))]) for place in places]

"""Owns bags: the cached tokens of whole cases as padded batches with a mask; knows no head, label or file format.

Inside a bag a "view" is one (view, plane) pair of the cache, named ``view/plane``. A slice that is blank, absent or
only there to pad has mask False and tokens of zero; a case that lacks a view has that view masked throughout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor

from embedkit.errors import CacheError
from embedkit.recipe import TokenSet
from embedkit.tails import Tail, TailShape

__all__ = ["Bag", "BagShape", "BagStore", "TokenSource", "bag_shape", "list_views", "load_bags", "stream_bags"]

_POOL = 8  # batches among which shuffled cases are sorted by length


class SliceTable(Protocol):
    """Where the slices of one stack lie and which of them are blank, arrays of one length."""

    @property
    def positions_mm(self) -> np.ndarray[Any, Any]: ...
    @property
    def blank(self) -> np.ndarray[Any, Any]: ...


class TokenSetShape(Protocol):
    """What bags must know of a token set: its shape per slice."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class TokenSource(Protocol):
    """What bags are loaded from; `embedkit.cache.Cache` is one.

    ``stacks`` has a row per stack with the columns ``stack`` (what `read` and `slices` take), ``case_id``, ``view``,
    ``plane`` and ``count``.
    """

    @property
    def stacks(self) -> pl.DataFrame: ...
    @property
    def token_sets(self) -> Mapping[str, TokenSetShape]: ...
    def read(self, stack: int, token_set: str, /) -> np.ndarray[Any, Any]: ...
    def slices(self, stack: int, /) -> SliceTable: ...
    def tail_shape(self) -> TailShape: ...
    def tail(self) -> Tail: ...


@dataclass(frozen=True)
class Bag:
    """A batch of cases, padded to the most slices among them.

    Attributes:
        tokens: Token set -> [batch views slices patches dim]; ``cls`` has one patch.
        mask: Bool [batch views slices], True for a real slice that is not blank.
        positions: [batch views slices], place along the stack from 0 (first slice) to 1 (last); 0.5 for a lone slice.
        case_ids: One per item of the batch.
        zeroed: Whether masked slices are known to hold zeros, so that nobody need fill them again; where it is False
            they may hold anything.
        tail: The blocks that ``cut`` tokens enter; None where the bag has no such tokens.
        cover: Float [batch views slices patches], the share of each patch that the mask of the image covers, NaN where
            none is known; there while a head that learns masks is trained or judged (`embedkit.covers`).
        clicks: Float [batch views slices patches], 1 where somebody pointed at what the mask is to cover, else 0; None
            where no mask is asked for.
    """

    tokens: dict[str, Tensor]
    mask: Tensor
    positions: Tensor
    case_ids: tuple[str, ...]
    zeroed: bool = False
    tail: Tail | None = None
    cover: Tensor | None = None
    clicks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.case_ids)

    @property
    def asks_mask(self) -> bool:
        """Whether a head that learns masks is to give its ``mask_logits``."""
        return self.cover is not None or self.clicks is not None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Bag:
        """The same bag on ``device`` with tokens and positions as ``dtype``; None leaves either as it is."""
        tokens = {name: values.to(device=device, dtype=dtype) for name, values in self.tokens.items()}
        positions = self.positions.to(device=device, dtype=dtype)
        cover, clicks = (None if each is None else each.to(device=device) for each in (self.cover, self.clicks))
        mask = self.mask.to(device=device)
        return dataclasses.replace(self, tokens=tokens, mask=mask, positions=positions, cover=cover, clicks=clicks)


@dataclass(frozen=True)
class BagShape:
    """What a head is built for: the sizes that all bags of one store share.

    Attributes:
        token_sets: Token set -> (patches, dim).
        grids: Patch token set -> (height, width) of its patch grid; (1, patches) where it is not square.
        views: ``view/plane`` names in the order of the bag's views axis.
        tail: Shape of the blocks that ``cut`` tokens enter; None where there are none.
    """

    token_sets: dict[str, tuple[int, int]]
    grids: dict[str, tuple[int, int]]
    views: tuple[str, ...]
    tail: TailShape | None = None

    def select(self, token_sets: Sequence[str]) -> BagShape:
        """The same shape with these token sets alone."""
        return BagShape(
            {name: self.token_sets[name] for name in token_sets},
            {name: self.grids[name] for name in token_sets if name in self.grids},
            self.views,
            self.tail if any(_is_cut(name) for name in token_sets) else None,
        )


def _is_cut(token_set: str) -> bool:
    return TokenSet.parse(token_set).kind == "cut"


def list_views(source: TokenSource) -> tuple[str, ...]:
    """The ``view/plane`` pairs of a source, sorted."""
    pairs = source.stacks.select("view", "plane").unique()
    return tuple(sorted(f"{view}/{plane}" for view, plane in pairs.iter_rows()))


def bag_shape(source: TokenSource, token_sets: Sequence[str], *, views: Sequence[str] | None = None) -> BagShape:
    """The shape of bags with these token sets, before any token is read.

    Raises:
        CacheError: the source lacks one of ``token_sets``.
    """
    sizes: dict[str, tuple[int, int]] = {}
    grids: dict[str, tuple[int, int]] = {}
    for name in token_sets:
        if name not in source.token_sets:
            raise CacheError(
                f"token set {name} is not in the cache, which holds {', '.join(sorted(source.token_sets))};"
                " choose among these or extract with --tokens"
            )
        shape = source.token_sets[name].shape
        sizes[name] = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
        if TokenSet.parse(name).kind == "patch":
            side = math.isqrt(shape[0])
            grids[name] = (side, side) if side * side == shape[0] else (1, shape[0])
    tail = source.tail_shape() if any(map(_is_cut, token_sets)) else None
    return BagShape(sizes, grids, tuple(views) if views is not None else list_views(source), tail)


class BagStore:
    """The tokens of many cases in memory, packed row after row as float16, from which padded batches are gathered.

    Each token table ends with one row of zeros; every blank, absent or padding slice points at it, so that a batch is
    one gather per token set, without a loop over cases or slices.
    """

    def __init__(
        self,
        shape: BagShape,
        case_ids: Sequence[str],
        tables: dict[str, Tensor],
        rows: Tensor,
        positions: Tensor,
        *,
        tail: Tail | None = None,
    ) -> None:
        """Takes tables [rows + 1, patches, dim], and rows and positions [cases views slices]; the last row is zero."""
        self.shape = shape
        self.case_ids = tuple(case_ids)
        self._tables = tables
        self._rows = rows
        self._positions = positions
        self._tail = tail
        self._zero_row = int(next(iter(tables.values())).shape[0]) - 1
        real = rows != self._zero_row
        self._longest = (real * torch.arange(1, rows.shape[2] + 1, device=rows.device)).amax((1, 2))

    def __len__(self) -> int:
        return len(self.case_ids)

    @property
    def device(self) -> torch.device:
        return self._rows.device

    def table(self, token_set: str) -> Tensor:
        """All rows of a token set, float16 [rows patches dim], real slices and blank ones."""
        return self._tables[token_set][:-1]

    def segments(self) -> Tensor:
        """[rows], case * views + view of each row of `table`; -1 for a blank slice."""
        cases, views, _ = self._rows.shape
        owner = torch.arange(cases * views, device=self.device).view(cases, views, 1).expand_as(self._rows)
        segments = torch.full((self._zero_row + 1,), -1, device=self.device)
        segments[self._rows.flatten()] = owner.flatten()
        return segments[:-1]

    def batch(
        self, cases: Sequence[int] | Tensor, token_sets: Sequence[str] | None = None, *, slices: int | None = None
    ) -> Bag:
        """Gathers the cases at these places of ``case_ids`` into one bag, in the order given.

        Args:
            cases: Places in ``case_ids``.
            token_sets: Which sets to gather; None for all.
            slices: Length of the slices axis; None for as long as the last real slice needs, at least 1.

        Returns:
            A bag whose tokens are as the store holds them, float16 if they came from a cache.
        """
        places = torch.as_tensor(cases, dtype=torch.int64, device=self.device)
        if slices is None:
            slices = max(int(self._longest[places].amax()), 1) if len(places) else 1
        rows, positions = self._rows[places, :, :slices], self._positions[places, :, :slices]
        if beyond := slices - rows.shape[2]:
            rows = torch.nn.functional.pad(rows, (0, beyond), value=self._zero_row)
            positions = torch.nn.functional.pad(positions, (0, beyond))
        flat = rows.flatten()
        names = tuple(self._tables) if token_sets is None else tuple(token_sets)
        tokens = {
            name: self._tables[name].index_select(0, flat).view(*rows.shape, *self.shape.token_sets[name])
            for name in names
        }
        case_ids = tuple(self.case_ids[place] for place in places.tolist())
        return Bag(tokens, rows != self._zero_row, positions, case_ids, tail=self._tail)

    def batches(
        self, cases: Sequence[int] | Tensor, size: int, *, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Splits cases into batches of about equal stack length, so that little is padding.

        Args:
            cases: Places in ``case_ids``.
            size: Cases per batch at most.
            generator: Shuffles the cases, sorts them by length only within every eight batches, and shuffles the
                batches; None sorts all by length.

        Yields:
            [batch] numbers of items of ``cases``.
        """
        lengths = self._longest.cpu()[torch.as_tensor(cases, dtype=torch.int64)]
        if generator is None:
            pools: Sequence[Tensor] = [torch.arange(len(lengths))]
        else:
            pools = torch.split(torch.randperm(len(lengths), generator=generator), _POOL * size)
        found = [part for pool in pools for part in torch.split(pool[lengths[pool].argsort(stable=True)], size)]
        order = range(len(found)) if generator is None else torch.randperm(len(found), generator=generator).tolist()
        return (found[item] for item in order)

    def to(self, device: torch.device | str) -> Self:
        """The same store with its tables on ``device``."""
        tables = {name: table.to(device) for name, table in self._tables.items()}
        rows, positions = self._rows.to(device), self._positions.to(device)
        return type(self)(self.shape, self.case_ids, tables, rows, positions, tail=self._tail)


def load_bags(
    source: TokenSource, case_ids: Sequence[str], token_sets: Sequence[str], *, views: Sequence[str] | None = None
) -> BagStore:
    """Reads the tokens of some cases once.

    Args:
        source: A cache, or anything like it.
        case_ids: The cases, in the order the store keeps; a case without any stack is masked throughout.
        token_sets: What to read, at least one.
        views: ``view/plane`` names and their order; None for those of the source. Others are not read.

    Raises:
        CacheError: the source lacks one of ``token_sets``.
    """
    shape = bag_shape(source, token_sets, views=views)
    stacks = _select_stacks(source, case_ids, shape.views)
    counts = stacks["count"].to_numpy().astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    tables = {
        name: torch.zeros((int(starts[-1]) + 1, *size), dtype=torch.float16) for name, size in shape.token_sets.items()
    }
    rows = np.full((len(case_ids), len(shape.views), int(counts.max(initial=1))), starts[-1], np.int64)
    positions = np.zeros(rows.shape, np.float32)
    for number, (stack, case, view) in enumerate(stacks.select("stack", "case", "place").iter_rows()):
        start, stop = int(starts[number]), int(starts[number + 1])
        for name, table in tables.items():
            table[start:stop].numpy()[...] = source.read(stack, name).reshape(stop - start, *shape.token_sets[name])
        slices = source.slices(stack)
        rows[case, view, : stop - start] = np.where(slices.blank, starts[-1], np.arange(start, stop))
        positions[case, view, : stop - start] = _relative_positions(slices.positions_mm)
    tail = source.tail() if shape.tail is not None else None
    return BagStore(shape, case_ids, tables, torch.from_numpy(rows), torch.from_numpy(positions), tail=tail)


def stream_bags(
    source: TokenSource,
    case_ids: Sequence[str],
    token_sets: Sequence[str],
    *,
    views: Sequence[str] | None = None,
    chunk_bytes: int = 128 * 2**20,
) -> Iterator[Bag]:
    """Reads cases in their order as bags of bounded size, for one pass over any number of them.

    Args:
        source, case_ids, token_sets, views: As in `load_bags`.
        chunk_bytes: Of float16 tokens per bag, padding included; a case that is larger comes alone.

    Raises:
        CacheError: as `load_bags`.
    """
    shape = bag_shape(source, token_sets, views=views)
    per_slice = 2 * len(shape.views) * sum(patches * dim for patches, dim in shape.token_sets.values())
    longest = dict(source.stacks.group_by("case_id").agg(pl.col("count").max()).iter_rows())
    chunk: list[str] = []
    slices = 0
    for case_id in case_ids:
        slices = max(slices, longest.get(case_id, 1))
        if chunk and (len(chunk) + 1) * slices * per_slice > chunk_bytes:
            yield load_bags(source, chunk, token_sets, views=shape.views).batch(range(len(chunk)))
            chunk, slices = [], longest.get(case_id, 1)
        chunk.append(case_id)
    if chunk:
        yield load_bags(source, chunk, token_sets, views=shape.views).batch(range(len(chunk)))


def _select_stacks(source: TokenSource, case_ids: Sequence[str], views: Sequence[str]) -> pl.DataFrame:
    """The stacks of these cases and views in reading order, with ``case`` and ``place`` (of the view) as numbers."""
    cases = pl.DataFrame(
        {"case_id": list(case_ids), "case": range(len(case_ids))}, schema={"case_id": pl.String, "case": pl.Int64}
    )
    places = pl.DataFrame(
        {"bag_view": list(views), "place": range(len(views))}, schema={"bag_view": pl.String, "place": pl.Int64}
    )
    found = source.stacks.select("stack", "case_id", "count", bag_view=pl.concat_str("view", "plane", separator="/"))
    return found.join(cases, on="case_id").join(places, on="bag_view").sort("stack")


def _relative_positions(positions_mm: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Maps the first slice to 0 and the last to 1; a lone slice to 0.5."""
    if len(positions_mm) < 2 or positions_mm[-1] == positions_mm[0]:
        return np.full(len(positions_mm), 0.5, np.float32)
    relative: np.ndarray[Any, Any] = (positions_mm - positions_mm[0]) / (positions_mm[-1] - positions_mm[0])
    return relative.astype(np.float32)

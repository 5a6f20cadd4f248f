"""Owns calls: which rows of a stack are run on which cases at once, so that little is copied and all fits in memory.

Rows of one training set share their cases; others of equal size have theirs side by side. Runs nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedkit.batching import Deck

__all__ = ["Call", "Calls", "as_index", "pad_cases"]

_SHARED_AT_ONCE = 64 * 2**20  # bytes of float32 tokens in one run of a head, were they not shared by its rows
_APART_AT_ONCE = 8 * 2**20  # where each row has its own: more does not stay in the processor's own memory

_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Call:
    """One run of the head: rows of the stack on cases [1 batch] that they share, or [rows batch] each its own."""

    rows: list[int]
    cases: _Ints
    slices: int


class Calls:
    """Cuts the rows of a stack into calls."""

    def __init__(
        self, groups: Sequence[tuple[int, Hashable]], decks: Sequence[Deck], numbers: int, *, stackable: bool
    ) -> None:
        """Takes of each row its noise and training set, and its deck; how many numbers a slice has.

        A head that is not ``stackable`` runs for one row at a time.
        """
        self._groups = groups
        self._decks = decks
        self._numbers = numbers
        self._stackable = stackable
        self._sharing: dict[Hashable, list[int]] = {}
        for row, group in enumerate(groups):
            self._sharing.setdefault(group, []).append(row)

    def cover(self, batches: Sequence[_Ints], *, level: bool = False) -> Iterator[Call]:
        """The runs that cover every row's batch; ``level`` pads batches of several sizes with their first case."""
        side: dict[Hashable, list[int]] = {}
        for rows in self._sharing.values():
            first, cases = rows[0], batches[rows[0]]
            if len(cases) == 0:
                continue
            slices = self._decks[first].slices(cases)
            if len(rows) > 1 or not self._stackable:
                yield from self._cut(rows, cases[None], slices)
            else:
                noise, _ = self._groups[first]
                side.setdefault(0 if level else (noise, len(cases), slices), []).append(first)
        for rows in side.values():
            most = max(len(batches[row]) for row in rows)
            slices = max(self._decks[row].slices(batches[row]) for row in rows)
            yield from self._cut(rows, np.stack([pad_cases(batches[row], most) for row in rows]), slices)

    def _cut(self, rows: list[int], cases: _Ints, slices: int) -> Iterator[Call]:
        """Splits a run into such as fit in memory."""
        limit = _SHARED_AT_ONCE if len(cases) == 1 else _APART_AT_ONCE
        most = max(1, limit // (4 * cases.shape[1] * slices * self._numbers)) if self._stackable else 1
        for start in range(0, len(rows), most):
            part = slice(start, start + most)
            yield Call(rows[part], cases if len(cases) == 1 else cases[part], slices)


def pad_cases(cases: _Ints, length: int) -> _Ints:
    """Cases with the first one repeated at their end, up to ``length``."""
    return np.concatenate([cases, np.repeat(cases[:1], length - len(cases))])


def as_index(rows: list[int]) -> slice | list[int]:
    """Rows as a slice where they follow each other, which copies nothing."""
    return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else rows

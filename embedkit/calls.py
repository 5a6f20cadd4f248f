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
_APART_AT_ONCE = 8 * 2**20  # of those of several training sets: more does not stay in the processor's own memory
_LEARNED_AT_ONCE = 16 * 2**20  # bytes of what rows of several training sets learn, for the same reason

_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Call:
    """One run of the head: rows of the stack on the cases of each of some training sets.

    Attributes:
        rows: Those of the first training set, then those of the next; as many of each.
        cases: [sets batch].
        slices: Length of the slices axis.
    """

    rows: list[int]
    cases: _Ints
    slices: int

    @property
    def sharing(self) -> int:
        """How many rows share the cases of a training set."""
        return len(self.rows) // len(self.cases)

    @property
    def firsts(self) -> list[int]:
        """The first row of each training set."""
        return self.rows[:: self.sharing]


class Calls:
    """Cuts the rows of a stack into calls."""

    def __init__(
        self,
        groups: Sequence[tuple[int, Hashable]],
        decks: Sequence[Deck],
        *,
        numbers: int,
        parameters: int,
        stackable: bool,
    ) -> None:
        """Takes of each row its noise and training set, and its deck; how many numbers a slice has, and a row learns.

        A head that is not ``stackable`` runs for one row at a time.
        """
        self._groups = groups
        self._decks = decks
        self._numbers = numbers
        self._parameters = parameters
        self._stackable = stackable
        self._sharing: dict[Hashable, list[int]] = {}
        for row, group in enumerate(groups):
            self._sharing.setdefault(group, []).append(row)

    def cover(self, batches: Sequence[_Ints], *, level: bool = False) -> Iterator[Call]:
        """The runs that cover every row's batch; ``level`` pads batches of several sizes with their first case."""
        beside: dict[Hashable, list[list[int]]] = {}
        for rows in self._sharing.values():
            if len(cases := batches[rows[0]]) == 0:
                continue
            noise, _ = self._groups[rows[0]]
            slices = self._decks[rows[0]].slices(cases)
            alike = len(rows) if level else (len(rows), noise, len(cases), slices)
            beside.setdefault(alike if self._stackable else rows[0], []).append(rows)
        for sets in beside.values():
            firsts = [rows[0] for rows in sets]
            most = max(len(batches[row]) for row in firsts)
            slices = max(self._decks[row].slices(batches[row]) for row in firsts)
            yield from self._cut(sets, np.stack([pad_cases(batches[row], most) for row in firsts]), slices)

    def _cut(self, sets: list[list[int]], cases: _Ints, slices: int) -> Iterator[Call]:
        """Splits a run into such as fit in memory: few training sets at once, and of a large one few rows."""
        size = 4 * cases.shape[1] * slices * self._numbers
        rows = max(1, _SHARED_AT_ONCE // size) if self._stackable else 1
        learned = 4 * self._parameters * len(sets[0])
        most = max(1, min(_APART_AT_ONCE // size, rows // len(sets[0]), _LEARNED_AT_ONCE // learned))
        for start in range(0, len(sets), most):
            part = slice(start, start + most)
            if len(sets[0]) <= rows:
                yield Call([row for each in sets[part] for row in each], cases[part], slices)
                continue
            for at in range(0, len(sets[0]), rows):
                yield Call(sets[start][at : at + rows], cases[part], slices)


def pad_cases(cases: _Ints, length: int) -> _Ints:
    """Cases with the first one repeated at their end, up to ``length``."""
    return np.concatenate([cases, np.repeat(cases[:1], length - len(cases))])


def as_index(rows: list[int]) -> slice | list[int]:
    """Rows as a slice where they follow each other, which copies nothing."""
    return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else rows

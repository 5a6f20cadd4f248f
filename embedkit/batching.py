"""Owns the order in which cases come: blocks of a pass, batches of a training set; knows no head, token or label.

One order per epoch is drawn over all labelled cases of a task. It is cut into blocks, each small enough to lie in
memory whole, and every training set takes its own cases of a block, in that order, as batches. So all fits that learn
from one task's cases pass over the same blocks; which batches a fit sees depends on its own training set alone, and not
on what is trained beside it nor on where the tokens lie.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Deck"]

_POOL = 8  # batches among which cases are sorted by length, so that little is padding

_Ints = NDArray[np.int64]


class Deck:
    """Deals the cases of a task anew in every epoch, and their altered copies with them where there are some.

    What is dealt are items: the cases in their order, then the copies. Item numbers of cases are their numbers in the
    task.

    Attributes:
        blocks: Parts of a pass.
        owners: int64 [items], the number of the case that each item shows.
    """

    def __init__(
        self, places: _Ints, lengths: _Ints, *, longest: int, blocks: int, seed: int, owners: _Ints | None = None
    ) -> None:
        """Takes places in a token store and numbers of slices of the items, both [items], and the most that any has.

        Without ``owners`` the items are the cases.
        """
        self.places = places
        self.lengths = lengths
        self.owners = np.arange(len(places)) if owners is None else owners
        self.longest = longest
        self.blocks = min(blocks, len(places))
        self.seed = seed
        self._blocks: tuple[int, list[_Ints]] = (-1, [])
        self._dealt: dict[tuple[Hashable, ...], list[_Ints]] = {}

    def steps(self, training: int, batch_size: int) -> int:
        """Batches per block of a training set with this many cases."""
        return math.ceil(math.ceil(training / self.blocks) / batch_size)

    def slices(self, cases: _Ints) -> int:
        """Length of the slices axis that these cases are padded to: rounded up, so that batches come to be alike."""
        most = int(self.lengths[cases].max())
        step = 1 << max(0, most.bit_length() - 3)
        return min(self.longest, -(-most // step) * step)

    def leave_copies(self, cases: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """bool [items] of bool [cases]: no copy is among them."""
        return np.concatenate([cases, np.zeros(len(self.owners) - len(cases), bool)])

    def deal(self, epoch: int) -> list[_Ints]:
        """The items of each block, as numbers, in the order of this epoch."""
        if self._blocks[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.places))
            self._blocks = (epoch, [np.asarray(part, np.int64) for part in np.array_split(order, self.blocks)])
        return self._blocks[1]

    def batches(
        self,
        key: Hashable,
        training: NDArray[np.bool_],
        epoch: int,
        block: int,
        count: int,
        *,
        classes: _Ints | None = None,
    ) -> list[_Ints]:
        """The batches of one training set in one block, alike in size.

        Args:
            key: Names the training set; what was last dealt for it is remembered.
            training: bool [items].
            epoch: From 0.
            block: From 0.
            count: Number of batches, from `steps`.
            classes: Class of each item, [items], where the batches are to hold each alike; None for every case once.

        Returns:
            ``count`` arrays of item numbers. Items are sorted by length among every eight batches; then the batches
            are shuffled, alike for all training sets of as many, so that long ones meet long ones.
        """
        asked = (key, epoch, block, count)
        if asked not in self._dealt:
            cases = self.deal(epoch)[block]
            cases = cases[training[cases]]
            if classes is not None:
                cases = _balance(cases, classes[cases], np.random.default_rng([self.seed, epoch, block, len(cases)]))
            ends = np.linspace(0, len(cases), count + 1).round().astype(np.int64)
            found: list[_Ints] = []
            for start in range(0, count, _POOL):
                bounds = ends[start : start + _POOL + 1]
                pool = cases[bounds[0] : bounds[-1]]
                pool = pool[np.argsort(self.lengths[pool], kind="stable")]
                found += np.split(pool, bounds[1:-1] - bounds[0])
            shuffled = np.random.default_rng([self.seed, epoch, block, count]).permutation(count)
            self._dealt = {each: dealt for each, dealt in self._dealt.items() if each[1:3] == asked[1:3]}
            self._dealt[asked] = [found[place] for place in shuffled]
        return self._dealt[asked]


def _balance(cases: _Ints, classes: _Ints, rng: np.random.Generator) -> _Ints:
    """As many cases, shuffled, of each class alike or one more; within a class each as often as any or once more."""
    names = rng.permutation(np.unique(classes))
    wanted = [part.size for part in np.array_split(cases, max(1, len(names)))]
    drawn = [
        np.resize(rng.permutation(cases[classes == name]), count) for name, count in zip(names, wanted, strict=False)
    ]
    return rng.permutation(np.concatenate([cases[:0], *drawn]))

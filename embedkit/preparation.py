"""Owns the first pass over the tokens of a training: all that fits share and no fold changes; fits nothing.

In one reading of every case: the moments that standardisation is made of, the features of heads in closed form, and
the bags of heads that pool without parameters first, which are then so small that they stay in memory for good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape, BagStore, TokenSource, bag_shape, stream_bags
from embedkit.batching import Deck
from embedkit.covers import CoveredStore, Covers
from embedkit.headplans import HeadPlan
from embedkit.members import build_member
from embedkit.plugins import learns_masks
from embedkit.pooling import joined_grid
from embedkit.standardisation import MomentSums, Standardiser, fit_standardiser
from embedkit.storage import (
    BLOCK_BYTES,
    ResidentStore,
    Storage,
    StreamedStore,
    TokenStore,
    count_bytes,
    open_store,
    require_storage,
)
from embedkit.sweeps import Candidate
from embedkit.tasks import Task

__all__ = ["Preparation"]

_Key = tuple[str, tuple[str, ...], str]


class _Reducing(Protocol):
    def reduce(self, bag: Bag) -> Bag: ...


class Preparation:
    """What the heads of some plans share, over some cases."""

    def __init__(
        self,
        source: TokenSource,
        plans: Sequence[HeadPlan],
        case_ids: Sequence[str],
        device: torch.device,
        *,
        seed: int = 0,
        storage: Storage = "auto",
        block_bytes: int = BLOCK_BYTES,
        covers: Mapping[tuple[int, int], Covers] | None = None,
        copies: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Reads all tokens that the plans need once, and loads those that are to be read every epoch.

        Heads that learn masks are shown those of ``covers``, by the grid that they read. Heads by gradient are shown,
        in training, the ``copies`` of a case beside it, which are in ``source`` too; nothing else is made of them.

        Raises:
            CacheError: a token is NaN or infinite, or a token set is absent.
            OptionError: no such storage.
        """
        require_storage(storage, device)
        self.source = source
        self.case_ids = sorted(case_ids)
        self.device = device
        self.block_bytes = block_bytes
        self._copies = {case: tuple((copies or {}).get(case, ())) for case in self.case_ids}
        self._shown = [*self.case_ids, *(copy for each in self._copies.values() for copy in each)]
        self._places = {case: place for place, case in enumerate(self._shown)}
        self._counts = dict(source.stacks.group_by("case_id").agg(pl.col("count").max()).iter_rows())
        pairs = [(plan, candidate) for plan in plans for candidate in plan.candidates]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._heads = {_key(*pair): _build_head(source, *pair) for pair in pairs}
        self._shapes: dict[tuple[str, ...], BagShape] = {}
        self._features: dict[_Key, Tensor] = {}
        self._parts: dict[_Key, list[Bag]] = {}
        self._read_once(pairs)
        self._read_copies([pair for pair in pairs if pair[0].by_gradient])
        self._reduced = {key: self._gather(key[1], parts) for key, parts in self._parts.items()}
        unreduced = [pair for pair in pairs if pair[0].by_gradient and _key(*pair) not in self._reduced]
        names = list(dict.fromkeys(name for _, candidate in unreduced for name in candidate.token_sets))
        self._store = open_store(source, self._shown, names, device, storage) if names else None
        self._covers = covers or {}
        self._covered: dict[tuple[int, int], TokenStore] = {}

    def features(self, plan: HeadPlan, candidate: Candidate) -> Tensor:
        """Features [cases features] of a head in closed form."""
        return self._features[_key(plan, candidate)]

    def store(self, plan: HeadPlan, candidate: Candidate) -> TokenStore:
        """Where a head trained by gradient reads its batches."""
        if not (self._covers and learns_masks(plan.head)):
            return self._reduced.get(_key(plan, candidate)) or cast(TokenStore, self._store)
        grid = joined_grid(self.shape(candidate), candidate.token_sets)
        return self._covered.setdefault(grid, CoveredStore(cast(TokenStore, self._store), self._covers[grid]))

    def rounds(self, plans: Sequence[HeadPlan]) -> list[list[HeadPlan]]:
        """Which plans to fit together: one by one, but at once where tokens are read from the cache every epoch."""
        streamed = [plan for plan in plans if plan.by_gradient and self._streams(plan)]
        return [[plan] for plan in plans if plan not in streamed] + ([streamed] if streamed else [])

    def _streams(self, plan: HeadPlan) -> bool:
        return _key(plan, plan.candidates[0]) not in self._reduced and isinstance(self._store, StreamedStore)

    def places(self, task: Task) -> NDArray[np.int64]:
        """Places of a task's cases among those of the preparation."""
        return np.searchsorted(np.asarray(self.case_ids), np.asarray(task.case_ids)).astype(np.int64)

    def deck(self, plan: HeadPlan, candidate: Candidate, task: Task, *, seed: int) -> Deck:
        """Deals the cases of a task and their copies, in blocks of bounded size."""
        pairs = [(copy, case) for case, each in enumerate(task.case_ids) for copy in self._copies[each]]
        items = [*task.case_ids, *(copy for copy, _ in pairs)]
        owners = np.array([*range(len(task.case_ids)), *(case for _, case in pairs)], np.int64)
        places = np.array([self._places[item] for item in items], np.int64)
        reduced = _key(plan, candidate) in self._reduced
        lengths = np.array([1 if reduced else self._counts.get(item, 1) for item in items])
        size = 0 if reduced else count_bytes(self.source, items, candidate.token_sets)
        longest = 1 if reduced else max(self._counts.values())
        blocks = max(1, -(-size // self.block_bytes))
        return Deck(places, lengths, longest=longest, blocks=blocks, seed=seed, owners=owners)

    def shape(self, candidate: Candidate) -> BagShape:
        """Of the bags that a candidate reads."""
        if candidate.token_sets not in self._shapes:
            self._shapes[candidate.token_sets] = bag_shape(self.source, candidate.token_sets)
        return self._shapes[candidate.token_sets]

    def standardiser(self, candidate: Candidate, places: NDArray[np.int64]) -> Standardiser:
        """Fitted on the cases at these places."""
        shape = self.shape(candidate)
        moments = {name: self._moments[name] for name in candidate.token_sets}
        return fit_standardiser(shape, moments, torch.from_numpy(places))

    def samples(self, plan: HeadPlan, candidate: Candidate) -> tuple[Bag, Bag]:
        """Two cases, standardised, to try a head on: whole, and as it reads them in training."""
        bag = next(iter(stream_bags(self.source, self.case_ids[:2], candidate.token_sets)))
        head = self._heads[_key(plan, candidate)]
        reduced = cast(_Reducing, head).reduce(bag) if hasattr(head, "reduce") else bag
        standardise = self.standardiser(candidate, np.arange(len(self.case_ids)))
        return standardise(bag).to(self.device), standardise(reduced).to(self.device)

    def _read_once(self, pairs: Sequence[tuple[HeadPlan, Candidate]]) -> None:
        names = list(dict.fromkeys(name for _, candidate in pairs for name in candidate.token_sets))
        shape = bag_shape(self.source, names)
        gradient = {name for plan, candidate in pairs if plan.by_gradient for name in candidate.token_sets}
        sums = MomentSums(shape, [name for name in names if name in gradient])
        features: dict[_Key, list[Tensor]] = {}
        heads = {_key(*pair): (pair, self._heads[_key(*pair)]) for pair in pairs}
        with torch.no_grad():
            for bag in stream_bags(self.source, self.case_ids, names, chunk_bytes=self.block_bytes // 4):
                sums.add(bag)
                for key, ((plan, _), head) in heads.items():
                    if not plan.by_gradient:
                        own = bag.to(dtype=torch.float32)
                        features.setdefault(key, []).append(cast(Any, head).features(own))
                    else:
                        self._reduce(key, head, bag)
        self._moments = sums.total()
        self._features = {key: torch.cat(parts) for key, parts in features.items()}

    def _read_copies(self, pairs: Sequence[tuple[HeadPlan, Candidate]]) -> None:
        """Checks the tokens of the copies, and reduces them for heads that pool first."""
        names = list(dict.fromkeys(name for _, candidate in pairs for name in candidate.token_sets))
        heads = {_key(*pair): self._heads[_key(*pair)] for pair in pairs}
        copies = self._shown[len(self.case_ids) :]
        if not copies or not names:
            return
        with torch.no_grad():
            for bag in stream_bags(self.source, copies, names, chunk_bytes=self.block_bytes // 4):
                MomentSums(bag_shape(self.source, names), names).add(bag)
                for key, head in heads.items():
                    self._reduce(key, head, bag)

    def _reduce(self, key: _Key, head: nn.Module, bag: Bag) -> None:
        """Keeps what a head makes of the next bag without parameters, if it begins so."""
        if hasattr(head, "reduce"):
            own = Bag({name: bag.tokens[name] for name in key[1]}, bag.mask, bag.positions, bag.case_ids)
            self._parts.setdefault(key, []).append(cast(_Reducing, head).reduce(own))

    def _gather(self, token_sets: Sequence[str], parts: Sequence[Bag]) -> ResidentStore:
        """The store of what `_reduce` kept."""
        bags = _gather(bag_shape(self.source, token_sets), parts)
        return ResidentStore(bags.to(self.device), self.device)


def _build_head(source: TokenSource, plan: HeadPlan, candidate: Candidate) -> nn.Module:
    """A head as it is before any fit."""
    shape = bag_shape(source, candidate.token_sets)
    return build_member(plan.head, shape, outputs=1, kind="binary", options=candidate.options).head


def _gather(shape: BagShape, bags: Sequence[Bag]) -> BagStore:
    """A store of reduced bags, one slice per view."""
    mask = torch.cat([bag.mask for bag in bags])
    cases, views, _ = mask.shape
    tables, sizes = {}, {}
    for name in shape.token_sets:
        tokens = torch.cat([bag.tokens[name] for bag in bags]).flatten(0, 2)
        tables[name] = torch.cat([tokens, tokens.new_zeros(1, *tokens.shape[1:])])
        sizes[name] = (tokens.shape[1], tokens.shape[2])
    rows = torch.where(mask, torch.arange(cases * views).view(cases, views, 1), cases * views)
    positions = torch.cat([bag.positions for bag in bags])
    ids = [case for bag in bags for case in bag.case_ids]
    return BagStore(BagShape(sizes, {}, shape.views), ids, tables, rows, positions)


def _key(plan: HeadPlan, candidate: Candidate) -> _Key:
    """Names what is computed without parameters: for a head by gradient it depends on the token sets alone."""
    return plan.head, candidate.token_sets, "" if plan.by_gradient else str(sorted(candidate.options.items()))

"""Owns where tokens lie during a training: on the device, in memory, or read block by block; the numbers are the same.

A streamed store holds one block of cases while a thread reads the next from the memory map.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from embedkit.bags import Bag, BagShape, BagStore, TokenSource, bag_shape, load_bags
from embedkit.errors import OptionError
from embedkit.readahead import Waits, run_in_background

__all__ = [
    "BLOCK_BYTES",
    "ResidentStore",
    "Storage",
    "StreamedStore",
    "TokenStore",
    "count_bytes",
    "open_store",
    "require_storage",
]

Storage = Literal["auto", "device", "memory", "stream"]
BLOCK_BYTES = 512 * 2**20
"""Tokens of a block, float16: what a streamed training holds twice."""
_SHARE = 0.5  # of the free memory that tokens may take


class TokenStore(Protocol):
    """What a training reads batches from."""

    @property
    def shape(self) -> BagShape: ...
    @property
    def device(self) -> torch.device: ...
    def batch(self, places: NDArray[np.int64], token_sets: Sequence[str], *, slices: int | None = None) -> Bag: ...
    def visit(self, parts: Sequence[NDArray[np.int64]], token_sets: Sequence[str], /) -> Iterator[None]: ...


class ResidentStore:
    """All cases at hand, in memory or on the device that trains."""

    def __init__(self, bags: BagStore, device: torch.device) -> None:
        self.bags = bags
        self.shape = bags.shape
        self.device = device

    def batch(self, places: NDArray[np.int64], token_sets: Sequence[str], *, slices: int | None = None) -> Bag:
        """As `BagStore.batch`, on the device that trains."""
        return self.bags.batch(torch.from_numpy(places), token_sets, slices=slices).to(self.device)

    def visit(self, parts: Sequence[NDArray[np.int64]], _token_sets: Sequence[str], /) -> Iterator[None]:
        """Every part is at hand at any time."""
        for _ in parts:
            yield


class StreamedStore:
    """Gathers batches like `BagStore`, but only of the cases of the part that is being visited."""

    def __init__(
        self, source: TokenSource, case_ids: Sequence[str], token_sets: Sequence[str], device: torch.device
    ) -> None:
        self.source = source
        self.case_ids = list(case_ids)
        self.shape = bag_shape(source, token_sets)
        self.device = device
        self._held: BagStore | None = None
        self._local = np.full(len(self.case_ids), -1, np.int64)

    def batch(self, places: NDArray[np.int64], token_sets: Sequence[str], *, slices: int | None = None) -> Bag:
        """As `BagStore.batch`; every case must be of the part that is visited."""
        local = self._local[places]
        if self._held is None or (local < 0).any():
            raise ValueError("a case was asked for that is not in the part being visited")
        return self._held.batch(torch.from_numpy(local), token_sets, slices=slices)

    def visit(self, parts: Sequence[NDArray[np.int64]], token_sets: Sequence[str], /) -> Iterator[None]:
        """Has these tokens of one part's cases after the other at hand, while the next is being read."""

        def load() -> Iterator[tuple[NDArray[np.int64], BagStore]]:
            for places in parts:
                ids = [self.case_ids[place] for place in places]
                yield places, load_bags(self.source, ids, token_sets, views=self.shape.views)

        try:
            for places, held in run_in_background(load(), depth=1, waits=Waits(), taking="tokens", putting="training"):
                self._local[:] = -1
                self._local[places] = np.arange(len(places))
                self._held = held.to(self.device)
                del held
                yield
        finally:
            self._held = None


def open_store(
    source: TokenSource, case_ids: Sequence[str], token_sets: Sequence[str], device: torch.device, storage: Storage
) -> TokenStore:
    """Puts the tokens of some cases where they fit, or where the user says.

    Raises:
        OptionError: as `require_storage`.
    """
    require_storage(storage, device)
    where = _choose(count_bytes(source, case_ids, token_sets), device) if storage == "auto" else storage
    if where == "stream":
        return StreamedStore(source, case_ids, token_sets, device)
    store = load_bags(source, case_ids, token_sets)
    return ResidentStore(store.to(device) if where == "device" else store, device)


def require_storage(storage: Storage, device: torch.device) -> None:
    """Stops where tokens cannot lie as the user says.

    Raises:
        OptionError: no such storage, or ``device`` without an accelerator.
    """
    if storage not in get_args(Storage):
        raise OptionError(f"storage is {storage!r}, expected one of {', '.join(get_args(Storage))}")
    if storage == "device" and device.type == "cpu":
        raise OptionError("storage device was asked for without an accelerator; choose memory, or another --device")


def count_bytes(source: TokenSource, case_ids: Sequence[str], token_sets: Sequence[str]) -> int:
    """Bytes of float16 tokens of some cases."""
    shape = bag_shape(source, token_sets)
    slices = source.stacks.filter(pl.col("case_id").is_in(list(case_ids)))["count"].sum()
    return int(slices) * 2 * sum(patches * dim for patches, dim in shape.token_sets.values())


def _choose(size: int, device: torch.device) -> Storage:
    if device.type == "cuda" and size < _SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "memory" if size < _SHARE * _free_memory() else "stream"


def _free_memory() -> float:
    """Bytes that this process may still take, by the machine, its control group and its own limits."""
    free = [float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        found = [line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
        free = [float(found[0]) * 1024] if found else free
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdecimal():
        cached = [line.split()[1] for line in (group / "memory.stat").read_text().splitlines() if line[:5] == "file "]
        free.append(float(most) - float(used.read_text()) + float(cached[0]))
    status = Path("/proc/self/status")
    data = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if data != resource.RLIM_INFINITY and status.is_file():
        taken = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmData:")]
        free.append(data - 1024 * float(taken[0]))
    return max(0.0, min(free))

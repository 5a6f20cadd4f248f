"""Owns what is said between extracting workers and whoever gives out the cases: plain values, and who carries them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from embedkit.errors import EmbedkitError
from embedkit.failures import Failure
from embedkit.recipe import Recipe
from embedkit.sources import Case
from embedkit.strays import Looks

__all__ = [
    "Begin",
    "Broken",
    "Channel",
    "Computed",
    "Done",
    "Drain",
    "Drained",
    "Event",
    "Failed",
    "Looked",
    "Lost",
    "Order",
    "Quit",
    "Ready",
    "Same",
    "Settled",
    "Stop",
    "Transport",
    "Wanted",
]


@dataclass(frozen=True)
class Begin:
    """Order: work for this cache. ``probe`` is an image that the sender can read; None where it reads none."""

    cache: Path
    recipe: Recipe
    probe: Path | None


@dataclass(frozen=True)
class Drain:
    """Order: no more cases for now; finish those given, and the shard."""


@dataclass(frozen=True)
class Stop:
    """Order: finish the case in work and the shard, give up the other cases."""


@dataclass(frozen=True)
class Quit:
    """Order: end."""


Order = Begin | Case | Drain | Stop | Quit


@dataclass(frozen=True)
class Ready:
    """Event: the backbone is loaded and gives this recipe."""

    recipe: Recipe
    pid: int
    host: str


@dataclass(frozen=True)
class Wanted:
    """Event: one more case, please; answered by a `Case` or by `Drain`."""


@dataclass(frozen=True)
class Looked:
    """Event: these folders were looked through for DICOM series, and hold these strays."""

    looks: Looks


@dataclass(frozen=True)
class Computed:
    """Event: so many slices of cases in work are done since the last."""

    slices: int


@dataclass(frozen=True)
class Done:
    """Event: a case is extracted; it is on disk at the next `Drained`, if not before."""

    case_id: str
    slices: int
    blank_slices: int
    changed: bool


@dataclass(frozen=True)
class Failed:
    """Event: a case gives no tokens."""

    failure: Failure

    @property
    def case_id(self) -> str:
        """Of the case."""
        return self.failure.case_id


@dataclass(frozen=True)
class Same:
    """Event: the files of a case were touched, but hold the cached bytes."""

    case_id: str


@dataclass(frozen=True)
class Drained:
    """Event: all cases given are settled or given up, and their shards on disk; ``waits`` in seconds since the last."""

    waits: Mapping[str, float]


@dataclass(frozen=True)
class Broken:
    """Event: the worker ends. ``error`` is what stops the whole call; None where only this worker is out of order.

    ``reason`` may be put on record, ``found`` is what a library or a file says; so it is of `Lost`.
    """

    reason: str
    error: EmbedkitError | None
    found: str = ""


@dataclass(frozen=True)
class Lost:
    """Event, told by the transport: the worker is gone."""

    reason: str
    found: str = ""


Settled = Done | Failed | Same
Event = Ready | Wanted | Looked | Computed | Settled | Drained | Broken | Lost


class Channel(Protocol):
    """The worker's end of the line to whoever gives out the cases; used by several threads."""

    def send(self, event: Event) -> None:
        """Hands over an event; never waits for an answer."""

    def receive(self) -> Order:
        """The next order, in the order they were given; raises EOFError once nobody is at the other end."""


class Transport(Protocol):
    """Starts workers and carries orders to them and events from them."""

    @property
    def size(self) -> int:
        """How many workers there should be, numbered from 0."""

    def name(self, number: int) -> str:
        """A worker, for messages."""

    def start(self, number: int) -> None:
        """Starts a worker: the first under this number, or one in the place of a lost one."""

    def send(self, number: int, order: Order) -> None:
        """Hands over an order; to a worker that is gone it goes nowhere, for `poll` tells that it is lost."""

    def poll(self, timeout_s: float) -> Sequence[tuple[int, Event]]:
        """Events and whose they are, in each worker's order; waits at most ``timeout_s`` for the first."""

    def kill(self, number: int) -> None:
        """Ends a worker at once; nothing more is heard of it."""

    def close(self) -> None:
        """Ends all workers; those that still work may finish their shard first."""

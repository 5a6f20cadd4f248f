"""Owns working ahead in threads: bounded, in order, errors surfacing where results are taken; knows no image.

Every wait is counted, so that an extraction can say which of its stages holds up the others.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

__all__ = ["Waits", "read_ahead", "run_in_background"]

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Waits:
    """Seconds that stages spent waiting, by what they waited for; each name is counted by one thread alone."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def count(self, name: str) -> Iterator[None]:
        """Adds the time spent in the block to ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def read_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, waits: Waits, name: str
) -> Iterator[tuple[Item, Result | Exception]]:
    """Maps ``function`` over ``items`` in order, each call in a thread, at most ``workers`` results ahead.

    Args:
        function: What it raises is given in the place of its result.
        items: Taken one by one as threads become free.
        workers: Threads.
        waits: Counts, under ``name``, how long the caller waited for a result.
        name: As the waits are to be told.
    """

    def attempt(item: Item) -> Result | Exception:
        try:
            return function(item)
        except Exception as error:
            return error

    remaining = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="embedkit-read") as pool:
        flying: deque[tuple[Item, Future[Result | Exception]]] = deque(
            (item, pool.submit(attempt, item)) for item in itertools.islice(remaining, workers)
        )
        try:
            while flying:
                item, future = flying.popleft()
                with waits.count(name):
                    result = future.result()
                flying.extend((later, pool.submit(attempt, later)) for later in itertools.islice(remaining, 1))
                yield item, result
                del result, future  # a volume is large, and waiting for the next one takes no hold of it
        finally:
            for _, future in flying:
                future.cancel()


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def run_in_background(items: Iterator[Item], *, depth: int, waits: Waits, taking: str, putting: str) -> Iterator[Item]:
    """Runs ``items`` in a thread, at most ``depth`` ahead; what it raises surfaces here, leaving early stops it.

    Args:
        items: What the thread iterates over.
        depth: Items kept ready.
        waits: Counts how long the caller waited for an item, and the thread for the caller.
        taking: Name of the first.
        putting: Name of the second.
    """
    ready: queue.Queue[Item | _Raised | None] = queue.Queue(depth)
    left = threading.Event()

    def put(entry: Item | _Raised | None) -> None:
        with waits.count(putting):
            while not left.is_set():
                try:
                    ready.put(entry, timeout=0.1)
                except queue.Full:
                    continue
                return

    def work() -> None:
        try:
            for item in items:
                put(item)
                if left.is_set():
                    return
            put(None)
        except BaseException as error:
            put(_Raised(error))

    def take() -> Item | _Raised | None:
        with waits.count(taking):
            return ready.get()

    thread = threading.Thread(target=work, name="embedkit-render", daemon=True)
    thread.start()
    try:
        while (entry := take()) is not None:
            if isinstance(entry, _Raised):
                raise entry.error
            yield entry
    finally:
        left.set()
        thread.join()

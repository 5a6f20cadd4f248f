"""Owns collecting finished cases into shards, which one background thread writes; knows no image and no backbone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from embedkit.cache import StackTokens, write_shard
from embedkit.readahead import Waits
from embedkit.recipe import Recipe

__all__ = ["ShardWriter"]


class ShardWriter:
    """Collects finished cases and writes them as shards in one background thread, at most one shard behind.

    Leaving the block writes what is left, also when it is left by an error: finished cases are never thrown away.
    """

    def __init__(self, cache: Path, recipe: Recipe, *, shard_bytes: int, shard_seconds: float, waits: Waits) -> None:
        """Args as for `embedkit.extract`; ``waits`` counts how long `add` waited for the disk."""
        self._cache, self._recipe, self._waits = cache, recipe, waits
        self._shard_bytes, self._shard_seconds = shard_bytes, shard_seconds
        self._stacks: list[StackTokens] = []
        self._bytes, self._since = 0, time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="embedkit-write")
        self._writing: Future[Path] | None = None

    def add(self, stacks: Sequence[StackTokens]) -> None:
        """Takes all stacks of one case; they land in the same shard.

        Raises:
            CacheError: an earlier shard could not be written.
        """
        if not self._stacks:
            self._since = time.monotonic()
        self._stacks.extend(stacks)
        self._bytes += sum(tokens.nbytes for stack in stacks for tokens in stack.tokens.values())
        self.tick()

    def tick(self) -> None:
        """Begins to write the shard if it is full, or was begun too long ago.

        Raises:
            CacheError: an earlier shard could not be written.
        """
        overdue = bool(self._stacks) and time.monotonic() - self._since >= self._shard_seconds
        if overdue or self._bytes >= self._shard_bytes:
            self._flush()

    def _flush(self) -> None:
        self._wait()
        if self._stacks:
            self._writing = self._pool.submit(write_shard, self._cache, self._recipe, self._stacks)
        self._stacks, self._bytes = [], 0

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            with self._waits.count("backbone for the shard writer"):
                writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                self._wait()
            finally:  # where the shard before could not be written, what came after it may still fit
                self._flush()
                self._wait()
        finally:
            self._pool.shutdown()

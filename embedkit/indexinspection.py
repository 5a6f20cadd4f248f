"""Owns the question whether a search index is undamaged; changes nothing, parses nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from embedkit.indexseals import list_damage
from embedkit.inspection import Damage

__all__ = ["verify_index"]


def verify_index(path: Path | str, *, progress: Callable[[int, int], None] | None = None) -> list[Damage]:
    """Checks every byte of a search index against its checksums; opening one checks only what is parsed of large files.

    Args:
        path: Its folder.
        progress: Called with (bytes done, bytes in all).

    Returns:
        All that is wrong; empty for a sound index.

    Raises:
        SearchError: there is no index at ``path``, or its index.json is damaged or of another format.
    """
    found = list_damage(Path(path), progress=progress)
    return [Damage(Path(path) / name, "", problem) for name, problem in found.items()]

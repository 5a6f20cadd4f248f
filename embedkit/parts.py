"""Owns the parts into which a list of cases is cut for calls that know nothing of each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from embedkit.errors import OptionError

__all__ = ["take_part"]

_PART = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")

Item = TypeVar("Item")


def take_part(items: Sequence[Item], part: str) -> list[Item]:
    """Every n-th item from the i-th for ``part`` ``i/n``: the n parts are disjoint and differ by one item at most.

    Raises:
        OptionError: ``part`` is not of the form ``i/n`` with i from 1 to n.
    """
    match = _PART.fullmatch(part)
    number, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= parts:
        raise OptionError(f"part is {part!r}, expected i/n with i from 1 to n, as 3/8 for the third of eight parts")
    return list(items[number - 1 :: parts])

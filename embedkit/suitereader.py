"""Owns how values leave a table of a TOML file: each key once, of the type asked for; knows no suite.

What is wrong is a `SuiteError` that names the file, the table, and the nearest right key or value.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from embedkit.errors import SuiteError

__all__ = ["TableReader", "choose_nearest"]

Value = TypeVar("Value")

_TYPES = {str: "text", int: "a whole number", bool: "true or false", dict: "a table", list: "a list"}


def choose_nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean A?`` for the nearest of some names, else all of them: ``; expected one of A, B``."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(names) or 'none'}"


class TableReader:
    """Takes the keys of one table; made with those that it may have.

    Attributes:
        where: The file and the table, which begin every message.
    """

    def __init__(self, table: Mapping[str, Any], where: str, known: Iterable[str]) -> None:
        self.where = where
        self._table = table
        known = tuple(known)
        for key in table:
            if key not in known:
                raise SuiteError(f"{where}: unknown key {key!r}{choose_nearest(key, known)}")

    def take(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        """The value of a key; without a default the key must be there.

        Raises:
            SuiteError: it is not there, empty text, or of another type.
        """
        if key not in self._table and default is not None:
            return default
        found = self.take_optional(key, kind)
        if found is None:
            raise SuiteError(f"{self.where}: {key} is missing, expected {_TYPES[kind]}")
        return found

    def take_optional(self, key: str, kind: type[Value]) -> Value | None:
        """The value of a key, None where it is not there.

        Raises:
            SuiteError: empty text, or another type.
        """
        found = self._table.get(key)
        if found is None:
            return None
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool) or found == "":
            raise SuiteError(f"{self.where}: {key} is {found!r}, expected {_TYPES[kind]}")
        return found

    def take_names(self, key: str) -> tuple[str, ...]:
        """A list of text as a tuple, empty where it is not there.

        Raises:
            SuiteError: no list of text, or one twice.
        """
        found: list[Any] = self.take(key, list, [])
        if not all(isinstance(each, str) and each for each in found) or len(set(found)) < len(found):
            raise SuiteError(f"{self.where}: {key} is {found!r}, expected a list of text, each once")
        return tuple(found)

    def take_choice(self, key: str, choices: Iterable[str], default: str | None = None) -> str:
        """Text that is one of some.

        Raises:
            SuiteError: as `take`, or another text.
        """
        found = self.take(key, str, default)
        choices = tuple(choices)
        if found not in choices:
            raise SuiteError(f"{self.where}: {key} is {found!r}{choose_nearest(found, choices)}")
        return found

    def take_count(self, key: str, default: int, least: int) -> int:
        """A whole number that is not too small.

        Raises:
            SuiteError: as `take`, or a smaller one.
        """
        found = self.take(key, int, default)
        if found < least:
            raise SuiteError(f"{self.where}: {key} is {found}, expected {least} or more")
        return found

    def take_path(self, key: str, folder: Path) -> Path | None:
        """A path that begins at ``folder``; None where it is not there.

        Raises:
            SuiteError: no text.
        """
        found = self.take_optional(key, str)
        return None if found is None else folder / found

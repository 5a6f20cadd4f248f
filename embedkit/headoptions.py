"""Owns options of heads as a user types them, HEAD.NAME=VALUE; knows no option by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embedkit.errors import OptionError
from embedkit.plugins import list_options

__all__ = ["parse_head_options"]


def parse_head_options(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What `embedkit.train` takes as ``head_options``, each value of the type of the head's own default.

    Args:
        texts: Each ``HEAD.NAME=VALUE``. One whose default is a sequence may be given several times.

    Raises:
        OptionError: not of that form, no such option, a value of another type, or one option given twice.
        HeadError: unknown head.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        place, equals, value = text.partition("=")
        head, dot, name = place.partition(".")
        if not equals or not dot or not head or not name:
            raise OptionError(f"head option {text!r} is not of the form HEAD.NAME=VALUE, for example grid.width=32")
        defaults = list_options(head)
        if name not in defaults:
            raise OptionError(f"head {head!r} has no option {name!r}; it has {', '.join(defaults) or 'none'}")
        options = found.setdefault(head, {})
        if isinstance(defaults[name], tuple | list):
            options[name] = (*options.get(name, ()), value)
        elif name in options:
            raise OptionError(f"head option {place} was given twice, expected one value")
        else:
            options[name] = _convert(place, value, defaults)
    return found


def _convert(place: str, value: str, defaults: Mapping[str, Any]) -> Any:
    kind = type(defaults[place.partition(".")[2]])
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise OptionError(f"head option {place} is {value!r}, expected true or false")
        return value.lower() == "true"
    if kind not in (int, float):
        return value
    try:
        return kind(value)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise OptionError(f"head option {place} is {value!r}, expected {expected}") from None

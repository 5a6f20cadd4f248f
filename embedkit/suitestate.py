"""Owns what a folder of results remembers of its suite: which one it was, and how long extraction took; runs nothing.

``suite.json`` holds every setting that decides a score. A suite may gain or lose tasks, heads, backbones and data sets;
what both have must be alike, else the difference is named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedkit.errors import SuiteError
from embedkit.files import explain_os_error, temporary_path
from embedkit.suitefile import Suite

__all__ = ["SuiteState", "open_state", "write_json"]

_FILE = "suite.json"
_FORMAT = 1
_SETTINGS = ("folds", "seed", "seeds", "sweep", "resamples")
_FREE = ("metric", "weights")
"""Keys of no weight for what is kept: a headline, and a path whose content the cache's recipe knows."""
_SHOWN = 5


class SuiteState:
    """What is known of the results in a folder; `save` writes it.

    Attributes:
        settings: Dotted key -> value.
        extract_seconds: ``DATASET.BACKBONE`` -> seconds that all calls took.
    """

    def __init__(self, path: Path, settings: dict[str, Any], extract_seconds: dict[str, float]) -> None:
        self.path = path
        self.settings = settings
        self.extract_seconds = extract_seconds

    def save(self) -> None:
        """Replaces the file, in one step.

        Raises:
            SuiteError: it cannot be written.
        """
        fields = {"format": _FORMAT, "settings": self.settings, "extract_seconds": self.extract_seconds}
        write_json(self.path, fields)


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Writes or replaces a file of results, in one step.

    Raises:
        SuiteError: it cannot be written.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(fields, indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise SuiteError(f"results are not written: {explain_os_error(error, path)}") from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def open_state(out: Path, suite: Suite) -> SuiteState:
    """Makes the folder of a suite's results, or checks that those there are of this suite.

    Raises:
        SuiteError: the folder cannot be made, is damaged, or a setting that both have differs.
    """
    path = out / _FILE
    wanted = _flatten(suite)
    try:
        out.mkdir(parents=True, exist_ok=True)
        fields = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        settings, seconds = dict(fields.get("settings", {})), dict(fields.get("extract_seconds", {}))
    except OSError as error:
        raise SuiteError(f"no place for results: {explain_os_error(error, out)}") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise SuiteError(f"{path} is damaged ({error}); choose another --out") from error
    if fields and fields.get("format") != _FORMAT:
        raise SuiteError(f"{path} has format {fields.get('format')!r}, expected {_FORMAT}; choose another --out")
    _require_alike(out, settings, wanted)
    state = SuiteState(path, settings | wanted, seconds)
    state.save()
    return state


def _require_alike(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compares the settings, and the tables that both have key by key."""
    shared = {_table(key) for key in before} & {_table(key) for key in now}
    keys = sorted(key for key in {*before, *now} if _table(key) in shared)
    differ = [
        f"{key} was {_word(before, key)} and is now {_word(now, key)}"
        for key in keys
        if before.get(key) != now.get(key)
    ]
    if differ:
        more = f", and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
        raise SuiteError(
            f"the suite is not the one whose results are in {out}: {'; '.join(differ[:_SHOWN])}{more}. Choose another"
            " --out, or give the task, backbone or data set another name"
        )


def _flatten(suite: Suite) -> dict[str, Any]:
    """``settings.folds``, ``tasks.NAME.target`` and so on, as the file has them, of all that is to be run."""
    flat: dict[str, Any] = {f"settings.{key}": getattr(suite, key) for key in _SETTINGS}
    asked = {"tasks": {task.name for task in suite.tasks}, "backbones": {each.name for each in suite.backbones}}
    for section, names in asked.items():
        for table in suite.document[section]:
            if table["name"] in names:
                flat |= _flatten_table(f"{section}.{table['name']}", table)
    for name in sorted({task.dataset for task in suite.tasks}):
        flat |= _flatten_table(f"datasets.{name}", suite.document["datasets"][name])
    return flat


def _flatten_table(where: str, table: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {where: True}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= {f"{where}.{key}.{name}": each for name, each in value.items()}
        elif key not in (*_FREE, "heads"):
            flat[f"{where}.{key}"] = value
    return flat


def _table(key: str) -> str:
    """The table that a key is in: ``settings``, ``tasks.NAME``."""
    section, _, rest = key.partition(".")
    return section if section == "settings" else f"{section}.{rest.split('.')[0]}"


def _word(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if settings.get(key) is not None else "not given"

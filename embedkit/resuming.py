"""Owns whether a run on disk is the one that a training would make again; trains nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from embedkit.errors import DifferentRunError
from embedkit.runfolder import read_run

__all__ = ["is_finished"]

_WAYS_OUT = "pass the same options and labels, choose another --out, or pass --overwrite instead of --resume"


def is_finished(path: Path, fields: Mapping[str, Any], tested: pl.DataFrame) -> bool:
    """Whether a run is there already, as a training would make it.

    Args:
        path: Its folder.
        fields: Of its record, as the training would write them.
        tested: case_id, fold and target of its predictions.

    Raises:
        RunError: a run is there that is damaged.
        DifferentRunError: a run is there that differs; the message names what.
    """
    if not path.exists():
        return False
    found = read_run(path)
    record = {name: getattr(found.record, name) for name in fields}
    for name, wanted in _plain(fields).items():
        if (there := _plain(record)[name]) != wanted:
            difference = f"was trained with {name} {_shorten(there)}, but this training asks for {_shorten(wanted)}"
            raise DifferentRunError(f"run {path} {difference}", _WAYS_OUT)
    if not found.predictions.select(tested.columns).equals(tested):
        raise DifferentRunError(
            f"run {path} was trained on other cases, labels or folds than this training has", _WAYS_OUT
        )
    return True


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return plain


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."

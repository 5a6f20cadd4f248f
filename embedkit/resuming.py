"""Owns whether a run on disk is the one that a training would make again; trains nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from embedkit.errors import DifferentRunError
from embedkit.fitting import FitOptions
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
    record = _plain({name: getattr(found.record, name) for name in fields})
    asked = _plain(fields)
    for name, default in dataclasses.asdict(FitOptions()).items():
        if name in asked.get("fit_options", ()):  # a run made before there was an option was made as its default has it
            record["fit_options"].setdefault(name, default)
    for name, wanted in asked.items():
        if record[name] != wanted:
            there, here = _leave_different(record[name], wanted)
            difference = f"was trained with {name} {_shorten(there)}, but this training asks for {_shorten(here)}"
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


def _leave_different(there: Any, wanted: Any) -> tuple[Any, Any]:
    """Of two tables what differs; all of anything else."""
    if not (isinstance(there, dict) and isinstance(wanted, dict)):
        return there, wanted
    absent = object()
    names = [name for name in {**there, **wanted} if there.get(name, absent) != wanted.get(name, absent)]
    first, second = ({name: each[name] for name in names if name in each} for each in (there, wanted))
    return first, second


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."

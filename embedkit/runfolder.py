"""Owns the run folder: ``run.json``, the weights, the scores out of fold and of inner splits; knows no training.

A folder under its final name is complete: it is written under a temporary name beside it, made durable, then renamed.
Reading trusts nothing: no pickle, checksums over the weights and the scores, every field checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from embedkit.answers import score_array, score_columns
from embedkit.bags import BagShape
from embedkit.errors import RecipeError, RunError
from embedkit.files import explain_os_error, publish_folder, remove_stale, replace_folder, temporary_path
from embedkit.members import Member, build_member
from embedkit.metrics import Interval
from embedkit.recipe import Recipe
from embedkit.tails import TailShape
from embedkit.targets import TaskKind

__all__ = ["FORMAT_VERSION", "RunContents", "RunRecord", "read_run", "require_absent", "write_run"]

FORMAT = "embedkit-run"
FORMAT_VERSION = 2
_FILES = ("run.json", "weights.safetensors", "predictions.parquet", "inner.parquet")


@dataclass(frozen=True, eq=False)
class RunRecord:
    """What ``run.json`` holds.

    Attributes:
        name: ``TARGET.HEAD``.
        target: Column that was learned.
        kind: Of the task.
        classes: In the order of the scores; empty for a regression and for survival.
        event, times: As `Task.event` and `Task.times`.
        head: Registered name.
        head_options: All options of the head, where a member does not say otherwise.
        outputs: Width of the logits.
        shape: Of the bags: token sets, grids and views.
        recipe: Of the cache.
        metrics: Out of fold, pooled.
        members: Of each: its fold, how many cases that tested, the token sets that it reads, all options of its head,
            how its fit went and, where it mixes layers, how heavy each is to it (``layer_weights``).
        fit_options: Of a fit by gradient.
        folds: Number of folds, or the column that they came from.
        seed: Of folds, weights and batches.
        parameters: Trainable numbers per member.
        seconds: Time that the fits took.
        versions: Of embedkit and what it stands on.
        cases: Numbers of cases trained on and left aside, with the ids of the latter and of the patients that were
            in training but in no test part (``untested_patients``).
        sweep: Its name and its candidates (token_sets, head_options, fit_options), of which each member says which it
            is (``candidate``) and how they ranked on the inner splits (``ranking``: candidate and mean held-out loss,
            best first); None without a sweep.
        notes: What the user should know, in sentences.
        masks: Number of cases whose mask the head learned from; 0 for a head that learned none.
        copies: Of the altered copies that the head was shown in training beside its cases: ``fingerprint`` and
            ``augment`` of their recipe, how many (``shown``) and a digest of their ids (``names``); None where it was
            shown none.
        folded_with: Other targets that its folds and inner splits are those of as well.
        sha256: Of the other files, in hex; known once it is written.
    """

    name: str
    target: str
    kind: TaskKind
    classes: tuple[str, ...]
    head: str
    head_options: dict[str, Any]
    outputs: int
    shape: BagShape
    recipe: Recipe
    metrics: dict[str, Interval]
    members: tuple[dict[str, Any], ...]
    fit_options: dict[str, Any]
    folds: int | str
    seed: int
    parameters: int
    seconds: float
    repeats: int = 1
    event: str = ""
    times: tuple[float, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    cases: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    masks: int = 0
    copies: dict[str, Any] | None = None
    folded_with: tuple[str, ...] = ()
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of the recipe of the cache."""
        return self.recipe.fingerprint

    @property
    def views(self) -> tuple[str, ...]:
        """``view/plane`` names that the head reads, in order."""
        return self.shape.views

    @property
    def member_count(self) -> int:
        """Number of members."""
        return len(self.members)

    @property
    def token_sets(self) -> tuple[str, ...]:
        """What the head reads."""
        return tuple(self.shape.token_sets)

    @property
    def score_columns(self) -> tuple[str, ...]:
        """Columns of predictions, as `embedkit.answers.score_columns` names them."""
        return score_columns(self.kind, self.classes, self.times)

    def score_array(self, scores: NDArray[Any]) -> NDArray[np.float64]:
        """Scores [cases outputs] as `compute_metrics` takes them."""
        return score_array(self.kind, scores)


def write_run(
    path: Path,
    record: RunRecord,
    members: Sequence[Member],
    predictions: pl.DataFrame,
    inner: pl.DataFrame,
    *,
    overwrite: bool,
) -> None:
    """Writes a run folder, whole or not at all.

    Args:
        path: The folder.
        record: Its checksums are made here.
        members: In the order of ``record.members``.
        predictions: Out of fold: case_id, patient_id, fold, target, score columns.
        inner: Of the inner splits: fold, split, case_id, patient_id, target, score columns.
        overwrite: Replace a run that is there.

    Raises:
        RunError: ``path`` exists and ``overwrite`` is False, or the file system refuses.
    """
    require_absent(path, overwrite=overwrite)
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        tensors = {
            f"member.{number}.{name}": tensor.detach().cpu().contiguous().clone()
            for number, member in enumerate(members)
            for name, tensor in member.state_dict().items()
        }
        weights = safetensors.torch.save(tensors)  # save_file would hide the file from other users
        (temporary / "weights.safetensors").write_bytes(weights)
        predictions.write_parquet(temporary / "predictions.parquet")
        inner.write_parquet(temporary / "inner.parquet")
        digests = {name: _digest(temporary / name) for name in _FILES[1:]}
        (temporary / "run.json").write_text(_to_json(record, digests), encoding="utf-8")
        if path.exists():
            replace_folder(temporary, path)
        else:
            publish_folder(temporary, path)
    except OSError as error:
        raise RunError(f"run {record.name} cannot be written: {explain_os_error(error, path)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class RunContents:
    """A run folder as values: what was given to `write_run`."""

    record: RunRecord
    predictions: pl.DataFrame
    inner: pl.DataFrame
    members: tuple[Member, ...]


def read_run(path: Path) -> RunContents:
    """Reads what `write_run` wrote.

    Raises:
        RunError: not a run, damaged, incomplete, or of another format.
        HeadError: its head is not installed, or no longer takes its options.
    """
    record = _read_record(path)
    for name in _FILES[1:]:
        if _digest(path / name) != record.sha256[name]:
            raise RunError(f"run {path} is damaged: {name} is not what was written; restore it or train again")
    members = _read_members(path, record)
    inner = pl.read_parquet(path / "inner.parquet")
    return RunContents(record, pl.read_parquet(path / "predictions.parquet"), inner, members)


def _read_record(path: Path) -> RunRecord:
    if not path.is_dir():
        raise RunError(f"{path} is no run folder; give a folder TARGET.HEAD that embedkit train wrote")
    absent = [name for name in _FILES if not (path / name).is_file()]
    incomplete = RunError(f"run {path} lacks {', '.join(absent)}; give a folder TARGET.HEAD that embedkit train wrote")
    if "run.json" in absent:
        raise incomplete
    try:
        fields = json.loads((path / "run.json").read_text(encoding="utf-8"))
        if fields["format"] == FORMAT and fields["format_version"] < FORMAT_VERSION:
            raise RunError(
                f"run {path} has format version {fields['format_version']}, which keeps less than {FORMAT_VERSION} does"
                " (no scores of inner splits); train it again"
            )
        record = _from_json(fields | {"sha256": {name: fields["sha256"][name] for name in _FILES[1:]}})
    except (ValueError, KeyError, TypeError, AttributeError, RecipeError) as error:
        raise RunError(
            f"run {path} is damaged: run.json: {type(error).__name__}: {error}; restore it or train again"
        ) from error
    if absent:
        raise incomplete
    return record


def _read_members(path: Path, record: RunRecord) -> tuple[Member, ...]:
    with torch.random.fork_rng(devices=[]):  # initial weights, soon replaced, are drawn from the global generator
        members = tuple(
            build_member(
                record.head,
                record.shape.select(each["token_sets"]),
                outputs=record.outputs,
                kind=record.kind,
                options=each["head_options"],
                times=record.times,
            )
            for each in record.members
        )
    try:
        tensors = safetensors.torch.load_file(path / "weights.safetensors")
        for number, member in enumerate(members):
            prefix = f"member.{number}."
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            member.load_state_dict(own)
            member.eval().requires_grad_(False)
    except (SafetensorError, RuntimeError) as error:
        raise RunError(
            f"run {path} does not fit head {record.head!r} as it is installed: {str(error).splitlines()[0]};"
            f" install the version that trained it ({record.versions.get('head', 'unknown')}) or train again"
        ) from error
    return members


def require_absent(path: Path, *, overwrite: bool) -> None:
    """Stops before training where a run is already there, one included that a killed writer had set aside.

    Raises:
        RunError: ``path`` exists and ``overwrite`` is False, it exists and is no run, or the file system refuses.
    """
    try:
        if path.parent.is_dir():
            remove_stale(path.parent)
    except OSError as error:
        raise RunError(f"run {path.name} cannot be written: {explain_os_error(error, path)}") from error
    if not path.exists():
        return
    if not overwrite:
        raise RunError(f"{path} exists already; choose another --out, or pass --overwrite to replace it")
    if not (path / "run.json").is_file():
        raise RunError(f"{path} exists and is no run (no run.json), so it is not replaced; choose another --out")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_json(record: RunRecord, digests: dict[str, str]) -> str:
    fields = dataclasses.asdict(record) | {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "recipe": record.recipe.to_fields(),
        "fingerprint": record.recipe.fingerprint,
        "sha256": digests,
    }
    return json.dumps(_finite(fields), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """``value`` with every NaN or infinity as None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(fields: dict[str, Any]) -> RunRecord:
    if fields["format"] != FORMAT:
        raise ValueError(f"its format is {fields['format']!r}, expected {FORMAT!r}")
    if fields["format_version"] > FORMAT_VERSION:
        raise ValueError(f"format version {fields['format_version']} is newer than {FORMAT_VERSION}: upgrade embedkit")
    if fields["kind"] not in get_args(TaskKind):
        raise ValueError(f"kind is {fields['kind']!r}")
    shape = fields["shape"]
    known = {each.name for each in dataclasses.fields(RunRecord)}
    plain = {name: value for name, value in fields.items() if name in known}
    return RunRecord(
        **plain
        | {
            "classes": tuple(fields["classes"]),
            "times": tuple(float(time) for time in fields.get("times", ())),
            "shape": BagShape(
                {name: (int(size[0]), int(size[1])) for name, size in shape["token_sets"].items()},
                {name: (int(size[0]), int(size[1])) for name, size in shape["grids"].items()},
                tuple(shape["views"]),
                None if shape.get("tail") is None else TailShape.from_fields(shape["tail"]),
            ),
            "recipe": Recipe.from_json(json.dumps(fields["recipe"])),
            "metrics": {name: _interval(found) for name, found in fields["metrics"].items()},
            "members": tuple(fields["members"]),
            "notes": tuple(fields["notes"]),
            "folded_with": tuple(fields.get("folded_with", ())),
        }
    )


def _interval(found: dict[str, Any]) -> Interval:
    value, low, high = (math.nan if found[name] is None else float(found[name]) for name in ("value", "low", "high"))
    return Interval(value, low, high, int(found["undefined"]))

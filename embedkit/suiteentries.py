"""Owns the entries of a suite file: its backbones, data sets, tasks and published figures, each table checked alone.

Knows no other entry and opens no image; the whole file is shown in `embedkit.suitefile`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedkit.errors import SuiteError
from embedkit.metrics import METRICS
from embedkit.suitereader import TableReader, choose_nearest

__all__ = [
    "Published",
    "SuiteBackbone",
    "SuiteDataset",
    "SuiteTask",
    "read_backbone",
    "read_dataset",
    "read_published",
    "read_task",
]

_EXTRACT = (
    "image_size", "tokens", "layers", "cut", "planes", "slices", "window", "channels", "fill", "crop", "resize",
    "dtype", "precision", "preview", "batch_size", "workers",
)  # fmt: skip
_SEARCH_METRICS = (
    "map",
    "ndcg",
    "mrr",
    "precision@1",
    "precision@5",
    "precision@10",
    "recall@1",
    "recall@5",
    "recall@10",
)
_METRICS: dict[str, tuple[str, ...]] = {
    "classification": METRICS["binary"],
    **{str(kind): names for kind, names in METRICS.items()},
    "retrieval": _SEARCH_METRICS,
}
_HEADLINE = {kind: names[0] for kind, names in _METRICS.items()} | {"regression": "r2"}
_ONLY = {
    "classes": ("classification", "binary", "multiclass", "multilabel"),
    "event": ("survival",),
    "split": ("classification", "binary", "multiclass", "multilabel", "regression", "survival"),
    "heads": ("classification", "binary", "multiclass", "multilabel", "regression", "survival"),
    "exclude_same": ("retrieval",),
    "where": ("retrieval",),
}


@dataclass(frozen=True)
class SuiteBackbone:
    """A backbone; ``extract`` are options that go before those of the data set."""

    name: str
    weights: Path | None
    extract: Mapping[str, Any]


@dataclass(frozen=True)
class SuiteDataset:
    """Images and labels.

    Attributes:
        manifest, scan, medmnist: One of them is given: a table, a folder, or an .npz file of MedMNIST3D.
        labels: None where tasks need no column beyond those of the manifest.
        images_apart: Every image is a case.
        columns: Name -> SQL expression over the columns of the labels.
        extract: Options of `embedkit.extract`.
    """

    name: str
    manifest: Path | None
    scan: Path | None
    medmnist: Path | None
    labels: Path | None
    images_apart: bool
    columns: Mapping[str, str]
    extract: Mapping[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        """What must be there."""
        return tuple(path for path in (self.manifest, self.scan, self.medmnist, self.labels) if path is not None)


@dataclass(frozen=True)
class SuiteTask:
    """A question; ``metric`` is its headline. ``heads`` are its own; empty for those of the suite."""

    name: str
    dataset: str
    kind: str
    target: str
    metric: str
    classes: tuple[str, ...]
    event: str | None
    split: str | None
    heads: tuple[str, ...]
    exclude_same: str | None
    where: str | None


@dataclass(frozen=True)
class Published:
    """What others found: ``scores`` maps task -> metric -> value."""

    method: str
    source: str
    scores: Mapping[str, Mapping[str, float]]


def read_backbone(table: Mapping[str, Any], where: str, folder: Path) -> SuiteBackbone:
    """A backbone from its table; ``where`` begins every message.

    Raises:
        SuiteError: a key or value that means nothing.
    """
    reader = TableReader(table, where, ("name", "weights", "extract"))
    return SuiteBackbone(reader.take("name", str), reader.take_path("weights", folder), _parse_extract(reader))


def read_dataset(name: str, table: Any, where: str, folder: Path) -> SuiteDataset:
    """A data set from its table; ``where`` begins every message.

    Raises:
        SuiteError: a key or value that means nothing.
    """
    if not isinstance(table, dict):
        raise SuiteError(f"{where}: is {table!r}, expected a table [datasets.{name}]")
    sources = ("manifest", "scan", "medmnist")
    reader = TableReader(table, where, (*sources, "labels", "images", "columns", "extract"))
    given = [key for key in sources if key in table]
    if len(given) != 1:
        raise SuiteError(f"{where}: has {' and '.join(given) or 'no images'}; expected one of {', '.join(sources)}")
    if given == ["medmnist"] and "labels" in table:
        raise SuiteError(f"{where}: labels are given, but the file of medmnist holds its own; leave them out")
    columns: dict[str, Any] = reader.take("columns", dict, {})
    for column, formula in columns.items():
        if not isinstance(formula, str):
            raise SuiteError(f"{where}: column {column} is {formula!r}, expected an SQL expression as text")
    return SuiteDataset(
        name=name,
        manifest=reader.take_path("manifest", folder),
        scan=reader.take_path("scan", folder),
        medmnist=reader.take_path("medmnist", folder),
        labels=reader.take_path("labels", folder),
        images_apart=reader.take_choice("images", ("apart", "together"), "together") == "apart",
        columns=columns,
        extract=_parse_extract(reader),
    )


def _parse_extract(reader: TableReader) -> Mapping[str, Any]:
    found: dict[str, Any] = reader.take("extract", dict, {})
    TableReader(found, f"{reader.where}, extract", _EXTRACT)
    lists = ("tokens", "planes", "channels")
    return {key: [value] if key in lists and isinstance(value, str) else value for key, value in found.items()}


def read_task(table: Mapping[str, Any], where: str) -> SuiteTask:
    """A task from its table; ``where`` begins every message.

    Raises:
        SuiteError: a key or value that means nothing.
    """
    reader = TableReader(table, where, ("name", "dataset", "kind", "target", "metric", *_ONLY))
    kind = reader.take_choice("kind", _METRICS)
    for key, kinds in _ONLY.items():
        if key in table and kind not in kinds:
            raise SuiteError(f"{where}: {key} is given, but the task is {kind}; {key} is for {', '.join(kinds)}")
    return SuiteTask(
        name=reader.take("name", str),
        dataset=reader.take("dataset", str),
        kind=kind,
        target=reader.take("target", str),
        metric=reader.take_choice("metric", _METRICS[kind], _HEADLINE[kind]),
        classes=reader.take_names("classes"),
        event=reader.take("event", str) if kind == "survival" else None,
        split=reader.take_optional("split", str),
        heads=reader.take_names("heads"),
        exclude_same=reader.take_optional("exclude_same", str),
        where=reader.take_optional("where", str),
    )


def read_published(table: Mapping[str, Any], where: str, tasks: set[str]) -> Published:
    """Published figures from their table; ``where`` begins every message.

    Raises:
        SuiteError: a key or value that means nothing.
    """
    reader = TableReader(table, where, ("method", "source", "scores"))
    scores: dict[str, Any] = reader.take("scores", dict)
    for task, values in scores.items():
        if task not in tasks:
            raise SuiteError(f"{where}: no task {task!r}{choose_nearest(task, tasks)}")
        if not isinstance(values, dict) or not all(isinstance(each, float) for each in values.values()):
            raise SuiteError(f"{where}: {task} is {values!r}, expected values by metric: {{ auroc = 0.9 }}")
    return Published(reader.take("method", str), reader.take("source", str), scores)

"""Owns the suite file: which data sets, tasks, heads and backbones it names, checked; opens no image and no table.

    name = "brains"                      # all of this section is optional
    heads = ["linear", "abmil", "cox"]   # each on tasks of the kinds that it learns; baselines are always there
    folds = 5
    seed = 0
    seeds = 1
    sweep = "small"
    resamples = 2000

    [[backbones]]
    name = "embedkit/scattering"
    weights = "weights.safetensors"      # optional
    extract = { tokens = ["cls"] }       # optional, goes before that of the data set

    [datasets.lgg]                       # manifest, scan (a folder) or medmnist (an .npz file)
    manifest = "lgg/manifest.csv"
    labels = "lgg/labels.csv"
    images = "apart"                     # optional: every image is a case CASE.VIEW, view_name a label of it
    columns = { whole = "front + back" } # optional: columns derived by SQL from those of labels
    extract = { crop = "foreground" }    # optional: options of `embedkit extract`

    [[tasks]]
    name = "grade"
    dataset = "lgg"
    kind = "classification"              # binary, multiclass, multilabel, regression, survival, retrieval
    target = "grade"                     # of survival the time, of retrieval the column whose value is shared
    classes = ["1", "3"]                 # optional; `event` of survival; `exclude_same` and `where` of retrieval
    metric = "auroc"                     # optional
    heads = ["linear"]                   # optional, instead of those above

Paths begin at the folder of the file, or at the one given with it.
"""

from __future__ import annotations

import importlib.resources
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedkit.errors import SuiteError
from embedkit.metrics import METRICS
from embedkit.suitereader import TableReader, choose_nearest

__all__ = ["Published", "Suite", "SuiteBackbone", "SuiteDataset", "SuiteTask", "list_suites", "read_suite"]

_SETTINGS = ("name", "description", "heads", "folds", "seed", "seeds", "sweep", "resamples")
_SECTIONS = ("backbones", "datasets", "tasks", "published")
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


@dataclass(frozen=True)
class Suite:
    """All that a suite file says; ``document`` is the file as TOML has it."""

    name: str
    description: str
    heads: tuple[str, ...]
    folds: int
    seed: int
    seeds: int
    sweep: str | None
    resamples: int
    backbones: tuple[SuiteBackbone, ...]
    datasets: Mapping[str, SuiteDataset]
    tasks: tuple[SuiteTask, ...]
    published: tuple[Published, ...]
    document: Mapping[str, Any]


def list_suites() -> tuple[str, ...]:
    """Names of the suites that come with embedkit."""
    folder = importlib.resources.files("embedkit") / "suites"
    return tuple(sorted(each.name.removesuffix(".toml") for each in folder.iterdir() if each.name.endswith(".toml")))


def read_suite(suite: str | Path, *, data: str | Path | None = None) -> Suite:
    """Reads a suite file, or one of those that come with embedkit.

    Args:
        suite: A file, or a name out of `list_suites`.
        data: Where paths begin; None is the folder of the file. A suite that comes with embedkit needs it.

    Raises:
        SuiteError: no such suite, no ``data`` where it is needed, no TOML, or a key or value that means nothing.
    """
    path = Path(suite)
    if path.suffix == ".toml" or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SuiteError(f"{path}: cannot be read ({error}); give a TOML file") from error
        return _parse(text, str(path), path.stem, Path(data) if data is not None else path.absolute().parent)
    name = str(suite)
    if name not in list_suites():
        raise SuiteError(f"no suite {name!r}{choose_nearest(name, list_suites())}; or give a file that ends in .toml")
    if data is None:
        raise SuiteError(f"suite {name} comes without data; say where they are with --data FOLDER")
    text = (importlib.resources.files("embedkit") / "suites" / f"{name}.toml").read_text(encoding="utf-8")
    return _parse(text, f"suite {name}", name, Path(data))


def _parse(text: str, where: str, stem: str, folder: Path) -> Suite:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SuiteError(f"{where}: no TOML ({error}); see `embedkit bench --help`") from error
    reader = TableReader(document, where, (*_SETTINGS, *_SECTIONS))
    tables = {name: _list_tables(reader, name) for name in ("backbones", "tasks", "published")}
    tasks = tuple(_parse_task(table, f"{where}, task {place}") for place, table in enumerate(tables["tasks"], 1))
    backbones = tuple(
        _parse_backbone(table, f"{where}, backbone {place}", folder)
        for place, table in enumerate(tables["backbones"], 1)
    )
    datasets = {
        name: _parse_dataset(name, table, f"{where}, data set {name}", folder)
        for name, table in reader.take("datasets", dict).items()
    }
    for what, names in (("task", [task.name for task in tasks]), ("backbone", [each.name for each in backbones])):
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise SuiteError(f"{where}: two {what}s are named {twice}; give each a name of its own")
        if not names:
            raise SuiteError(f"{where}: no {what}; expected at least one table [[{what}s]]")
    for name in (*(task.name for task in tasks), *datasets):
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise SuiteError(f"{where}: {name!r} names a folder; expected letters, digits, and _ . - in it")
    for task in tasks:
        if task.dataset not in datasets:
            raise SuiteError(
                f"{where}, task {task.name}: no data set {task.dataset!r}{choose_nearest(task.dataset, datasets)}"
            )
    return Suite(
        name=reader.take("name", str, stem),
        description=reader.take_optional("description", str) or "",
        heads=reader.take_names("heads"),
        folds=reader.take_count("folds", 5, 2),
        seed=reader.take_count("seed", 0, 0),
        seeds=reader.take_count("seeds", 1, 1),
        sweep=reader.take_choice("sweep", ("small", "large")) if "sweep" in document else None,
        resamples=reader.take_count("resamples", 2000, 0),
        backbones=backbones,
        datasets=datasets,
        tasks=tasks,
        published=tuple(
            _parse_published(table, f"{where}, published {place}", {task.name for task in tasks})
            for place, table in enumerate(tables["published"], 1)
        ),
        document=document,
    )


def _list_tables(reader: TableReader, key: str) -> list[Mapping[str, Any]]:
    found: list[Any] = reader.take(key, list, [])
    if not all(isinstance(each, dict) for each in found):
        raise SuiteError(f"{reader.where}: {key} is {found!r}, expected tables [[{key}]]")
    return found


def _parse_backbone(table: Mapping[str, Any], where: str, folder: Path) -> SuiteBackbone:
    reader = TableReader(table, where, ("name", "weights", "extract"))
    return SuiteBackbone(reader.take("name", str), reader.take_path("weights", folder), _parse_extract(reader))


def _parse_dataset(name: str, table: Any, where: str, folder: Path) -> SuiteDataset:
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


def _parse_task(table: Mapping[str, Any], where: str) -> SuiteTask:
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


def _parse_published(table: Mapping[str, Any], where: str, tasks: set[str]) -> Published:
    reader = TableReader(table, where, ("method", "source", "scores"))
    scores: dict[str, Any] = reader.take("scores", dict)
    for task, values in scores.items():
        if task not in tasks:
            raise SuiteError(f"{where}: no task {task!r}{choose_nearest(task, tasks)}")
        if not isinstance(values, dict) or not all(isinstance(each, float) for each in values.values()):
            raise SuiteError(f"{where}: {task} is {values!r}, expected values by metric: {{ auroc = 0.9 }}")
    return Published(reader.take("method", str), reader.take("source", str), scores)

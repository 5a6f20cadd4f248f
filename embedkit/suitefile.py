"""Owns the suite file: which data sets, tasks, heads and backbones it names, checked together; opens no image.

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
from embedkit.suiteentries import (
    Published,
    SuiteBackbone,
    SuiteDataset,
    SuiteTask,
    read_backbone,
    read_dataset,
    read_published,
    read_task,
)
from embedkit.suitereader import TableReader, choose_nearest

__all__ = ["Suite", "list_suites", "read_suite"]

_SETTINGS = ("name", "description", "heads", "folds", "seed", "seeds", "sweep", "resamples")
_SECTIONS = ("backbones", "datasets", "tasks", "published")


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
        raise SuiteError(f"no file that ends in .toml, and no suite {name!r}{choose_nearest(name, list_suites())}")
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
    tasks = tuple(read_task(table, f"{where}, task {place}") for place, table in enumerate(tables["tasks"], 1))
    backbones = tuple(
        read_backbone(table, f"{where}, backbone {place}", folder) for place, table in enumerate(tables["backbones"], 1)
    )
    datasets = {
        name: read_dataset(name, table, f"{where}, data set {name}", folder)
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
            read_published(table, f"{where}, published {place}", {task.name for task in tasks})
            for place, table in enumerate(tables["published"], 1)
        ),
        document=document,
    )


def _list_tables(reader: TableReader, key: str) -> list[Mapping[str, Any]]:
    found: list[Any] = reader.take(key, list, [])
    if not all(isinstance(each, dict) for each in found):
        raise SuiteError(f"{reader.where}: {key} is {found!r}, expected tables [[{key}]]")
    return found

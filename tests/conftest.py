"""Fixtures shared by every test module: where the real scans and the real weights are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from embedkit.answers import score_columns
from embedkit.bags import BagShape
from embedkit.cache import Cache, StackTokens, open_cache
from embedkit.folder import create_cache, write_shard
from embedkit.recipe import Recipe
from embedkit.runfolder import RunRecord
from embedkit.runs import Run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=20, help="How often tests/test_crash.py kills an extraction.")


PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real scans; the test is skipped where they are absent."""
    folder = Path(os.environ.get("EMBEDKIT_TEST_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real scans at {folder}; set EMBEDKIT_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def deit_weights(real_data: Path) -> Path:
    """Real ImageNet weights of timm's deit_tiny_patch16_224; the test is skipped where they are absent."""
    file = real_data.parent / "weights" / "deit_tiny_patch16_224.safetensors"
    if not file.is_file():
        pytest.skip(f"no weights at {file}")
    return file


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower on several threads, far slower on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Run]:
    """Makes a run that holds scores alone, no heads: see `_make_run`."""
    return _make_run


def _make_run(
    head: str, target: list[Any], scores: np.ndarray, *, kind: Any = "binary", patients: list[str] | None = None,
    name: str = "grade", classes: tuple[str, ...] | None = None, inner: pl.DataFrame | None = None,
) -> Run:  # fmt: skip
    """Scores out of two folds of cases c000, c001, ... in order: even ones in fold 0, odd ones in fold 1."""
    count = len(target)
    known = {"binary": ("no", "yes"), "multiclass": ("a", "b", "c"), "multilabel": ("x", "y"), "regression": ()}
    classes = known[kind] if classes is None else classes
    table = pl.DataFrame(
        {
            "case_id": [f"c{case:03}" for case in range(count)],
            "patient_id": patients or [f"p{case:03}" for case in range(count)],
            "fold": [case % 2 for case in range(count)],
            "target": target,
            **dict(zip(score_columns(kind, classes), np.atleast_2d(scores.T), strict=True)),
        }
    )
    record = RunRecord(
        name=f"{name}.{head}", target=name, kind=kind, classes=classes, head=head, head_options={}, outputs=1,
        shape=BagShape({"cls:1": (1, 4)}, {"cls:1": (1, 1)}, ("image/axial",)),
        recipe=Recipe("tiny", "builtin:1", ("cls:1",), 32, (0.5,), (0.5,), preview=0), metrics={},
        members=({"fold": 0}, {"fold": 1}), fit_options={}, folds=2, seed=0, parameters=1, seconds=0.0,
    )  # fmt: skip
    return Run(Path(f"runs/{record.name}"), record, table, table.clear() if inner is None else inner, ())


@pytest.fixture(scope="session")
def cache_tokens() -> Callable[..., Cache]:
    """Makes a cache of given class tokens: see `_cache_tokens`."""
    return _cache_tokens


def _cache_tokens(folder: Path, tokens: dict[str, np.ndarray], patients: dict[str, str], name: str = "tiny") -> Cache:
    """Cases with one axial view each; ``tokens`` are case -> [slices dim]."""
    recipe = Recipe(name, "builtin:1", ("cls:2",), 32, (0.5,), (0.5,), preview=0)
    create_cache(folder, recipe)
    stacks = [
        StackTokens(
            case_id=case, patient_id=patients[case], view="t1", plane="axial", sources=("t1",),
            indices=np.arange(len(values), dtype=np.int32), positions_mm=np.arange(len(values), dtype=np.float32),
            blank=np.zeros(len(values), bool), plane_shape=(8, 8), box=(0, 0, 8, 8), source_shape=(len(values), 8, 8),
            source_affine=np.eye(4), source_bytes=1, source_digest=case, tokens={"cls:2": values.astype(np.float16)},
        )
        for case, values in tokens.items()
    ]  # fmt: skip
    write_shard(folder, recipe, stacks)
    return open_cache(folder)


@pytest.fixture(scope="session")
def telling_cache() -> Callable[..., Cache]:
    """Makes a cache of class tokens that tell of their patients: see `_telling_cache`."""
    return _telling_cache


def _telling_cache(folder: Path, patients: dict[str, str], strength: float) -> Cache:
    """Two cases per patient; channel 0 shows every second patient, channels 1 to 3 each third of them."""
    rng = np.random.default_rng(0)
    tokens = {}
    for case, name in enumerate(patients):
        values = rng.normal(size=(3 + case % 2, 6))
        values[:, 0] += strength * (case // 2 % 2)
        values[:, 1 + case // 2 % 3] += strength
        tokens[name] = values
    return _cache_tokens(folder, tokens, patients)


@dataclass(frozen=True)
class Explored:
    """Phantoms with all that the explore page shows of them."""

    scans: Path
    cache: Path
    index: Path
    runs: tuple[Path, ...]
    labels: Path


@pytest.fixture(scope="session")
def explored(tmp_path_factory: pytest.TempPathFactory) -> Explored:
    """Twelve phantoms, their cache, index and two runs; the first phantom is a DICOM series."""
    import embedkit

    folder = tmp_path_factory.mktemp("explored")
    made = embedkit.make_phantoms(folder / "scans", cases=12, seed=3)
    embedkit.extract(
        made.manifest,
        folder / "cache",
        backbone="embedkit/scattering",
        slices="count:4",
        image_size=64,
        preview=32,
    )
    trained = embedkit.train(
        folder / "cache", made.labels, targets=["lesion"], heads=["logistic"], folds=2, out=folder / "runs"
    )
    embedkit.build_index(folder / "cache", folder / "index", labels=made.labels)
    runs = tuple(sorted(run.path for run in trained.runs))
    return Explored(folder / "scans", folder / "cache", folder / "index", runs, Path(made.labels))

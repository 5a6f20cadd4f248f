"""What the augmentation benchmark trains on: copies of a case never meet the patients that judge."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from embedkit import gradientfits
from embedkit.cache import StackTokens, open_cache
from embedkit.folder import create_cache, write_shard
from embedkit.recipe import Recipe
from embedkit.stacks import Fit
from embedkit.training import train

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield import_module("augmentation")
    for name in ("augmentation", "views"):
        sys.modules.pop(name, None)


def build_copies(folder: Path, *, patients: int = 12) -> pl.DataFrame:
    """One case per patient and a copy of it, in a cache; their labels."""
    recipe = Recipe("tiny", "builtin:1", ("cls:2",), 32, (0.5,), (0.5,), preview=0)
    create_cache(folder, recipe)
    rows, stacks = [], []
    for patient in range(patients):
        for name in (f"c{patient:02}", f"c{patient:02}#1"):
            tokens = np.full((3, 4), patient % 2, np.float16) + np.arange(4, dtype=np.float16)
            stacks.append(
                StackTokens(
                    case_id=name, patient_id=f"p{patient:02}", view="t1", plane="axial", sources=("t1",),
                    indices=np.arange(3, dtype=np.int32), positions_mm=np.arange(3, dtype=np.float32),
                    blank=np.zeros(3, bool), plane_shape=(8, 8), box=(0, 0, 8, 8), source_shape=(3, 8, 8),
                    source_affine=np.eye(4), source_bytes=1, source_digest=name, tokens={"cls:2": tokens},
                )
            )  # fmt: skip
            rows.append({"case_id": name, "patient_id": f"p{patient:02}", "odd": patient % 2, "fold": patient // 2 % 3})
    write_shard(folder, recipe, stacks)
    return pl.DataFrame(rows)


def test_a_copy_is_trained_on_alone(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = build_copies(tmp_path / "cache")
    run_passes, fits = gradientfits.run_passes, list[Fit]()

    def watch(given: list[Fit], *others: Any) -> Any:
        fits.extend(given)
        return run_passes(given, *others)

    monkeypatch.setattr(gradientfits, "run_passes", watch)
    with benchmark.alter_training("copies"):
        how: dict[str, Any] = {"fit_options": {"epochs": 1}, "split": "fold", "resamples": 10}
        train(open_cache(tmp_path / "cache"), labels, targets=["odd"], heads=["query"], out=tmp_path / "runs", **how)
    names, patients = np.array(sorted(labels["case_id"])), np.repeat(np.arange(12), 2)
    copies = np.array(["#" in name for name in names])
    inner = [fit for fit in fits if fit.held_out.any()]
    final = [fit for fit in fits if not fit.held_out.any()]
    assert len(inner) == len(final) == 3
    for fit in inner:
        assert not fit.held_out[copies].any()
        assert not set(patients[fit.training]) & set(patients[fit.held_out])
    for fold, fit in enumerate(final):
        assert set(patients[fit.training]) == {patient for patient in range(12) if patient // 2 % 3 != fold}
    for fit in fits:
        assert fit.training[copies].sum() == fit.training[~copies].sum() > 0

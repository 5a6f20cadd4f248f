"""A few-shot curve learns from the patients drawn alone, and rises where there is something to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from embedkit.cache import Cache, StackTokens, open_cache
from embedkit.charts import plot_shots
from embedkit.errors import HeadError, OptionError
from embedkit.folder import create_cache, write_shard
from embedkit.recipe import Recipe
from embedkit.shots import few_shot

CASES = 60


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Two cases per patient, one of each side; side shifts channel 0."""
    folder = tmp_path_factory.mktemp("shots") / "cache"
    recipe = Recipe("tiny", "builtin:1", ("cls:1",), 32, (0.5,), (0.5,), preview=0)
    create_cache(folder, recipe)
    rng = np.random.default_rng(0)
    stacks = [
        StackTokens(
            case_id=f"c{case:02}", patient_id=f"p{case // 2:02}", view="image", plane="axial", sources=("image",),
            indices=np.arange(2, dtype=np.int32), positions_mm=np.arange(2, dtype=np.float32), blank=np.zeros(2, bool),
            plane_shape=(8, 8), box=(0, 0, 8, 8), source_shape=(2, 8, 8), source_affine=np.eye(4), source_bytes=1,
            source_digest=str(case),
            tokens={"cls:1": (rng.normal(size=(2, 6)) + 1.5 * (case % 2) * np.eye(6)[0]).astype(np.float16)},
        )
        for case in range(CASES)
    ]  # fmt: skip
    write_shard(folder, recipe, stacks)
    return open_cache(folder)


LABELS = pl.DataFrame(
    {
        "case_id": [f"c{case:02}" for case in range(CASES)],
        "side": ["left", "right"] * (CASES // 2),
        "noise": np.random.default_rng(1).permutation(["a", "b"] * (CASES // 2)),
        "size": np.linspace(0, 1, CASES),
    }
)
QUICK: dict[str, Any] = {"draws": 4, "folds": 3, "resamples": 60}


def test_scores_rise_with_patients_towards_those_of_all(cache: Cache) -> None:
    found = few_shot(cache, LABELS, target="side", shots=(1, 2, 12), **QUICK)
    values = [each.value for _, each in found.curves["logistic"]]
    assert values[0] < values[2] <= found.full["logistic"].value + 0.05
    assert found.full["logistic"].value > 0.85
    assert all(each.low < each.value < each.high for _, each in found.curves["logistic"])
    assert found.table.columns == ["head", "shots", "value", "low", "high"]
    assert found.table["shots"].to_list() == [1, 2, 12, None]
    assert plot_shots(found.curves, metric="AUROC", full={"logistic": values[-1]}).startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_curve(cache: Cache) -> None:
    first, second = (few_shot(cache, LABELS, target="side", shots=(2,), **QUICK) for _ in range(2))
    assert first == second


def test_noise_is_not_learned_from_test_patients(cache: Cache) -> None:
    found = few_shot(cache, LABELS, target="noise", shots=(1, 5), **QUICK)
    assert all(0.3 < each.value < 0.7 for _, each in found.curves["logistic"])


def test_what_makes_no_curve_is_refused(cache: Cache) -> None:
    with pytest.raises(OptionError, match="shots are 2, 1; expected rising numbers from 1 on: 1,2,5,10"):
        few_shot(cache, LABELS, target="side", shots=(2, 1))
    with pytest.raises(OptionError, match="0 draws and 1 heads were asked for, expected one or more of each"):
        few_shot(cache, LABELS, target="side", draws=0)
    with pytest.raises(OptionError, match="40 patients per class were asked for, but without fold 0 class left has 2"):
        few_shot(cache, LABELS, target="side", shots=(40,), folds=3)
    with pytest.raises(OptionError, match="target size is regression, but shots are patients per class"):
        few_shot(cache, LABELS, target="size")
    with pytest.raises(OptionError, match="a binary task has no metric mae"):
        few_shot(cache, LABELS, target="side", metric="mae")
    with pytest.raises(HeadError, match="head 'linear' is fitted by gradient, and a few-shot curve takes hundreds"):
        few_shot(cache, LABELS, target="side", heads=("linear",), folds=3)


def test_only_the_patients_drawn_are_learned_from(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from embedkit.closed_form import LinearReadout

    seen: list[tuple[int, int]] = []
    fit = LinearReadout.fit

    def spy(self: LinearReadout, features: Any, targets: Any, **how: Any) -> float:
        seen.append((int((targets == 0).sum()), int((targets == 1).sum())))
        return fit(self, features, targets, **how)

    monkeypatch.setattr(LinearReadout, "fit", spy)
    few_shot(cache, LABELS, target="side", shots=(3,), draws=2, folds=3, resamples=0)
    assert seen == [(3, 3)] * 6 + [(20, 20)] * 3

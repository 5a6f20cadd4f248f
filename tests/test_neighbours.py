"""The nearest-neighbour probe asks like cases of other patients, finds what is there and nothing that is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.neighbors import KNeighborsRegressor

from embedkit import neighbours
from embedkit.cache import Cache, StackTokens, open_cache
from embedkit.errors import OptionError, SearchError
from embedkit.folder import create_cache, write_shard
from embedkit.neighbours import probe_neighbours
from embedkit.recipe import Recipe
from embedkit.tasks import make_folds, make_task

CASES = 48
VECTORS = np.random.default_rng(0).normal(size=(CASES, 6)) + 4.0 * (np.arange(CASES) % 2)[:, None] * np.eye(6)[0]
LABELS = pl.DataFrame(
    {
        "case_id": [f"c{case:02}" for case in range(CASES)],
        "side": ["left", "right"] * (CASES // 2),
        "three": ["a", "b", "c"] * (CASES // 3),
        "size": VECTORS[:, 0],
    }
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """One slice per case, a second view in half of them; two cases per patient."""
    folder = tmp_path_factory.mktemp("neighbours") / "cache"
    recipe = Recipe("tiny", "builtin:1", ("cls:1",), 32, (0.5,), (0.5,), preview=0)
    create_cache(folder, recipe)
    stacks = [
        StackTokens(
            case_id=f"c{case:02}", patient_id=f"p{case // 2:02}", view=view, plane="axial", sources=(view,),
            indices=np.zeros(1, np.int32), positions_mm=np.zeros(1, np.float32), blank=np.zeros(1, bool),
            plane_shape=(8, 8), box=(0, 0, 8, 8), source_shape=(1, 8, 8), source_affine=np.eye(4), source_bytes=1,
            source_digest=f"{case}{view}", tokens={"cls:1": VECTORS[case : case + 1].astype(np.float16)},
        )
        for case in range(CASES)
        for view in (("t1", "t2") if case % 4 < 2 else ("t1",))
    ]  # fmt: skip
    write_shard(folder, recipe, stacks)
    return open_cache(folder)


def test_what_like_cases_share_is_found_and_what_they_do_not_is_not(cache: Cache) -> None:
    side = probe_neighbours(cache, LABELS, target="side", resamples=50)
    assert side.metrics["auroc"].value > 0.8
    assert (side.cases, side.patients, side.embedding) == (CASES, CASES // 2, "mean:cls:1")
    assert len(side.neighbours) == 5
    three = probe_neighbours(cache, LABELS, target="three", resamples=0)
    assert 0.3 < three.metrics["auroc"].value < 0.7
    size = probe_neighbours(cache, LABELS, target="size", resamples=0)
    assert size.metrics["spearman"].value > 0.5


def test_answers_are_those_of_scikit_learn_on_centred_vectors(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_COUNTS", (3,))
    labels = LABELS.with_columns(side=pl.Series([float(case % 2) + case / 1000 for case in range(CASES)]))
    found = probe_neighbours(cache, labels, target="side", resamples=0)
    cases = pl.DataFrame({"case_id": LABELS["case_id"], "patient_id": [f"p{case // 2:02}" for case in range(CASES)]})
    task, _ = make_task(labels, "side", cases)
    folds = make_folds(task, 5, seed=0)
    told = np.zeros(CASES)
    second = (np.arange(CASES) % 4 < 2)[:, None]
    half = VECTORS.astype(np.float16).astype(np.float64)
    for fold in range(5):
        training = folds != fold
        views = [half - half[training].mean(0), (half - half[training & second[:, 0]].mean(0)) * second]
        joined = np.concatenate(views, axis=1)
        model = KNeighborsRegressor(3, metric="cosine", algorithm="brute").fit(joined[training], task.targets[training])
        told[~training] = model.predict(joined[~training])
    assert found.metrics["mae"].value == pytest.approx(np.abs(told - task.targets).mean(), abs=1e-9)


def test_no_case_is_answered_by_its_own_patient(cache: Cache) -> None:
    """Cases of a patient share a random label that nothing else tells: were they neighbours, it would be told."""
    rng = np.random.default_rng(3)
    labels = LABELS.with_columns(side=pl.Series(np.repeat(rng.permutation(["x", "y"] * (CASES // 4)), 2)))
    assert probe_neighbours(cache, labels, target="side", resamples=0).metrics["auroc"].value < 0.7


def test_what_cannot_be_probed_is_refused(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="embedding 'cls:1' is not mean:TOKEN_SET"):
        probe_neighbours(cache, LABELS, target="side", embedding="cls:1")
    with pytest.raises(SearchError, match="patch@4:1"):
        probe_neighbours(cache, LABELS, target="side", embedding="mean:patch@4:1")


def test_probabilities_are_drawn_towards_the_classes_shares() -> None:
    answers, similar = np.array([[1.0], [1.0], [0.0], [0.0]]), np.array([[0.9, 0.8, 0.1, 0.0]])
    assert neighbours._vote(similar, answers, 2, "binary").tolist() == [[pytest.approx(2.5 / 3)]]
    assert neighbours._vote(similar, answers, 3, "regression").tolist() == [[pytest.approx(2 / 3)]]

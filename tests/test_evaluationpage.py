"""Reports hold what was found, show slices where there are any, and name what they leave out."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.special import softmax

from embedkit.cache import Cache, StackTokens, open_cache
from embedkit.casemap import choose_embedding, map_cases
from embedkit.comparison import compare_runs
from embedkit.comparisonpage import write_comparison
from embedkit.embeddings import Embedding
from embedkit.errors import RunError
from embedkit.evaluation import evaluate
from embedkit.evaluationpage import write_evaluation
from embedkit.folder import create_cache, write_shard
from embedkit.mistakes import find_mistakes, is_wrong
from embedkit.outcomes import Outcomes
from embedkit.recipe import Recipe
from embedkit.runs import Run
from embedkit.training import train

MakeRun = Callable[..., Run]
CASES = 24


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Cases c000, ... with a high channel 0 where odd, and previews."""
    folder = tmp_path_factory.mktemp("judged") / "cache"
    recipe = Recipe("tiny", "builtin:1", ("cls:1",), 32, (0.5,), (0.5,), preview=16)
    create_cache(folder, recipe)
    rng = np.random.default_rng(0)
    stacks = [
        StackTokens(
            case_id=f"c{case:03}", patient_id=f"p{case:03}", view="image", plane="axial", sources=("image",),
            indices=np.arange(3, dtype=np.int32), positions_mm=np.arange(3, dtype=np.float32), blank=np.zeros(3, bool),
            plane_shape=(8, 8), box=(0, 0, 8, 8), source_shape=(3, 8, 8), source_affine=np.eye(4), source_bytes=1,
            source_digest=str(case),
            tokens={"cls:1": (rng.normal(size=(3, 4)) + case % 2 * np.eye(4)[0]).astype(np.float16)},
            preview=rng.integers(0, 255, (3, 16, 16), dtype=np.uint8),
        )
        for case in range(CASES)
    ]  # fmt: skip
    write_shard(folder, recipe, stacks)
    return open_cache(folder)


@pytest.fixture(scope="module")
def trained(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    labels = pl.DataFrame({"case_id": [f"c{case:03}" for case in range(CASES)]}).with_columns(
        lesion=pl.Series([("no", "yes")[case % 2] for case in range(CASES)])
    )
    found = train(cache, labels, targets="lesion", out=tmp_path_factory.mktemp("runs"), heads=(), folds=3, device="cpu")
    return {run.head: run for run in found.runs}


def titles(page: Path) -> list[str]:
    return [html.unescape(found) for found in re.findall(r"<h2>(.*?)</h2>", page.read_text(encoding="utf-8"))]


def test_a_report_of_a_trained_run_shows_the_map_and_the_slices_of_its_mistakes(
    trained: dict[str, Run], cache: Cache, tmp_path: Path
) -> None:
    labels = pl.DataFrame({"case_id": [f"c{case:03}" for case in range(CASES)], "site": ["a", "b"] * (CASES // 2)})
    found = evaluate(
        trained["logistic"], labels=labels, at=["sensitivity=0.8"], subgroups=["site"], calibrate="temperature",
        resamples=20,
    )  # fmt: skip
    page = write_evaluation(tmp_path / "report.html", found, cache=cache)
    assert titles(page) == [
        "Scores", "ROC and precision-recall", "Calibration", "Confusion matrix", "Operating points", "Subgroups",
        "Map of the cases", "Worst mistakes",
    ]  # fmt: skip
    text = page.read_text(encoding="utf-8")
    mistakes = find_mistakes(found.outcomes)
    assert text.count("<img") == 6 + min(6, len(mistakes)) > 6
    assert all(f"{each.case_id}: {each.truth}, taken for {each.answer}" in text for each in mistakes[:6])
    assert "t-SNE of mean:cls:1" in text
    assert "AUROC (DeLong)" in text


def test_without_a_cache_the_map_is_left_out_and_the_mistakes_say_where_slices_come_from(
    trained: dict[str, Run], tmp_path: Path
) -> None:
    page = write_evaluation(tmp_path / "report.html", evaluate(trained["logistic"], resamples=20))
    assert titles(page)[-1] == "Worst mistakes"
    assert "Map of the cases" not in titles(page)
    assert "Name the cache that the cases came from to see their slices." in page.read_text(encoding="utf-8")


def scores_of(kind: str, size: int = 60) -> tuple[list[Any], np.ndarray]:
    rng = np.random.default_rng(3)
    if kind == "regression":
        values = rng.normal(50, 9, size)
        return values.tolist(), values + rng.normal(0, 3, size)
    if kind == "multilabel":
        has = rng.random((size, 2)) < 0.4
        cells = [";".join(name for name, one in zip("xy", row, strict=True) if one) for row in has]
        return cells, np.clip(0.3 + 0.4 * has + 0.2 * rng.normal(size=has.shape), 0, 1)
    codes = np.arange(size) % 3
    return [("a", "b", "c")[code] for code in codes], softmax(np.eye(3)[codes] + rng.normal(size=(size, 3)), axis=1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("multiclass", ["Scores", "ROC and precision-recall", "Calibration", "Confusion matrix", "Worst mistakes"]),
        ("multilabel", ["Scores", "ROC and precision-recall", "Calibration", "Worst mistakes"]),
        ("regression", ["Scores", "Predictions and truth", "Worst mistakes"]),
    ],
)
def test_each_kind_of_task_has_its_own_sections(
    make_run: MakeRun, tmp_path: Path, kind: str, expected: list[str]
) -> None:
    target, scores = scores_of(kind)
    page = write_evaluation(tmp_path / "r.html", evaluate(make_run("h", target, scores, kind=kind), resamples=20))
    assert titles(page) == expected


def test_a_report_of_a_comparison_ranks_the_runs_and_marks_what_differs(make_run: MakeRun, tmp_path: Path) -> None:
    target = [("no", "yes")[case % 2] for case in range(80)]
    rng = np.random.default_rng(0)
    good, poor = np.arange(80) % 2 * 0.5 + 0.4 * rng.random(80), rng.random(80)
    runs = [make_run("poor", target, poor), make_run("good", target, good)]
    text = write_comparison(tmp_path / "c.html", compare_runs(runs, resamples=100)).read_text(encoding="utf-8")
    assert titles(tmp_path / "c.html") == ["Scores", "Differences", "ROC"]
    assert "Highest AUROC: grade.good" in text
    assert "1 of 1 differ with Holm" in text
    assert "<strong>grade.poor − grade.good</strong>" in text
    alike = write_comparison(tmp_path / "d.html", compare_runs([runs[0], make_run("b", target, 1 - poor)], resamples=9))
    assert "that is no proof that they are alike" in alike.read_text(encoding="utf-8")
    numbers = [make_run(head, *scores_of("regression"), kind="regression") for head in ("a", "b")]
    write_comparison(tmp_path / "n.html", compare_runs(numbers, resamples=20))
    assert titles(tmp_path / "n.html") == ["Scores", "Differences"]


# --- mistakes and map


def outcomes_of(kind: Any, classes: tuple[str, ...], targets: list[Any], scores: list[Any]) -> Outcomes:
    ids = tuple(f"c{case}" for case in range(len(targets)))
    return Outcomes(kind, classes, ids, ids, np.array(targets), np.array([scores]), np.zeros((1, len(ids)), np.int64))


def test_the_most_confident_wrong_answers_come_first() -> None:
    found = outcomes_of("binary", ("no", "yes"), [1, 1, 0, 0, 1], [0.9, 0.4, 0.95, 0.3, 0.1])
    assert [(each.case_id, each.truth, each.answer, round(each.score, 6)) for each in find_mistakes(found)] == [
        ("c2", "no", "yes", 0.95), ("c4", "yes", "no", 0.9), ("c1", "yes", "no", 0.6),
    ]  # fmt: skip
    assert is_wrong(found).tolist() == [False, True, True, False, True]
    assert len(find_mistakes(found, most=1)) == 1
    several = outcomes_of("multiclass", ("a", "b", "c"), [0, 2], [[0.5, 0.3, 0.2], [0.7, 0.2, 0.1]])
    assert [(each.truth, each.answer, each.class_name) for each in find_mistakes(several)] == [("c", "a", "a")]
    labels = outcomes_of("multilabel", ("x", "y"), [[1, 0], [0, 0]], [[0.9, 0.2], [0.2, 0.8]])
    assert [(each.truth, each.answer, each.class_name) for each in find_mistakes(labels)] == [("none", "y", "y")]
    numbers = outcomes_of("regression", (), [1.0, 5.0], [2.0, 1.0])
    assert [(each.case_id, each.score, each.class_name) for each in find_mistakes(numbers)] == [
        ("c1", 4.0, None), ("c0", 1.0, None),
    ]  # fmt: skip
    assert not is_wrong(numbers).any()


def test_scores_of_repeats_are_averaged_per_case_before_a_case_is_called_a_mistake() -> None:
    one = outcomes_of("binary", ("no", "yes"), [1], [0.4])
    two = Outcomes(
        "binary", one.classes, one.case_ids, one.patient_ids, one.targets, np.array([[0.4], [0.7]]), one.folds
    )
    assert find_mistakes(two) == []


def test_a_map_is_the_same_for_a_seed_and_parts_what_is_far_apart(cache: Cache) -> None:
    ids = [f"c{case:03}" for case in range(CASES)]
    places, how = map_cases(cache, ids, Embedding("mean", "cls:1"), seed=4)
    assert places.shape == (CASES, 2)
    assert how == "t-SNE of mean:cls:1, perplexity 8, seed 4"
    np.testing.assert_array_equal(places, map_cases(cache, ids, Embedding("mean", "cls:1"), seed=4)[0])
    few, how = map_cases(cache, ids[:5], Embedding("mean", "cls:1"))
    assert how == "first two principal components of mean:cls:1"
    assert few.shape == (5, 2)
    np.testing.assert_allclose(few.mean(axis=0), 0, atol=1e-6)


def test_what_cannot_be_mapped_is_refused(cache: Cache) -> None:
    with pytest.raises(RunError, match="2 cases to map, expected three or more"):
        map_cases(cache, ["c000", "c001"], Embedding("mean", "cls:1"))
    with pytest.raises(RunError, match=r"lacks 1 of the cases judged \(x\); give the cache that they came from"):
        map_cases(cache, ["c000", "c001", "x"], Embedding("mean", "cls:1"))
    with pytest.raises(RunError, match="no cls or patch tokens among attention:1"):
        choose_embedding(["attention:1"])

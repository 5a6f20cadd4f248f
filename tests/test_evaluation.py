"""A run is judged on the scores it keeps; calibration and thresholds come from inner splits, never from test cases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.special import expit, logit

from embedkit.calibration import fit_calibrator
from embedkit.delong import estimate_aurocs
from embedkit.errors import OptionError, RunError
from embedkit.evaluation import evaluate
from embedkit.metrics import compute_metrics
from embedkit.runs import Run
from embedkit.subgroups import judge_subgroups, shown_metrics
from embedkit.thresholds import Goal, choose_threshold

MakeRun = Callable[..., Run]
SIZE = 160


def truth_and_scores(seed: int, sharpness: float = 3.0, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Targets and overconfident scores: the logits are ``sharpness`` times what they should be."""
    rng = np.random.default_rng(seed)
    chance = expit(1.5 * rng.normal(size=size))
    return (rng.random(size) < chance).astype(int), expit(sharpness * logit(chance))


def inner_table(*, size: int = SIZE) -> pl.DataFrame:
    """Inner scores of two folds; those of fold 1 are sharper still, and half of the cases are held out twice."""
    parts = []
    for fold in range(2):
        truth, scores = truth_and_scores(10 + fold, 3.0 + 3 * fold, size)
        ids = [f"c{case:03}" for case in range(size)]
        once = pl.DataFrame(
            {
                "fold": fold, "split": 0, "case_id": ids, "patient_id": ids,
                "target": [("no", "yes")[code] for code in truth], "score": scores,
            }
        )  # fmt: skip
        parts += [once, once.head(size // 2).with_columns(split=pl.lit(1))]
    return pl.concat([part.with_columns(pl.col("fold", "split").cast(pl.Int64)) for part in parts])


@pytest.fixture(scope="module")
def run(make_run: MakeRun) -> Run:
    truth, scores = truth_and_scores(0)
    patients = [f"p{case // 2:03}" for case in range(SIZE)]
    return make_run("h", [("no", "yes")[code] for code in truth], scores, patients=patients, inner=inner_table())


def test_out_of_fold_scores_are_judged_without_a_cache(run: Run) -> None:
    truth, scores = truth_and_scores(0)
    patients = run.predictions["patient_id"].to_list()
    found = evaluate(run, resamples=60)
    assert found.metrics == compute_metrics("binary", truth, scores, patients, resamples=60)
    assert found.held_out
    aurocs = estimate_aurocs(truth, scores, patients)
    assert found.delong is not None
    assert found.delong.value == pytest.approx(aurocs.values[0])
    assert found.delong.low < found.delong.value < found.delong.high
    assert found.calibration[0].metrics["ece"] == found.metrics["ece"]
    plain = found.to_dict()
    assert (plain["cases"], plain["patients"], plain["scores"]) == (SIZE, SIZE // 2, "out of fold")
    assert plain["auroc"]["value"] == found.metrics["auroc"].value
    assert {"auroc_delong", "run", "repeats"} <= plain.keys()
    assert not {"calibration", "operating_points", "subgroups"} & plain.keys()


def test_each_fold_is_calibrated_by_its_own_inner_splits_alone(run: Run) -> None:
    inner = inner_table()
    calibrated = run.calibrated("temperature")
    for fold in range(2):
        held = inner.filter((pl.col("fold") == fold) & (pl.col("split") == 0))
        alone = fit_calibrator("binary", held["target"] == "yes", held["score"].to_numpy(), method="temperature")
        rows = run.predictions["fold"] == fold
        np.testing.assert_allclose(
            calibrated.predictions.filter(rows)["score"].to_numpy(),
            alone.apply(run.predictions.filter(rows)["score"].to_numpy()),
            atol=1e-4,
        )
    assert calibrated.calibrators[0].slope > calibrated.calibrators[1].slope
    changed = dataclasses.replace(run, predictions=run.predictions.with_columns(score=1 - pl.col("score")))
    slopes = [each.slope for each in changed.calibrated("temperature").calibrators]
    assert slopes == [each.slope for each in calibrated.calibrators]


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_calibration_mends_overconfidence_and_says_by_how_much(run: Run, method: Any) -> None:
    found = evaluate(run, calibrate=method, resamples=40)
    before, after = found.calibration
    assert before.metrics["ece"].value > 1.5 * after.metrics["ece"].value
    assert before.debiased > after.debiased
    assert found.metrics["brier"] == after.metrics["brier"]
    assert before.metrics["brier"].value > after.metrics["brier"].value
    assert len(after.reliability.counts) == 10
    told = found.to_dict()["calibration"]
    assert told["method"] == method
    assert told["before"]["ece"]["value"] == before.metrics["ece"].value
    assert told["after"]["debiased_error"] == after.debiased


def test_a_threshold_comes_from_the_inner_splits_of_the_cases_own_fold(run: Run) -> None:
    inner, goal = inner_table(), Goal("sensitivity", 0.9)
    expected = [
        choose_threshold((part["target"] == "yes").to_numpy(), part["score"].to_numpy(), goal)
        for part in inner.partition_by("fold", maintain_order=True)
    ]
    (point,) = evaluate(run, at=["sensitivity=0.9"], resamples=0).operating_points
    assert point.thresholds == pytest.approx(expected)
    table = run.predictions.with_columns(limit=pl.Series([expected[fold] for fold in run.predictions["fold"]]))
    called = (table["score"] >= table["limit"]).to_numpy()
    positive = (table["target"] == "yes").to_numpy()
    assert point.sensitivity.value == pytest.approx(called[positive].mean())
    assert point.specificity.value == pytest.approx((~called)[~positive].mean())
    assert point.ppv.value == pytest.approx(positive[called].mean())
    assert point.npv.value == pytest.approx((~positive)[~called].mean())
    assert 0.75 < point.sensitivity.value <= 1
    assert point.sensitivity.low < point.sensitivity.value


def test_goals_need_a_binary_task_and_subgroups_need_labels(run: Run, make_run: MakeRun) -> None:
    numbers = make_run("h", [1.0, 2.0, 3.0, 4.0], np.array([1.0, 2.0, 2.5, 4.0]), kind="regression")
    with pytest.raises(OptionError, match=r"operating points belong to a binary task, but run grade\.h is regression"):
        evaluate(numbers, at=["sensitivity=0.9"])
    with pytest.raises(OptionError, match="new cases and subgroups take a label table"):
        evaluate(run, subgroups=["sex"])
    found = evaluate(numbers, resamples=20)
    assert (found.delong, found.calibration) == (None, ())
    assert found.metrics["mae"].value == 0.125


# --- subgroups


def labels(run: Run, **columns: Any) -> pl.DataFrame:
    return run.predictions.select("case_id").with_columns(**{name: pl.Series(each) for name, each in columns.items()})


def test_every_value_has_its_scores_and_few_patients_are_flagged(run: Run) -> None:
    sex = ["f"] * 100 + ["m"] * 50 + [None] * 10
    found = evaluate(run, labels=labels(run, sex=sex), subgroups=["sex"], resamples=30).subgroups
    assert [(each.value, each.cases, each.patients, each.small) for each in found] == [
        ("f", 100, 50, False), ("m", 50, 25, False), ("unknown", 10, 5, True),
    ]  # fmt: skip
    truth, scores = truth_and_scores(0)
    own = compute_metrics(
        "binary", truth[:100], scores[:100], run.predictions["patient_id"].to_list()[:100], resamples=30
    )
    assert found[0].metrics == own
    assert set(shown_metrics("binary")) <= own.keys()


def test_numbers_of_many_values_are_parted_into_thirds(run: Run) -> None:
    table = labels(run, age=[20.0 + case / 4 for case in range(SIZE)])
    found = evaluate(run, labels=table, subgroups=["age"], resamples=0).subgroups
    assert [each.value for each in found] == ["up to 33.25", "33.25 to 46.5", "above 46.5"]
    assert sum(each.cases for each in found) == SIZE
    codes = evaluate(run, labels=labels(run, code=[case % 3 for case in range(SIZE)]), subgroups=["code"], resamples=0)
    assert [each.value for each in codes.subgroups] == ["0", "1", "2"]


def test_a_group_without_a_class_has_no_auroc_and_is_small(run: Run) -> None:
    truth, _ = truth_and_scores(0)
    found = evaluate(run, labels=labels(run, group=truth), subgroups=["group"], resamples=10).subgroups
    assert all(each.small and math.isnan(each.metrics["auroc"].value) for each in found)


def test_columns_that_form_no_groups_are_refused(run: Run) -> None:
    outcomes = evaluate(run, resamples=0).outcomes
    with pytest.raises(RunError, match="no column sex to form subgroups by; the label table has case_id, age"):
        judge_subgroups(outcomes, labels(run, age=[1] * SIZE), "sex")
    with pytest.raises(RunError, match="column sex has no value for any of the 160 cases judged"):
        judge_subgroups(outcomes, pl.DataFrame({"case_id": ["x"], "sex": ["f"]}), "sex")
    with pytest.raises(RunError, match="column note has 160 different texts, expected 50 or fewer"):
        judge_subgroups(outcomes, labels(run, note=[f"n{case}" for case in range(SIZE)]), "note")
    twice = pl.DataFrame({"case_id": ["c000", "c000"], "sex": ["f", "m"]})
    with pytest.raises(RunError, match=r"column sex gives 1 case \(c000\) two values, expected one"):
        judge_subgroups(outcomes, twice, "sex")

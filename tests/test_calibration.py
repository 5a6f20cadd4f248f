"""Calibration finds the map that the scores were bent by, never turns an order round, and is told on other cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit, softmax
from sklearn.isotonic import IsotonicRegression

from embedkit.calibration import (
    METHODS,
    debiased_calibration_error,
    fit_calibrator,
    measure_reliability,
    top_confidence,
)
from embedkit.errors import OptionError, TaskError
from embedkit.metrics import compute_metrics


def draw(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Targets, and the probability that each was drawn with."""
    rng = np.random.default_rng(seed)
    truth = expit(2 * rng.normal(size=size))
    return (rng.random(size) < truth).astype(int), truth


def ece(targets: np.ndarray, scores: np.ndarray) -> float:
    groups = [str(case) for case in range(len(targets))]
    return compute_metrics("binary", targets, scores, groups, resamples=0)["ece"].value


def test_temperature_finds_the_factor_that_made_scores_overconfident() -> None:
    targets, truth = draw(6000, 0)
    found = fit_calibrator("binary", targets, expit(3 * logit(truth)), method="temperature")
    assert found.slope == pytest.approx(1 / 3, rel=0.06)
    assert found.shifts.tolist() == [0.0]
    np.testing.assert_allclose(found.apply(expit(3 * logit(truth))), truth, atol=0.02)


def test_platt_also_finds_the_shift_that_class_weights_leave() -> None:
    targets, truth = draw(6000, 1)
    bent = expit(2 * logit(truth) + 1.5)
    found = fit_calibrator("binary", targets, bent, method="platt")
    assert (found.slope, found.shifts[0]) == (pytest.approx(0.5, rel=0.08), pytest.approx(-0.75, rel=0.15))
    fresh, chances = draw(6000, 2)
    bent = expit(2 * logit(chances) + 1.5)
    assert ece(fresh, bent) > 0.1
    assert ece(fresh, found.apply(bent)) < 0.03


def test_isotonic_undoes_any_rising_map_on_other_cases() -> None:
    targets, truth = draw(4000, 3)
    found = fit_calibrator("binary", targets, truth**4, method="isotonic")
    fresh, chances = draw(4000, 4)
    assert ece(fresh, chances**4) > 0.1
    assert ece(fresh, found.apply(chances**4)) < 0.04


def test_isotonic_is_scikit_learns_on_softened_targets() -> None:
    targets, truth = draw(60, 5)
    found = fit_calibrator("binary", targets, truth, method="isotonic")
    positives = targets.sum()
    soft = np.where(targets == 1, (positives + 1) / (positives + 2), 1 / (60 - positives + 2))
    plain = IsotonicRegression(out_of_bounds="clip").fit(truth, soft)
    grid = np.linspace(0, 1, 50)
    np.testing.assert_allclose(found.apply(grid), plain.predict(grid), atol=1e-12)


def test_multiclass_temperature_finds_its_factor_and_rows_still_sum_to_one() -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(5000, 4))
    targets = np.array([rng.choice(4, p=row) for row in softmax(logits, axis=1)])
    found = fit_calibrator("multiclass", targets, softmax(4 * logits, axis=1), method="temperature")
    assert found.slope == pytest.approx(0.25, rel=0.08)
    for method in METHODS:
        mapped = fit_calibrator("multiclass", targets, softmax(4 * logits, axis=1), method=method).apply(
            softmax(logits, axis=1)
        )
        np.testing.assert_allclose(mapped.sum(axis=1), 1)


def test_every_label_of_a_multilabel_task_is_mapped() -> None:
    first, second = draw(3000, 7), draw(3000, 8)
    targets = np.stack([first[0], second[0]], axis=1)
    scores = np.stack([first[1] ** 3, np.sqrt(second[1])], axis=1)
    mapped = fit_calibrator("multilabel", targets, scores, method="isotonic").apply(scores)
    np.testing.assert_allclose(mapped, np.stack([first[1], second[1]], axis=1), atol=0.12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), min_size=1, max_size=30), st.sampled_from(METHODS))
def test_a_map_never_turns_an_order_round_and_stays_within_0_and_1(cases: list[tuple[int, float]], method: Any) -> None:
    targets, scores = np.array([each[0] for each in cases]), np.array([each[1] for each in cases])
    mapped = fit_calibrator("binary", targets, scores, method=method).apply(np.linspace(0, 1, 40))
    assert (np.diff(mapped) >= -1e-12).all()
    assert mapped.min() >= 0
    assert mapped.max() <= 1


def test_a_few_cases_in_perfect_order_do_not_ask_for_certainty() -> None:
    for method in METHODS:
        mapped = fit_calibrator("binary", [0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], method=method).apply([0.1, 0.9])
        assert mapped[0] > 0.1
        assert mapped[1] < 0.9


@pytest.mark.parametrize("method", METHODS)
def test_a_case_held_out_twice_with_half_the_weight_counts_once(method: Any) -> None:
    targets, truth = draw(80, 9)
    once = fit_calibrator("binary", targets, truth, method=method)
    twice = fit_calibrator("binary", np.tile(targets, 2), np.tile(truth, 2), method=method, weights=np.full(160, 0.5))
    np.testing.assert_allclose(twice.apply(truth), once.apply(truth), atol=1e-4)


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(
        OptionError, match="no calibration is called 'beta'; expected one of temperature, platt, isotonic"
    ):
        fit_calibrator("binary", [0, 1], [0.1, 0.9], method="beta")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="a regression gives no probabilities"):
        fit_calibrator("regression", [0.0, 1.0], [0.1, 0.9], method="platt")
    with pytest.raises(TaskError, match="no held-out case to calibrate on"):
        fit_calibrator("binary", [], [], method="platt")


# --- how far off


def test_the_debiased_error_is_near_the_true_one_where_the_plain_one_is_far_above() -> None:
    plain, debiased = [], []
    for seed in range(40):
        targets, truth = draw(150, 100 + seed)
        plain.append(ece(targets, truth))
        debiased.append(debiased_calibration_error(truth, targets == 1))
    assert np.mean(plain) > 0.07  # though the scores are the very chances
    assert np.mean(debiased) < 0.04
    targets, truth = draw(20000, 10)
    shifted = np.clip(truth + 0.1, 0, 1)
    expected = np.sqrt(np.mean((shifted - truth) ** 2))
    assert debiased_calibration_error(shifted, targets == 1) == pytest.approx(expected, abs=0.01)


def test_the_debiased_error_of_one_bin_is_written_out() -> None:
    right = np.array([True, True, False, False, True])
    assert debiased_calibration_error(np.full(5, 0.9), right) == pytest.approx(np.sqrt(0.3**2 - 0.24 / 4))
    assert debiased_calibration_error(np.array([0.4]), np.array([True])) == pytest.approx(0.6)


def test_reliability_bins_hold_like_numbers_of_cases_and_their_shares() -> None:
    confidence = np.linspace(0, 1, 40)
    right = confidence > 0.45
    found = measure_reliability(confidence, right, [str(case) for case in range(40)])
    assert found.counts == (8, 8, 8, 8, 8)
    assert [each.value for each in found.observed] == [0, 0, 0.75, 1, 1]
    np.testing.assert_allclose(found.predicted, confidence.reshape(5, 8).mean(axis=1))
    assert all(each.low < each.high for each in found.observed)


def test_confidence_is_that_of_the_answer() -> None:
    confidence, right = top_confidence("multiclass", [0, 2], [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    assert (confidence.tolist(), right.tolist()) == ([0.6, 0.5], [True, False])
    confidence, right = top_confidence("multilabel", [[1, 0], [0, 1]], [[0.9, 0.2], [0.3, 0.4]])
    assert (confidence.tolist(), right.tolist()) == ([0.9, 0.3, 0.2, 0.4], [True, False, False, True])

"""ROC curves equal scikit-learn's, ties included; their bands are those of single resamples of patients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk

from embedkit.bootstrap import draw_weights
from embedkit.errors import TaskError
from embedkit.roc import compute_roc, roc_points

# scores from a coarse grid tie often, and fall on the bin edges and on 0.5
COARSE = st.integers(0, 15).map(lambda number: number / 15)
FINE = st.floats(0, 1)


@st.composite
def binary_data(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    size = draw(st.integers(2, 30))
    scores = draw(hnp.arrays(float, size, elements=draw(st.sampled_from([COARSE, FINE, st.just(0.5)]))))
    targets = draw(hnp.arrays(int, size, elements=st.integers(0, 1)))
    targets[:2] = [0, 1]
    return targets, scores


def people(count: int) -> list[str]:
    return [f"p{number}" for number in range(count)]


@settings(max_examples=30, deadline=None)
@given(binary_data())
def test_roc_points_equal_scikit_learn(data: tuple[np.ndarray, np.ndarray]) -> None:
    targets, scores = data
    expected = sk.roc_curve(targets, scores, drop_intermediate=False)[:2]
    for found, wanted in zip(roc_points(targets, scores), expected, strict=True):
        np.testing.assert_allclose(found, wanted)


def test_the_band_of_perfect_scores_is_the_curve_itself() -> None:
    curve = compute_roc([0, 0, 0, 1, 1, 1], [0.1, 0.2, 0.3, 0.7, 0.8, 0.9], people(6), resamples=100)
    assert curve.low.tolist() == [1.0] * 101
    assert curve.high.tolist() == [1.0] * 101
    assert (curve.false_positive_rate[0], curve.true_positive_rate[-1]) == (0.0, 1.0)


def test_the_band_holds_the_curve_and_equals_single_resamples() -> None:
    rng = np.random.default_rng(3)
    targets = rng.integers(0, 2, 80)
    scores = np.clip(0.3 * targets + rng.random(80) * 0.7, 0, 1).round(1)
    curve = compute_roc(targets, scores, people(80), resamples=100, seed=2)
    middle = np.interp(curve.grid, curve.false_positive_rate, curve.true_positive_rate)
    assert ((curve.low <= middle + 1e-12) & (middle <= curve.high + 1e-12)).all()
    rows = []
    for row in np.concatenate(list(draw_weights(people(80), resamples=100, seed=2))):
        false_rate, true_rate, _ = sk.roc_curve(targets, scores, sample_weight=row, drop_intermediate=False)
        rows.append(np.interp(curve.grid, false_rate, true_rate))
    np.testing.assert_allclose(np.quantile(rows, [0.025, 0.975], axis=0), [curve.low, curve.high], atol=1e-12)


def test_a_band_without_any_fit_resample_is_nan() -> None:
    curve = compute_roc([0, 1], [0.2, 0.8], ["p", "q"], resamples=0)
    assert np.isnan(curve.low).all()
    assert np.isnan(curve.high).all()


def test_a_roc_curve_of_one_class_is_refused() -> None:
    with pytest.raises(TaskError, match="a ROC curve takes cases of both classes, but all targets are equal"):
        roc_points([1, 1], [0.1, 0.2])

"""DeLong's variance equals its definition, pair by pair; with several cases of a patient the intervals still cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from embedkit.delong import Aurocs, compare_aurocs, delong_interval, estimate_aurocs
from embedkit.errors import TaskError
from embedkit.metrics import compute_metrics


@st.composite
def reader_data(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Targets with both classes in two or more patients, coarse scores of two readers, patients."""
    size = draw(st.integers(4, 24))
    targets = np.array(draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)))
    targets[:4] = [0, 0, 1, 1]
    scores = np.array(draw(st.lists(st.integers(0, 6), min_size=2 * size, max_size=2 * size))).reshape(2, size) / 6
    patients = draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))
    patients[:4] = [10, 11, 10, 12]
    return targets, scores, [f"p{patient}" for patient in patients]


def wins(above: float, below: float) -> float:
    return float(above > below) + 0.5 * float(above == below)


def slow_covariance(targets: np.ndarray, scores: np.ndarray, groups: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """AUROCs and Obuchowski's covariance from every pair of cases, as the paper writes them down."""
    positives, negatives = np.flatnonzero(targets == 1), np.flatnonzero(targets == 0)
    names = sorted(set(groups))
    kernel = np.array([[[wins(row[i], row[j]) for j in negatives] for i in positives] for row in scores])
    aurocs = kernel.mean((1, 2))
    sums = np.zeros((2, len(scores), len(names)))
    for reader in range(len(scores)):
        for place, case in enumerate(positives):
            sums[0, reader, names.index(groups[case])] += kernel[reader, place].mean() - aurocs[reader]
        for place, case in enumerate(negatives):
            sums[1, reader, names.index(groups[case])] += kernel[reader, :, place].mean() - aurocs[reader]
    counts, total = [len(positives), len(negatives)], np.zeros((len(scores), len(scores)))
    for side, cases in enumerate((positives, negatives)):
        owners = len({groups[case] for case in cases})
        total += owners / (owners - 1) / counts[side] * (sums[side] @ sums[side].T) / counts[side]
    cross = len(names) / (len(names) - 1) * sums[0] @ sums[1].T / (counts[0] * counts[1])
    return aurocs, total + cross + cross.T


@settings(max_examples=60, deadline=None)
@given(reader_data())
def test_values_and_covariance_equal_the_sums_over_all_pairs(data: tuple[np.ndarray, np.ndarray, list[str]]) -> None:
    targets, scores, groups = data
    found = estimate_aurocs(targets, scores, groups)
    aurocs, covariance = slow_covariance(targets, scores, groups)
    np.testing.assert_allclose(found.values, aurocs, atol=1e-12)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-12)


def test_one_case_per_patient_gives_delongs_own_variance() -> None:
    rng = np.random.default_rng(0)
    targets = np.repeat([0, 1], [30, 20])
    scores = rng.normal(targets, 1).round(1)
    kernel = np.array([[wins(i, j) for j in scores[targets == 0]] for i in scores[targets == 1]])
    expected = kernel.mean(1).var(ddof=1) / 20 + kernel.mean(0).var(ddof=1) / 30  # DeLong et al. 1988, section 3
    found = estimate_aurocs(targets, scores, [f"p{number}" for number in range(50)])
    assert found.covariance[0, 0] == pytest.approx(expected, rel=1e-12)
    assert found.values[0] == pytest.approx(kernel.mean(), rel=1e-12)


def test_the_auroc_is_that_of_the_metrics() -> None:
    rng = np.random.default_rng(1)
    targets, scores = np.arange(40) % 2, rng.integers(0, 12, 40) / 12
    groups = [f"p{number // 2}" for number in range(40)]
    plain = compute_metrics("binary", targets, scores, groups, resamples=0)["auroc"].value
    assert estimate_aurocs(targets, scores, groups).values[0] == pytest.approx(plain, abs=1e-12)


def test_copies_of_each_patients_case_add_no_certainty() -> None:
    rng = np.random.default_rng(2)
    targets, scores = np.arange(60) % 2, rng.normal(size=60)
    once = estimate_aurocs(targets, scores, [f"p{number}" for number in range(60)])
    copied = estimate_aurocs(
        np.repeat(targets, 5), np.repeat(scores, 5), [f"p{number}" for number in np.repeat(np.arange(60), 5)]
    )
    np.testing.assert_allclose(copied.covariance, once.covariance, rtol=1e-9)


def test_the_mean_of_repeats_has_the_variance_of_a_mean() -> None:
    aurocs = Aurocs(np.array([0.8, 0.6, 0.9]), np.array([[4.0, 2.0, 1.0], [2.0, 6.0, 0.0], [1.0, 0.0, 1.0]]))
    mean = aurocs.average([2, 1])
    np.testing.assert_allclose(mean.values, [0.7, 0.9])
    np.testing.assert_allclose(mean.covariance, [[3.5, 0.5], [0.5, 1.0]])


def test_an_interval_stays_within_bounds_and_is_symmetric_in_logits() -> None:
    found = delong_interval(0.97, 0.02**2)
    assert 0 < found.low < 0.97 < found.high < 1
    logit = [math.log(value / (1 - value)) for value in (found.low, found.value, found.high)]
    assert logit[1] - logit[0] == pytest.approx(logit[2] - logit[1])
    assert logit[2] - logit[1] == pytest.approx(norm.ppf(0.975) * 0.02 / (0.97 * 0.03))


@pytest.mark.parametrize(("value", "variance"), [(1.0, 0.0), (0.0, 0.0), (0.7, math.nan)])
def test_no_limits_where_nothing_is_known_of_the_variance(value: float, variance: float) -> None:
    found = delong_interval(value, variance)
    assert found.value == value
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_a_class_of_one_patient_has_a_value_without_variance() -> None:
    found = estimate_aurocs([0, 0, 1, 1], [0.1, 0.6, 0.5, 0.9], ["a", "b", "c", "c"])
    assert found.values[0] == 0.75
    assert np.isnan(found.covariance).all()
    assert math.isnan(compare_aurocs(found.average([1]), 0, 0)[1])


def test_equal_scores_do_not_differ_and_a_difference_without_variance_is_not_tested() -> None:
    targets, scores = np.arange(20) % 2, np.linspace(0, 1, 20)
    groups = [f"p{number}" for number in range(20)]
    same = estimate_aurocs(targets, np.stack([scores, scores**3]), groups)
    assert compare_aurocs(same, 0, 1)[1] == 1.0
    opposite = estimate_aurocs(targets, np.stack([targets, 1.0 - targets]), groups)
    difference, p_value = compare_aurocs(opposite, 0, 1)
    assert difference.value == 1.0
    assert math.isnan(p_value)


def test_wrong_shapes_and_absent_classes_are_refused() -> None:
    with pytest.raises(TaskError, match=r"targets \(3,\), scores \(1, 2\) and 3 groups do not fit"):
        estimate_aurocs([0, 1, 1], [0.1, 0.2], ["a", "b", "c"])
    with pytest.raises(TaskError, match="an AUROC takes cases of both classes"):
        estimate_aurocs([1, 1], [0.1, 0.2], ["a", "b"])


def draw_clustered(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Forty patients of one to four cases; two readers that share what is hard about a patient, equally good."""
    sizes = rng.integers(1, 5, 40)
    patient = np.repeat(np.arange(40), sizes)
    targets = (rng.random(len(patient)) < 0.45).astype(int)
    targets[:2] = [0, 1]
    shared = rng.normal(size=40)[patient]
    scores = 1.1 * targets + shared + rng.normal(size=(2, len(patient)))
    return targets, scores, [f"p{each}" for each in patient]


def test_intervals_cover_and_the_paired_test_keeps_its_level_with_clustered_cases() -> None:
    rng = np.random.default_rng(5)
    truth = float(norm.cdf(1.1 / 2))  # the difference of two cases has variance 2 * (1 + 1) = 4
    covered, rejected, rounds = 0, 0, 400
    for _ in range(rounds):
        aurocs = estimate_aurocs(*draw_clustered(rng))
        interval = delong_interval(float(aurocs.values[0]), float(aurocs.covariance[0, 0]))
        covered += interval.low <= truth <= interval.high
        rejected += compare_aurocs(aurocs, 0, 1)[1] < 0.05
    assert 0.92 <= covered / rounds <= 0.98
    assert 0.02 <= rejected / rounds <= 0.08


def test_a_real_difference_is_found_and_signed() -> None:
    rng = np.random.default_rng(6)
    targets = np.arange(120) % 2
    good, poor = targets + 0.4 * rng.normal(size=120), rng.normal(size=120)
    aurocs = estimate_aurocs(targets, np.stack([poor, good]), [f"p{number}" for number in range(120)])
    difference, p_value = compare_aurocs(aurocs, 0, 1)
    assert difference.high < 0
    assert p_value < 1e-6

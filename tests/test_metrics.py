"""Metrics equal scikit-learn's and SciPy's, weighted or not, ties included; intervals resample patients."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from sklearn import metrics as sk

from embedkit.bootstrap import draw_weights, form_interval
from embedkit.errors import OptionError, TaskError
from embedkit.metrics import (
    HIGHER_IS_BETTER,
    METRICS,
    Interval,
    compute_metrics,
    compute_weighted_metrics,
    paired_difference,
)

# scores from a coarse grid tie often, and fall on the bin edges and on 0.5
COARSE = st.integers(0, 15).map(lambda number: number / 15)
FINE = st.floats(0, 1)
WEIGHTS = st.integers(0, 3)


@st.composite
def binary_data(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size = draw(st.integers(2, 30))
    scores = draw(hnp.arrays(float, size, elements=draw(st.sampled_from([COARSE, FINE, st.just(0.5)]))))
    targets = draw(hnp.arrays(int, size, elements=st.integers(0, 1)))
    weights = draw(hnp.arrays(float, size, elements=WEIGHTS))
    targets[:2], weights[:2] = [0, 1], weights[:2] + 1
    return targets, scores, weights


@st.composite
def class_data(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size, classes = draw(st.integers(6, 25)), draw(st.integers(3, 4))
    raw = draw(hnp.arrays(int, (size, classes), elements=st.integers(1, 4))).astype(float)
    targets = draw(hnp.arrays(int, size, elements=st.integers(0, classes - 1)))
    weights = draw(hnp.arrays(float, size, elements=WEIGHTS))
    targets[:classes], weights[:classes] = np.arange(classes), weights[:classes] + 1
    return targets, raw / raw.sum(axis=1, keepdims=True), weights


@st.composite
def number_data(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size = draw(st.integers(3, 30))
    elements = draw(st.sampled_from([st.integers(-3, 3).map(float), st.floats(-100, 100, width=16)]))
    targets, scores = (draw(hnp.arrays(float, size, elements=elements)) for _ in range(2))
    weights = draw(hnp.arrays(float, size, elements=WEIGHTS))
    targets[1], scores[1], weights[:2] = targets[0] + 1, scores[0] - 2, weights[:2] + 1
    return targets, scores, weights


def weighted(kind: Any, targets: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    return {name: float(values[0]) for name, values in compute_weighted_metrics(kind, targets, scores, weights).items()}


def plain_calibration_error(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray) -> float:
    error, edges = 0.0, np.linspace(0, 1, 16)
    for number in range(15):
        inside = (confidence > edges[number]) & (confidence <= edges[number + 1])
        inside |= (confidence == 0) & (number == 0)
        if weights[inside].sum():
            gap = np.average(right[inside], weights=weights[inside]) - np.average(
                confidence[inside], weights=weights[inside]
            )
            error += abs(gap) * weights[inside].sum() / weights.sum()
    return error


def plain_adaptive_error(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray) -> float:
    error, below, total = np.zeros(15), 0.0, weights.sum()
    for value in sorted(set(confidence.tolist())):
        here = confidence == value
        place = min(int(15 * (below + weights[here].sum() / 2) / total), 14)
        error[place] += (weights[here] * (right[here] - confidence[here])).sum()
        below += weights[here].sum()
    return float(np.abs(error).sum() / total)


def people(count: int) -> list[str]:
    return [f"p{number}" for number in range(count)]


# --- values against the reference


@settings(max_examples=60, deadline=None)
@given(binary_data())
def test_weighted_binary_metrics_equal_scikit_learn(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    targets, scores, weights = data
    called = (scores >= 0.5).astype(int)
    assert weighted("binary", targets, scores, weights) == pytest.approx(
        {
            "auroc": sk.roc_auc_score(targets, scores, sample_weight=weights),
            "auprc": sk.average_precision_score(targets, scores, sample_weight=weights),
            "balanced_accuracy": sk.balanced_accuracy_score(targets, called, sample_weight=weights),
            "accuracy": sk.accuracy_score(targets, called, sample_weight=weights),
            "f1": sk.f1_score(targets, called, sample_weight=weights),
            "brier": sk.brier_score_loss(targets, scores, sample_weight=weights),
            "ece": plain_calibration_error(scores, targets, weights),
            "ece_adaptive": plain_adaptive_error(scores, targets, weights),
        },
        abs=1e-9,
    )


@settings(max_examples=40, deadline=None)
@given(class_data())
def test_weighted_multiclass_metrics_equal_scikit_learn(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    targets, scores, weights = data
    one_hot, called = np.eye(scores.shape[1], dtype=int)[targets], scores.argmax(axis=1)
    right = (called == targets).astype(float)
    assert weighted("multiclass", targets, scores, weights) == pytest.approx(
        {
            "auroc": sk.roc_auc_score(targets, scores, sample_weight=weights, multi_class="ovr"),
            "auprc": sk.average_precision_score(one_hot, scores, sample_weight=weights),
            "balanced_accuracy": sk.balanced_accuracy_score(targets, called, sample_weight=weights),
            "accuracy": sk.accuracy_score(targets, called, sample_weight=weights),
            "f1": sk.f1_score(targets, called, sample_weight=weights, average="macro"),
            "brier": sk.brier_score_loss(targets, scores, sample_weight=weights),
            "ece": plain_calibration_error(scores.max(axis=1), right, weights),
            "ece_adaptive": plain_adaptive_error(scores.max(axis=1), right, weights),
        },
        abs=1e-9,
    )


@settings(max_examples=60, deadline=None)
@given(number_data())
def test_weighted_regression_metrics_equal_scikit_learn_and_scipy(
    data: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    targets, scores, weights = data
    repeats = weights.astype(int)
    found = weighted("regression", targets, scores, weights)
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(targets, scores, sample_weight=weights))
    assert found["r2"] == pytest.approx(sk.r2_score(targets, scores, sample_weight=weights), rel=1e-6, abs=1e-6)
    repeated = stats.spearmanr(np.repeat(targets, repeats), np.repeat(scores, repeats)).statistic
    assert found["spearman"] == pytest.approx(repeated, abs=1e-9)


def test_multilabel_metrics_are_the_mean_over_labels() -> None:
    rng = np.random.default_rng(0)
    targets, scores = rng.integers(0, 2, (40, 3)), rng.random((40, 3)).round(1)
    found = compute_metrics("multilabel", targets, scores, people(40), resamples=0)
    for name in METRICS["multilabel"]:
        single = [
            compute_metrics("binary", targets[:, label], scores[:, label], people(40), resamples=0)[name].value
            for label in range(3)
        ]
        assert found[name].value == pytest.approx(np.mean(single))
    assert found["accuracy"].value == pytest.approx(1 - sk.hamming_loss(targets, scores >= 0.5))


def test_known_values_by_hand() -> None:
    found = compute_metrics("binary", [0, 0, 1, 1], [0.1, 0.5, 0.5, 0.9], people(4), resamples=0)
    assert {name: interval.value for name, interval in found.items()} == pytest.approx(
        {
            "auroc": 3.5 / 4,
            "auprc": 0.5 * 1 + 0.5 * 2 / 3,
            "balanced_accuracy": 0.75,
            "accuracy": 0.75,
            "f1": 0.8,
            "brier": (0.01 + 0.25 + 0.25 + 0.01) / 4,
            "ece": (0.1 + 0.0 + 0.1) / 4,
            "ece_adaptive": (0.1 + 0.0 + 0.1) / 4,
        }
    )


def test_the_adaptive_calibration_error_fills_all_its_bins() -> None:
    scores = np.linspace(0.9, 0.99, 30)  # one bin of equal width, fifteen of equal weight, of two cases each
    targets = (np.arange(30) % 4 < 2).astype(int)  # pairs that both come true, then pairs that both do not
    found = compute_metrics("binary", targets, scores, people(30), resamples=0)
    means = scores.reshape(15, 2).mean(1)
    assert found["ece_adaptive"].value == pytest.approx(np.abs(means - (np.arange(15) % 2 == 0)).mean())
    assert found["ece"].value < found["ece_adaptive"].value


def test_every_metric_of_a_kind_is_there_in_order() -> None:
    assert tuple(compute_metrics("binary", [0, 1], [0.2, 0.7], people(2), resamples=0)) == METRICS["binary"]
    assert tuple(compute_metrics("regression", [0, 1], [0.2, 0.7], people(2), resamples=0)) == METRICS["regression"]
    assert [name for name, higher in HIGHER_IS_BETTER.items() if not higher] == [
        "brier",
        "ece",
        "ece_adaptive",
        "mae",
        "integrated_brier",
    ]


# --- undefined


def test_one_class_leaves_ranking_undefined_and_the_rest_defined() -> None:
    found = compute_metrics("binary", [0, 0, 0], [0.2, 0.3, 0.6], people(3), resamples=20)
    for name in ("auroc", "auprc", "balanced_accuracy", "f1"):
        assert math.isnan(found[name].value)
        assert math.isnan(found[name].low)
        assert found[name].undefined == 20
    assert found["accuracy"].value == pytest.approx(2 / 3)
    assert found["accuracy"].undefined == 0


def test_constant_numbers_leave_correlation_undefined() -> None:
    found = compute_metrics("regression", [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], people(3), resamples=0)
    assert math.isnan(found["r2"].value)
    assert math.isnan(found["spearman"].value)
    assert found["mae"].value == pytest.approx(2 / 3)
    assert math.isnan(compute_metrics("regression", [1, 2], [5, 5], people(2), resamples=0)["spearman"].value)


def test_resamples_without_a_class_are_left_out_and_counted() -> None:
    targets, scores = np.array([1, 0, 0, 0]), np.array([0.9, 0.1, 0.2, 0.3])
    found = compute_metrics("binary", targets, scores, people(4), resamples=1000, seed=1)
    lacking = sum(
        int(((weights[:, 0] == 0) | (weights[:, 0] == 4)).sum())
        for weights in draw_weights(people(4), resamples=1000, seed=1)
    )
    assert found["auroc"].undefined == lacking
    assert 250 < lacking < 400  # (3/4)^4 of all, and the few of four positives
    assert found["auroc"] == Interval(1.0, 1.0, 1.0, lacking)


def test_classes_that_the_targets_lack_leave_the_means() -> None:
    targets = np.array([0, 1, 0, 1, 1, 0])
    scores = np.random.default_rng(0).dirichlet(np.ones(3), 6)
    found = compute_metrics("multiclass", targets, scores, people(6), resamples=0)
    pairs = [(targets == code, scores[:, code]) for code in (0, 1)]
    assert found["auroc"].value == pytest.approx(np.mean([sk.roc_auc_score(*pair) for pair in pairs]))
    recalls = [(scores.argmax(axis=1)[targets == code] == code).mean() for code in (0, 1)]
    assert found["balanced_accuracy"].value == pytest.approx(np.mean(recalls))


def test_labels_that_never_vary_leave_the_mean_auroc_of_a_multilabel_task() -> None:
    targets = np.array([[1, 0], [0, 0], [1, 0], [0, 0]])
    scores = np.array([[0.9, 0.1], [0.2, 0.1], [0.3, 0.1], [0.4, 0.1]])
    found = compute_metrics("multilabel", targets, scores, people(4), resamples=0)
    assert found["auroc"].value == 0.75
    assert found["accuracy"].value == pytest.approx((0.75 + 1.0) / 2)


# --- intervals


def test_weights_count_patients_and_keep_their_cases_together() -> None:
    groups = ["a", "b", "a", "c", "b", "a"]
    weights = np.concatenate(list(draw_weights(groups, resamples=500, seed=0)))
    assert weights.shape == (500, 6)
    assert (weights[:, [0, 0]] == weights[:, [2, 5]]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert weights[:, [0, 1, 3]].mean(axis=0) == pytest.approx([1, 1, 1], abs=0.12)


def test_weights_come_in_blocks_of_bounded_size() -> None:
    blocks = list(draw_weights(people(1000), resamples=50, seed=0))
    assert sum(len(block) for block in blocks) == 50
    assert max(block.nbytes for block in blocks) <= 1 << 17
    assert all(len(block) == 1 for block in draw_weights(people(20_000), resamples=3, seed=0))


def test_an_interval_equals_the_plain_bootstrap_on_the_same_draws() -> None:
    rng = np.random.default_rng(0)
    groups = [f"p{number // 2}" for number in range(60)]
    targets = rng.integers(0, 2, 60)
    scores = np.clip(0.3 * targets + rng.random(60) * 0.7, 0, 1).round(2)
    found = compute_metrics("binary", targets, scores, groups, resamples=200, seed=5)["auroc"]
    weights = np.concatenate(list(draw_weights(groups, resamples=200, seed=5)))
    values = []
    for row in weights.astype(int):
        drawn = np.repeat(np.arange(60), row)
        values.append(sk.roc_auc_score(targets[drawn], scores[drawn]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    assert found.value == pytest.approx(sk.roc_auc_score(targets, scores))


def test_the_interval_of_a_mean_has_its_known_width() -> None:
    errors = np.random.default_rng(0).exponential(size=400)
    found = compute_metrics("regression", errors, np.zeros(400), people(400), resamples=4000)["mae"]
    half = 1.96 * errors.std() / 20
    assert found.low == pytest.approx(errors.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(errors.mean() + half, abs=0.1 * half)


def test_repeating_cases_of_a_patient_does_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 50)
    scores = np.clip(0.2 * targets + rng.random(50) * 0.8, 0, 1)
    once = compute_metrics("binary", targets, scores, people(50), resamples=300)["auroc"]
    thrice = compute_metrics(
        "binary", *(np.tile(values, 3) for values in (targets, scores)), people(50) * 3, resamples=300
    )
    assert dataclasses.astuple(thrice["auroc"]) == pytest.approx(dataclasses.astuple(once))


def test_intervals_depend_on_the_seed_alone() -> None:
    targets, scores = [0, 1, 0, 1, 1, 0], [0.2, 0.6, 0.7, 0.5, 0.9, 0.1]
    first = compute_metrics("binary", targets, scores, people(6), resamples=100, seed=1)
    assert first == compute_metrics("binary", targets, scores, people(6), resamples=100, seed=1)
    assert first["brier"] != compute_metrics("binary", targets, scores, people(6), resamples=100, seed=2)["brier"]


def test_one_patient_or_no_resamples_give_no_limits() -> None:
    one = compute_metrics("binary", [0, 1], [0.2, 0.7], ["p", "p"], resamples=10)["auroc"]
    none = compute_metrics("binary", [0, 1], [0.2, 0.7], ["p", "q"], resamples=0)["auroc"]
    for interval in (one, none):
        assert interval.value == 1.0
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)
    assert form_interval(0.5, np.array([0.4, np.nan, 0.6]), ["p", "q"]).undefined == 1


# --- differences


def test_a_score_differs_from_itself_by_nothing() -> None:
    targets, scores = [0, 1, 0, 1, 1, 0], [0.2, 0.6, 0.7, 0.5, 0.9, 0.1]
    found = paired_difference("binary", targets, scores, scores, people(6), metric="auroc", resamples=200)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_pairing_narrows_the_difference_of_like_scores() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 200)
    first = np.clip(0.3 * targets + rng.random(200) * 0.7, 0, 1)
    second = np.clip(first + rng.normal(0, 0.02, 200), 0, 1)
    found = paired_difference("binary", targets, first, second, people(200), metric="auroc", resamples=500)
    values = [
        compute_metrics("binary", targets, scores, people(200), resamples=500)["auroc"] for scores in (first, second)
    ]
    assert found.value == pytest.approx(values[0].value - values[1].value)
    assert found.low < found.value < found.high
    assert found.high - found.low < 0.3 * (values[0].high - values[0].low)


def test_a_difference_in_an_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(OptionError, match="a regression task has no metric auroc; expected one of mae, r2, spearman"):
        paired_difference("regression", [0, 1], [0, 1], [0, 1], people(2), metric="auroc")


# --- input


@pytest.mark.parametrize(
    ("kind", "targets", "scores", "message"),
    [
        ("binary", [0, 1], [0.5], r"binary targets \(2,\), scores \(1,\) and 2 groups do not fit .* scores \[cases\]"),
        ("binary", [0, 1], [[0.5, 0.5]] * 2, "do not fit each other"),
        ("multiclass", [0, 1], [0.5, 0.5], r"do not fit each other; expected scores \[cases classes\]"),
        ("multilabel", [[0, 1]] * 2, [[0.5]] * 2, r"multilabel targets \(2, 2\) and scores \(2, 1\) differ"),
        ("binary", [0, 1], [0.5, float("nan")], "1 scores or targets are NaN or infinite, expected finite numbers"),
        ("regression", [0, float("inf")], [0.5, 1], "1 scores or targets are NaN or infinite"),
        ("binary", [0, 1], [-3, 2], r"scores lie in -3\.\.2, expected probabilities; apply sigmoid or softmax first"),
        ("binary", [0, 2], [0.5, 0.5], r"binary targets are not all whole numbers in 0\.\.1; expected codes"),
        ("multiclass", [0, 3], [[1, 0, 0]] * 2, r"multiclass targets are not all whole numbers in 0\.\.2"),
        ("multiclass", [0, 1], [[0.5, 0.1]] * 2, r"scores of a case sum to 0\.6, expected 1; apply softmax"),
    ],
)
def test_scores_that_do_not_fit_are_refused(kind: Any, targets: Any, scores: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        compute_metrics(kind, targets, scores, ["p", "q"])


def test_no_cases_unknown_kind_and_negative_resamples_are_refused() -> None:
    with pytest.raises(TaskError, match="no case to compute metrics on"):
        compute_metrics("binary", [], [], [])
    with pytest.raises(OptionError, match="task kind 'ordinal' is unknown; expected one of binary"):
        compute_metrics("ordinal", [0], [0.5], ["p"])  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="-1 resamples were asked for, expected 0 or more"):
        compute_metrics("binary", [0, 1], [0.5, 0.5], ["p", "q"], resamples=-1)

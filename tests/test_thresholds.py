"""Thresholds reach their goal on the cases they are chosen on, give away nothing, and proportions cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from embedkit.errors import OptionError, TaskError
from embedkit.proportions import proportion_interval
from embedkit.thresholds import Goal, choose_threshold, measure_threshold


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    size = draw(st.integers(2, 25))
    scores = np.array(draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))) / 9
    positive = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    positive[:2] = [True, False]
    return positive, scores


def rates(positive: np.ndarray, scores: np.ndarray, threshold: float) -> tuple[float, float]:
    called = scores >= threshold
    return float(called[positive].mean()), float((~called)[~positive].mean())


@given(scored(), st.sampled_from(["sensitivity", "specificity"]), st.floats(0.05, 1))
def test_a_threshold_reaches_its_goal_and_no_other_gives_more(
    data: tuple[np.ndarray, np.ndarray], side: str, level: float
) -> None:
    positive, scores = data
    found = rates(positive, scores, choose_threshold(positive, scores, Goal(side, level)))  # type: ignore[arg-type]
    own = 0 if side == "sensitivity" else 1
    assert found[own] >= level - 1e-9
    others = [rates(positive, scores, threshold) for threshold in [*np.unique(scores), 2.0]]
    assert found[1 - own] >= max(other[1 - own] for other in others if other[own] >= level - 1e-9) - 1e-12


def test_a_threshold_lies_halfway_between_the_scores_it_parts() -> None:
    positive, scores = np.array([False, False, True, True]), np.array([0.1, 0.3, 0.5, 0.9])
    assert choose_threshold(positive, scores, Goal("sensitivity", 1.0)) == pytest.approx(0.4)
    assert choose_threshold(positive, scores, Goal("sensitivity", 0.5)) == pytest.approx(0.7)
    assert choose_threshold(positive, scores, Goal("specificity", 1.0)) == pytest.approx(0.4)
    assert choose_threshold(positive, scores, Goal("specificity", 0.5)) == pytest.approx(0.2)


@pytest.mark.parametrize("text", ["sensitivity", "sensitivity=0", "sensitivity=1.2", "recall=0.9", "specificity=high"])
def test_other_goals_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match=rf"operating point '{text}' means nothing; .* for example sensitivity=0\.95"):
        Goal.parse(text)


def test_a_goal_is_read_and_written() -> None:
    assert Goal.parse("specificity=0.90") == Goal("specificity", 0.9)
    assert str(Goal.parse("sensitivity=0.95")) == "sensitivity=0.95"


def test_a_class_that_no_held_out_case_has_is_refused() -> None:
    with pytest.raises(TaskError, match="no positive case among the inner held-out ones, so no threshold reaches"):
        choose_threshold(np.array([False]), np.array([0.5]), Goal("sensitivity", 0.9))


def test_what_a_threshold_achieves_is_counted() -> None:
    positive = np.array([True, True, True, False, False, False, False])
    called = np.array([True, True, False, True, False, False, False])
    found = measure_threshold(Goal("sensitivity", 0.9), [0.4], positive, called, list("abcdefg"))
    values = [getattr(found, name).value for name in ("sensitivity", "specificity", "ppv", "npv", "called")]
    assert values == pytest.approx([2 / 3, 3 / 4, 2 / 3, 3 / 4, 3 / 7])
    none = measure_threshold(Goal("sensitivity", 0.9), [0.4], positive, np.zeros(7, bool), list("abcdefg"))
    assert math.isnan(none.ppv.value)
    assert none.npv.value == pytest.approx(4 / 7)


# --- proportions


@given(st.integers(1, 60), st.data())
def test_with_one_case_per_patient_it_is_wilsons(count: int, data: st.DataObject) -> None:
    hits = np.arange(count) < data.draw(st.integers(0, count))
    found = proportion_interval(hits, [str(case) for case in range(count)])
    known = binomtest(int(hits.sum()), count).proportion_ci(method="wilson")
    assert (found.low, found.high) == (pytest.approx(known.low, abs=1e-12), pytest.approx(known.high))


def test_copies_of_a_patients_case_add_no_certainty() -> None:
    hits = np.arange(30) % 3 == 0
    once = proportion_interval(hits, [str(case) for case in range(30)])
    copied = proportion_interval(np.repeat(hits, 4), [str(case) for case in np.repeat(np.arange(30), 4)])
    assert (copied.low, copied.high) == (pytest.approx(once.low), pytest.approx(once.high))
    every = proportion_interval(np.ones(40, bool), [str(case) for case in np.repeat(np.arange(10), 4)])
    assert every.low == pytest.approx(binomtest(10, 10).proportion_ci(method="wilson").low)


def test_no_case_gives_no_number() -> None:
    assert math.isnan(proportion_interval(np.zeros(0, bool), []).value)


def test_intervals_cover_with_cases_of_patients_that_are_alike() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        own = rng.beta(4.5, 0.5, size=30)  # mean 0.9, patients far apart
        patient = np.repeat(np.arange(30), rng.integers(1, 5, 30))
        hits = rng.random(len(patient)) < own[patient]
        found = proportion_interval(hits, [str(each) for each in patient])
        covered += found.low <= 0.9 <= found.high
    assert 0.92 <= covered / 500 <= 0.985

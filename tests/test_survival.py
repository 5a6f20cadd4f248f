"""Time-to-event formulas equal lifelines' and scikit-survival's on lifelines' data, weighted or not, ties included."""

from __future__ import annotations

import time
import warnings
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedkit.bootstrap import Statistic, bootstrap_values
from embedkit.survival import (
    compute_log_rank,
    estimate_survival,
    weigh_brier,
    weigh_concordance,
    weigh_integrated_brier,
    weigh_ipcw_concordance,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lifelines import KaplanMeierFitter
    from lifelines.datasets import load_gbsg2, load_rossi
    from lifelines.statistics import multivariate_logrank_test
    from lifelines.utils import concordance_index
    from sksurv import metrics as sksurv
    from sksurv.util import Surv


def rossi() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weeks to arrest (many ties, censored at 52), and a risk with ties."""
    table = load_rossi()
    return table["week"].to_numpy(float), table["arrest"].to_numpy(bool), table["prio"].to_numpy(float)


def gbsg2() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Days to recurrence of 686 patients, and a risk."""
    table = load_gbsg2()
    risk = 100 * table["pnodes"].to_numpy(float) - table["progrec"].to_numpy(float)
    return table["time"].to_numpy(float), table["cens"].to_numpy(bool), risk


def curve(risk: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Some survival [cases times] that falls with risk and time."""
    return np.exp(-np.exp((risk - risk.mean()) / risk.std() / 2)[:, None] * at / at.max() / 2)


DATA = {"rossi": rossi(), "gbsg2": gbsg2()}


def plain(statistic: Statistic, cases: int) -> float:
    return float(statistic(np.ones((1, cases)))[0])


@pytest.mark.parametrize("name", DATA)
def test_concordance_is_that_of_lifelines_and_scikit_survival(name: str) -> None:
    times, events, risk = DATA[name]
    found = plain(weigh_concordance(times, events, risk), len(times))
    assert found == pytest.approx(concordance_index(times, -risk, events), abs=1e-12)
    assert found == pytest.approx(sksurv.concordance_index_censored(events, times, risk)[0], abs=1e-12)


@pytest.mark.parametrize("name", DATA)
def test_ipcw_concordance_is_that_of_scikit_survival(name: str) -> None:
    times, events, risk = DATA[name]
    truth, until = Surv.from_arrays(events, times), float(np.quantile(times[events], 0.9))
    found = plain(weigh_ipcw_concordance(times, events, risk, until=until), len(times))
    assert found == pytest.approx(sksurv.concordance_index_ipcw(truth, truth, risk, tau=until)[0], abs=1e-12)


@pytest.mark.parametrize("name", DATA)
def test_brier_scores_are_those_of_scikit_survival(name: str) -> None:
    times, events, risk = DATA[name]
    at = np.quantile(times[events], np.linspace(0.1, 0.9, 9))
    survival, truth = curve(risk, at), Surv.from_arrays(events, times)
    expected = sksurv.brier_score(truth, truth, survival, at)[1]
    found = [plain(weigh_brier(times, events, survival[:, k], at[k]), len(times)) for k in range(len(at))]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    whole = plain(weigh_integrated_brier(times, events, survival, at), len(times))
    assert whole == pytest.approx(sksurv.integrated_brier_score(truth, truth, survival, at), abs=1e-12)
    alone = plain(weigh_integrated_brier(times, events, survival[:, :1], at[:1]), len(times))
    assert alone == pytest.approx(expected[0], abs=1e-12)


def test_brier_before_the_first_time_asks_for_no_weights() -> None:
    score = weigh_brier(np.array([2.0, 3.0]), np.array([True, False]), np.array([0.9, 0.5]), 1.0)
    assert plain(score, 2) == pytest.approx((0.1**2 + 0.5**2) / 2)


@pytest.mark.parametrize("name", DATA)
def test_kaplan_meier_with_its_band_is_that_of_lifelines(name: str) -> None:
    times, events, _ = DATA[name]
    found = estimate_survival(times, events)
    fitter = KaplanMeierFitter().fit(times, events)
    np.testing.assert_allclose(found.times, fitter.survival_function_.index)
    np.testing.assert_allclose(found.survival, fitter.survival_function_.iloc[:, 0], atol=1e-12)
    np.testing.assert_allclose(found.low, fitter.confidence_interval_.iloc[:, 0], atol=1e-12)
    np.testing.assert_allclose(found.high, fitter.confidence_interval_.iloc[:, 1], atol=1e-12)
    np.testing.assert_allclose(found.at_risk, fitter.event_table["at_risk"])


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("parts", [2, 3])
def test_log_rank_is_that_of_lifelines(name: str, parts: int) -> None:
    times, events, risk = DATA[name]
    groups = np.searchsorted(np.quantile(risk, np.linspace(0, 1, parts + 1)[1:-1]), risk)
    expected = multivariate_logrank_test(times, groups, events)
    statistic, p = compute_log_rank(times, events, groups)
    assert statistic == pytest.approx(expected.test_statistic, rel=1e-9)
    assert p == pytest.approx(expected.p_value, rel=1e-9)


def test_log_rank_says_nothing_of_one_group_or_of_no_event() -> None:
    times = np.array([1.0, 2.0, 3.0])
    assert np.isnan(compute_log_rank(times, np.ones(3, bool), [0, 0, 0])).all()
    assert np.isnan(compute_log_rank(times, np.zeros(3, bool), [0, 1, 0])).all()


@st.composite
def followed(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Times, events, risks and weights with many ties."""
    size = draw(st.integers(2, 14))
    numbers = st.lists(st.integers(1, 5), min_size=size, max_size=size)
    times, risks, weights = (np.array(draw(numbers), float) for _ in range(3))
    events = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    return times, events, risks, weights - 1


@given(followed())
@settings(max_examples=150, deadline=None)
def test_weighted_concordance_is_the_plain_sum_over_pairs(data: tuple[np.ndarray, ...]) -> None:
    times, events, risks, weights = data
    right = pairs = 0.0
    for i, j in product(range(len(times)), repeat=2):
        if events[i] and (times[i] < times[j] or (times[i] == times[j] and not events[j])):
            pairs += weights[i] * weights[j]
            right += weights[i] * weights[j] * (0.5 * (risks[i] == risks[j]) + (risks[i] > risks[j]))
    found = float(weigh_concordance(times, events, risks)(weights[None])[0])
    assert found == pytest.approx(right / pairs) if pairs else np.isnan(found)


@given(followed())
@settings(max_examples=60, deadline=None)
def test_a_weight_is_as_many_copies_of_a_case(data: tuple[np.ndarray, ...]) -> None:
    times, events, risks, weights = data
    copies = np.repeat(np.arange(len(times)), weights.astype(int))
    if not len(copies):
        return
    at = np.array([1.5, 2.0, 4.0])
    survival = curve(risks + np.arange(len(risks)), at)
    whole = (times, events, risks, survival)
    for make in (
        lambda t, e, r, _: weigh_ipcw_concordance(t, e, r, until=4.0),
        lambda t, e, _, s: weigh_integrated_brier(t, e, s, at),
    ):
        weighted = float(make(*whole)(weights[None])[0])
        repeated = make(*(each[copies] for each in whole))
        np.testing.assert_allclose(weighted, plain(repeated, len(copies)), atol=1e-12)


def test_two_thousand_resamples_of_a_thousand_cases_take_seconds() -> None:
    rng = np.random.default_rng(0)
    times, events, risk = rng.exponential(size=1000) + 0.01, rng.random(1000) < 0.6, rng.normal(size=1000)
    at = np.quantile(times[events], np.linspace(0.1, 0.9, 9))
    statistics = {
        "c": weigh_concordance(times, events, risk),
        "uno": weigh_ipcw_concordance(times, events, risk, until=float(at[-1])),
        "ibs": weigh_integrated_brier(times, events, curve(risk, at), at),
    }
    started = time.process_time()
    values = bootstrap_values(statistics, [str(k) for k in range(1000)], resamples=2000, seed=0)
    assert time.process_time() - started < 10  # about 1 s on a quiet core
    assert 0.45 < values["c"].mean() < 0.55 and 0.005 < values["c"].std() < 0.03

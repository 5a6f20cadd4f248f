"""Survival heads: losses by hand, the closed form against libraries, curves from logits, runs from end to end."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from embedkit.closed_form import LinearReadout
from embedkit.curves import CoxCurve, MtlrCurve, choose_edges, count_edges
from embedkit.hazards import estimate_log_baseline, fit_hazards, partial_likelihood
from embedkit.losses import StackedLoss, TaskLoss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lifelines import CoxPHFitter
    from lifelines.datasets import load_rossi
    from sksurv.linear_model import CoxPHSurvivalAnalysis
    from sksurv.util import Surv

ROSSI = load_rossi()
TARGETS = ROSSI[["week", "arrest"]].to_numpy(float)
TABLE = ROSSI.drop(columns=["week", "arrest"])
FEATURES = ((TABLE - TABLE.mean()) / TABLE.std()).to_numpy()


# --- losses


def test_the_cox_loss_is_the_one_by_hand() -> None:
    targets = np.array([[3.0, 1], [1.0, 1], [2.0, 0], [3.0, 1], [5.0, 0]])
    logits = torch.tensor([[0.5], [1.0], [-1.0], [0.0], [0.2]])
    hazards = np.exp([0.5, 1.0, -1.0, 0.0, 0.2])
    at_three, tied = hazards[[0, 3, 4]].sum(), hazards[[0, 3]].sum()
    expected = [np.log(at_three) - 0.5, np.log(hazards.sum()) - 1.0, 0, np.log(at_three - tied / 2) - 0.0, 0]
    loss = TaskLoss("survival", targets, np.ones(5, bool))
    np.testing.assert_allclose(loss.each(logits, torch.arange(5)).numpy(), expected, atol=1e-7)
    assert float(loss(logits, torch.arange(5))) == pytest.approx(np.mean(expected))


def test_the_cox_loss_is_the_partial_likelihood_of_lifelines_and_takes_stacks() -> None:
    weights = np.random.default_rng(0).normal(size=(3, FEATURES.shape[1])) / 3
    loss = TaskLoss("survival", TARGETS, np.ones(len(TARGETS), bool))
    cases = torch.from_numpy(np.random.default_rng(1).permutation(len(TARGETS)))
    logits = torch.from_numpy(weights @ FEATURES.T)[:, cases, None].requires_grad_()
    sums = loss.each(logits, cases).sum(1)
    for each, found in zip(weights, sums.tolist(), strict=True):
        assert -found == pytest.approx(partial_likelihood(FEATURES @ each, TARGETS), abs=1e-8)
    sums.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_the_cox_loss_stays_finite_at_extreme_logits() -> None:
    logits = torch.tensor([[900.0], [-900.0], [0.0], [900.0]], requires_grad=True)
    targets = np.array([[1.0, 1], [1.0, 1], [2.0, 1], [2.0, 0]])
    loss = TaskLoss("survival", targets, np.ones(4, bool)).each(logits, torch.arange(4))
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()


def test_the_mtlr_loss_is_the_one_by_hand() -> None:
    targets = np.array([[1.0, 1], [2.0, 1], [3.0, 1], [2.0, 0], [2.5, 0], [9.0, 0], [0.5, 0]])
    loss = TaskLoss("survival", targets, np.ones(7, bool), likelihood="mtlr")
    assert choose_edges(targets, count_edges(targets)).tolist() == [1, 2, 3]
    a, b, c = 0.3, -0.2, 0.7  # logits of the edges 1, 2, 3
    scores = np.exp([a + b + c, b + c, c, 0])  # event until 1, until 2, until 3, later
    chances = scores / scores.sum()
    expected = [chances[0], chances[1], chances[2], chances[2:].sum(), chances[2:].sum(), chances[3], 1]
    found = loss.each(torch.tensor([a, b, c]).expand(7, 3), torch.arange(7))
    np.testing.assert_allclose(found.numpy(), -np.log(expected), atol=1e-6)


@pytest.mark.parametrize("likelihood", ["cox", "mtlr"])
def test_stacked_survival_losses_are_those_of_each_fit_alone_and_padding_is_in_no_risk_set(likelihood: str) -> None:
    trains = np.ones(len(TARGETS), bool)
    losses = [TaskLoss("survival", part, trains[: len(part)], likelihood=likelihood) for part in (TARGETS, TARGETS)]
    rng = np.random.default_rng(0)
    outputs = count_edges(TARGETS) if likelihood == "mtlr" else 1
    cases = torch.from_numpy(np.stack([rng.permutation(len(TARGETS))[:40] for _ in losses]))
    real = torch.ones(2, 40, dtype=torch.bool)
    cases[1, 30:], real[1, 30:] = cases[1, 0], False
    logits = torch.from_numpy(rng.normal(size=(2, 3, 40, outputs)))
    found = StackedLoss(losses).each(logits, cases, real=real)
    for row, loss in enumerate(losses):
        alone = loss.each(logits[row][:, real[row]], cases[row, real[row]])
        torch.testing.assert_close(found[row][:, real[row]], alone)
    assert found.isfinite().all()
    one = StackedLoss(losses[:1] * 2).each(logits, cases, real=real)
    torch.testing.assert_close(one, found)


def test_a_batch_of_the_cox_loss_takes_its_risk_sets_from_the_batch() -> None:
    loss = TaskLoss("survival", TARGETS, np.ones(len(TARGETS), bool))
    eta = torch.from_numpy(FEATURES @ np.linspace(-0.5, 0.5, FEATURES.shape[1]))[:, None]
    half = torch.arange(0, len(TARGETS), 2)
    expected = -partial_likelihood(eta[half, 0].numpy(), TARGETS[half.numpy()])
    assert float(loss.each(eta[half], half).sum()) == pytest.approx(expected)
    assert float(loss.each(eta, torch.arange(len(TARGETS)))[half].sum()) > expected + 1  # of all they are larger


# --- closed form


@pytest.mark.parametrize("strength", [0.01, 0.1, 10.0])
def test_penalised_cox_is_that_of_lifelines_and_scikit_survival(strength: float) -> None:
    weights = fit_hazards(FEATURES, TARGETS, strength=strength)
    table = TABLE.assign(
        **dict(zip(TABLE.columns, FEATURES.T, strict=True)), week=ROSSI["week"], arrest=ROSSI["arrest"]
    )
    fitter = CoxPHFitter(penalizer=1 / (len(TARGETS) * strength)).fit(table, "week", "arrest")
    np.testing.assert_allclose(weights, fitter.params_.to_numpy(), atol=2e-6)
    truth = Surv.from_arrays(TARGETS[:, 1] == 1, TARGETS[:, 0])
    model = CoxPHSurvivalAnalysis(alpha=1 / strength, ties="efron", tol=1e-12).fit(FEATURES, truth)
    np.testing.assert_allclose(weights, model.coef_, atol=1e-7)
    at = np.array([0.5, 5.0, 10.0, 52.0])
    expected = [0.0, *model.cum_baseline_hazard_(at[1:])]
    baseline = np.exp(estimate_log_baseline(FEATURES @ model.coef_, TARGETS, at))
    np.testing.assert_allclose(baseline, expected, atol=1e-12)


def test_the_readout_fits_survival_and_chooses_a_penalty_that_suits_it() -> None:
    rng = np.random.default_rng(0)
    features, new = rng.normal(size=(200, 30)), rng.normal(size=(400, 30))
    signal = np.repeat([0.6, 0.0], 15)
    targets = np.column_stack([rng.exponential(np.exp(-features @ signal)), rng.random(200) < 0.7])
    holdouts = [rng.random(200) < 0.2 for _ in range(3)]
    learns, noise = LinearReadout(30, 1), LinearReadout(30, 1)
    how: dict[str, Any] = {"kind": "survival", "holdouts": holdouts}
    assert learns.fit(torch.from_numpy(features).float(), targets, **how) > 1
    assert noise.fit(torch.from_numpy(features).float(), targets[rng.permutation(200)], **how) < 1
    eta = learns(torch.from_numpy(new).float())[:, 0].numpy()
    assert np.corrcoef(eta, new @ signal)[0, 1] > 0.9


# --- curves


def test_a_cox_curve_is_lifelines_survival_function() -> None:
    strength, at = 0.1, (5.0, 20.0, 50.0)
    eta = FEATURES @ fit_hazards(FEATURES, TARGETS, strength=strength)
    curve = CoxCurve(at)
    curve.fit(torch.from_numpy(eta)[:, None], TARGETS)
    scores = curve(torch.from_numpy(eta)[:, None]).numpy()
    truth = Surv.from_arrays(TARGETS[:, 1] == 1, TARGETS[:, 0])
    model = CoxPHSurvivalAnalysis(alpha=1 / strength, ties="efron", tol=1e-12).fit(FEATURES, truth)
    expected = np.stack([each(np.array(at)) for each in model.predict_survival_function(FEATURES)])
    np.testing.assert_allclose(scores[:, 1:], expected, atol=1e-6)
    areas = np.trapezoid(np.column_stack([np.ones(len(scores)), expected]), [0.0, *at], axis=1)
    np.testing.assert_allclose(scores[:, 0], 1 - areas / 50, atol=1e-6)


def test_an_mtlr_curve_passes_through_its_edges_and_runs_straight_between_them() -> None:
    targets = np.array([[1.0, 1], [2.0, 1], [4.0, 1], [6.0, 0]])
    curve = MtlrCurve(3, (0.5, 1.0, 3.0, 4.0, 5.0))
    curve.fit(torch.zeros(4, 3), targets)
    assert curve.edges.tolist() == [1, 2, 4]
    scores = np.exp([0.3 - 0.2 + 0.7, -0.2 + 0.7, 0.7, 0])
    chances = scores / scores.sum()
    first, second, last = 1 - chances[0], 1 - chances[:2].sum(), chances[3]
    found = curve(torch.tensor([[0.3, -0.2, 0.7]]))[0].numpy()
    np.testing.assert_allclose(found[1:], [(1 + first) / 2, first, (second + last) / 2, last, last], atol=1e-6)
    assert (np.diff(found[1:]) <= 1e-9).all() and 0 < found[0] < 1


def test_edges_are_quantiles_of_events_and_rise_even_where_times_tie() -> None:
    targets = np.array([[float(time), 1] for time in range(1, 10)] + [[50.0, 0]])
    assert choose_edges(targets, 3).tolist() == [3, 6, 9]
    few = np.array([[2.0, 1], [2.0, 1], [4.0, 1], [9.0, 0]])
    assert (np.diff(choose_edges(few, 4)) > 0).all() and choose_edges(few, 4)[:2].tolist() == [2, 4]
    assert (count_edges(few), count_edges(targets), count_edges(np.ones((900, 2)))) == (3, 3, 20)

"""Runs are compared on the same cases alone; p-values keep their level, and corrections are those of their papers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedkit.bootstrap import two_sided_p
from embedkit.comparison import adjust_p_values, compare_runs
from embedkit.errors import OptionError, RunError
from embedkit.metrics import compute_metrics, paired_difference
from embedkit.outcomes import read_outcomes
from embedkit.runs import Run

CLASSES = {"binary": ("no", "yes"), "multiclass": ("a", "b", "c"), "regression": ()}
MakeRun = Callable[..., Run]


def yes_no(size: int) -> list[str]:
    return ["no" if case % 2 else "yes" for case in range(size)]


def noisy(size: int, noise: float, seed: int) -> np.ndarray:
    signal = np.array([0.35 if case % 2 else 0.65 for case in range(size)])
    return np.clip(signal + noise * np.random.default_rng(seed).normal(size=size), 0, 1)


def test_a_difference_is_that_of_the_metrics_with_both_tests_beside_it(make_run: MakeRun) -> None:
    good, poor = make_run("good", yes_no(120), noisy(120, 0.2, 0)), make_run("poor", yes_no(120), noisy(120, 0.9, 1))
    found = compare_runs([good, poor], resamples=400)
    (contrast,) = found.contrasts
    truth = (np.arange(120) % 2 == 0).astype(int)
    groups = good.predictions["patient_id"].to_list()
    first, second = good.predictions["score"].to_numpy(), poor.predictions["score"].to_numpy()
    expected = paired_difference("binary", truth, first, second, groups, metric="auroc", resamples=400)
    assert contrast.difference == expected
    assert contrast.delong is not None
    assert contrast.delong.value == pytest.approx(expected.value)
    assert contrast.p_value == contrast.p_delong < 0.001
    assert contrast.p_bootstrap == pytest.approx(2 / 401)
    own = compute_metrics("binary", truth, first, groups, resamples=400)["auroc"]
    assert found.scores["grade.good"] == own
    assert (found.metric, found.cases, found.patients, found.notes) == ("auroc", 120, 120, ())


def test_the_table_has_a_row_for_every_pair_and_numbers_alone(make_run: MakeRun) -> None:
    runs = [make_run(f"h{seed}", yes_no(40), noisy(40, 0.4, seed)) for seed in range(4)]
    table = compare_runs(runs, resamples=50).table
    assert table.height == 6
    assert table.columns == [
        "first", "second", "difference", "low", "high", "p_bootstrap", "p_delong", "p_holm", "p_bh",
    ]  # fmt: skip
    assert (table["p_holm"] >= table["p_delong"]).all()
    assert (table["p_bh"] <= table["p_holm"] + 1e-12).all()


def test_a_reference_meets_each_of_the_others_once(make_run: MakeRun) -> None:
    runs = [make_run(f"h{seed}", yes_no(40), noisy(40, 0.4, seed)) for seed in range(3)]
    found = compare_runs(runs, reference="runs/grade.h1", resamples=50)
    assert [(each.first, each.second) for each in found.contrasts] == [
        ("grade.h0", "grade.h1"), ("grade.h2", "grade.h1"),
    ]  # fmt: skip
    assert found.contrasts == compare_runs(runs, reference=runs[1], resamples=50).contrasts


def test_other_metrics_and_other_kinds_use_the_bootstrap_alone(make_run: MakeRun) -> None:
    first, second = make_run("a", yes_no(40), noisy(40, 0.2, 0)), make_run("b", yes_no(40), noisy(40, 0.5, 1))
    (contrast,) = compare_runs([first, second], metric="brier", resamples=50).contrasts
    assert (contrast.delong, contrast.p_delong) == (None, None)
    assert contrast.p_value == contrast.p_bootstrap
    values = [float(case) for case in range(30)]
    numbers = [
        make_run(head, values, np.array(values) + noise, kind="regression")
        for head, noise in (("near", 1.0), ("far", 5.0))
    ]
    found = compare_runs(numbers, resamples=50)
    assert found.metric == "mae"
    assert found.contrasts[0].difference.value == -4.0
    rng = np.random.default_rng(0)
    classes = [CLASSES["multiclass"][case % 3] for case in range(45)]
    several = [make_run(head, classes, rng.dirichlet(np.ones(3), 45), kind="multiclass") for head in ("a", "b")]
    assert compare_runs(several, resamples=50).contrasts[0].p_delong is None


def test_repeats_of_the_folds_are_averaged_not_pooled(make_run: MakeRun) -> None:
    size, repeats = 30, 3
    truth = (np.arange(size) % 2 == 0).astype(int)
    scores = [np.stack([noisy(size, 0.5, 10 * head + repeat) for repeat in range(repeats)]) for head in range(2)]
    runs = []
    for head in range(2):
        parts = [make_run(f"h{head}", yes_no(size), row) for row in scores[head]]
        tables = [part.predictions.with_columns(pl.col("fold") + 2 * at) for at, part in enumerate(parts)]
        runs.append(
            dataclasses.replace(parts[0], predictions=pl.concat(tables).sample(fraction=1, shuffle=True, seed=1))
        )
    outcomes = read_outcomes("binary", CLASSES["binary"], runs[0].predictions)
    np.testing.assert_array_equal(outcomes.scores, scores[0])
    found = compare_runs(runs, resamples=40)
    groups = [f"p{case:03}" for case in range(size)]
    single = [
        [compute_metrics("binary", truth, row, groups, resamples=0)["auroc"].value for row in each] for each in scores
    ]
    assert found.scores["grade.h0"].value == pytest.approx(np.mean(single[0]))
    (contrast,) = found.contrasts
    assert contrast.delong is not None
    assert contrast.delong.value == pytest.approx(np.mean(single[0]) - np.mean(single[1]))
    assert contrast.difference.value == pytest.approx(contrast.delong.value)
    assert found.cases == size


def test_runs_with_other_folds_are_compared_with_a_note(make_run: MakeRun) -> None:
    first, second = make_run("a", yes_no(20), noisy(20, 0.4, 0)), make_run("b", yes_no(20), noisy(20, 0.4, 1))
    moved = dataclasses.replace(second, predictions=second.predictions.with_columns(fold=1 - pl.col("fold")))
    (note,) = compare_runs([first, moved], resamples=20).notes
    assert note.startswith("The folds of grade.b differ from those of grade.a")


def test_runs_of_one_name_are_told_apart_by_their_folders(make_run: MakeRun) -> None:
    first = make_run("a", yes_no(20), noisy(20, 0.4, 0))
    second = dataclasses.replace(make_run("a", yes_no(20), noisy(20, 0.4, 1)), path=Path("other/grade.a"))
    assert compare_runs([first, second], resamples=20).names == ("runs/grade.a", "other/grade.a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"name": "stage"},
            r"run grade.a learned grade \(binary\) and run stage.b stage \(binary\), expected one target",
        ),
        ({"classes": ("yes", "no")}, "run grade.a has the classes no, yes and run grade.b yes, no, expected the same"),
        ({"patients": ["p000"] * 20}, r"name other patients for 19 cases \(c001, c002, .*, expected the same"),
        ({"target": ["yes", *yes_no(20)[:-1]]}, r"other labels for 19 cases \(c001, .*expected the same"),
        ({"size": 18}, r"run grade.a was tested on 2 cases \(c018, c019\) that run grade.b was not, expected the same"),
        ({"size": 22}, r"run grade.b was tested on 2 cases \(c020, c021\) that run grade.a was not, expected the same"),
    ],
)
def test_runs_about_other_things_are_refused(make_run: MakeRun, change: dict[str, Any], message: str) -> None:
    size = change.pop("size", 20)
    target = change.pop("target", yes_no(size))
    other = make_run("b", target, noisy(size, 0.4, 1), **change)
    with pytest.raises(RunError, match=message):
        compare_runs([make_run("a", yes_no(20), noisy(20, 0.4, 0)), other])


def test_wrong_options_are_refused(make_run: MakeRun) -> None:
    first, second = make_run("a", yes_no(20), noisy(20, 0.4, 0)), make_run("b", yes_no(20), noisy(20, 0.4, 1))
    with pytest.raises(OptionError, match="1 run given to compare, expected two or more"):
        compare_runs([first])
    with pytest.raises(OptionError, match=r"run runs/grade\.a was given twice"):
        compare_runs([first, first])
    with pytest.raises(OptionError, match="a binary task has no metric mae; expected one of auroc"):
        compare_runs([first, second], metric="mae")
    with pytest.raises(OptionError, match=r"the reference .*grade.c is none of the runs compared \(grade.a, grade.b\)"):
        compare_runs([first, second], reference="runs/grade.c")
    with pytest.raises(OptionError, match="0 resamples were asked for, expected 1 or more"):
        compare_runs([first, second], resamples=0)
    with pytest.raises(RunError, match="nowhere is no run folder"):
        compare_runs([first, "nowhere"])


# --- p-values


def test_corrections_are_those_of_the_papers() -> None:
    p_values = [0.01, 0.04, 0.03, 0.005]
    np.testing.assert_allclose(adjust_p_values(p_values, method="holm"), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(adjust_p_values(p_values, method="bh"), [0.02, 0.04, 0.04, 0.02])
    np.testing.assert_allclose(adjust_p_values([0.02, math.nan, 0.5], method="holm"), [0.04, math.nan, 0.5])
    np.testing.assert_allclose(adjust_p_values([0.02, math.nan, 0.5], method="bh"), [0.04, math.nan, 0.5])
    assert np.isnan(adjust_p_values([math.nan], method="bh")).all()
    with pytest.raises(OptionError, match="no correction is called 'bonferroni'; expected holm or bh"):
        adjust_p_values([0.1], method="bonferroni")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_stepping_down_rejects(p_values: list[float]) -> None:
    level, still = 0.05, True
    rejected = np.zeros(len(p_values), bool)
    for step, place in enumerate(np.argsort(p_values, kind="stable")):
        still = still and p_values[place] * (len(p_values) - step) <= level
        rejected[place] = still
    np.testing.assert_array_equal(adjust_p_values(p_values, method="holm") <= level, rejected)


def test_the_bootstrap_p_value_agrees_with_the_interval_and_is_never_zero() -> None:
    assert two_sided_p(np.full(99, 0.5)) == pytest.approx(0.02)
    assert two_sided_p(np.zeros(99)) == 1.0
    assert two_sided_p(np.array([-1.0] * 30 + [1.0] * 69 + [math.nan] * 5)) == pytest.approx(2 * 31 / 100)
    assert math.isnan(two_sided_p(np.array([math.nan])))


def test_two_heads_alike_are_seldom_told_apart(make_run: MakeRun) -> None:
    found = []
    for round_ in range(60):
        runs = [make_run(f"h{head}", yes_no(60), noisy(60, 0.5, 2 * round_ + head)) for head in range(2)]
        (contrast,) = compare_runs(runs, resamples=200).contrasts
        found.append((contrast.p_value, contrast.p_bootstrap))
    below = (np.array(found) < 0.05).sum(axis=0)
    assert (below <= 8).all()  # 3 expected; 8 or fewer in all but 0.2 % of such series

"""Survival tasks: a time and an event become targets, every part of a split holds events, wrong columns are named."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from embedkit.answers import choose_class, score_columns, word_answer
from embedkit.errors import EmbedkitError, OptionError, TaskError
from embedkit.metrics import METRICS, compute_metrics, paired_difference
from embedkit.survival import weigh_concordance
from embedkit.tasks import folds_from_column, inner_split, make_folds, make_task

CASES = 60


def build_labels(cases: int = CASES) -> pl.DataFrame:
    """Two cases per patient, a third with the event, times without order."""
    numbers = np.arange(cases)
    return pl.DataFrame(
        {
            "case_id": [f"c{number:02}" for number in numbers],
            "months": (numbers * 7 % cases + 1).astype(float),
            "died": (numbers // 2 % 3 == 0).astype(int),
        }
    )


LABELS = build_labels()
USABLE = pl.DataFrame({"case_id": LABELS["case_id"], "patient_id": [f"p{number // 2:02}" for number in range(CASES)]})


def make(labels: pl.DataFrame = LABELS, **options: Any) -> Any:
    return make_task(labels, "months", USABLE, **{"event": "died", **options})[0]


def test_a_time_and_an_event_make_the_targets_of_a_survival_task() -> None:
    task = make()
    assert (task.kind, task.event, task.classes, task.outputs) == ("survival", "died", (), 1)
    np.testing.assert_array_equal(task.targets[:, 0], LABELS["months"])
    np.testing.assert_array_equal(task.targets[:, 1], LABELS["died"])
    assert task.patients_per_state == (10,)


@pytest.mark.parametrize("values", [[True, False], ["1", "0"], ["true", "False"], [1.0, 0.0]])
def test_events_may_be_truth_values_text_or_numbers(values: list[Any]) -> None:
    labels = LABELS.with_columns(died=pl.Series([values[0] if each else values[1] for each in LABELS["died"]]))
    np.testing.assert_array_equal(make(labels).targets, make().targets)


def test_a_case_without_time_or_without_event_is_unlabelled() -> None:
    labels = LABELS.with_columns(
        months=pl.when(pl.col("case_id") != "c03").then("months"), died=pl.when(pl.col("case_id") != "c05").then("died")
    )
    task, report = make_task(labels, "months", USABLE, event="died")
    assert report.unlabelled == ("c03", "c05")
    assert len(task.case_ids) == CASES - 2


def test_survival_is_stated_at_deciles_of_the_event_times_or_at_the_times_given() -> None:
    events = LABELS.filter(pl.col("died") == 1)["months"].to_numpy()
    expected = sorted({float(f"{time:.3g}") for time in np.quantile(events, np.linspace(0.1, 0.9, 9))})
    assert make().times == tuple(expected)
    assert make(times=(12, 24)).times == (12.0, 24.0)
    assert score_columns("survival", (), (12.0, 24.5)) == ("score", "survival_12", "survival_24.5")


def with_value(column: str, value: Any) -> pl.DataFrame:
    return LABELS.with_columns(pl.when(pl.col("case_id") == "c04").then(pl.lit(value)).otherwise(column).alias(column))


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (with_value("months", -3.0), {}, r"months is 0 or below in 1 case \(c04: -3\), expected times above 0"),
        (with_value("months", 0.0), {}, r"months is 0 or below in 1 case \(c04: 0\)"),
        (with_value("months", float("nan")), {}, r"months is NaN or infinite in 1 case \(c04\)"),
        (with_value("died", 2), {}, r"event column died is neither 0 nor 1 in 1 case \(c04: 2\), expected 1 where"),
        (LABELS.with_columns(died=0), {}, r"event column died is 0 in all 60 labelled cases, expected 1 for some"),
        (LABELS, {"event": "dies"}, r"label table has no column dies; did you mean died\?"),
        (LABELS, {"event": None, "kind": "survival"}, r"survival task, but no event column was named; name the"),
        (LABELS, {"kind": "binary"}, r"event column died given for target months, which is no survival"),
        (LABELS, {"event": None, "times": (3,)}, r"times of survival given for target months, which is no survival"),
        (LABELS, {"classes": ("1", "2")}, r"named for a survival task, which has none"),
        (LABELS, {"times": (24, 12)}, r"at the times 24, 12; expected one or more above 0, each later"),
        (LABELS, {"times": ()}, r"at the times none; expected one or more"),
        (LABELS, {"times": (60,)}, r"stated at 60, but no case was followed longer than 60; expected times below"),
        (LABELS.with_columns(died=(pl.col("case_id") == "c07").cast(int)), {},
         r"an event has 1 case \(c07\) of 1 patient, but learning and testing it take at least 2 patients; add cases"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_columns_is_said(labels: pl.DataFrame, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EmbedkitError, match=message):
        make(labels, **options)


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_every_fold_and_every_inner_split_has_events_and_whole_patients(folds: int) -> None:
    task = make()
    dealt = make_folds(task, folds, seed=3)
    for fold in range(folds):
        assert task.targets[dealt == fold, 1].any()
        held = inner_split(task, dealt != fold, fraction=0.2, seed=1)
        assert task.targets[held, 1].any() and task.targets[(dealt != fold) & ~held, 1].any()
    patients = np.asarray(task.patient_ids)
    assert all(len(set(dealt[patients == patient])) == 1 for patient in set(task.patient_ids))


def test_events_and_times_are_spread_over_the_folds() -> None:
    task = make()
    dealt = make_folds(task, 5, seed=0)
    counts = [int(task.targets[dealt == fold, 1].sum()) for fold in range(5)]
    assert min(counts) >= 2 and max(counts) <= 6  # 20 events of 10 patients
    means = [task.targets[dealt == fold, 0].mean() for fold in range(5)]
    assert max(means) - min(means) < 12  # of times 1..60


def test_folds_without_an_event_are_refused_in_words() -> None:
    with pytest.raises(TaskError, match=r"an event occurs in 10 patients, fewer than the 11 folds, .* or add cases"):
        make_folds(make(), 11, seed=0)
    split = LABELS.with_columns(site=pl.when(pl.col("died") == 1).then(pl.lit("a")).otherwise(pl.lit("b")))
    with pytest.raises(TaskError, match="without a the training part lacks an event of target months"):
        folds_from_column(make(), split, "site")


def scored(task: Any, seed: int = 0) -> np.ndarray:
    risk = np.random.default_rng(seed).normal(size=len(task.case_ids)) - task.targets[:, 0] / 40
    return np.column_stack([risk, np.exp(-np.exp(risk)[:, None] * np.asarray(task.times) / 60)])


def test_survival_metrics_have_intervals_over_patients() -> None:
    task = make()
    scores = scored(task)
    found = compute_metrics("survival", task.targets, scores, task.patient_ids, times=task.times, resamples=200)
    assert tuple(found) == METRICS["survival"]
    followed, happened = task.targets[:, 0], task.targets[:, 1] == 1
    assert found["c_index"].value == weigh_concordance(followed, happened, scores[:, 0])(np.ones((1, CASES)))[0] > 0.6
    for interval in found.values():
        assert interval.low < interval.value < interval.high
    other = paired_difference(
        "survival", task.targets, scores, scores, task.patient_ids, metric="c_index", times=task.times, resamples=20
    )
    assert (other.value, other.low, other.high) == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda task, scores: (task.targets, scores[:, :-1]), r"expected scores \[cases \d+\], targets \[cases 2\]"),
        (lambda task, scores: (task.targets[:, 0], scores), r"expected scores \[cases \d+\], targets \[cases 2\]"),
        (
            lambda task, scores: (-task.targets, scores),
            r"survival targets begin with -1 and -1; expected of every case",
        ),
        (lambda task, scores: (task.targets, scores * 2), r"expected probabilities"),
    ],
)
def test_scores_that_do_not_fit_a_survival_task_are_refused(change: Any, message: str) -> None:
    task = make()
    targets, scores = change(task, scored(task))
    with pytest.raises(TaskError, match=message):
        compute_metrics("survival", targets, scores, task.patient_ids, times=task.times)


def test_an_answer_says_risk_and_chances() -> None:
    scores = np.array([0.42, 0.8, 0.55])
    assert choose_class("survival", (), scores, None) == 0
    words = word_answer("survival", (), "months", scores, 0, times=(12.0, 24.0))
    assert words == "months: risk 0.42, chance to be without the event at 12: 0.80, 24: 0.55"


def test_survival_without_an_event_column_is_an_option_error() -> None:
    with pytest.raises(OptionError):
        make(event=None, kind="survival")

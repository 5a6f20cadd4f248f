"""Survival from end to end: breast cancer of lifelines' bundled table, its covariates as the tokens of a cache."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from embedkit.cli.main import app
from typer.testing import CliRunner

from embedkit.cache import Cache, StackTokens, open_cache
from embedkit.comparison import compare_runs
from embedkit.errors import HeadError, OptionError, RunError
from embedkit.evaluation import evaluate
from embedkit.evaluationpage import write_evaluation
from embedkit.exporting import export_run
from embedkit.folder import create_cache, write_shard
from embedkit.metrics import METRICS
from embedkit.recipe import Recipe
from embedkit.runs import open_run, predict
from embedkit.survivalsection import survival_section
from embedkit.training import Training, train

pytestmark = pytest.mark.usefixtures("one_thread")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lifelines import KaplanMeierFitter
    from lifelines.datasets import load_gbsg2
    from lifelines.statistics import multivariate_logrank_test
    from sksurv.metrics import brier_score
    from sksurv.util import Surv

CASES = 150
QUICK = {"epochs": 25, "learning_rate": 1e-2}
TIMES = (10.0, 25.0, 45.0)


def build_cache(folder: Path, table: Any, first: int = 0) -> Cache:
    """One case per row: two slices whose tokens are the standardised covariates, and those with a little noise."""
    covariates = np.log1p(table[["age", "tsize", "pnodes", "progrec", "estrec"]].to_numpy(float))
    covariates = (covariates - covariates.mean(0)) / covariates.std(0)
    recipe = Recipe("tiny", "builtin:1", ("cls:2",), 32, (0.5,), (0.5,), preview=0)
    create_cache(folder, recipe)
    rng = np.random.default_rng(0)
    stacks = [
        StackTokens(
            case_id=f"c{first + number:03}", patient_id=f"p{first + number:03}", view="t1", plane="axial",
            sources=("t1",), indices=np.arange(2, dtype=np.int32), positions_mm=np.arange(2, dtype=np.float32),
            blank=np.zeros(2, bool), plane_shape=(8, 8), box=(0, 0, 8, 8), source_shape=(2, 8, 8),
            source_affine=np.eye(4), source_bytes=1, source_digest=str(number),
            tokens={"cls:2": (row + 0.1 * rng.normal(size=(2, len(row)))).astype(np.float16)},
        )
        for number, row in enumerate(covariates)
    ]  # fmt: skip
    write_shard(folder, recipe, stacks)
    return open_cache(folder)


def build_labels(table: Any, first: int = 0) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "case_id": [f"c{first + number:03}" for number in range(len(table))],
            "months": table["time"].to_numpy(float) / 30,
            "recurred": table["cens"].to_numpy(),
            "old": (table["age"] > 52).to_numpy().astype(int),
        }
    )


GBSG2 = load_gbsg2()
LABELS = build_labels(GBSG2[:CASES])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return build_cache(tmp_path_factory.mktemp("survival") / "cache", GBSG2[:CASES])


@pytest.fixture(scope="module")
def trained(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return run_training(cache, tmp_path_factory.mktemp("survival") / "runs", heads=("cox", "mtlr"))


def run_training(cache: Cache, out: Path, **options: Any) -> Training:
    settings: dict[str, Any] = {
        "targets": "months", "event": "recurred", "times": TIMES, "folds": 2, "heads": (), "resamples": 50,
        "fit_options": QUICK, "device": "cpu",
    }  # fmt: skip
    return train(cache, LABELS, out=out, **settings | options)


def test_heads_and_baselines_rank_who_recurs_sooner(trained: Training) -> None:
    assert trained.table["head"].to_list() == ["logistic", "raptor", "cox", "mtlr"]
    for run in trained.runs:
        assert tuple(run.metrics) == METRICS["survival"]
        assert run.metrics["c_index"].value > 0.58, run.head
        assert run.metrics["integrated_brier"].value < 0.2, run.head
    mtlr = trained.runs[-1]
    events = LABELS["recurred"].sum()
    assert mtlr.record.outputs == int(np.ceil(np.sqrt(events)))


def test_predictions_hold_time_event_risk_and_falling_chances(trained: Training) -> None:
    for run in trained.runs:
        columns = ["case_id", "patient_id", "fold", "target", "event", "score", *(f"survival_{t:g}" for t in TIMES)]
        assert run.predictions.columns == columns
        chances = run.predictions.select(columns[6:]).to_numpy()
        assert (np.diff(chances, axis=1) <= 1e-9).all() and chances.min() >= 0 and chances.max() <= 1
        areas = np.trapezoid(np.column_stack([np.ones(len(chances)), chances]), [0.0, *TIMES], axis=1)
        np.testing.assert_allclose(run.predictions["score"], 1 - areas / TIMES[-1], atol=1e-6)
        known = LABELS.select("case_id", pl.col("months").alias("target"), pl.col("recurred").alias("event"))
        assert run.predictions.select("case_id", "target", "event").sort("case_id").equals(known)


def test_a_run_predicts_evaluates_explains_and_compares(trained: Training, tmp_path: Path) -> None:
    others = GBSG2[CASES : CASES + 60]
    cache, labels = build_cache(tmp_path / "other", others, CASES), build_labels(others, CASES)
    for name in ("logistic", "cox", "mtlr"):
        run = open_run(next(each.path for each in trained.runs if each.head == name))
        table = predict(run, cache, device="cpu")
        assert table.columns == ["case_id", "patient_id", "score", "survival_10", "survival_25", "survival_45"]
        found = evaluate(run, cache, labels, device="cpu", resamples=50).metrics
        assert tuple(found) == METRICS["survival"] and found["c_index"].low < found["c_index"].value
        own = evaluate(run, labels=LABELS, subgroups=["old"], resamples=50)
        assert own.metrics["integrated_brier"].value == pytest.approx(run.metrics["integrated_brier"].value)
        assert {group.value for group in own.subgroups} == {"0", "1"}
        shown = run.find_evidence(cache, f"c{CASES}")
        assert shown.answer.startswith("months: risk 0.") and "25: 0." in shown.answer
        assert shown.scores["t1/axial"].shape == (2, 1, 1) and np.abs(shown.scores["t1/axial"]).max() > 0
    compared = compare_runs([each.path for each in trained.runs[2:]], resamples=50)
    assert compared.metric == "c_index"


def test_survival_and_other_targets_train_in_one_call(cache: Cache, tmp_path: Path) -> None:
    found = run_training(
        cache, tmp_path, targets=["old", "months"], event={"months": "recurred"}, heads=["cox", "linear"], times=None
    )
    pairs = found.table.select("target", "head").rows()
    assert pairs == [(t, h) for t, own in (("old", "linear"), ("months", "cox")) for h in ("logistic", "raptor", own)]
    assert found.table.filter(pl.col("head") == "linear")["auroc"][0] > 0.9
    assert len(found.runs[-1].record.times) == 9


@pytest.mark.parametrize("trunk", ["linear", "grid"])
def test_another_head_can_be_the_trunk(cache: Cache, tmp_path: Path, trunk: str) -> None:
    (run,) = (
        each
        for each in run_training(cache, tmp_path, heads=["cox"], head_options={"cox": {"trunk": trunk}}).runs
        if each.head == "cox"
    )
    assert run.metrics["c_index"].value > 0.5
    assert type(open_run(run.path).members[0].head.trunk).__name__.lower() == f"{trunk}head"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": ["abmil"]}, HeadError, r"head 'abmil' learns binary, .* but target months is a survival task; heads"
         r" that learn it: cox, .*logistic"),
        ({"heads": ["cox"], "event": None, "targets": "old", "times": None}, HeadError, "'cox' learns survival, but"),
        ({"heads": ["cox"], "head_options": {"cox": {"trunk": "logistic"}}}, HeadError, "'logistic' is fitted in"),
        ({"heads": ["cox"], "head_options": {"cox": {"trunk": "mtlr"}}}, HeadError, "'mtlr' has a trunk itself"),
        ({"event": {"month": "recurred"}}, OptionError, "event columns were given for month, but targets are months"),
        ({"kind": "binary"}, OptionError, "event column recurred given for target months, which is no survival task"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(
    cache: Cache, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_training(cache, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_survival_resumes_sweeps_and_streams(cache: Cache, trained: Training, tmp_path: Path) -> None:
    out = trained.runs[0].path.parent
    before = {run.head: run.path.stat().st_ino for run in trained.runs}
    again = run_training(cache, out, heads=("cox", "mtlr"), resume=True)
    assert {run.head: run.path.stat().st_ino for run in again.runs} == before
    with pytest.raises(RunError, match="times"):
        run_training(cache, out, heads=("cox", "mtlr"), times=(10.0, 20.0), resume=True)
    streamed = run_training(cache, tmp_path / "streamed", heads=("cox",), storage="stream")
    expected = next(run for run in trained.runs if run.head == "cox").predictions["score"]
    np.testing.assert_allclose(streamed.runs[-1].predictions["score"], expected, atol=1e-4)
    quick = QUICK | {"epochs": 4}
    swept = run_training(cache, tmp_path / "swept", heads=("cox",), sweep="small", fit_options=quick).runs[-1]
    assert {len(member["ranking"]) for member in swept.record.members} == {len(swept.record.sweep["candidates"])}


def test_an_exported_survival_run_gives_the_scores_of_predict(cache: Cache, trained: Training, tmp_path: Path) -> None:
    for run in trained.runs[2:]:
        exported = export_run(run, tmp_path / f"{run.head}.pt2", format="torch")
        assert exported.difference < 1e-3
        assert exported.description["outputs"][0]["columns"] == ["score", "survival_10", "survival_25", "survival_45"]


def test_the_report_parts_cases_by_predicted_risk_and_follows_the_brier_score(
    trained: Training, tmp_path: Path
) -> None:
    found = evaluate(trained.runs[0], resamples=20)
    section = survival_section(found.outcomes, "months", seed=0)
    table = section.table
    assert table is not None and [row[0] for row in table.rows] == ["10", "25", "45"]
    targets, scores = found.outcomes.targets, found.outcomes.scores[0]
    truth = Surv.from_arrays(targets[:, 1] == 1, targets[:, 0])
    _, expected = brier_score(truth, truth, scores[:, 1:], TIMES)
    np.testing.assert_allclose([row[1].value for row in table.rows], expected, atol=1e-6)
    share = KaplanMeierFitter().fit(targets[:, 0], targets[:, 1]).predict(TIMES).to_numpy()
    _, plain = brier_score(truth, truth, np.tile(share, (CASES, 1)), TIMES)
    np.testing.assert_allclose([row[2] for row in table.rows], plain, atol=1e-6)
    third = np.searchsorted(np.quantile(scores[:, 0], [1 / 3, 2 / 3]), scores[:, 0])
    p = multivariate_logrank_test(targets[:, 0], third, targets[:, 1]).p_value
    assert f"p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}." in section.figures[0].caption
    page = write_evaluation(tmp_path / "months.html", found).read_text(encoding="utf-8")
    assert "Survival by predicted risk" in page and page.count("data:image/png") == 2


def test_the_command_line_trains_survival(cache: Cache, tmp_path: Path) -> None:
    LABELS.write_csv(tmp_path / "labels.csv")
    base = [
        "train", str(cache.path), "--labels", str(tmp_path / "labels.csv"), "--target", "months", "--kind", "survival",
        "--folds", "2", "--device", "cpu", "--head", "cox", "--json", "-o",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [*base, str(tmp_path / "runs"), "--event", "recurred", "--times", "10,25"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["head"] for row in rows] == ["logistic", "raptor", "cox"] and rows[0]["c_index"] > 0.5
    assert "survival_25" in open_run(tmp_path / "runs" / "months.cox").predictions.columns
    without = CliRunner().invoke(app, [*base, str(tmp_path / "none")])
    assert "no event column was named" in str(without.exception)
    wrong = CliRunner().invoke(app, [*base, str(tmp_path / "none"), "--event", "recurred", "--times", "soon"])
    assert wrong.exit_code == 2 and "'soon' is no number" in wrong.output
    several = CliRunner().invoke(app, [*base, str(tmp_path / "none"), "--event", "months=recurred", "--event", "old"])
    assert several.exit_code == 2 and "'old' among several event columns" in several.output

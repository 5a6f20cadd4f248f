"""Folds that all targets of a training have in common: one partition, equal inner splits, common runs of the head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from embedkit.cli.main import app
from typer.testing import CliRunner

from embedkit.cache import Cache
from embedkit.crossfitting import cross_fit
from embedkit.errors import OptionError, RunError, TaskError
from embedkit.fitting import FitOptions
from embedkit.foldjobs import FoldedTask, make_job
from embedkit.gradientfits import GradientFitter
from embedkit.headplans import HeadPlan
from embedkit.jointfitting import deal_together
from embedkit.members import complete_options
from embedkit.preparation import Preparation
from embedkit.runs import open_run
from embedkit.sweeps import Candidate
from embedkit.tasks import Task, make_folds, make_task
from embedkit.training import Training, train

CPU = torch.device("cpu")
PATIENTS = {f"c{case:02}": f"p{case // 2:02}" for case in range(48)}
NUMBERS = np.arange(48)
LABELS = pl.DataFrame(
    {
        "case_id": list(PATIENTS),
        "patient_id": list(PATIENTS.values()),
        "ill": NUMBERS // 2 % 2,
        "sort": [("a", "b", "c")[case // 2 % 3] for case in NUMBERS],
        "size": [10.0 + 3 * (case // 2 % 2) + case % 5 / 10 if case < 30 else None for case in NUMBERS],
        "site": [f"s{case // 12}" for case in NUMBERS],
    }
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, telling_cache: Callable[..., Cache]) -> Cache:
    """Channel 0 shows who is ill, channels 1 to 3 which sort it is."""
    return telling_cache(tmp_path_factory.mktemp("samefolds") / "cache", PATIENTS, 2)


def run_training(cache: Cache, out: Path, **options: Any) -> Training:
    settings: dict[str, Any] = {
        "targets": ("ill", "sort", "size"), "heads": ("query",), "folds": 4, "resamples": 20, "device": "cpu",
        "fit_options": {"epochs": 4, "batch_size": 8}, "same_folds": True,
    }  # fmt: skip
    return train(cache, LABELS, out=out, **settings | options)


@pytest.fixture(scope="module")
def trained(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return run_training(cache, tmp_path_factory.mktemp("samefolds") / "runs")


def test_patients_of_all_targets_are_in_one_partition_with_every_class_in_every_fold(trained: Training) -> None:
    found = pl.concat([run.predictions.select("patient_id", "fold") for run in trained.runs]).unique()
    assert found.height == found["patient_id"].n_unique() == 24
    for run in trained.runs:
        classes = run.predictions.group_by("fold").agg(pl.col("target").n_unique()).sort("fold")
        assert classes["fold"].to_list() == [0, 1, 2, 3]
        if run.record.classes:
            assert (classes["target"] == len(run.record.classes)).all(), run.name


def test_the_same_cases_are_held_out_for_all_targets_that_have_them(trained: Training) -> None:
    held = {
        run.record.target: set(run.inner.select("fold", "case_id").iter_rows())
        for run in trained.runs
        if run.head == "query"
    }
    assert held["ill"] == held["sort"]
    assert held["size"] == {(fold, case) for fold, case in held["ill"] if int(case[1:]) < 30}


def test_a_run_says_which_targets_have_its_folds(trained: Training, cache: Cache, tmp_path: Path) -> None:
    ill = next(run for run in trained.runs if run.name == "ill.query")
    assert ill.record.folded_with == ("sort", "size")
    assert open_run(ill.path).record.folded_with == ("sort", "size")
    alone = run_training(cache, tmp_path / "runs", same_folds=False, targets=("ill",))
    assert all(run.record.folded_with == () for run in alone.runs)


def make_tasks(cache: Cache, names: tuple[str, ...] = ("ill", "site01")) -> list[Task]:
    labels = LABELS.with_columns(site01=(pl.col("site") == "s1").cast(pl.Int64))
    return [make_task(labels, name, cache.stacks.select("case_id", "patient_id"))[0] for name in names]


def deal(task: Task) -> FoldedTask:
    return FoldedTask(task, make_folds(task, 4, seed=0)[None])


def prepare(cache: Cache, head: str) -> tuple[Preparation, HeadPlan]:
    fit = FitOptions(epochs=4, batch_size=8)
    plan = HeadPlan(head, (Candidate(("cls:2",), complete_options(head, {}), fit),))
    return Preparation(cache, [plan], sorted(PATIENTS), CPU), plan


@pytest.mark.parametrize("head", ["query", "abmil", "mlp"])
def test_a_fit_beside_those_of_other_targets_becomes_what_it_becomes_alone(cache: Cache, head: str) -> None:
    dealt = list(deal_together(make_tasks(cache), deal).values())
    preparation, plan = prepare(cache, head)
    both = cross_fit(preparation, [(plan, target) for target in dealt], seed=0)
    for target, beside in zip(dealt, both, strict=True):
        (alone,) = cross_fit(preparation, [(plan, target)], seed=0)
        np.testing.assert_allclose(beside.scores, alone.scores, rtol=1e-4, atol=1e-5)
    assert not np.allclose(both[0].scores, both[1].scores, atol=1e-2)


def test_a_case_is_read_once_for_all_targets(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    preparation, plan = prepare(cache, "query")
    store = preparation.store(plan, plan.candidates[0])
    cases = 0

    def read(places: Any, *given: Any, **options: Any) -> Any:
        nonlocal cases
        cases += len(places)
        return real(places, *given, **options)

    real = store.batch
    monkeypatch.setattr(store, "batch", read)
    dealt = list(deal_together(make_tasks(cache), deal).values())
    found = []
    for targets in (dealt[:1], dealt, [deal(target.task) for target in dealt]):
        fits = GradientFitter(preparation, 0, seeds=1)
        jobs = [make_job(plan, target, fold, seed=0, device=CPU) for target in targets for fold in range(4)]
        cases = 0
        fits.fit(jobs, on_done=lambda _job: None)
        found.append(cases)
    one, together, apart = found
    assert together == pytest.approx(one, rel=0.1)  # a judged part is padded to the longest of its rows
    assert apart > 1.5 * one


def test_a_split_by_a_column_holds_out_the_same_cases_too(cache: Cache, tmp_path: Path) -> None:
    runs = run_training(cache, tmp_path / "runs", targets=("ill", "sort"), group_by="site").runs
    held = {run.name: set(run.inner.select("fold", "case_id").iter_rows()) for run in runs if run.head == "query"}
    assert held["ill.query"] == held["sort.query"]
    with pytest.raises(RunError, match="folded_with"):
        run_training(cache, tmp_path / "runs", targets=("ill", "sort"), group_by="site", same_folds=False, resume=True)
    again = run_training(cache, tmp_path / "runs", targets=("ill", "sort"), group_by="site", resume=True)
    assert [run.record.seconds for run in again.runs] == [run.record.seconds for run in runs]


def test_a_joint_head_beside_has_the_folds_of_all_targets(cache: Cache, tmp_path: Path) -> None:
    runs = run_training(cache, tmp_path / "runs", heads=("query", "multitask")).runs
    found = pl.concat([run.predictions.select("patient_id", "fold") for run in runs]).unique()
    assert found.height == 24
    by_head = {run.head: set(run.inner.select("fold", "case_id").iter_rows()) for run in runs if run.name[:3] == "ill"}
    assert by_head["multitask"] == by_head["query"]


def test_what_cannot_have_the_same_folds_is_refused(trained: Training, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="same folds were asked for a single target, expected two"):
        run_training(cache, tmp_path / "runs", targets="ill")
    with pytest.raises(OptionError, match="starts from a run keeps its folds"):
        run_training(cache, tmp_path / "runs", start=trained.runs[0].path, heads=None)


def test_a_target_none_of_whose_cases_is_held_out_is_refused_by_name(cache: Cache) -> None:
    both = deal_together(make_tasks(cache), deal)
    whole = both["ill"].joint
    assert whole is not None
    held = whole.hold_out(0, fraction=0.2, seed=1000)
    few = LABELS.filter(~pl.Series(held))
    task, _ = make_task(few, "size", cache.stacks.select("case_id", "patient_id"))
    rows = np.searchsorted(np.asarray(whole.task.case_ids), np.asarray(task.case_ids))
    with pytest.raises(TaskError, match=r"target size: of the cases held out of fold 0 .* none has a label"):
        FoldedTask(task, whole.folds[:, rows], whole).hold_out(0, fraction=0.2, seed=1000)


def test_a_target_whose_cases_all_train_is_refused_by_name(cache: Cache, tmp_path: Path) -> None:
    labels = LABELS.with_columns(
        part=pl.Series(["test" if case >= 36 else "train" for case in NUMBERS]),
        early=pl.Series([case // 2 % 2 if case < 30 else None for case in NUMBERS]),
    )
    with pytest.raises(TaskError, match="target early: every labelled case is in training alone"):
        train(cache, labels, targets=["ill", "early"], out=tmp_path, heads=["mlp"], split="part", same_folds=True)


def test_the_command_takes_the_option(cache: Cache, tmp_path: Path) -> None:
    LABELS.write_csv(tmp_path / "labels.csv")
    words = ["train", str(cache.path), "--labels", str(tmp_path / "labels.csv"), "--target", "ill", "--target", "sort"]
    words += ["--head", "mlp", "--folds", "3", "--same-folds", "-o", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert open_run(tmp_path / "runs" / "sort.mlp").record.folded_with == ("ill",)

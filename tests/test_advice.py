"""Advice: finds the token set that knows, is judged by cases that had no part in the choice, keeps to its budget."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from embedkit.cli.main import app
from typer.testing import CliRunner

from embedkit.advice import Advice, AdviceProgress, advise
from embedkit.cache import Cache, StackTokens, open_cache
from embedkit.errors import CacheError, OptionError, TaskError
from embedkit.folder import create_cache, write_shard
from embedkit.ladder import Setting, list_settings, list_wanting
from embedkit.recipe import Recipe
from embedkit.runs import open_run

DIM, CASES = 5, 40
SETS = ("cls:3", "patch@2:1", "patch@2:2")


def build_cache(folder: Path, sets: tuple[str, ...] = SETS) -> Cache:
    """Odd cases have a high channel at place 3, even ones at place 0, in layer 1 alone; all else is noise."""
    recipe = Recipe("tiny", "builtin:1", sets, 32, (0.5,), (0.5,), preview=0)
    create_cache(folder, recipe)
    generator = np.random.default_rng(0)
    stacks = []
    for case in range(CASES):
        tokens: dict[str, Any] = {}
        for name in sets:
            size = (3, DIM) if name.startswith("cls") else (3, 4, DIM)
            tokens[name] = generator.normal(size=size)
            if name == "patch@2:1":
                tokens[name][:, 3 * (case % 2), 1] += 4
        stacks.append(
            StackTokens(
                case_id=f"c{case:02}", patient_id=f"p{case:02}", view="t1", plane="axial", sources=("t1",),
                indices=np.arange(3, dtype=np.int32), positions_mm=np.arange(3, dtype=np.float32),
                blank=np.zeros(3, bool), plane_shape=(8, 8), box=(0, 0, 8, 8), source_shape=(3, 8, 8),
                source_affine=np.eye(4), source_bytes=1, source_digest=f"{case}",
                tokens={name: values.astype(np.float16) for name, values in tokens.items()},
            )
        )  # fmt: skip
    write_shard(folder, recipe, stacks)
    return open_cache(folder)


LABELS = pl.DataFrame(
    {
        "case_id": [f"c{case:02}" for case in range(CASES)],
        "side": [("left", "right")[case % 2] for case in range(CASES)],
        "coin": np.random.default_rng(5).integers(2, size=CASES),
        "months": [10.0 + case + 50 * (case % 2) for case in range(CASES)],
        "died": [1] * CASES,
        "fold": [case // 2 % 3 for case in range(CASES)],
    }
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return build_cache(tmp_path_factory.mktemp("advice") / "cache")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """One token set and so three settings."""
    return build_cache(tmp_path_factory.mktemp("advice") / "few", ("patch@2:1",))


@pytest.fixture(scope="module")
def advice(cache: Cache) -> Advice:
    return advise(cache, LABELS, target="side", folds=3, resamples=50, device="cpu")


def test_the_setting_that_reads_the_layer_that_knows_is_recommended(advice: Advice) -> None:
    assert advice.metric == "auroc"
    assert "patch@2:1" in advice.recommended.token_sets and advice.recommended.head in {"raptor", "grid"}
    assert advice.score.value > 0.9 and advice.score.low <= advice.score.value <= advice.score.high
    scores = {str(trial.setting): trial.score.value for trial in advice.trials}
    assert scores["grid on patch@2:1"] > 0.9
    assert max(scores["logistic on cls:3"], scores["grid on patch@2:2"]) < 0.8
    assert set(advice.chosen) == {0, 1, 2}
    assert advice.table.filter(pl.col("recommended")).height == 1


def test_the_command_trains_what_was_recommended(advice: Advice, cache: Cache, tmp_path: Path) -> None:
    LABELS.write_csv(tmp_path / "labels.csv")
    words = shlex.split(advice.command)
    assert words[:3] == ["embedkit", "train", str(cache.path)] and words[-2:] == ["-o", "runs"]
    assert words[words.index("--folds") + 1] == "3"
    words[words.index("--labels") + 1], words[-1] = str(tmp_path / "labels.csv"), str(tmp_path / "runs")
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.output
    run = open_run(tmp_path / "runs" / f"side.{advice.recommended.head}")
    assert run.record.token_sets == advice.recommended.token_sets
    best = next(trial for trial in advice.trials if trial.setting == advice.recommended)
    assert run.metrics["auroc"].value == pytest.approx(best.score.value, abs=0.1)


def test_of_a_coin_nothing_is_promised(few: Cache) -> None:
    found = advise(few, LABELS, target="coin", folds=3, resamples=50, device="cpu")
    assert found.score.low < 0.5
    assert found.score.value <= max(trial.score.value for trial in found.trials)


def test_labels_of_a_fold_s_test_cases_have_no_part_in_its_choice(few: Cache) -> None:
    """With the labels of fold 0 turned round, what is chosen for fold 0 stays, and its answers are then wrong."""
    turned = LABELS.with_columns(
        side=pl.when(pl.col("fold") == 0)
        .then(pl.col("side").replace({"left": "right", "right": "left"}))
        .otherwise("side")
    )
    plain, other = (
        advise(few, table, target="side", split="fold", resamples=0, device="cpu") for table in (LABELS, turned)
    )
    assert plain.chosen[0] == other.chosen[0]
    assert plain.score.value > 0.9 > other.score.value


def test_the_budget_is_kept_and_what_was_left_out_is_told(cache: Cache) -> None:
    seen: list[AdviceProgress] = []
    found = advise(
        cache, LABELS, target="side", folds=2, budget_s=1e-6, resamples=0, device="cpu", on_progress=seen.append
    )
    assert [str(trial.setting) for trial in found.trials] == ["logistic on cls:3"]
    assert found.recommended == found.trials[0].setting
    left_out = [line for line in found.untried if line.endswith("no time was left; give a larger --budget")]
    assert len(left_out) == len(list_settings(cache, "binary")) - 1 == seen[-1].total - 1
    assert seen[-1].done == seen[-1].total


def test_a_setting_whose_first_fold_is_too_slow_is_given_up_and_so_is_what_is_no_faster(cache: Cache) -> None:
    """By a clock that gains ten seconds whenever it is read."""
    clock = itertools.count(0.0, 10.0)
    found = advise(cache, LABELS, target="side", budget_s=95, resamples=0, device="cpu", clock=lambda: next(clock))
    assert [str(trial.setting) for trial in found.trials] == ["logistic on cls:3"]
    assert found.untried[:3] == (
        "logistic on patch@2:1: takes about 50 s, 45 s were left; give a larger --budget",
        "logistic on patch@2:2: takes about 50 s, 15 s were left; give a larger --budget",
        "raptor on patch@2:1: takes about 50 s, 5 s were left; give a larger --budget",
    )
    assert "no time was left" in found.untried[3]


@pytest.mark.parametrize(("event", "metric", "last"), [(None, "r2", "grid"), ("died", "c_index", "cox")])
def test_values_and_times_are_advised_on_too(few: Cache, event: str | None, metric: str, last: str) -> None:
    found = advise(few, LABELS, target="months", event=event, folds=2, resamples=20, device="cpu")
    assert (found.metric, found.trials[-1].setting.head) == (metric, last)
    assert found.score.value > (0.6 if event else 0.1)
    assert found.table["inner"].is_not_null().all()
    if event:
        assert "--event died" in found.command
        assert Setting("cox", ("patch@2:1",), {"trunk": "grid"}).list_flags()[-2:] == [
            "--head-option",
            "cox.trunk=grid",
        ]


def test_the_ladder_has_what_the_cache_holds_and_says_what_it_lacks(cache: Cache, tmp_path: Path) -> None:
    assert [str(each) for each in list_settings(cache, "binary")] == [
        "logistic on cls:3", "logistic on patch@2:1", "logistic on patch@2:2", "raptor on patch@2:1",
        "raptor on patch@2:2", "query on cls:3", "grid on patch@2:2", "grid on patch@2:1",
        "grid on patch@2:1,patch@2:2",
    ]  # fmt: skip
    assert Setting("cox", ("patch@2:1",), {"trunk": "grid"}) in list_settings(cache, "survival")
    assert "learns no survival" in list_wanting(cache, "survival")[0]
    (lacking,) = list_wanting(cache, "binary")
    assert "no cut tokens; extract with --cut 4" in lacking
    alone = build_cache(tmp_path / "alone", ("cls:3",))
    assert [str(each) for each in list_settings(alone, "binary")] == ["logistic on cls:3", "query on cls:3"]
    assert "no patch tokens; extract with --tokens cls,patch@4" in list_wanting(alone, "binary")[0]
    one = build_cache(tmp_path / "one", ("patch@2:1",))
    assert "patch tokens of one alone (patch@2:1); extract with several" in list_wanting(one, "binary")[0]
    assert "as --tokens cls,patch@4:1,patch@4:2" in list_wanting(one, "binary")[0]


def test_the_command_line_prints_evidence_and_command(cache: Cache, tmp_path: Path) -> None:
    LABELS.write_csv(tmp_path / "labels.csv")
    asked = ["advise", str(cache.path), "--labels", str(tmp_path / "labels.csv"), "--target", "side", "--split", "fold"]
    fields = json.loads(CliRunner().invoke(app, [*asked, "--budget", "0.001s", "--json"]).stdout)
    assert fields["recommended"] == "logistic on cls:3" and len(fields["trials"]) == 1
    assert "--split fold" in fields["command"] and "--head logistic --tokens cls:3" in fields["command"]
    shown = CliRunner().invoke(app, [*asked, "--budget", "0.001s"]).stdout
    assert "* logistic on cls:3" in shown and "not tried: grid on patch@2:1: no time was left" in shown
    assert shown.rstrip().splitlines()[-1] == fields["command"]


def test_what_means_nothing_is_refused(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the budget is 0 s, expected above 0"):
        advise(cache, LABELS, target="side", budget_s=0)
    with pytest.raises(TaskError, match="no column grade"):
        advise(cache, LABELS, target="grade")
    empty = tmp_path / "empty"
    create_cache(empty, cache.recipe)
    with pytest.raises(CacheError, match="holds no stack yet; extract some cases first"):
        advise(empty, LABELS, target="side")
    LABELS.write_csv(tmp_path / "labels.csv")
    asked = ["advise", str(cache.path), "--labels", str(tmp_path / "labels.csv"), "--target", "side"]
    done = CliRunner().invoke(app, [*asked, "--budget", "soon"])
    assert done.exit_code == 2 and "duration 'soon' means nothing" in " ".join(done.output.split())

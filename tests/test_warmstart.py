"""Warm start: what is taken over from an old run by value, whose folds are kept, and what cannot be a start."""

from __future__ import annotations

import json
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
from embedkit.errors import HeadError, OptionError, RecipeError, RunError
from embedkit.runs import Run
from embedkit.training import Training, train

PATIENTS = {f"c{case:02}": f"p{case // 2:02}" for case in range(60)}
QUICK: dict[str, Any] = {"epochs": 8, "batch_size": 8, "learning_rate": 3e-2}
FROZEN: dict[str, Any] = {"epochs": 1, "learning_rate": 1e-9}
MLP = {"mlp": {"hidden": 16}}


def build_labels() -> pl.DataFrame:
    patients = np.arange(60) // 2
    sort = [("a", "b", "c")[patient % 3] for patient in patients]
    return pl.DataFrame(
        {
            "case_id": list(PATIENTS),
            "ill": [("no", "yes")[patient % 2] if patient < 20 else None for patient in patients],
            "sort": [name if 4 <= patient < 24 else None for name, patient in zip(sort, patients, strict=True)],
            "later": [name if patient >= 20 else None for name, patient in zip(sort, patients, strict=True)],
            "site": [patient % 2 for patient in patients],
        }
    )


LABELS = build_labels()


def make_tokens() -> dict[str, np.ndarray]:
    """Channel 0 shows who is ill, channels 1 to 3 which sort it is."""
    rng = np.random.default_rng(0)
    tokens = {name: rng.normal(size=(3, 6)) for name in PATIENTS}
    for case, values in enumerate(tokens.values()):
        values[:, 0] += 4 * (case // 2 % 2)
        values[:, 1 + case // 2 % 3] += 4
    return tokens


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, cache_tokens: Callable[..., Cache]) -> Cache:
    return cache_tokens(tmp_path_factory.mktemp("warmstart") / "cache", make_tokens(), PATIENTS)


def run_training(cache: Cache, out: Path, target: str, **options: Any) -> Training:
    settings: dict[str, Any] = {"folds": 2, "resamples": 10, "fit_options": QUICK, "device": "cpu"}
    return train(cache, LABELS, targets=target, out=out, **settings | options)


@pytest.fixture(scope="module")
def old(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    heads = ("mlp", "linear")
    trained = run_training(cache, tmp_path_factory.mktemp("warmstart") / "old", "ill", heads=heads, head_options=MLP)
    return {run.head: run for run in trained.runs}


def require_taken_over(new: Run, old: Run, pairs: list[tuple[int, int]]) -> None:
    """Members of the new run have the layers and the standardisation of those of the old, but another last layer."""
    for one, other in pairs:
        mine, theirs = new.members[one].state_dict(), old.members[other].state_dict()
        shared = [name for name in theirs if not name.startswith("head.classify") and name not in ("unit", "sharpness")]
        assert any(name.startswith("head.") for name in shared)
        assert any(name.startswith("standardiser.") for name in shared)
        for name in shared:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-6, msg=name)
        assert mine["head.classify.weight"].shape == (3, 16)


def test_a_head_starts_from_the_member_of_its_fold_and_the_folds_of_the_old_run_are_kept(
    cache: Cache, old: dict[str, Run], tmp_path: Path
) -> None:
    trained = run_training(cache, tmp_path, "sort", start=old["mlp"], fit_options=FROZEN, folds=3, seeds=2)
    assert trained.table["head"].to_list() == ["logistic", "raptor", "mlp"]
    new = trained.runs[-1]
    assert [member["fold"] for member in new.record.members] == [0, 0, 1, 1]
    assert {run.record.folds for run in trained.runs} == {2}  # those of the old run, not the three asked for
    require_taken_over(new, old["mlp"], [(0, 0), (1, 0), (2, 1), (3, 1)])
    before = dict(old["mlp"].predictions.select("patient_id", "fold").iter_rows())
    for run in trained.runs:
        after = dict(run.predictions.select("patient_id", "fold").iter_rows())
        assert {patient: fold for patient, fold in after.items() if patient in before} == {
            patient: before[patient] for patient in after if patient in before
        }
        assert sorted(fold for patient, fold in after.items() if patient not in before) == [0, 0, 1, 1]
    assert "started from run ill.mlp (weights " in new.record.notes[-1]
    assert not any("started" in note for run in trained.runs[:-1] for note in run.record.notes)


def test_a_fold_that_has_no_patient_of_the_new_target_leaves_the_others_with_their_members(
    cache: Cache, tmp_path: Path
) -> None:
    old = run_training(cache, tmp_path / "old", "ill", heads=("mlp",), head_options=MLP, folds=3).runs[-1]
    fold_of = dict(old.predictions.select("case_id", "fold").iter_rows())
    labels = LABELS.with_columns(
        few=pl.Series(
            [ill if fold_of.get(case) in (0, 2) else None for case, ill in LABELS.select("case_id", "ill").iter_rows()]
        )
    )
    new = train(
        cache, labels, targets="few", out=tmp_path / "new", start=old, fit_options=FROZEN, resamples=10, device="cpu"
    ).runs[-1]
    assert dict(new.predictions.select("case_id", "fold").iter_rows()) == {
        case: fold for case, fold in fold_of.items() if fold != 1
    }
    assert [member["fold"] for member in new.record.members] == [0, 2]
    for one, other in ((0, 0), (1, 2)):
        weight = "head.weight"
        mine, theirs = new.members[one].state_dict()[weight], old.members[other].state_dict()[weight]
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_on_other_patients_any_folds_will_do(cache: Cache, old: dict[str, Run], tmp_path: Path) -> None:
    trained = run_training(cache, tmp_path, "later", start=old["mlp"].path, fit_options=FROZEN, folds=3)
    require_taken_over(trained.runs[-1], old["mlp"], [(0, 0), (1, 1), (2, 0)])
    by_site = run_training(cache, tmp_path / "site", "later", start=old["mlp"], group_by="site")
    assert by_site.runs[-1].metrics["auroc"].value > 0.9


def test_the_last_layer_begins_anew_even_where_it_has_the_same_shape(
    cache: Cache, old: dict[str, Run], tmp_path: Path
) -> None:
    new = run_training(cache, tmp_path, "ill", start=old["mlp"], fit_options=FROZEN).runs[-1]
    for one, other in zip(new.members, old["mlp"].members, strict=True):
        weight = "head.classify.weight"
        assert one.state_dict()[weight].shape == other.state_dict()[weight].shape
        assert not torch.allclose(one.state_dict()[weight], other.state_dict()[weight], atol=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        ("logistic", {}, RunError, "head 'logistic' is fitted in closed form and has no weights to start from"),
        ("linear", {}, RunError, "all of head 'linear' belongs to its outputs; choose a head with layers before"),
        ("mlp", {"heads": ["abmil"]}, HeadError, "can start head 'mlp' alone, but heads are abmil; add --head mlp"),
        ("mlp", {"sweep": "small"}, OptionError, "cannot be had together with a sweep"),
        ("mlp", {"repeats": 2}, OptionError, "cannot be had together with repeats"),
        ("mlp", {"resume": True}, OptionError, "cannot be had together with resume"),
        ("mlp", {"token_sets": ["cls:2"]}, OptionError, "together with token sets: they are those of the old run"),
        (
            "mlp",
            {"group_by": "site"},
            OptionError,
            "folds from column site were asked for, but run ill.mlp was trained",
        ),
        (
            "mlp",
            {"head_options": {"mlp": {"hidden": 8}}},
            RunError,
            r"is \[1, 16, 6\] in run ill.mlp and \[1, 8, 6\] now",
        ),
    ],
)
def test_what_cannot_be_a_start_is_said(
    cache: Cache, old: dict[str, Run], tmp_path: Path, wrong: tuple[str, dict[str, Any], type[Exception], str]
) -> None:
    head, options, error, message = wrong
    with pytest.raises(error, match=message):
        run_training(cache, tmp_path, "sort", start=old[head], **options)
    assert not list(tmp_path.iterdir())


def test_a_cache_of_another_recipe_is_refused(
    old: dict[str, Run], tmp_path: Path, cache_tokens: Callable[..., Cache]
) -> None:
    other = cache_tokens(tmp_path / "cache", make_tokens(), PATIENTS, name="other")
    with pytest.raises(RecipeError, match="backbone"):
        run_training(other, tmp_path / "runs", "sort", start=old["mlp"])


def test_the_command_line_starts_from_a_run(cache: Cache, old: dict[str, Run], tmp_path: Path) -> None:
    LABELS.write_csv(tmp_path / "labels.csv")
    command = ["train", str(cache.path), "--labels", str(tmp_path / "labels.csv"), "--target", "sort", "--folds", "2"]
    done = CliRunner().invoke(app, [*command, "--from", str(old["mlp"].path), "-o", str(tmp_path / "runs"), "--json"])
    assert done.exit_code == 0, done.output
    assert [row["head"] for row in json.loads(done.stdout)] == ["logistic", "raptor", "mlp"]

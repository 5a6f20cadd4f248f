"""Keeping old answers: exemplars, the loss by hand, who may be an exemplar, and what becomes of the old run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from embedkit.cli.main import app
from torch import nn
from typer.testing import CliRunner

from embedkit import keeping, plugins
from embedkit.bags import Bag
from embedkit.cache import Cache
from embedkit.distillation import Buffer, KeepingLoss, join_buffer
from embedkit.errors import OptionError, RunError
from embedkit.exemplars import choose_exemplars
from embedkit.losses import TaskLoss
from embedkit.plugins import HeadOutput
from embedkit.runs import Run, open_run, predict
from embedkit.tasks import Task
from embedkit.training import Training, train

PATIENTS = {f"c{case:03}": f"p{case // 2:02}" for case in range(120)}
MLP = {"mlp": {"hidden": 4, "dropout": 0.0}}
QUICK: dict[str, Any] = {"epochs": 12, "batch_size": 8, "learning_rate": 3e-2}
FROZEN: dict[str, Any] = {"epochs": 1, "learning_rate": 1e-9}


def build_labels() -> pl.DataFrame:
    """Who is ill, of the first 40 patients; how they fare, of all but the first 10."""
    patients = np.arange(120) // 2
    rng = np.random.default_rng(0)
    fares = rng.permutation(60)[patients] % 2
    return pl.DataFrame(
        {
            "case_id": list(PATIENTS),
            "ill": [("no", "yes")[patient % 2] if patient < 40 else None for patient in patients],
            "fares": [("badly", "well")[fares[case]] if patients[case] >= 10 else None for case in range(120)],
            "late": [("badly", "well")[fares[case]] if patients[case] >= 40 else None for case in range(120)],
            "size": [float(patient % 2) + 0.1 * (patient % 5) if patient < 40 else None for patient in patients],
            "months": 1.0 + patients,
            "died": patients % 2,
            "part": ["train" if patient % 4 < 2 else "test" for patient in patients],
        }
    )


LABELS = build_labels()


def make_tokens() -> dict[str, np.ndarray]:
    """Channel 0 shows who is ill and channel 1 how they fare, which is much the clearer; the rest is noise."""
    rng = np.random.default_rng(0)
    fares = (LABELS["fares"].fill_null("badly") == "well").to_numpy()
    tokens = {name: rng.normal(size=(3, 8)) for name in PATIENTS}
    for case, values in enumerate(tokens.values()):
        values[:, 0] += 2 * (case // 2 % 2)
        values[:, 1] += 3 * fares[case]
    return tokens


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, cache_tokens: Callable[..., Cache]) -> Cache:
    return cache_tokens(tmp_path_factory.mktemp("keeping") / "cache", make_tokens(), PATIENTS)


def run_training(cache: Cache, out: Path, target: str, **options: Any) -> Training:
    settings: dict[str, Any] = {"folds": 2, "resamples": 10, "fit_options": QUICK, "device": "cpu"}
    return train(cache, LABELS, targets=target, out=out, **settings | options)


@pytest.fixture(scope="module")
def old(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    out = tmp_path_factory.mktemp("keeping") / "old"
    heads: dict[str, Any] = {"heads": ("mlp", "dsmil"), "head_options": MLP}
    return {run.head: run for run in run_training(cache, out, "ill", **heads).runs}


@pytest.mark.parametrize("shape", [(30, 5), (40, 1), (12, 3)])
def test_exemplars_are_those_of_a_plain_search(shape: tuple[int, int]) -> None:
    vectors = np.random.default_rng(shape[0]).normal(size=shape).round(1)  # rounded, so that there are ties
    mean = vectors.mean(0)
    wanted = [min(range(len(vectors)), key=lambda case: ((vectors[case] - mean) ** 2).sum())]
    while len(wanted) < 7:
        left = [case for case in range(len(vectors)) if case not in wanted]
        gap = {case: min(((vectors[case] - vectors[one]) ** 2).sum() for one in wanted) for case in left}
        wanted.append(max(left, key=lambda case: gap[case]))
    assert choose_exemplars(vectors, 7).tolist() == wanted
    assert sorted(choose_exemplars(vectors, 99).tolist()) == list(range(len(vectors)))


def test_equal_vectors_are_all_chosen_before_any_comes_twice() -> None:
    assert choose_exemplars(np.ones((4, 2)), 4).tolist() == [0, 1, 2, 3]
    assert choose_exemplars(np.zeros((0, 2)), 4).tolist() == []


def make_loss(weight: float) -> KeepingLoss:
    """Cases a to c are of the new task, c and d of the buffer."""
    own = Task("new", "binary", ("no", "yes"), ("a", "b", "c"), ("pa", "pb", "pc"), np.array([0, 1, 1]))
    task = join_buffer(own, 1, Buffer(("c", "d"), ("pc", "pd"), np.array([[1.0, -1.0], [2.0, 0.5]], np.float32)))
    assert task.case_ids == ("a", "b", "c", "d")
    assert task.outputs == 3
    assert task.hold_out(np.array([False, False, True])).tolist() == [False, False, True, False]
    targets = task.spread(own.targets)
    return KeepingLoss(TaskLoss("binary", targets, task.labelled, class_weights=False), task, weight)


def test_the_loss_is_the_new_targets_and_the_mean_squared_distance_to_the_old_answers() -> None:
    loss = make_loss(0.5)
    logits = torch.tensor([[[0.3, 9.0, 9.0], [-0.2, 0.0, -1.0], [7.0, 2.0, 2.5]]])  # of b, c and d
    cases = torch.tensor([[1, 2, 3]])
    own = np.log1p(np.exp(-0.3)) + np.log1p(np.exp(0.2))  # of b and c
    apart = (1.0**2 + 0.0**2) / 2 + (0.0**2 + 2.0**2) / 2  # of c and d
    found = loss.stack([loss]).total(logits, cases, [0], nn.Identity(), {})
    assert float(found) == pytest.approx((own + 0.5 * apart) / 3, rel=1e-6)
    alone = loss.stack([loss]).total(logits[:, 2:], cases[:, 2:], [0], nn.Identity(), {})
    assert float(alone) == pytest.approx(0.5 * 2.0, rel=1e-6)


def test_held_out_cases_judge_by_the_new_target_alone() -> None:
    loss = make_loss(0.5)
    logits = torch.randn(2, 4, 4, 3, generator=torch.Generator().manual_seed(0))
    cases, real = torch.tensor([[1, 2, 3, 0], [0, 3, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    found = loss.judge.stack([loss.judge] * 2).each(logits, cases, real=real)
    means = torch.where(real[:, None], found, 0).sum(-1) / real.sum(1)[:, None]
    first = loss.own.each(logits[0, ..., :1][:, [0, 1, 3]], torch.tensor([1, 2, 0])).mean(-1)
    second = loss.own.each(logits[1, ..., :1][:, :1], torch.tensor([0])).mean(-1)
    torch.testing.assert_close(means, torch.stack([first, second]))


@pytest.fixture
def kept_buffers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[int, Buffer]]]:
    """What each training chose as exemplars, and the folds that it had."""
    found: list[tuple[Any, dict[int, Buffer]]] = []

    class Watched(keeping.Keeper):
        def __init__(self, start: Any, source: Any, plan: Any, folded: Any, **how: Any) -> None:
            super().__init__(start, source, plan, folded, **how)
            found.append((folded, self.buffers))

    monkeypatch.setattr("embedkit.training.Keeper", Watched)
    return found


@pytest.mark.parametrize("dealt", [("fares", None), ("late", None), ("late", "part")])
def test_no_exemplar_is_of_a_patient_that_either_target_tests(
    cache: Cache, old: dict[str, Run], tmp_path: Path, kept_buffers: list[Any], dealt: tuple[str, str | None]
) -> None:
    target, split = dealt
    how: dict[str, Any] = {"fit_options": FROZEN, "split": split}
    runs = run_training(cache, tmp_path, target, start=old["mlp"], keep_old=9, **how).runs
    assert [run.name for run in runs] == [f"{target}.logistic", f"{target}.raptor", f"{target}.mlp", "ill.mlp"]
    (folded, buffers), kept = kept_buffers[0], runs[-1]
    before = old["mlp"].predictions
    for fold, buffer in buffers.items():
        tested = {folded.task.patient_ids[case] for case in np.flatnonzero(folded.find_tested(fold))}
        old_fold = sorted(before["fold"].unique())[fold]
        tested_before = set(before.filter(pl.col("fold") == old_fold)["patient_id"])
        assert len(buffer.case_ids) == 9
        assert set(buffer.case_ids) <= set(before["case_id"])
        assert [PATIENTS[case] for case in buffer.case_ids] == list(buffer.patient_ids)
        assert not set(buffer.patient_ids) & (tested | tested_before)
    assert kept.record.member_count == len(buffers)


def test_a_head_that_learns_nothing_answers_as_the_old_run_did(
    cache: Cache, old: dict[str, Run], tmp_path: Path
) -> None:
    before = old["mlp"]
    new, kept = run_training(cache, tmp_path, "fares", start=before, keep_old=8, fit_options=FROZEN).runs[-2:]
    assert kept.record.target == "ill"
    assert kept.predictions["case_id"].to_list() == before.predictions["case_id"].to_list()
    assert kept.predictions["fold"].to_list() == before.predictions["fold"].to_list()
    np.testing.assert_allclose(kept.predictions["score"], before.predictions["score"], atol=1e-5)
    assert kept.metrics["auroc"].value == pytest.approx(before.metrics["auroc"].value)
    assert kept.inner.equals(before.inner)
    for one, other in zip(new.members, kept.members, strict=True):
        mine, theirs = one.state_dict(), other.state_dict()
        shared = [name for name in mine if not name.startswith("head.classify") and name not in ("unit", "sharpness")]
        assert {"head.weight", "standardiser.mean_0"} <= set(shared)
        assert all(torch.equal(mine[name], theirs[name]) for name in shared)


def test_answers_stay_where_a_plain_start_forgets_them(cache: Cache, old: dict[str, Run], tmp_path: Path) -> None:
    how: dict[str, Any] = {"start": old["mlp"], "fit_options": {**QUICK, "epochs": 30}}
    scores = {}
    for weight in (0.0, 1.0):
        runs = run_training(cache, tmp_path / f"{weight}", "late", keep_old=24, keep_weight=weight, **how).runs
        scores[weight] = {run.name: run.metrics["auroc"].value for run in runs}
    before = old["mlp"].metrics["auroc"].value
    assert before > 0.9
    assert scores[0.0]["ill.mlp"] < before - 0.1  # forgotten
    assert scores[1.0]["ill.mlp"] > before - 0.03  # kept
    assert min(scores[weight]["late.mlp"] for weight in scores) > 0.9


def test_the_old_run_as_it_is_then_is_a_run_like_any_other(cache: Cache, old: dict[str, Run], tmp_path: Path) -> None:
    runs = run_training(cache, tmp_path, "late", start=old["mlp"].path, keep_old=8, seeds=2).runs
    kept = open_run(tmp_path / "ill.mlp")
    assert [member["fold"] for member in kept.record.members] == [0, 0, 1, 1]
    found = predict(kept, cache, case_ids=["c100", "c000"], device="cpu")
    assert found.columns == ["case_id", "patient_id", "score", "predicted"]
    assert found["score"].is_finite().all()
    fold = int(kept.predictions.filter(pl.col("case_id") == "c003")["fold"][0])
    alone = dataclasses.replace(kept, members=tuple(kept.members[2 * fold : 2 * fold + 2]))
    wanted = kept.predictions.filter(pl.col("case_id") == "c003")["score"][0]
    assert predict(alone, cache, case_ids=["c003"], device="cpu")["score"][0] == pytest.approx(wanted, abs=1e-6)
    assert kept.calibrated("platt").predictions["score"].is_between(0, 1).all()
    note = kept.record.notes[-1]
    assert note.startswith("kept while run late.mlp, which shares all but the last layer, was trained from run ill.mlp")
    assert "on 8, 8 exemplars in its folds, weighed by 1; its auroc was " in note
    assert "on 80 cases, out of fold" in note
    assert runs[-1].digest == kept.digest != old["mlp"].digest


def test_a_regression_is_kept_in_its_unit(cache: Cache, tmp_path: Path) -> None:
    before = run_training(cache, tmp_path / "old", "size", heads=("mlp",), head_options=MLP).runs[-1]
    how: dict[str, Any] = {"start": before, "keep_old": 40, "keep_weight": 3.0}
    runs = run_training(cache, tmp_path / "new", "late", **how, fit_options={**QUICK, "epochs": 20}).runs
    after = np.corrcoef(runs[-1].predictions["score"], before.predictions["score"])[0, 1]
    assert after > 0.8
    assert abs(float((runs[-1].predictions["score"] - before.predictions["score"]).mean())) < 0.1
    assert "its mae was 0." in runs[-1].record.notes[-1]


class Mixing(nn.Module):
    """Its logits are what is left of a mean over all of them."""

    reads = frozenset({"cls"})
    fit_by = "gradient"

    def __init__(self, shape: Any, token_sets: Any, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Linear(shape.token_sets[token_sets[0]][1], 4)
        self.classify = nn.Linear(4, outputs)

    def forward(self, bag: Bag) -> HeadOutput:
        (tokens,) = bag.tokens.values()
        pooled = tokens.masked_fill(~bag.mask[..., None, None], 0.0).mean((1, 2, 3))
        logits = self.classify(self.embed(pooled))
        return HeadOutput(logits - 0.5 * logits.mean(1, keepdim=True))


def test_a_head_that_mixes_its_outputs_is_refused(
    cache: Cache, old: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        RunError, match=r"classify.weight of head 'dsmil' mixes its outputs; choose a run of a head whose"
    ):
        run_training(cache, tmp_path / "new", "late", start=old["dsmil"], keep_old=8)
    entry = plugins.HeadEntry("mixing", "mine", "1", f"{Mixing.__module__}:Mixing")
    known = {**plugins.list_heads(), "mixing": entry}
    monkeypatch.setattr(plugins, "_installed", lambda: known)
    before = run_training(cache, tmp_path / "old", "ill", heads=("mixing",)).runs[-1]
    with pytest.raises(RunError, match="what head 'mixing' says of one target depends on the other, so it cannot be"):
        run_training(cache, tmp_path / "new", "late", start=before, keep_old=8)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ("late", {"start": None}, "no old run was given to start from, with --from"),
        ("late", {"keep_old": 0}, "0 exemplars per fold to keep them on, expected 1 or more"),
        ("late", {"keep_weight": -1.0}, "keeping is weighed by -1, expected 0 or above"),
        ("late", {"keep_weight": float("nan")}, "keeping is weighed by nan, expected 0 or above"),
        (["late", "fares"], {}, "targets are late, fares, expected one: train each in a call of its own"),
        ("ill", {}, "two targets would both write to"),
        ("late", {"fit_options": {"sampling": "balanced"}}, "in balanced batches: exemplars have no class; leave one"),
    ],
)
def test_keeping_that_means_nothing_is_said(
    cache: Cache, old: dict[str, Run], tmp_path: Path, wrong: tuple[Any, dict[str, Any], str]
) -> None:
    target, options, message = wrong
    with pytest.raises(OptionError, match=message):
        run_training(cache, tmp_path, target, **{"start": old["mlp"], "keep_old": 8, **options})
    assert not list(tmp_path.iterdir())


def test_a_survival_target_is_refused(cache: Cache, tmp_path: Path) -> None:
    how: dict[str, Any] = {"heads": ["cox"], "event": "died", "fit_options": FROZEN}
    before = run_training(cache, tmp_path / "old", "months", **how).runs[-1]
    labels = LABELS.rename({"months": "weeks"})
    with pytest.raises(OptionError, match="beside a survival target, as weeks is; leave keeping away"):
        train(
            cache, labels, targets="weeks", event="died", out=tmp_path / "new", start=before, keep_old=8, device="cpu"
        )


def test_the_old_run_is_not_written_over(cache: Cache, old: dict[str, Run]) -> None:
    with pytest.raises(OptionError, match=r"run ill.mlp would be written over where it lies, .*; choose another --out"):
        run_training(cache, old["mlp"].path.parent, "late", start=old["mlp"], keep_old=8, overwrite=True)


def test_a_cache_without_the_old_cases_is_refused(
    cache: Cache, old: dict[str, Run], tmp_path: Path, cache_tokens: Callable[..., Cache]
) -> None:
    tokens = {case: values for case, values in make_tokens().items() if case >= "c080"}
    other = cache_tokens(tmp_path / "later", tokens, PATIENTS)
    with pytest.raises(
        RunError, match=r"holds no case that run ill.mlp was tested on, so nobody could tell what became"
    ):
        run_training(other, tmp_path / "runs", "late", start=old["mlp"], keep_old=8)
    fold = old["mlp"].predictions.filter(pl.col("fold") == 0)["case_id"].to_list()
    tokens |= {case: values for case, values in make_tokens().items() if case in fold}
    other = cache_tokens(tmp_path / "one-fold", tokens, PATIENTS)
    with pytest.raises(RunError, match=r"that run ill.mlp was trained on, none of which may be an exemplar in fold 0"):
        run_training(other, tmp_path / "runs", "late", start=old["mlp"], keep_old=8)
    assert not (tmp_path / "runs").exists()


def test_the_command_line_keeps_old_answers(cache: Cache, old: dict[str, Run], tmp_path: Path) -> None:
    LABELS.write_csv(tmp_path / "labels.csv")
    command = ["train", str(cache.path), "--labels", str(tmp_path / "labels.csv"), "--target", "late", "--folds", "2"]
    start = ["--from", str(old["mlp"].path), "--keep-old", "8", "--keep-weight", "2"]
    done = CliRunner().invoke(app, [*command, *start, "-o", str(tmp_path / "runs"), "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [(row["target"], row["head"]) for row in rows[-2:]] == [("late", "mlp"), ("ill", "mlp")]

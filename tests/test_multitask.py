"""Several targets on one trunk: shared folds, labels that are lacking, weights by formula, and runs like any others."""

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
from embedkit.heads.multitask import MultitaskHead
from typer.testing import CliRunner

from embedkit.bags import BagShape
from embedkit.cache import Cache
from embedkit.comparison import compare_runs
from embedkit.errors import HeadError, OptionError, RunError, TaskError
from embedkit.jointlosses import JointLoss
from embedkit.jointtasks import join_tasks
from embedkit.losses import StackedLoss, TaskLoss
from embedkit.plugins import create_head
from embedkit.runs import open_run, predict
from embedkit.stopping import SHARPNESS
from embedkit.tasks import Task, make_folds
from embedkit.training import Training, train
from embedkit.trunks import find_output_axes

QUICK = {"epochs": 12, "batch_size": 8, "learning_rate": 3e-2}
PATIENTS = {f"c{case:02}": f"p{case // 2:02}" for case in range(40)}
SHAPE = BagShape({"cls:2": (1, 6)}, {}, ("t1/axial",))


def build_labels() -> pl.DataFrame:
    """Of forty cases, two per patient: who is ill, how large it is (known of the first 28), of which of three sorts."""
    patients = np.arange(40) // 2
    rng = np.random.default_rng(1)
    return pl.DataFrame(
        {
            "case_id": list(PATIENTS),
            "ill": ["yes" if patient % 2 else "no" for patient in patients],
            "size": [
                100 + 30 * (patient % 2) + rng.normal() if case < 28 else None for case, patient in enumerate(patients)
            ],
            "sort": [("a", "b", "c")[patient % 3] if case > 5 else None for case, patient in enumerate(patients)],
            "months": 1.0 + patients,
            "died": patients % 2,
        }
    )


LABELS = build_labels()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, telling_cache: Callable[..., Cache]) -> Cache:
    """Channel 0 shows who is ill, channels 1 to 3 which sort it is."""
    return telling_cache(tmp_path_factory.mktemp("multitask") / "cache", PATIENTS, 4)


def run_training(cache: Cache, out: Path, **options: Any) -> Training:
    settings: dict[str, Any] = {
        "targets": ("ill", "size", "sort"), "heads": ("multitask",), "folds": 2, "resamples": 20, "fit_options": QUICK,
        "device": "cpu",
    }  # fmt: skip
    return train(cache, LABELS, out=out, **settings | options)


@pytest.fixture(scope="module")
def trained(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return run_training(cache, tmp_path_factory.mktemp("multitask") / "runs", seeds=2)


def test_one_trunk_learns_targets_of_three_kinds_with_labels_that_are_lacking(trained: Training) -> None:
    runs = {run.record.target: run for run in trained.runs if run.head == "multitask"}
    assert {name: run.record.kind for name, run in runs.items()} == {
        "ill": "binary",
        "size": "regression",
        "sort": "multiclass",
    }
    assert runs["ill"].metrics["auroc"].value > 0.95
    assert runs["size"].metrics["r2"].value > 0.5
    assert runs["sort"].metrics["auroc"].value > 0.95
    assert [len(runs[name].predictions) for name in ("ill", "size", "sort")] == [40, 28, 34]
    assert set(runs["size"].predictions["case_id"]) == set(LABELS.drop_nulls("size")["case_id"])
    assert set(runs["size"].inner["case_id"]) <= set(LABELS.drop_nulls("size")["case_id"])


def test_whoever_is_tested_for_one_target_trains_for_none_and_all_heads_have_these_folds(trained: Training) -> None:
    found = pl.concat([run.predictions.select("patient_id", "fold") for run in trained.runs]).unique()
    assert found["patient_id"].n_unique() == 20
    assert found.height == 20
    for run in trained.runs:
        held = run.inner.join(run.predictions.select("case_id", tested="fold"), on="case_id")
        assert (held["fold"] != held["tested"]).all(), run.name


def test_members_of_all_targets_share_their_numbers_but_for_what_makes_scores_of_logits(trained: Training) -> None:
    ill, size, sort = (run for run in trained.runs if run.head == "multitask")
    assert [member["fold"] for member in ill.record.members] == [0, 0, 1, 1]
    for other in (size, sort):
        for one, two in zip(ill.members, other.members, strict=True):
            for name, values in one.head.state_dict().items():
                torch.testing.assert_close(two.head.state_dict()[name], values, rtol=0, atol=0)
    first, second = ill.members[:2]
    assert not torch.equal(
        first.head.state_dict()["trunk.classify.weight"], second.head.state_dict()["trunk.classify.weight"]
    )
    assert float(size.members[0].sharpness) == pytest.approx(1)
    assert float(size.members[0].unit[0]) == pytest.approx(115, abs=8)


def test_a_run_of_one_target_is_like_any_other(trained: Training, cache: Cache) -> None:
    sort = next(run for run in trained.runs if run.name == "sort.multitask")
    assert sort.record.head_options["targets"] == ["ill", "size", "sort"]
    table = predict(sort, cache, device="cpu")
    assert table.columns == ["case_id", "patient_id", "score_a", "score_b", "score_c", "predicted"]
    assert table.select(pl.sum_horizontal("score_a", "score_b", "score_c")).to_series().to_list() == pytest.approx(
        [1.0] * 40, abs=1e-4
    )
    compared = compare_runs([run for run in trained.runs if run.record.target == "sort"], resamples=20)
    assert "multitask" in str(compared.table)
    case = "c10"  # of sort c, which channel 3 shows
    evidence = sort.find_evidence(cache, case, class_name="c").scores["t1/axial"]
    other = sort.find_evidence(cache, case, class_name="a").scores["t1/axial"]
    assert evidence.mean() > 0 > other.mean()


def test_scores_out_of_fold_are_those_of_the_members_that_did_not_train_on_the_case(
    trained: Training, cache: Cache
) -> None:
    size = next(run for run in trained.runs if run.name == "size.multitask")
    for fold in (0, 1):
        members = tuple(
            member for each, member in zip(size.record.members, size.members, strict=True) if each["fold"] == fold
        )
        tested = size.predictions.filter(pl.col("fold") == fold)
        found = predict(
            dataclasses.replace(size, members=members), cache, case_ids=tested["case_id"].to_list(), device="cpu"
        )
        assert found["score"].to_list() == pytest.approx(tested["score"].to_list(), rel=1e-4)


def test_resume_keeps_the_runs_and_names_what_differs(trained: Training, cache: Cache) -> None:
    out = trained.runs[0].path.parent
    before = {path: path.stat().st_mtime_ns for path in out.rglob("run.json")}
    run_training(cache, out, seeds=2, resume=True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("run.json")} == before
    with pytest.raises(RunError, match=r"ill.multitask was trained with head_options .*uncertainty"):
        run_training(cache, out, seeds=2, resume=True, head_options={"multitask": {"weighting": "equal"}})


def test_a_run_that_was_lost_is_made_again_as_it_was(cache: Cache, tmp_path: Path) -> None:
    import shutil

    options = {"head_options": {"multitask": {"weighting": "gradnorm", "trunk": "mlp"}}}
    first = run_training(cache, tmp_path, **options)
    sort = next(run for run in first.runs if run.name == "sort.multitask")
    shutil.rmtree(sort.path)
    run_training(cache, tmp_path, resume=True, **options)
    assert open_run(sort.path).digest == sort.digest


def test_targets_that_no_joint_head_learns_have_other_heads(cache: Cache, tmp_path: Path) -> None:
    events = {"months": "died"}
    found = run_training(cache, tmp_path, targets=("ill", "size", "months"), heads=("multitask", "cox"), event=events)
    names = [run.name for run in found.runs if run.head in ("multitask", "cox")]
    assert names == ["ill.multitask", "size.multitask", "months.cox"]


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"targets": "ill"},
        HeadError,
        "learns several targets at once, but 1 target of the kinds that it learns was given",
    ),
    (
        {"targets": ("ill", "months"), "heads": ("multitask", "cox"), "event": {"months": "died"}},
        HeadError,
        "but 1 target .* give --target again",
    ),
    (
        {"targets": ("ill", "sort"), "fit_options": {"sampling": "balanced"}},
        OptionError,
        "balanced .* learns 2 at once",
    ),
    ({"folds": 14}, TaskError, "class no of ill occurs in 10 patients, fewer than the 14 folds"),
]
WRONG_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"widths": (1, 1)}, "option widths of head 'multitask' follows from the targets; leave it out"),
    ({"trunk": "linear"}, "head 'linear' shares nothing between targets, so it cannot be the trunk of 'multitask'"),
    ({"trunk": "logistic"}, "is fitted in closed form, so it cannot be the trunk of 'multitask'"),
    ({"weighting": "best"}, "weighting of head 'multitask' is 'best', expected uncertainty, gradnorm, equal"),
]
WRONG += [({"head_options": {"multitask": options}}, HeadError, message) for options, message in WRONG_OPTIONS]


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_what_cannot_be_joined_is_said_before_anything_is_trained(
    cache: Cache, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_training(cache, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command_line_trains_targets_together(cache: Cache, tmp_path: Path) -> None:
    LABELS.write_csv(tmp_path / "labels.csv")
    command = [
        "train",
        str(cache.path),
        "--labels",
        str(tmp_path / "labels.csv"),
        "--folds",
        "2",
        "--head",
        "multitask",
    ]
    targets = ["--target", "ill", "--target", "sort", "-o", str(tmp_path / "runs")]
    done = CliRunner().invoke(app, [*command, *targets, "--head-option", "multitask.trunk=mlp", "--json"])
    assert done.exit_code == 0, done.output
    assert [row["target"] for row in json.loads(done.stdout) if row["head"] == "multitask"] == ["ill", "sort"]


def make_task(name: str, kind: Any, cases: list[int], targets: np.ndarray, classes: tuple[str, ...] = ()) -> Task:
    return Task(name, kind, classes, tuple(f"c{case}" for case in cases), tuple(f"p{case}" for case in cases), targets)


GRADE = make_task("grade", "multiclass", [3, 1, 0], np.array([2, 0, 1]), ("a", "b", "c"))
SIZE = make_task("size", "regression", [0, 2, 3], np.array([5.0, 1.0, 3.0]))


def test_a_joint_task_has_every_case_and_the_states_of_all_targets() -> None:
    joint = join_tasks([GRADE, SIZE])
    assert joint.case_ids == ("c0", "c1", "c2", "c3")
    assert joint.labelled.tolist() == [[True, True], [True, False], [False, True], [True, True]]
    assert joint.columns == (slice(0, 3), slice(3, 4)) and joint.outputs == 4
    assert joint.states == (
        "class a of grade",
        "class b of grade",
        "class c of grade",
        "the lower half of size",
        "the upper half of size",
    )
    assert joint.membership.astype(int).tolist() == [[0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 0, 1]]
    there, numbers = joint.find_numbers(0, np.array([3, 2, 0]))
    assert (there.tolist(), numbers.tolist()) == ([0, 2], [0, 2])
    other = make_task("mark", "binary", [3], np.array([1]), ("no", "yes"))
    with pytest.raises(TaskError, match="case c3 is of patient p3 and of other, expected one patient"):
        join_tasks([GRADE, dataclasses.replace(other, patient_ids=("other",))])


def test_folds_of_a_joint_task_hold_every_state_of_every_target() -> None:
    rng = np.random.default_rng(0)
    grade = make_task("grade", "binary", list(range(30)), rng.permutation(np.repeat([0, 1], 15)), ("no", "yes"))
    rare = make_task("rare", "binary", list(range(20, 50)), (np.arange(30) % 10 == 0).astype(int), ("no", "yes"))
    joint = join_tasks([grade, rare, make_task("size", "regression", list(range(50)), rng.normal(size=50))])
    folds = make_folds(joint, 3, seed=0)
    for fold in range(3):
        assert joint.membership[folds == fold].any(0).all()


def make_loss() -> tuple[JointLoss, TaskLoss, TaskLoss]:
    """Of the two tasks above; case c1 has no size, c2 no grade."""
    joint = join_tasks([GRADE, SIZE])
    training = np.ones(4, bool)
    parts = [
        TaskLoss(part.kind, joint.spread(place, part.targets), training & has, class_weights=False)
        for place, (part, has) in enumerate(zip(joint.parts, joint.labelled.T, strict=True))
    ]
    return JointLoss(parts, joint.columns, joint.labelled, training), parts[0], parts[1]


class TenfoldSecond(torch.nn.Module):
    def combine(self, losses: torch.Tensor, chance: torch.Tensor, leaves: Any) -> torch.Tensor:
        assert float(chance[0, 0]) == pytest.approx(np.log(3)), leaves
        return (losses * torch.tensor([1.0, 10.0])).sum(1)


def test_a_target_is_descended_on_by_the_cases_that_have_it() -> None:
    loss, grade, size = make_loss()
    logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    found = loss.stack([loss]).total(logits, torch.tensor([[1, 2, 3]]), [0], TenfoldSecond(), {})
    grades = grade.each(logits[0, [0, 2], :3], torch.tensor([1, 3])).mean()
    sizes = size.each(logits[0, [1, 2], 3:], torch.tensor([2, 3])).mean()
    assert float(found) == pytest.approx(float(grades + 10 * sizes), rel=1e-5)


def test_held_out_cases_judge_each_target_at_the_sharpness_that_suits_it() -> None:
    loss, grade, size = make_loss()
    logits = 5 * torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    cases = torch.tensor([[0, 1, 2], [3, 2, 2]])
    real = torch.tensor([[True, True, True], [True, True, False]])
    factors = SHARPNESS[:, None, None]
    found = loss.judge.stack([loss, loss]).each(logits[:, None] * factors, cases, real=real)
    assert found.shape == (2, len(SHARPNESS), 3)
    means = torch.where(real[:, None], found, 0).sum(2) / real.sum(1)[:, None]
    graded = [torch.stack([grade(logits[0, :2, :3] * f, cases[0, :2]) for f in SHARPNESS]).min()]
    graded += [torch.stack([grade(logits[1, :1, :3] * f, cases[1, :1]) for f in SHARPNESS]).min()]
    sized = [size(logits[0, [0, 2], 3:], cases[0, [0, 2]]), size(logits[1, :2, 3:], cases[1, :2])]
    expected = torch.stack([torch.stack(graded), torch.stack(sized)]).sum(0)
    torch.testing.assert_close(means, expected[:, None].expand_as(means), rtol=1e-4, atol=1e-5)


def combine(weighting: str, losses: torch.Tensor, chance: torch.Tensor, leaves: dict[str, torch.Tensor]) -> Any:
    head = create_head("multitask", SHAPE, ("cls:2",), 2, options={"weighting": weighting, "widths": (1, 1)})
    assert isinstance(head, MultitaskHead)
    if weighting == "gradnorm":
        head.shared = ("shared",)
    return head.combine(losses, chance, leaves)


def test_uncertainty_weighs_by_the_formula_of_kendall() -> None:
    losses, log_variances = torch.tensor([[0.2, 3.0], [1.0, 1.0]]), torch.tensor([[-0.5, 1.5], [0.0, 0.0]])
    leaves = {"balance": (log_variances / 10).requires_grad_()}
    found = combine("uncertainty", losses, torch.ones(2, 2), leaves)
    expected = (losses * (-log_variances).exp() + log_variances / 2).sum(1)
    torch.testing.assert_close(found, expected)
    best = {"balance": ((2 * losses).log() / 10).requires_grad_()}
    combine("uncertainty", losses, torch.ones(2, 2), best).sum().backward()
    torch.testing.assert_close(best["balance"].grad, torch.zeros(2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(combine("equal", losses, torch.ones(2, 2), {}), losses.sum(1))


def test_gradnorm_evens_out_the_gradients_by_how_much_each_target_has_learned() -> None:
    shared = torch.tensor([[1.0], [1.0]]).requires_grad_()
    leaves = {"balance": torch.zeros(2, 2).requires_grad_(), "shared": shared}
    losses = shared * torch.tensor([[3.0, 1.0], [3.0, 1.0]])
    chance = torch.tensor([[3.0, 1.0], [6.0, 1.0]])  # in the second row the first target has learned half
    found = combine("gradnorm", losses, chance, leaves)
    left = torch.tensor([0.5, 1.0]) / 0.75
    gap = (torch.tensor([3.0, 1.0]) - 2 * left**1.5).abs().sum()
    torch.testing.assert_close(found.detach(), torch.stack([torch.tensor(4.0 + 2.0), 4 + gap]))
    slopes = torch.autograd.grad(found.sum(), [leaves["balance"], shared])
    torch.testing.assert_close(slopes[0][0], torch.tensor([20.0, -20.0]))  # less for the steep one, more for the other
    torch.testing.assert_close(slopes[1], torch.tensor([[4.0], [4.0]]))


def test_which_axes_grow_with_the_outputs() -> None:
    axes = find_output_axes("dsmil", SHAPE, ("cls:2",), 2)
    assert axes["score.weight"] == (0,) and axes["classify.weight"] == (0, 1) and axes["embed.weight"] == ()
    assert find_output_axes("linear", SHAPE, ("cls:2",), 1)["weight"] == (1,)


def test_losses_of_one_target_are_descended_on_as_before() -> None:
    loss = TaskLoss("regression", np.array([1.0, 2.0, 4.0]), np.ones(3, bool))
    logits = torch.randn(2, 3, 1)
    cases = torch.tensor([[0, 1, 2], [2, 1, 0]])
    found = StackedLoss([loss, loss]).total(logits, cases, [0, 1], torch.nn.Identity(), {})
    expected = sum(loss(each, numbers) for each, numbers in zip(logits, cases, strict=True))
    torch.testing.assert_close(found, expected)

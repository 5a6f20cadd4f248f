"""Training: learns what is there, nothing that is not, the same each time, and never from a test case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from embedkit.cli.main import app, main
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from embedkit.bags import BagStore, load_bags
from embedkit.cache import Cache, StackTokens, open_cache
from embedkit.closed_form import LinearReadout
from embedkit.errors import CacheError, HeadError, OptionError, RunError, TaskError
from embedkit.evaluation import evaluate
from embedkit.fitting import FitOptions
from embedkit.folder import create_cache, write_shard
from embedkit.recipe import Recipe
from embedkit.runs import open_run, predict
from embedkit.standardisation import Moments, compute_moments, fit_standardiser
from embedkit.training import BASELINES, TrainingProgress, train

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 6
QUICK = {"epochs": 15, "batch_size": 8, "learning_rate": 5e-2}


def build_cache(
    folder: Path, *, cases: int = 40, views: tuple[str, ...] = ("t1",), sets: tuple[str, ...] = ("cls:2", "patch@2:1")
) -> Cache:
    """Cases c00, c01, ..., two per patient. Odd patients have a high channel 0; place 0 or 3 is high by patient."""
    recipe = Recipe("tiny", "builtin:1", sets, 32, (0.5,), (0.5,), preview=0)
    create_cache(folder, recipe)
    generator = np.random.default_rng(0)
    stacks = []
    for case in range(cases):
        patient, slices = case // 2, 3 + case % 3
        for view in views if case % 5 else views[:1]:
            cls = generator.normal(size=(slices, DIM))
            patch = generator.normal(size=(slices, 4, DIM))
            cls[:, 0] += 3 * (patient % 2)
            patch[:, 3 * (patient // 2 % 2), 1] += 4
            tokens = {name: (cls if name.startswith("cls") else patch).astype(np.float16) for name in sets}
            stacks.append(
                StackTokens(
                    case_id=f"c{case:02}", patient_id=f"p{patient:02}", view=view, plane="axial", sources=(view,),
                    indices=np.arange(slices, dtype=np.int32), positions_mm=np.arange(slices, dtype=np.float32),
                    blank=np.zeros(slices, bool), plane_shape=(8, 8), box=(0, 0, 8, 8), source_shape=(slices, 8, 8),
                    source_affine=np.eye(4), source_bytes=1, source_digest=f"{case}{view}", tokens=tokens,
                )
            )  # fmt: skip
    write_shard(folder, recipe, stacks)
    return open_cache(folder)


def build_labels(cases: int = 40) -> pl.DataFrame:
    patients = np.arange(cases) // 2
    generator = np.random.default_rng(1)
    return pl.DataFrame(
        {
            "case_id": [f"c{case:02}" for case in range(cases)],
            "disease": ["yes" if patient % 2 else "no" for patient in patients],
            "place": (patients // 2) % 2,
            "noise": generator.permutation(np.repeat([0, 1], cases // 4))[patients],
            "group": [("a", "b", "c")[patient % 2 + (patient % 4 == 3)] for patient in patients],
            "marks": [
                ";".join(["hot"] * bool(patient % 2) + ["low"] * bool(patient // 2 % 2)) or ";"
                for patient in patients
            ],
            "size": patients % 2 * 30.0 + 100 + generator.normal(size=cases),
            "constant": ["x"] * cases,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return build_cache(tmp_path_factory.mktemp("training") / "cache")


LABELS = build_labels()


def run_training(cache: Cache, out: Path, target: str = "disease", **options: Any) -> Any:
    settings: dict[str, Any] = {"heads": (), "resamples": 20, "fit_options": QUICK, "folds": 3, "device": "cpu"}
    return train(cache, LABELS, targets=target, out=out, **settings | options)


def sum_moments(store: BagStore, token_set: str) -> dict[str, Moments]:
    return compute_moments(store.shape, [store.batch(range(len(store)))], [token_set])


def auroc(result: Any, head: str) -> float:
    return float(result.table.filter(pl.col("head") == head)["auroc"][0])


def test_every_head_learns_what_its_tokens_show(cache: Cache, tmp_path: Path) -> None:
    progress: list[TrainingProgress] = []
    result = run_training(cache, tmp_path, heads=("linear", "query", "abmil"), on_progress=progress.append)
    assert result.table["head"].to_list() == [*BASELINES, "linear", "query", "abmil"]
    for head in ("logistic", "linear", "query", "abmil"):
        assert auroc(result, head) > 0.9, head
    assert [each.done for each in progress] == list(range(1, 16))
    assert {each.total for each in progress} == {15}
    assert (progress[-1].target, progress[-1].head) == ("disease", "abmil")
    assert sorted(each.fold for each in progress if each.head == "abmil") == [0, 1, 2]
    assert "abmil" in str(result)


def test_grid_sees_where_a_token_is_and_class_tokens_do_not(cache: Cache, tmp_path: Path) -> None:
    result = run_training(cache, tmp_path, "place", heads=("grid", "linear"))
    assert auroc(result, "grid") > 0.9
    assert auroc(result, "linear") < 0.75


def test_labels_that_mean_nothing_give_chance(cache: Cache, tmp_path: Path) -> None:
    result = run_training(cache, tmp_path, "noise", heads=("linear", "grid"))
    for head in ("logistic", "linear", "grid"):
        assert 0.15 < auroc(result, head) < 0.85, head


@pytest.mark.parametrize(
    ("target", "kind", "columns"),
    [
        ("group", "multiclass", ("score_a", "score_b", "score_c")),
        ("marks", "multilabel", ("score_hot", "score_low")),
        ("size", "regression", ("score",)),
    ],
)
def test_every_kind_of_task_is_trained_and_scored(
    cache: Cache, tmp_path: Path, target: str, kind: str, columns: tuple[str, ...]
) -> None:
    result = run_training(cache, tmp_path, target, heads=("linear",), folds=3)
    for run in result.runs:
        assert run.record.kind == kind
        assert run.record.score_columns == columns == tuple(run.predictions.columns[4:])
        scores = run.predictions.select(columns).to_numpy()
        if kind == "multiclass":
            np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)
    linear = {run.head: run for run in result.runs}["linear"]
    if kind == "regression":
        assert linear.metrics["r2"].value > 0.7
        assert abs(linear.predictions["score"].mean() - 115) < 5
    else:
        assert linear.metrics["auroc"].value > 0.65
    assert set(linear.predictions["target"]) >= ({"hot", "hot;low", "low", ""} if kind == "multilabel" else set())


def test_equal_seeds_give_equal_runs_and_leave_the_global_state_alone(cache: Cache, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    runs = [run_training(cache, tmp_path / str(number), heads=("abmil",), seed=3).runs[2] for number in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert runs[0].predictions.equals(runs[1].predictions)
    first, second = (run.members[0].state_dict() for run in runs)
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = run_training(cache, tmp_path / "other", heads=("abmil",), seed=4).runs[2]
    assert not other.predictions["score"].equals(runs[0].predictions["score"])


def test_out_of_fold_predictions_hold_every_case_once_and_never_part_a_patient(cache: Cache, tmp_path: Path) -> None:
    run = run_training(cache, tmp_path).runs[0]
    table = run.predictions
    assert table["case_id"].to_list() == [f"c{case:02}" for case in range(40)]
    assert table.group_by("patient_id").agg(pl.col("fold").n_unique())["fold"].to_list() == [1] * 20
    assert table["target"].to_list() == LABELS["disease"].to_list()
    assert table["fold"].n_unique() == 3 == len(run.members)


@pytest.mark.parametrize(("target", "columns"), [("disease", ["score"]), ("group", ["score_a", "score_b", "score_c"])])
def test_inner_scores_are_of_training_cases_by_heads_that_had_not_seen_them(
    cache: Cache, tmp_path: Path, target: str, columns: list[str]
) -> None:
    runs = {run.head: run for run in run_training(cache, tmp_path, target, heads=("linear",)).runs}
    fold_of = dict(runs["linear"].predictions.select("patient_id", "fold").iter_rows())
    for run, splits in ((runs["linear"], 1), (runs["logistic"], 5)):
        inner = run.inner
        assert inner.columns == ["fold", "split", "case_id", "patient_id", "target", *columns]
        assert inner.select("fold", "split").unique().sort("fold", "split").rows() == [
            (fold, split) for fold in range(3) for split in range(splits)
        ]
        assert all(fold_of[patient] != fold for fold, patient in inner.select("fold", "patient_id").iter_rows())
        assert inner.group_by("fold", "split", "case_id").len()["len"].max() == 1
        assert (
            dict(LABELS.select("case_id", target).iter_rows()).items()
            >= dict(inner.select("case_id", "target").iter_rows()).items()
        )


def test_inner_scores_of_a_closed_form_come_from_a_fit_without_their_cases(cache: Cache, tmp_path: Path) -> None:
    run = run_training(cache, tmp_path).runs[0]
    held = run.inner.filter((pl.col("fold") == 0) & (pl.col("split") == 0))
    ids = set(run.predictions.filter(pl.col("fold") != 0)["case_id"])
    learned, asked = sorted(ids - set(held["case_id"])), held["case_id"].to_list()
    head, member = run.members[0].head, run.members[0]
    features = {
        name: head.features(member.prepare(load_bags(cache, names, ["cls:2"]).batch(range(len(names)))))
        for name, names in (("learned", learned), ("asked", asked))
    }
    truth = dict(LABELS.select("case_id", "disease").iter_rows())
    readout = LinearReadout(DIM, 1)
    targets = np.array([int(truth[case] == "yes") for case in learned])
    readout.fit(features["learned"], targets, kind="binary", strength=run.record.members[0]["choices"]["strength"])
    np.testing.assert_allclose(held["score"], readout(features["asked"])[:, 0].sigmoid(), atol=1e-6)


def test_a_fold_that_comes_from_a_column_is_tested_alone(cache: Cache, tmp_path: Path) -> None:
    split = LABELS.with_columns(site=pl.when(pl.int_range(40) < 24).then(pl.lit("train")).otherwise(pl.lit("test")))
    result = train(
        cache, split, targets="disease", out=tmp_path, heads=(), split="site", resamples=0, fit_options=QUICK
    )
    run = result.runs[0]
    assert len(run.members) == 1
    assert run.predictions["case_id"].to_list() == [f"c{case:02}" for case in range(24, 40)]
    assert run.record.folds == "site"


def test_repeated_folds_test_every_case_anew_and_metrics_are_means_over_repeats(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(LABELS.select("case_id", "disease", "group").write_csv())
    command = [
        "train", str(cache.path), "--labels", str(tmp_path / "labels.csv"), "--target", "disease", "--head", "linear",
        "--folds", "2", "--repeats", "3", "-o", str(tmp_path / "runs"), "--device", "cpu",
    ]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    once = run_training(cache, tmp_path / "once", heads=("linear",), folds=2, seed=0, fit_options={})
    for name in ("logistic", "linear"):
        run = open_run(tmp_path / "runs" / f"disease.{name}")
        assert run.record.repeats == 3 and len(run.members) == 6
        assert run.predictions.height == 120 and set(run.predictions["fold"]) == set(range(6))
        deals = [run.predictions.filter(pl.col("fold") // 2 == repeat).sort("case_id") for repeat in range(3)]
        assert all(deal["case_id"].to_list() == LABELS["case_id"].to_list() for deal in deals)
        assert not (deals[1]["fold"] - 2).equals(deals[0]["fold"])
        assert all(len(set(deal.group_by("patient_id").agg(pl.col("fold").n_unique())["fold"])) == 1 for deal in deals)
        found = [roc_auc_score(deal["target"] == "yes", deal["score"]) for deal in deals]
        assert run.metrics["auroc"].value == pytest.approx(np.mean(found))
        alone = next(each for each in once.runs if each.head == name)
        np.testing.assert_allclose(alone.predictions.sort("case_id")["score"], deals[0]["score"], atol=1e-5)
        assert evaluate(run, resamples=10).metrics["auroc"].value == pytest.approx(np.mean(found))
    assert CliRunner().invoke(app, [*command, "--resume"]).exit_code == 0
    with pytest.raises(RunError, match="was trained with repeats 3, but this training asks for 1"):
        train(cache, LABELS, targets="disease", out=tmp_path / "runs", heads=("linear",), folds=2, resume=True)


def test_every_value_of_a_column_is_left_out_in_turn(cache: Cache, tmp_path: Path) -> None:
    sites = LABELS.with_columns(site=pl.Series(["test", "train", "north"][case // 2 % 3] for case in range(40)))
    how: dict[str, Any] = {"targets": "disease", "heads": ("linear",), "group_by": "site", "fit_options": QUICK}
    run = train(cache, sites, out=tmp_path, **how).runs[-1]
    together = run.predictions.join(sites.select("case_id", "site"), on="case_id")
    assert set(together.select("site", "fold").unique().rows()) == {("north", 0), ("test", 1), ("train", 2)}
    assert run.record.folds == "site" and len(run.members) == 3 and run.predictions.height == 40


def test_focal_loss_and_balanced_batches_are_reached_from_the_command_line(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(LABELS.select("case_id", "disease").write_csv())
    command = [
        "train", str(cache.path), "--labels", str(tmp_path / "labels.csv"), "--target", "disease", "--head", "linear",
        "--folds", "2", "-o", str(tmp_path), "--device", "cpu", "--loss", "focal", "--gamma", "1.5",
        "--sampling", "balanced",
    ]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    run = open_run(tmp_path / "disease.linear")
    options = run.record.fit_options
    assert (options["loss"], options["gamma"], options["sampling"]) == ("focal", 1.5, "balanced")
    assert run.metrics["auroc"].value > 0.75  # as with cross entropy at so slow a rate


def test_standardisation_never_sees_a_test_case(cache: Cache) -> None:
    ids = [f"c{case:02}" for case in range(40)]
    store = load_bags(cache, ids, ["cls:2"])
    planted = load_bags(cache, ids, ["cls:2"])
    rows = planted.segments() == 7
    planted.table("cls:2")[rows] = 3e4
    training = [case for case in range(40) if case != 7]
    expected, found = (
        fit_standardiser(each.shape, sum_moments(each, "cls:2"), training).state_dict() for each in (store, planted)
    )
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    seen = fit_standardiser(planted.shape, sum_moments(planted, "cls:2"), range(40)).state_dict()
    assert not torch.equal(seen["mean_0"], expected["mean_0"])


def test_a_standardiser_gives_mean_zero_and_deviation_one(cache: Cache) -> None:
    store = load_bags(cache, [f"c{case:02}" for case in range(40)], ["patch@2:1"])
    standardiser = fit_standardiser(store.shape, sum_moments(store, "patch@2:1"), range(40))
    bag = store.batch(range(40))
    tokens = standardiser(bag).tokens["patch@2:1"][bag.mask].flatten(0, 1)
    torch.testing.assert_close(tokens.mean(0), torch.zeros(DIM), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens.std(0, correction=0), torch.ones(DIM), atol=1e-3, rtol=0)


def test_tokens_that_are_not_finite_are_refused_by_case(cache: Cache) -> None:
    store = load_bags(cache, ["c00", "c01"], ["cls:2"])
    store.table("cls:2")[-1] = torch.inf
    with pytest.raises(CacheError, match=r"1 cases hold cls:2 tokens that are NaN or infinite \(c01\)"):
        sum_moments(store, "cls:2")


def test_the_penalty_is_chosen_on_what_is_held_out() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(80, 30, generator=generator)
    held = np.arange(80) % 4 == 0
    clear, noise = LinearReadout(30, 1), LinearReadout(30, 1)
    targets = (features[:, 0] > 0).long().numpy()
    strong = clear.fit(features, targets, kind="binary", holdouts=[held])
    weak = noise.fit(features, np.arange(80) // 2 % 2, kind="binary", holdouts=[held])
    assert strong > 10 * weak
    assert ((clear(features)[:, 0] > 0).long().numpy() == targets).mean() > 0.95
    assert noise.weight.norm() < 0.2 * clear.weight.norm()


def test_more_features_than_cases_give_what_the_full_fit_gives() -> None:
    from sklearn.linear_model import LogisticRegression

    features = torch.randn(20, 50, generator=torch.Generator().manual_seed(1))
    targets = np.arange(20) % 2
    readout = LinearReadout(50, 1)
    readout.fit(features, targets, kind="binary", holdouts=[], class_weights=False)
    standard = readout.standardise(features).double().numpy()
    direct = LogisticRegression(C=1 / 50, solver="newton-cholesky", tol=1e-10).fit(standard, targets)
    np.testing.assert_allclose(readout.weight.numpy(), direct.coef_, atol=1e-4)


def test_cases_left_aside_are_named_in_the_run(cache: Cache, tmp_path: Path) -> None:
    labels = LABELS.with_columns(disease=pl.when(pl.col("case_id") == "c03").then(None).otherwise(pl.col("disease")))
    labels = pl.concat([labels, labels[:1].with_columns(case_id=pl.lit("stranger"))])
    run = train(cache, labels, targets="disease", out=tmp_path, heads=(), folds=3, resamples=0).runs[0]
    cases = run.record.cases
    assert (cases["trained"], cases["unlabelled"], cases["unknown"]) == (39, ["c03"], ["stranger"])


def test_raptor_says_what_it_lacks(cache: Cache, tmp_path: Path) -> None:
    runs = {run.head: run for run in run_training(cache, tmp_path).runs}
    assert runs["raptor"].record.notes == (
        "Raptor is defined on three planes; this cache lacks coronal and sagittal",
        "Raptor is defined on the full patch grid; here it read patch@2:1",
    )
    assert runs["logistic"].record.notes == ()


def test_token_sets_can_be_chosen_for_all_heads_or_for_one(cache: Cache, tmp_path: Path) -> None:
    every = run_training(cache, tmp_path / "a", token_sets=["patch@2:1"])
    assert every.table["tokens"].to_list() == ["patch@2:1", "patch@2:1"]
    one = run_training(cache, tmp_path / "b", heads=("linear",), token_sets={"linear": ["cls:2", "patch@2:1"]})
    assert one.table["tokens"].to_list() == ["cls:2", "patch@2:1", "cls:2,patch@2:1"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target": "constant"}, TaskError, "constant"),
        ({"target": "nothing"}, TaskError, "no column nothing"),
        ({"target": []}, OptionError, "no target was given"),
        ({"heads": ("gird",)}, HeadError, "did you mean grid"),
        ({"token_sets": ["cls:9"]}, CacheError, "cls:9 is not in the cache"),
        ({"fit_options": {"speed": 3}}, OptionError, "no fit option is called speed; there are learning_rate"),
        ({"fit_options": {"precision": "fp8"}}, OptionError, "precision is 'fp8', expected fp32 or bf16"),
        ({"sweep": "huge"}, OptionError, "sweep is 'huge', expected small or large"),
        ({"seeds": 0}, OptionError, "seeds is 0, expected 1 or more members per fold"),
        ({"storage": "disk"}, OptionError, "storage is 'disk', expected one of auto, device, memory, stream"),
        ({"fit_options": {"epochs": 0}}, OptionError, "epochs is 0, expected above 0"),
        ({"head_options": {"grid": {}}}, HeadError, "given for grid, but heads are logistic, raptor"),
        ({"head_options": {"raptor": {"depth": 2}}}, HeadError, "it has projections, seed"),
        ({"folds": 30}, TaskError, "folds"),
        ({"repeats": 0}, OptionError, "0 repeats of the folds asked for, expected 1 or more"),
        ({"repeats": 2, "split": "group"}, OptionError, "2 repeats were asked for with the folds of column group"),
        ({"split": "group", "group_by": "group"}, OptionError, "from both split group and group_by group"),
        ({"fit_options": {"loss": "hinge"}}, OptionError, "loss is 'hinge', expected cross_entropy or focal"),
        ({"fit_options": {"gamma": -1}}, OptionError, "gamma is -1, expected 0 or above"),
        ({"fit_options": {"sampling": "most"}}, OptionError, "sampling is 'most', expected shuffled or balanced"),
        (
            {"target": "size", "heads": ("linear",), "fit_options": {"loss": "focal"}},
            OptionError,
            "focal loss belongs to classes, but target size is a regression task",
        ),
        (
            {"target": "size", "heads": ("linear",), "fit_options": {"sampling": "balanced"}},
            OptionError,
            "balanced sampling belongs to a binary or multiclass task, but target size is regression",
        ),
        ({"device": "abacus"}, OptionError, "abacus"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    cache: Cache, tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run_training(cache, tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()


def test_a_run_that_exists_is_kept_unless_told_otherwise(cache: Cache, tmp_path: Path) -> None:
    run_training(cache, tmp_path)
    before = open_run(tmp_path / "disease.logistic").record.seed
    with pytest.raises(RunError, match=r"disease\.logistic exists already; choose another --out, or pass --overwrite"):
        run_training(cache, tmp_path, seed=9)
    assert open_run(tmp_path / "disease.logistic").record.seed == before
    run_training(cache, tmp_path, seed=9, overwrite=True)
    assert open_run(tmp_path / "disease.logistic").record.seed == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disease.logistic", "disease.raptor"]


def test_a_folder_that_is_no_run_is_never_replaced(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "disease.raptor").mkdir(parents=True)
    (tmp_path / "disease.raptor" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="is no run"):
        run_training(cache, tmp_path, overwrite=True)
    assert (tmp_path / "disease.raptor" / "thesis.txt").read_text() == "precious"


def test_a_target_whose_name_is_no_file_name_gets_a_folder(cache: Cache, tmp_path: Path) -> None:
    labels = LABELS.rename({"disease": "../is it?"})
    run = train(cache, labels, targets="../is it?", out=tmp_path, heads=(), folds=3, resamples=0).runs[0]
    assert run.path.parent == tmp_path
    assert run.record.target == "../is it?"


def test_a_head_that_diverges_is_named_with_its_learning_rate(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(HeadError, match=r"head 'linear' diverged.*lower its learning rate \(now 1e\+30\)"):
        run_training(cache, tmp_path, heads=("linear",), fit_options={"learning_rate": 1e30, "epochs": 3})


def test_the_number_of_epochs_follows_the_held_out_loss(cache: Cache, tmp_path: Path) -> None:
    runs = run_training(cache, tmp_path, heads=("linear",), fit_options={"epochs": 8, "learning_rate": 5e-2}).runs
    members = runs[2].record.members
    assert all(1 <= member["epochs"] <= 8 for member in members)
    assert all(member["held_out_loss"] < 0.7 for member in members)
    assert FitOptions().replace(epochs=2).epochs == 2


def test_more_inner_splits_hold_out_other_cases_and_the_first_as_before(cache: Cache, tmp_path: Path) -> None:
    one, three = (
        run_training(
            cache, tmp_path / str(many), heads=("linear",), fit_options={"epochs": 4, "inner_splits": many}
        ).runs[2]
        for many in (1, 3)
    )
    held = [
        {split: set(part["case_id"]) for (split,), part in run.inner.filter(fold=0).group_by("split")}
        for run in (one, three)
    ]
    assert sorted(held[0]) == [0]
    assert sorted(held[1]) == [0, 1, 2]
    assert held[0][0] == held[1][0]
    assert len({frozenset(each) for each in held[1].values()}) > 1
    with pytest.raises(OptionError, match="inner_splits is 0, expected above 0"):
        run_training(cache, tmp_path / "none", fit_options={"inner_splits": 0})


def test_two_classes_as_multiclass_have_the_probabilities_of_the_binary_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 4, generator=generator)
    targets = (features[:, 0] + torch.randn(30, generator=generator) > 0).long().numpy()
    holdouts = [np.arange(30) % 5 == part for part in range(5)]
    binary, multiclass = LinearReadout(4, 1), LinearReadout(4, 2)
    strengths = [
        binary.fit(features, targets, kind="binary", holdouts=holdouts),
        multiclass.fit(features, targets, kind="multiclass", holdouts=holdouts),
    ]
    assert strengths[0] == strengths[1]
    assert binary.weight.abs().max() > 0.1
    torch.testing.assert_close(multiclass(features).softmax(1)[:, 1], binary(features)[:, 0].sigmoid())


def test_two_classes_can_be_trained_as_multiclass(cache: Cache, tmp_path: Path) -> None:
    result = run_training(cache, tmp_path, kind="multiclass")
    assert result.runs[0].record.score_columns == ("score_no", "score_yes")
    assert auroc(result, "logistic") > 0.9


def test_a_sweep_chooses_anew_in_every_fold_and_says_how_the_candidates_ranked(cache: Cache, tmp_path: Path) -> None:
    """The place of a patch is in no class token: a sweep over token sets must find the patches."""
    result = run_training(cache, tmp_path, "place", heads=("grid",), sweep="small", fit_options={"epochs": 5})
    runs = {run.head: run for run in result.runs}
    for head, count in (("grid", 24), ("raptor", 2)):
        record = runs[head].record
        assert record.sweep is not None
        assert (record.sweep["name"], len(record.sweep["candidates"])) == ("small", count)
        for member in record.members:
            ranking = member["ranking"]
            assert sorted(place for place, _ in ranking) == list(range(count))
            assert ranking[0][0] == member["candidate"]
            assert [loss for _, loss in ranking] == sorted(loss for _, loss in ranking)
            assert ranking[0][1] == member["held_out_loss"]
            chosen = record.sweep["candidates"][member["candidate"]]
            assert (chosen["token_sets"], chosen["head_options"]) == (member["token_sets"], member["head_options"])
    assert [member["token_sets"] for member in runs["grid"].record.members] == [["patch@2:1"]] * 3
    assert auroc(result, "grid") > 0.9
    assert runs["grid"].inner.select("fold", "split").n_unique() == 9


def test_members_that_chose_otherwise_predict_and_explain_together(cache: Cache, tmp_path: Path) -> None:
    run = run_training(cache, tmp_path, heads=("linear",), sweep="small", fit_options={"epochs": 2}).runs[2]
    fields = json.loads((run.path / "run.json").read_text())
    chosen = {tuple(member["token_sets"]) for member in fields["members"]}
    assert set(run.record.token_sets) == {name for each in chosen for name in each}
    answers = predict(run, cache)
    assert answers["score"].null_count() == 0
    shown = run.find_evidence(cache, "c01", held_out=True)
    assert shown.scores["t1/axial"].shape[0] == 4


def test_several_seeds_are_several_members_whose_mean_is_the_score(cache: Cache, tmp_path: Path) -> None:
    fit = {"epochs": 3, "learning_rate": 5e-2}
    one = run_training(cache, tmp_path / "one", heads=("abmil",), fit_options=fit).runs[2]
    two = run_training(cache, tmp_path / "two", heads=("abmil",), fit_options=fit, seeds=2).runs[2]
    assert [member["fold"] for member in two.record.members] == [0, 0, 1, 1, 2, 2]
    first, again = one.members[0].state_dict(), two.members[0].state_dict()
    assert all(torch.allclose(first[name], again[name], atol=1e-4) for name in first)
    assert not torch.allclose(two.members[1].state_dict()["head.value.weight"], again["head.value.weight"], atol=1e-3)
    case = two.predictions.row(0, named=True)
    bag = load_bags(cache, [case["case_id"]], ["cls:2"]).batch([0])
    mine = [
        member for each, member in zip(two.record.members, two.members, strict=True) if each["fold"] == case["fold"]
    ]
    with torch.no_grad():
        expected = np.mean([float(member.scores(member(bag).logits)) for member in mine])
    assert case["score"] == pytest.approx(expected, abs=1e-5)


def test_many_tasks_in_one_call_are_what_each_is_alone(cache: Cache, tmp_path: Path) -> None:
    targets = ["disease", "noise", "size"]
    together = run_training(cache, tmp_path / "together", targets, heads=("query",))
    scores = {run.record.target: run.predictions["score"] for run in together.runs if run.head == "query"}
    for target in targets:
        alone = run_training(cache, tmp_path / target, target, heads=("query",)).runs[2]
        np.testing.assert_allclose(alone.predictions["score"], scores[target], rtol=1e-3, atol=1e-4)


def test_a_training_that_was_interrupted_goes_on_where_it_stopped(cache: Cache, tmp_path: Path) -> None:
    heads = ("linear", "query")

    def stop(at: TrainingProgress) -> None:
        if at.head == "query":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(cache, tmp_path / "a", heads=heads, on_progress=stop)
    kept = ["disease.linear", "disease.logistic", "disease.raptor"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == kept
    before = {name: (tmp_path / "a" / name / "run.json").read_bytes() for name in kept}
    told: list[TrainingProgress] = []
    resumed = run_training(cache, tmp_path / "a", heads=heads, resume=True, on_progress=told.append)
    assert {name: (tmp_path / "a" / name / "run.json").read_bytes() for name in kept} == before
    assert [(at.head, at.done, at.total) for at in told] == [("query", done, 12) for done in (10, 11, 12)]
    whole = run_training(cache, tmp_path / "b", heads=heads)
    for one, other in zip(resumed.runs, whole.runs, strict=True):
        assert one.predictions.equals(other.predictions)
    again = run_training(cache, tmp_path / "a", heads=heads, resume=True)
    assert again.table["auroc"].to_list() == resumed.table["auroc"].to_list()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 5}, r"was trained with seed 0, but this training asks for 5; pass the same options"),
        ({"folds": 4}, "was trained with folds 3, but this training asks for 4"),
        ({"sweep": "small"}, "was trained with sweep null, but this training asks for"),
        ({"token_sets": ["patch@2:1"]}, r"was trained with token_sets \[\"cls:2\"\], but"),
        ({"labels": LABELS[:36]}, "was trained on other cases, labels or folds"),
    ],
)
def test_a_resume_with_other_options_names_what_differs(
    cache: Cache, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    run_training(cache, tmp_path)
    labels = options.pop("labels", LABELS)
    settings: dict[str, Any] = {"heads": (), "resamples": 0, "fit_options": QUICK, "folds": 3, "device": "cpu"}
    with pytest.raises(RunError, match=words):
        train(cache, labels, targets="disease", out=tmp_path, resume=True, **settings | options)
    with pytest.raises(OptionError, match="choose one of the two"):
        run_training(cache, tmp_path, resume=True, overwrite=True)


def test_a_run_that_lacks_a_later_fit_option_was_made_with_its_default(cache: Cache, tmp_path: Path) -> None:
    run_training(cache, tmp_path, heads=("query",))
    path = tmp_path / "disease.query" / "run.json"
    record = json.loads(path.read_text())
    del record["fit_options"]["inner_splits"]
    path.write_text(json.dumps(record))
    run_training(cache, tmp_path, heads=("query",), resume=True)
    words = r'was trained with fit_options {"inner_splits": 1}, but this training asks for {"inner_splits": 2}; pass'
    with pytest.raises(RunError, match=words):
        run_training(cache, tmp_path, heads=("query",), resume=True, fit_options={**QUICK, "inner_splits": 2})


def test_ctrl_c_exits_130_and_says_how_to_go_on(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("embedkit.rounds.cross_fit_all", interrupt)
    LABELS.write_csv(tmp_path / "labels.csv")
    labels, out = str(tmp_path / "labels.csv"), str(tmp_path / "runs")
    command = ["embedkit", "train", str(cache.path), "--labels", labels, "--target", "disease", "-o", out]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err


def flip_bit(cache: Path, token_set: str) -> Path:
    """Changes one bit of the last token of a set, so little that it stays a number like the others."""
    (shard,) = open_cache(cache).shards
    place, data = shard.arrays[f"tokens/{token_set}"], bytearray(shard.path.read_bytes())
    data[place.offset + place.bytes - 2] ^= 1
    shard.path.write_bytes(data)
    return shard.path


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_a_flipped_bit_is_never_trained_on(tmp_path: Path, storage: str) -> None:
    build_cache(tmp_path / "cache")
    shard = flip_bit(tmp_path / "cache", "patch@2:1")
    options: dict[str, Any] = {"heads": ["linear"], "storage": storage}
    run_training(open_cache(tmp_path / "cache"), tmp_path / "fine", token_sets=["cls:2"], **options)
    with pytest.raises(CacheError, match=f"{shard.name} is damaged: tokens/patch@2:1 is not what was written"):
        run_training(open_cache(tmp_path / "cache"), tmp_path / "runs", token_sets=["patch@2:1"], **options)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())

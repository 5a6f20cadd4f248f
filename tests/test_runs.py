"""Runs: complete or absent, the same predictions after reopening, and refused where they do not fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from embedkit import files, runfolder
from embedkit.cache import Cache, StackTokens, open_cache
from embedkit.errors import HeadError, RecipeError, RunError, TaskError
from embedkit.evaluation import evaluate
from embedkit.files import remove_stale, temporary_path
from embedkit.folder import create_cache, write_shard
from embedkit.recipe import Recipe
from embedkit.runs import Run, open_run, predict
from embedkit.training import train

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 5
RECIPE = Recipe("tiny", "builtin:1", ("cls:2", "patch@2:1"), 32, (0.5,), (0.5,), preview=0)


def build_cache(
    folder: Path, prefix: str, *, cases: int = 24, recipe: Recipe = RECIPE, views: tuple[str, ...] = ("pre", "post")
) -> Cache:
    """Case n of odd n holds a high channel 0 at place 2 of slice 1; every fourth case lacks all views but the first."""
    create_cache(folder, recipe)
    generator = np.random.default_rng(len(prefix))
    stacks = []
    for case in range(cases):
        for view in views if case % 4 else views[:1]:
            slices = 3 + case % 2
            patch = generator.normal(size=(slices, 4, DIM))
            patch[1, 2, 0] += 9 * (case % 2)
            tokens = {"patch@2:1": patch.astype(np.float16), "cls:2": patch.mean(1).astype(np.float16)}
            tokens |= {name: tokens["cls:2"] for name in recipe.token_sets if name not in tokens}
            stacks.append(
                StackTokens(
                    case_id=f"{prefix}{case:02}", patient_id=f"{prefix}-{case:02}", view=view, plane="axial",
                    sources=(view,), indices=np.arange(slices, dtype=np.int32),
                    positions_mm=np.arange(slices, dtype=np.float32), blank=np.arange(slices) == 3, plane_shape=(8, 8),
                    box=(0, 0, 8, 8), source_shape=(slices, 8, 8), source_affine=np.eye(4), source_bytes=1,
                    source_digest=f"{case}{view}", tokens={name: tokens[name] for name in recipe.token_sets},
                )
            )  # fmt: skip
    write_shard(folder, recipe, stacks)
    return open_cache(folder)


def build_labels(prefix: str, cases: int = 24) -> pl.DataFrame:
    ids = [f"{prefix}{case:02}" for case in range(cases)]
    return pl.DataFrame(
        {
            "case_id": ids,
            "lesion": [("absent", "present")[case % 2] for case in range(cases)],
            "grade": [("one", "two", "three")[case % 3] for case in range(cases)],
            "volume": [float(100 + 50 * (case % 2) + case / 10) for case in range(cases)],
        }
    )


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return build_cache(tmp_path_factory.mktemp("old") / "cache", "old")


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    recipe = dataclasses.replace(RECIPE, token_sets=("cls:1", *RECIPE.token_sets), preview=0)
    return build_cache(tmp_path_factory.mktemp("new") / "cache", "new", cases=12, recipe=recipe)


@pytest.fixture(scope="module")
def runs(old: Cache, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Every head on `lesion`, the baselines and linear on the other targets."""
    out = tmp_path_factory.mktemp("runs")
    quick: dict[str, Any] = {"out": out, "folds": 3, "resamples": 20, "device": "cpu"}
    options = {"epochs": 12, "batch_size": 8, "learning_rate": 5e-2}
    first = train(old, build_labels("old"), targets="lesion", fit_options=options, **quick)
    second = train(
        old, build_labels("old"), targets=["grade", "volume"], heads=("linear",), fit_options=options, **quick
    )
    return {run.name: run for run in (*first.runs, *second.runs)}


@pytest.fixture
def copied(runs: dict[str, Run], tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs["lesion.linear"].path, tmp_path / "run"))


def test_a_run_folder_holds_json_weights_and_predictions_alone(runs: dict[str, Run]) -> None:
    run = runs["lesion.grid"]
    assert sorted(path.name for path in run.path.iterdir()) == [
        "inner.parquet", "predictions.parquet", "run.json", "weights.safetensors",
    ]  # fmt: skip
    fields = json.loads((run.path / "run.json").read_text())
    assert fields["format"] == "embedkit-run"
    assert fields["fingerprint"] == RECIPE.fingerprint
    assert fields["recipe"] == json.loads(RECIPE.to_json())
    assert fields["head_options"] == {"hidden": 64, "width": 24, "dropout": 0.3, "views": "joint", "masks": False}
    assert set(fields["metrics"]["auroc"]) >= {"value", "low", "high"}
    assert {"embedkit", "torch", "python", "head"} <= set(fields["versions"])
    assert run.views == ("post/axial", "pre/axial")


@pytest.mark.parametrize("head", ["linear", "query", "abmil", "grid", "logistic", "raptor"])
def test_a_run_predicts_new_cases_as_the_mean_of_its_members(runs: dict[str, Run], new: Cache, head: str) -> None:
    run = runs[f"lesion.{head}"]
    table = predict(run.path, new)
    assert table.columns == ["case_id", "patient_id", "score", "predicted"]
    assert table["case_id"].to_list() == [f"new{case:02}" for case in range(12)]
    assert table["patient_id"][3] == "new-03"
    single = [predict(dataclasses.replace(run, members=(member,)), new)["score"].to_numpy() for member in run.members]
    np.testing.assert_allclose(table["score"].to_numpy(), np.mean(single, axis=0), atol=1e-6)
    assert table["predicted"].to_list() == [("absent", "present")[int(score >= 0.5)] for score in table["score"]]


def test_a_calibrated_run_predicts_the_mean_of_its_members_mapped_scores(runs: dict[str, Run], new: Cache) -> None:
    for name in ("lesion.logistic", "grade.linear"):
        run = runs[name]
        columns = run.record.score_columns
        mapped = []
        for member, calibrator in zip(run.members, run.calibrated("platt").calibrators, strict=True):
            alone = predict(dataclasses.replace(run, members=(member,)), new).select(columns).to_numpy()
            mapped.append(calibrator.apply(run.record.score_array(alone)).reshape(alone.shape))
        found = predict(run, new, calibrate="platt").select(columns).to_numpy()
        np.testing.assert_allclose(found, np.mean(mapped, axis=0), atol=1e-5)
        assert np.abs(found - predict(run, new).select(columns).to_numpy()).max() > 1e-3


def test_out_of_fold_scores_are_those_of_the_member_that_held_the_case_out(runs: dict[str, Run], old: Cache) -> None:
    run = runs["lesion.abmil"]
    for case, fold, score in run.predictions.select("case_id", "fold", "score").head(6).iter_rows():
        alone = predict(dataclasses.replace(run, members=(run.members[fold],)), old, case_ids=[case])
        assert alone["score"][0] == pytest.approx(score, abs=1e-5)


def test_other_kinds_predict_their_columns(runs: dict[str, Run], new: Cache) -> None:
    grades = predict(runs["grade.linear"], new, case_ids=["new05", "new01"])
    assert grades.columns[2:] == ["score_one", "score_three", "score_two", "predicted"]
    assert grades["case_id"].to_list() == ["new05", "new01"]
    np.testing.assert_allclose(grades.select(pl.col("^score.*$")).to_numpy().sum(1), 1, atol=1e-5)
    volumes = predict(runs["volume.linear"], new)
    assert volumes.columns[2:] == ["score"]
    assert 90 < float(volumes["score"].mean()) < 170  # type: ignore[arg-type]


def test_a_case_without_a_usable_slice_gets_null_and_is_not_dropped(runs: dict[str, Run], tmp_path: Path) -> None:
    cache = build_cache(tmp_path / "cache", "odd", cases=4)
    hollow = dataclasses.replace(RECIPE)
    stack = StackTokens(
        case_id="blank", patient_id="blank", view="pre", plane="axial", sources=("pre",),
        indices=np.arange(2, dtype=np.int32), positions_mm=np.arange(2, dtype=np.float32), blank=np.ones(2, bool),
        plane_shape=(8, 8), box=(0, 0, 8, 8), source_shape=(2, 8, 8), source_affine=np.eye(4), source_bytes=1,
        source_digest="blank",
        tokens={"cls:2": np.zeros((2, DIM), np.float16), "patch@2:1": np.zeros((2, 4, DIM), np.float16)},
    )  # fmt: skip
    write_shard(cache.path, hollow, [stack])
    table = predict(runs["lesion.linear"], open_cache(cache.path))
    assert table.filter(pl.col("case_id") == "blank").row(0) == ("blank", "blank", None, None)
    assert table["score"].null_count() == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 64}, "image_size is 64 there and 32 here"),
        ({"backbone": "other"}, "backbone is 'other' there and 'tiny' here"),
    ],
)
def test_a_cache_of_another_recipe_is_refused(
    runs: dict[str, Run], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    other = build_cache(tmp_path / "cache", "x", cases=2, recipe=dataclasses.replace(RECIPE, **change))
    with pytest.raises(RecipeError, match=words):
        predict(runs["lesion.linear"], other)


def test_a_cache_that_lacks_a_token_set_or_every_view_is_refused(runs: dict[str, Run], tmp_path: Path) -> None:
    poor = build_cache(tmp_path / "a", "x", cases=2, recipe=dataclasses.replace(RECIPE, token_sets=("cls:2",)))
    with pytest.raises(
        RunError, match=r"needs the token sets patch@2:1, but cache .* lacks patch@2:1 \(it holds cls:2"
    ):
        predict(runs["lesion.grid"], poor)
    strange = build_cache(tmp_path / "b", "x", cases=2, views=("late",))
    with pytest.raises(
        RunError, match=r"one or more of the views post/axial, pre/axial, but cache .* holds late/axial"
    ):
        predict(runs["lesion.linear"], strange)


@pytest.mark.parametrize("head", ["linear", "query", "abmil", "grid", "logistic", "raptor"])
def test_a_view_that_no_case_of_a_cache_has_counts_as_missing(
    runs: dict[str, Run], new: Cache, tmp_path: Path, head: str
) -> None:
    """Case new04 lacks `post`, so it is the same in a cache without any `post`."""
    run = runs[f"lesion.{head}"]
    half = build_cache(tmp_path / "cache", "new", cases=12, views=("pre",))
    create_cache(tmp_path / "alone", RECIPE)
    stacks = new.stacks.filter(pl.col("case_id") == "new04")
    assert stacks["view"].to_list() == ["pre"]
    tokens = {name: np.asarray(new.read(stacks["stack"][0], name)) for name in RECIPE.token_sets}
    record, slices = new.record(stacks["stack"][0]), new.slices(stacks["stack"][0])
    stack = StackTokens(
        case_id="new04", patient_id="new-04", view="pre", plane="axial", sources=("pre",), indices=slices.indices,
        positions_mm=slices.positions_mm, blank=slices.blank, plane_shape=(8, 8), box=(0, 0, 8, 8),
        source_shape=record.source_shape, source_affine=np.eye(4), source_bytes=1, source_digest="alone", tokens=tokens,
    )  # fmt: skip
    write_shard(tmp_path / "alone", RECIPE, [stack])
    alone = open_cache(tmp_path / "alone")
    assert predict(run, half)["score"].null_count() == 0
    assert predict(run, alone)["score"][0] == pytest.approx(predict(run, new, case_ids=["new04"])["score"][0], abs=1e-6)
    ids, vectors = run.embed(new)
    np.testing.assert_allclose(run.embed(alone)[1][0], vectors[ids.index("new04")], atol=1e-5)
    found, expected = (run.find_evidence(each, "new04").scores for each in (alone, new))
    assert list(found) == ["pre/axial"]
    np.testing.assert_allclose(found["pre/axial"], expected["pre/axial"], atol=1e-5)


def test_an_unknown_case_is_refused(runs: dict[str, Run], new: Cache) -> None:
    with pytest.raises(RunError, match="lacks 1 of the cases asked for: nobody"):
        predict(runs["lesion.linear"], new, case_ids=["new01", "nobody"])
    with pytest.raises(RunError, match="has no case 'nobody'"):
        runs["lesion.linear"].find_evidence(new, "nobody")


def test_evaluation_scores_new_patients_and_refuses_those_of_the_training(
    runs: dict[str, Run], old: Cache, new: Cache
) -> None:
    found = evaluate(runs["lesion.abmil"], new, build_labels("new", 12), resamples=50).metrics
    assert found["auroc"].value > 0.7
    assert found["auroc"].low <= found["auroc"].value <= found["auroc"].high
    assert set(evaluate(runs["volume.linear"].path, new, build_labels("new", 12), resamples=0).metrics) == {
        "mae", "r2", "spearman",
    }  # fmt: skip
    with pytest.raises(RunError, match=r"24 of the labelled cases are of patients that run lesion\.abmil was trained"):
        evaluate(runs["lesion.abmil"], old, build_labels("old"))
    with pytest.raises(TaskError, match="no column lesion"):
        evaluate(runs["lesion.abmil"], new, build_labels("new").drop("lesion"))


def test_patients_that_are_in_training_alone_are_refused_too(old: Cache, tmp_path: Path) -> None:
    labels = build_labels("old").with_columns(part=pl.Series(["train"] * 16 + ["test"] * 8))
    run = train(old, labels, targets="lesion", out=tmp_path, heads=(), split="part", resamples=0, device="cpu").runs[0]
    assert run.predictions["case_id"].to_list() == [f"old{case}" for case in range(16, 24)]
    assert run.training_patients == {f"old-{case:02}" for case in range(24)}
    with pytest.raises(
        RunError, match=r"16 of the labelled cases are of patients that run .* was trained on \(old00, "
    ):
        evaluate(run, old, labels.head(16))
    with pytest.raises(RunError, match=r"'old03' was not tested in the training of run lesion.* so no member holds it"):
        run.find_evidence(old, "old03", held_out=True)


@pytest.mark.parametrize("head", ["linear", "grid", "logistic"])
def test_embeddings_are_of_length_one_per_member(runs: dict[str, Run], new: Cache, head: str) -> None:
    ids, vectors = runs[f"lesion.{head}"].embed(new)
    assert ids == tuple(f"new{case:02}" for case in range(12))
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.square(vectors).sum(1), 3, rtol=1e-4)


def test_evidence_stands_where_the_lesion_is_and_turns_its_sign_with_the_class(
    runs: dict[str, Run], new: Cache
) -> None:
    run = runs["lesion.grid"]
    evidence = run.find_evidence(new, "new05")
    scores = evidence.scores["pre/axial"]
    assert scores.shape == (4, 2, 2)
    assert (scores[3] == 0).all()
    assert np.unravel_index(scores.argmax(), scores.shape) == (1, 1, 0)
    assert runs["lesion.abmil"].find_evidence(new, "new05").scores["pre/axial"].shape == (4, 1, 1)
    assert evidence.answer.startswith("lesion = present with probability ")
    against = run.find_evidence(new, "new05", class_name="absent")
    np.testing.assert_array_equal(against.scores["pre/axial"], -scores)
    assert against.answer.startswith("lesion = absent")


def test_evidence_of_one_case_can_be_asked_of_the_member_that_held_it_out(
    runs: dict[str, Run], old: Cache, new: Cache
) -> None:
    run = runs["lesion.grid"]
    fold = run.predictions.filter(pl.col("case_id") == "old05")["fold"][0]
    held_out = run.find_evidence(old, "old05", held_out=True)
    alone = dataclasses.replace(run, members=(run.members[fold],)).find_evidence(old, "old05")
    np.testing.assert_array_equal(held_out.scores["pre/axial"], alone.scores["pre/axial"])
    with pytest.raises(RunError, match="'new05' was not tested in the training"):
        run.find_evidence(new, "new05", held_out=True)


def test_a_missing_view_has_no_evidence_and_an_unknown_class_is_refused(runs: dict[str, Run], new: Cache) -> None:
    assert list(runs["lesion.linear"].find_evidence(new, "new04").scores) == ["pre/axial"]
    with pytest.raises(RunError, match="has no class 'maybe'; it has absent, present"):
        runs["lesion.linear"].find_evidence(new, "new05", class_name="maybe")
    with pytest.raises(RunError, match="has no class 'big'; it has none, being a regression"):
        runs["volume.linear"].find_evidence(new, "new05", class_name="big")
    assert runs["volume.linear"].find_evidence(new, "new05").answer.startswith("volume = 1")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run folder; give a folder"):
        open_run(tmp_path / "nothing")
    with pytest.raises(RunError, match=r"lacks run\.json, weights\.safetensors, predictions\.parquet, inner\.parquet"):
        open_run(tmp_path)


def test_a_run_that_lacks_a_file_or_is_older_says_so(copied: Path) -> None:
    (copied / "inner.parquet").unlink()
    with pytest.raises(RunError, match=r"lacks inner\.parquet; give a folder"):
        open_run(copied)
    fields = json.loads((copied / "run.json").read_text()) | {"format_version": 1}
    (copied / "run.json").write_text(json.dumps(fields))
    with pytest.raises(RunError, match=r"has format version 1, which keeps less than 2 does .* train it again"):
        open_run(copied)


@pytest.mark.parametrize("name", ["weights.safetensors", "predictions.parquet", "inner.parquet"])
def test_one_flipped_byte_is_found(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(RunError, match=f"is damaged: {name} is not what was written"):
        open_run(copied)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "its format is 'other'"),
        ({"format_version": 99}, "format version 99 is newer than 2: upgrade embedkit"),
        ({"kind": "guess"}, "kind is 'guess'"),
        ({"shape": {}}, "KeyError"),
        ({"recipe": {}}, "RecipeError: recipe lacks"),
        ({"members": 3}, "TypeError"),
        ({"sha256": {}}, "KeyError"),
    ],
)
def test_a_damaged_or_newer_record_is_refused(copied: Path, change: dict[str, Any], words: str) -> None:
    fields = json.loads((copied / "run.json").read_text()) | change
    (copied / "run.json").write_text(json.dumps(fields))
    with pytest.raises(RunError, match=words):
        open_run(copied)


def test_a_record_that_is_not_json_is_refused(copied: Path) -> None:
    (copied / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"is damaged: run\.json: JSONDecodeError"):
        open_run(copied)
    (copied / "run.json").write_text("[]")
    with pytest.raises(RunError, match=r"is damaged: run\.json: TypeError"):
        open_run(copied)


def test_weights_that_do_not_fit_the_head_and_a_head_that_is_gone_are_named(copied: Path) -> None:
    fields = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps(fields | {"outputs": 7}))
    with pytest.raises(RunError, match="does not fit head 'linear' as it is installed"):
        open_run(copied)
    (copied / "run.json").write_text(json.dumps(fields | {"head": "vanished"}))
    with pytest.raises(HeadError, match="no head is called 'vanished'"):
        open_run(copied)


def test_a_write_that_fails_leaves_no_trace(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs["lesion.linear"]

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runfolder, "publish_folder", fail)
    with pytest.raises(RunError, match=r"run lesion\.linear cannot be written: the disk or quota .* is full"):
        runfolder.write_run(tmp_path / "run", run.record, run.members, run.predictions, run.inner, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_an_overwrite_that_fails_leaves_the_old_run(
    runs: dict[str, Run], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = runs["lesion.grid"]

    def write() -> None:
        runfolder.write_run(copied, other.record, other.members, other.predictions, other.inner, overwrite=True)

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "publish_folder", fail)
        with pytest.raises(RunError, match=r"run lesion\.grid cannot be written: the disk or quota"):
            write()
    assert [path.name for path in copied.parent.iterdir()] == ["run"]
    assert open_run(copied).digest == runs["lesion.linear"].digest
    write()
    assert [path.name for path in copied.parent.iterdir()] == ["run"]
    assert open_run(copied).digest == other.digest


def test_a_run_that_a_killed_writer_had_set_aside_comes_back(runs: dict[str, Run], copied: Path) -> None:
    """Its name is that of this host and process id, but of another process: the one that had the id before."""
    temporary = temporary_path(copied)
    number, _, _ = temporary.name.removesuffix(".tmp").rpartition(".")
    aside = copied.with_name(f"{number}.00000000.old")
    shutil.copytree(copied, aside)
    assert remove_stale(copied.parent) == [aside]
    copied.rename(aside)
    run = runs["lesion.linear"]
    with pytest.raises(RunError, match="exists already; choose another --out, or pass --overwrite"):
        runfolder.write_run(copied, run.record, run.members, run.predictions, run.inner, overwrite=False)
    assert [path.name for path in copied.parent.iterdir()] == ["run"]
    assert open_run(copied).digest == run.digest


def test_the_digest_is_that_of_the_weights_file(runs: dict[str, Run]) -> None:
    run = runs["lesion.linear"]
    assert run.digest == hashlib.sha256((run.path / "weights.safetensors").read_bytes()).hexdigest()
    assert run.digest != runs["lesion.grid"].digest

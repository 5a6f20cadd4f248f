"""Suites end to end: one table from extraction to search, resumed, with what changed and what failed by name."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from embedkit.cli.main import main

from embedkit.benching import Bench, bench
from embedkit.benchpage import write_bench
from embedkit.benchtable import Score, rank_methods, tabulate_scores
from embedkit.errors import BackboneError, HeadError, SuiteError
from embedkit.medmnistfiles import unpack_medmnist
from embedkit.runs import open_run
from embedkit.suitedata import read_tables
from embedkit.suitefile import read_suite

SUITE = """
heads = ["linear"]
folds = 2
resamples = 50
[[backbones]]
name = "embedkit/scattering"
[datasets.scans]
manifest = "manifest.csv"
labels = "labels.csv"
columns = { double = "2 * size" }
extract = { image_size = 64, preview = 0 }
[[tasks]]
name = "kind"
dataset = "scans"
kind = "classification"
target = "kind"
[[tasks]]
name = "size"
dataset = "scans"
kind = "regression"
target = "double"
metric = "mae"
[[tasks]]
name = "like"
dataset = "scans"
kind = "retrieval"
target = "kind"
exclude_same = "patient_id"
metric = "precision@1"
[[tasks]]
name = "hopeless"
dataset = "scans"
kind = "classification"
target = "constant"
"""


def make_scans(folder: Path, cases: int = 12) -> None:
    """Blocks, plain or striped, whose size is a label."""
    generator = np.random.default_rng(0)
    rows, labels = [], []
    for case in range(cases):
        image = generator.normal(100, 5, (3, 16, 16))
        size = 2 + case % 5
        image[:, 4 : 10 + size, 4 : 10 + size : 1 + case % 2] += 200
        np.save(folder / f"c{case:02}.npy", image.astype(np.float32))
        rows.append((f"c{case:02}", f"p{case // 2:02}" if case < 4 else f"q{case:02}", f"c{case:02}.npy"))
        labels.append(
            (f"c{case:02}", "striped" if case % 2 else "plain", size, "x", 20.0 - size - case / 9, int(case % 4 > 0))
        )
    pl.DataFrame(rows, orient="row", schema=["case_id", "patient_id", "path"]).write_csv(folder / "manifest.csv")
    pl.DataFrame(labels, orient="row", schema=["case_id", "kind", "size", "constant", "months", "died"]).write_csv(
        folder / "labels.csv"
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    make_scans(folder)
    (folder / "suite.toml").write_text(SUITE)
    return folder


@pytest.fixture(scope="module")
def found(work: Path) -> Bench:
    return bench(work / "suite.toml", work / "out", device="cpu")


def test_every_task_and_head_has_a_score_a_rank_and_a_run(found: Bench) -> None:
    heads = {(each.task, each.head) for each in found.scores}
    trained = {(task, head) for task in ("kind", "size") for head in ("logistic", "raptor", "linear")}
    assert heads == trained | {("like", "search")}
    kind = {each.head: each for each in found.scores if each.task == "kind"}
    assert kind["logistic"].value == 1.0
    assert kind["logistic"].baseline and not kind["linear"].baseline
    run = open_run(kind["linear"].path)
    assert (run.metrics["auroc"].value, run.record.seed) == (kind["linear"].value, 0)
    size = next(each for each in found.scores if each.task == "size")
    assert (size.metric, size.higher_is_better) == ("mae", False)
    like = found.scores[-1]
    assert like.value > 0.9 > like.metrics["chance"].value
    assert sorted(found.table.filter(pl.col("task") == "size")["rank"]) == [1, 2, 3]


def test_a_task_that_cannot_be_learned_is_named_and_stops_no_other(found: Bench) -> None:
    (failure,) = found.failures
    assert failure.what == "hopeless"
    assert "constant is x in all 12 labelled cases" in failure.reason


def test_a_second_call_repeats_nothing_and_gives_the_same(
    work: Path, found: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr("embedkit.rounds.cross_fit_all", refuse)
    monkeypatch.setattr("embedkit.suitesearch.evaluate_search", refuse)
    again = bench(work / "suite.toml", work / "out", device="cpu")
    assert again.table.equals(found.table)
    assert again.extractions.equals(found.extractions)


def test_a_suite_that_changed_is_refused_by_the_key_that_did(work: Path, found: Bench) -> None:
    changed = work / "changed.toml"
    for old, new, message in (
        ("folds = 2", "folds = 3", "settings.folds was 2 and is now 3"),
        ('"2 * size"', '"3 * size"', r'datasets.scans.columns.double was "2 \* size" and is now "3 \* size"'),
        ('target = "double"', 'target = "size"', 'tasks.size.target was "double" and is now "size"'),
        ("image_size = 64, ", "", "datasets.scans.extract.image_size was 64 and is now not given"),
    ):
        changed.write_text(SUITE.replace(old, new))
        with pytest.raises(SuiteError, match=message):
            bench(changed, work / "out", device="cpu")


def test_a_run_that_differs_is_refused_without_options_that_bench_lacks(
    work: Path, found: Bench, tmp_path: Path
) -> None:
    shutil.copytree(work / "out", tmp_path / "out")
    rows = pl.read_csv(work / "labels.csv").with_columns(kind=pl.Series(["plain", "striped"] * 5 + ["plain", "plain"]))
    shutil.copytree(work, tmp_path / "work", ignore=shutil.ignore_patterns("out"))
    rows.write_csv(tmp_path / "work" / "labels.csv")
    message = (
        r"kind\.logistic was trained on other cases, labels or folds than .* has; choose another --out, or remove the"
    )
    with pytest.raises(SuiteError, match=message) as raised:
        bench(tmp_path / "work" / "suite.toml", tmp_path / "out", device="cpu", tasks=["kind"])
    assert "--overwrite" not in str(raised.value) and "--resume" not in str(raised.value)


def test_ctrl_c_in_a_suite_exits_130_and_the_next_run_goes_on(
    work: Path, found: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedkit import benching

    train, calls = benching.train, []

    def stop_at_the_second(*args: Any, **options: Any) -> Any:
        calls.append(options["targets"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args, **options)

    monkeypatch.setattr(benching, "train", stop_at_the_second)
    arguments = ["embedkit", "bench", str(work / "suite.toml"), "-o", str(tmp_path), "--device", "cpu", "--json"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--task", "kind", "--task", "size"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert "what is finished is kept, and the same command goes on" in capsys.readouterr().err
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.json")}
    assert sorted(path.parent.name for path in kept) == ["kind.linear", "kind.logistic", "kind.raptor"]
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    said = json.loads(capsys.readouterr().out)
    whole = {(each.task, each.head): each.value for each in found.scores}
    for each in said["scores"]:
        assert each["value"] == pytest.approx(whole[each["task"], each["head"]])


def test_a_survival_task_is_scored_by_its_c_index(work: Path, found: Bench) -> None:
    suite = work / "survival.toml"
    task = '[[tasks]]\nname = "time"\ndataset = "scans"\nkind = "survival"\ntarget = "months"\nevent = "died"\n'
    suite.write_text(SUITE + task + 'heads = ["cox"]\n')
    scores = bench(suite, work / "out", device="cpu", tasks=["time"]).scores
    assert [(each.task, each.head, each.metric) for each in scores] == [
        ("time", head, "c_index") for head in ("logistic", "raptor", "cox")
    ]
    assert all(0 <= each.value <= 1 for each in scores)


def test_heads_of_a_suite_are_trained_where_they_learn_the_kind(work: Path, found: Bench) -> None:
    task = '[[tasks]]\nname = "later"\ndataset = "scans"\nkind = "survival"\ntarget = "months"\nevent = "died"\n'
    (work / "mixed.toml").write_text(SUITE.replace('heads = ["linear"]', 'heads = ["linear", "cox"]') + task)
    again = bench(work / "mixed.toml", work / "out", device="cpu", tasks=["later", "kind"])
    heads = {name: {each.head for each in again.scores if each.task == name} for name in ("later", "kind")}
    assert heads == {"later": {"logistic", "raptor", "cox"}, "kind": {"logistic", "raptor", "linear"}}
    assert not again.failures


def test_another_task_or_metric_joins_the_results_that_are_there(work: Path, found: Bench) -> None:
    more = work / "more.toml"
    new = '[[tasks]]\nname = "new"\ndataset = "scans"\nkind = "regression"\ntarget = "double"\n'
    more.write_text(SUITE.replace('metric = "mae"', 'metric = "r2"') + new)
    again = bench(more, work / "out", device="cpu", tasks=["new", "size"])
    assert {each.task: each.metric for each in again.scores} == {"new": "r2", "size": "r2"}
    paths = [{each.path for each in again.scores if each.task == task} for task in ("new", "size")]
    assert paths[0] == paths[1]  # one question, one run


def test_wrong_names_and_columns_are_refused_before_anything_runs(work: Path, tmp_path: Path) -> None:
    suite = work / "suite.toml"
    for options, message in (
        ({"tasks": ["kinds"]}, "has no task 'kinds'; did you mean kind"),
        ({"weights": {"deit": "x"}}, "weights are given for 'deit', which is no backbone here"),
        ({"data": tmp_path}, "manifest.csv is not there"),
        ({"weights": {"embedkit/scattering": "x"}}, "weights x of embedkit/scattering are not there"),
    ):
        with pytest.raises(SuiteError, match=message):
            bench(suite, tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(HeadError, match="no head is called 'querry'; did you mean query"):
        bench(suite, tmp_path / "out", heads=["querry"])
    with pytest.raises(BackboneError, match="unknown backbone 'deit_tny"):
        bench(suite, tmp_path / "out", backbones=["deit_tny_patch16_224"])
    wrong = work / "wrong.toml"
    for old, new, message in (
        ('target = "kind"', 'target = "knd"', "target is 'knd', but data set scans has no such column; did you mean"),
        ('"2 * size"', '"2 * sise"', "column double = '2 .* sise' cannot be computed"),
        ("double =", "size =", "its labels have a column size already"),
    ):
        wrong.write_text(SUITE.replace(old, new))
        with pytest.raises(SuiteError, match=message):
            bench(wrong, tmp_path / "out")
    assert not (tmp_path / "out" / "caches").exists()


def test_a_damaged_memory_of_the_suite_is_named(work: Path, found: Bench, tmp_path: Path) -> None:
    shutil.copytree(work / "out", tmp_path / "out")
    (kept,) = (tmp_path / "out" / "searches").iterdir()
    kept.write_text("{}")
    with pytest.raises(SuiteError, match="keys are missing"):
        bench(work / "suite.toml", tmp_path / "out", device="cpu", tasks=["like"])
    (tmp_path / "out" / "suite.json").write_text("[")
    with pytest.raises(SuiteError, match=r"suite\.json is damaged"):
        bench(work / "suite.toml", tmp_path / "out", device="cpu")


def test_images_apart_are_cases_with_their_view_as_a_label(tmp_path: Path) -> None:
    make_scans(tmp_path, cases=8)
    rows = pl.read_csv(tmp_path / "manifest.csv")
    rows = rows.with_columns(
        case_id=pl.col("patient_id").str.slice(0, 1) + (pl.int_range(8) // 2).cast(pl.String),
        view=pl.Series(["t1", "t2"] * 4),
    ).with_columns(patient_id=pl.col("case_id"))
    rows.write_csv(tmp_path / "manifest.csv")
    (tmp_path / "suite.toml").write_text(
        'resamples = 0\n[[backbones]]\nname = "embedkit/scattering"\n'
        '[datasets.s]\nmanifest = "manifest.csv"\nimages = "apart"\nextract = { image_size = 64, preview = 0 }\n'
        '[[tasks]]\nname = "v"\ndataset = "s"\nkind = "retrieval"\ntarget = "view_name"\nexclude_same = "patient_id"\n'
    )
    (score,) = bench(tmp_path / "suite.toml", tmp_path / "out", device="cpu").scores
    assert score.metric == "map"
    assert score.metrics["chance"].value == pytest.approx(0.5)  # of six images of other patients three are of the view
    assert score.value > 0.7


def test_the_report_holds_scores_failures_and_asks_the_network_for_nothing(
    work: Path, found: Bench, tmp_path: Path
) -> None:
    text = write_bench(tmp_path / "report.html", found).read_text()
    for word in ("Mean rank", "Classification", "Retrieval", "hopeless", "linear"):
        assert word in text
    assert "http://" not in text and "https://" not in text and "default-src 'none'" in text


def test_the_command_prints_tables_or_json_and_fails_where_something_was_not_done(
    work: Path, found: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["embedkit", "bench", str(work / "suite.toml"), "-o", str(work / "out"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert ended.value.code == 1
    assert "mean rank" in shown.out and "report: " in shown.out
    assert "not done: hopeless on embedkit/scattering: target constant is x" in shown.err
    monkeypatch.setattr(sys, "argv", [*arguments, "--json", "--task", "kind"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert {each["head"] for each in said["scores"]} == {"logistic", "raptor", "linear"}
    assert said["scores"][0]["metrics"]["auroc"]["value"] == 1.0
    monkeypatch.setattr(sys, "argv", [*arguments, "--weights", "scattering"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "expected BACKBONE=FILE" in capsys.readouterr().err


def score(task: str, head: str, value: float, *, higher: bool = True, kind: str = "binary") -> Score:
    return Score(
        task=task, dataset="d", kind=kind, backbone="b", head=head, baseline=False, metric="m", value=value, low=0.0,
        high=1.0, higher_is_better=higher, metrics={}, tokens="cls:1", parameters=len(head), seconds=1.5, path="",
    )  # fmt: skip


def test_ranks_share_ties_turn_with_the_metric_and_leave_out_what_is_undefined() -> None:
    scores = [
        score("a", "x", 0.9), score("a", "yy", 0.9), score("a", "z", 0.1),
        score("b", "x", 2.0, higher=False), score("b", "yy", 1.0, higher=False), score("b", "z", float("nan")),
        score("c", "search", 0.5, kind="retrieval"),
    ]  # fmt: skip
    table = tabulate_scores(scores)
    assert table["rank"].to_list() == [1.5, 1.5, 3.0, 2.0, 1.0, None, 1.0]
    methods = {row["head"]: row for row in rank_methods(table).iter_rows(named=True)}
    assert list(methods) == ["yy", "x", "z", "search"]
    assert (methods["yy"]["mean_rank"], methods["x"]["mean_rank"], methods["z"]["mean_rank"]) == (1.25, 1.75, 3.0)
    assert (methods["z"]["tasks"], methods["z"]["of"], methods["search"]["of"]) == (1, 2, 1)
    assert (methods["yy"]["parameters"], methods["yy"]["seconds"]) == (2, 3.0)


def write_medmnist(file: Path, *, classes: int = 2) -> None:
    """A file of the form of MedMNIST3D: class c is bright in its c-th corner."""
    generator = np.random.default_rng(1)
    parts = {}
    for part, count in (("train", 8), ("val", 4), ("test", 4)):
        labels = np.arange(count) % classes
        images = generator.integers(0, 40, (count, 4, 8, 8), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, :4, 4 * label : 4 * label + 4] += 200
        parts |= {f"{part}_images": images, f"{part}_labels": labels[:, None].astype(np.uint8)}
    np.savez_compressed(file, **parts)


def test_medmnist_is_trained_and_tested_by_its_own_split(tmp_path: Path) -> None:
    write_medmnist(tmp_path / "organmnist3d_64.npz")
    (tmp_path / "suite.toml").write_text(
        'heads = ["linear"]\nresamples = 20\n[[backbones]]\nname = "embedkit/scattering"\n'
        '[datasets.organ]\nmedmnist = "organmnist3d_64.npz"\nextract = { image_size = 64, preview = 0 }\n'
        '[[tasks]]\nname = "organ"\ndataset = "organ"\nkind = "classification"\ntarget = "label"\nsplit = "split"\n'
        "[[published]]\nmethod = 'Net'\nsource = 'a paper'\nscores = { organ = { auroc = 0.9, accuracy = 0.8 } }\n"
    )
    found = bench(tmp_path / "suite.toml", tmp_path / "out", device="cpu")
    assert not found.failures
    tested = open_run(found.scores[0].path).predictions["case_id"].to_list()
    assert sorted(tested) == [f"test_{case:04}" for case in range(4)]
    text = write_bench(tmp_path / "report.html", found).read_text()
    assert "Beside published figures" in text and "a paper" in text and "linear on embedkit/scattering" in text


def test_the_volumes_of_medmnist_are_those_of_the_file_and_written_once(tmp_path: Path) -> None:
    write_medmnist(tmp_path / "a.npz")
    manifest, labels = unpack_medmnist(tmp_path / "a.npz", tmp_path / "out" / "a")
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(np.load(manifest.parent / "val_0003.npy"), arrays["val_images"][3])
    rows = pl.read_csv(labels)
    assert rows["split"].value_counts().sort("split").rows() == [("test", 4), ("train", 8), ("val", 4)]
    assert rows.filter(pl.col("case_id") == "test_0003")["label"].item() == 1
    before = manifest.stat().st_mtime_ns
    unpack_medmnist(tmp_path / "a.npz", tmp_path / "out" / "a")
    assert manifest.stat().st_mtime_ns == before


def test_files_of_another_form_are_no_medmnist(tmp_path: Path) -> None:
    file, out = tmp_path / "a.npz", tmp_path / "out"
    np.savez(file, images=np.zeros(3))
    with pytest.raises(SuiteError, match="has no train_images, but images"):
        unpack_medmnist(file, out)
    np.savez(file, train_images=np.zeros((2, 4, 4, 3, 3), np.uint8), train_labels=np.zeros((2, 1), np.uint8))
    with pytest.raises(SuiteError, match=r"expected uint8 \[cases slices height width\]"):
        unpack_medmnist(file, out)
    np.savez(file, train_images=np.array([{}], dtype=object))
    with pytest.raises(SuiteError, match=r"is no \.npz file of arrays"):
        unpack_medmnist(file, out)
    file.write_bytes(b"PK nothing")
    with pytest.raises(SuiteError, match=r"is no \.npz file of arrays"):
        unpack_medmnist(file, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz"]


@pytest.mark.parametrize("classes", [2, 5])
def test_auc_and_acc_of_medmnist_are_auroc_and_accuracy(classes: int) -> None:
    """MedMNIST's evaluator: AUC is the plain mean over classes, one against the rest; ACC takes a score above 0.5."""
    from sklearn.metrics import accuracy_score, roc_auc_score

    from embedkit.metrics import compute_metrics

    generator = np.random.default_rng(classes)
    truth = np.arange(60) % classes
    if classes == 2:
        scores = generator.random(60)
        auc, acc = roc_auc_score(truth, scores), accuracy_score(truth, scores > 0.5)
        kind: Any = "binary"
    else:
        scores = generator.dirichlet(np.ones(classes), 60)
        auc = np.mean([roc_auc_score(truth == code, scores[:, code]) for code in range(classes)])
        acc, kind = accuracy_score(truth, scores.argmax(1)), "multiclass"
    metrics = compute_metrics(kind, truth, scores, [f"{case}" for case in range(60)], resamples=0)
    assert metrics["auroc"].value == pytest.approx(auc)
    assert metrics["accuracy"].value == pytest.approx(acc)


def test_a_scanned_folder_tells_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    np.save(tmp_path / "scans" / "a.npy", np.zeros((2, 4, 4), np.float32))
    (tmp_path / "scans" / "b.nii").write_bytes(b"no image")
    (tmp_path / "suite.toml").write_text(
        '[[backbones]]\nname = "embedkit/scattering"\n[datasets.s]\nscan = "scans"\n'
        '[[tasks]]\nname = "v"\ndataset = "s"\nkind = "retrieval"\ntarget = "case_id"\n'
    )
    tables = read_tables(read_suite(tmp_path / "suite.toml").datasets["s"], tmp_path / "out")
    assert tables.manifest["case_id"].to_list() == tables.labels["case_id"].to_list() == ["a"]
    assert len(tables.skipped) == 1 and "b.nii" in tables.skipped[0]

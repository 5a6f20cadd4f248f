"""The program as a user meets it: every command, what it prints, its exit codes, and one-line errors."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
from embedkit.cli.main import app, main
from typer.testing import CliRunner

from embedkit.errors import CacheError, EmbedkitError
from embedkit.phantoms import make_phantoms

COMMANDS = ("demo", "scan", "extract", "info", "verify", "pack", "train", "predict", "evaluate", "explain", "index")
COMMANDS += ("compare", "shots", "neighbours", "search", "serve", "heads", "backbones")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms, their cache, runs and index, made once by the commands themselves."""
    folder = tmp_path_factory.mktemp("work")
    make_phantoms(folder / "scans", cases=24, seed=3)
    cases = str(folder / "scans" / "manifest.csv")
    labels = str(folder / "scans" / "labels.csv")
    call(
        "extract",
        cases,
        "-o",
        folder / "cache",
        "--backbone",
        "embedkit/scattering",
        "--slices",
        "count:6",
        "--image-size",
        "64",
    )
    call(
        "train",
        folder / "cache",
        "--labels",
        labels,
        "--target",
        "lesion",
        "--head",
        "grid",
        "--folds",
        "3",
        "-o",
        folder / "runs",
    )
    call("index", folder / "cache", "-o", folder / "index", "--labels", labels)
    return folder


def call(*arguments: object, code: int = 0) -> str:
    """Runs a command in this process and gives what it printed to stdout."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return str(result.stdout)


@dataclass(frozen=True)
class Ended:
    """How the program ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs the program's entry point in this process, which has imported everything, and says how it ended."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["embedkit", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(int(ended.value.code or 0), *capfd.readouterr())

    return run


def test_help_lists_every_command() -> None:
    printed = call("--help")
    assert [name for name in COMMANDS if f"\n  {name} " not in printed] == []


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert call("--version").strip() == version("embedkit")


def test_info_tells_cases_token_sets_and_bytes_and_the_same_as_json(work: Path) -> None:
    printed = call("info", work / "cache")
    assert "24 cases" in printed and "patch@4:2" in printed and "embedkit/scattering" in printed
    fields = json.loads(call("info", work / "cache", "--json"))
    assert fields["cases"] == 24
    assert fields["token_sets"]["patch@4:2"]["shape"] == [16, 417]
    assert fields["recipe"]["slices"] == "count:6"


def test_verify_passes_a_whole_cache_and_names_a_damaged_file(
    work: Path, tmp_path: Path, program: Callable[..., Ended]
) -> None:
    assert "all checksums are right" in call("verify", work / "cache")
    call("pack", work / "cache", "-o", tmp_path / "packed.h5")
    assert "24 cases" in call("info", tmp_path / "packed.h5")
    whole = json.loads(call("verify", tmp_path / "packed.h5", "--json"))
    assert whole == {"cache": str(tmp_path / "packed.h5"), "damages": []}
    content = bytearray((tmp_path / "packed.h5").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "packed.h5").write_bytes(content)
    done = program("verify", tmp_path / "packed.h5")
    assert done.returncode == 1
    assert "packed.h5" in done.stderr and "damaged; if it is a packed cache, restore a copy or pack it" in done.stderr
    (damage,) = json.loads(call("verify", tmp_path / "packed.h5", "--json", code=1))["damages"]
    assert damage["file"] == str(tmp_path / "packed.h5") and damage["problem"]
    with pytest.raises(
        CacheError, match="gone does not exist; give the folder or packed file of a cache, or the folder"
    ):
        call("verify", tmp_path / "gone")


def test_the_program_extracts_by_the_defaults_of_the_library() -> None:
    from embedkit.cli.extract import run

    from embedkit.extraction import extract

    program, library = (inspect.signature(function).parameters for function in (run, extract))
    shared = [name for name in program if name in library and name not in {"manifest", "out"}]
    assert len(shared) > 20

    def spelt(value: object) -> object:
        return ",".join(value) if isinstance(value, tuple) else value

    differing = {
        name: (program[name].default, library[name].default)
        for name in shared
        if (program[name].default or None) != (spelt(library[name].default) or None)
    }
    assert differing == {}


def test_a_second_extraction_repeats_nothing(work: Path) -> None:
    options = ["--backbone", "embedkit/scattering", "--slices", "count:6", "--image-size", "64", "--json"]
    summary = json.loads(call("extract", work / "scans" / "manifest.csv", "-o", work / "cache", *options))
    assert (summary["cases_before"], summary["cases_done"]) == (24, 0)


def test_a_failed_case_is_listed_and_the_exit_code_is_one(
    work: Path, tmp_path: Path, program: Callable[..., Ended]
) -> None:
    rows = pl.read_csv(work / "scans" / "manifest.csv").head(2).to_dicts()
    images = [{"case_id": row["case_id"], "path": str(work / "scans" / row["path"])} for row in rows]
    (tmp_path / "broken.nii.gz").write_bytes(b"not an image")
    pl.DataFrame([*images, {"case_id": "broken", "path": "broken.nii.gz"}]).write_csv(tmp_path / "cases.csv")
    options = ["--backbone", "embedkit/scattering", "--slices", "count:2", "--image-size", "64"]
    done = program("extract", tmp_path / "cases.csv", "-o", tmp_path / "cache", *options)
    assert done.returncode == 1, done.stderr
    assert "2 cases extracted" in done.stdout
    assert "broken failed: view image" in done.stderr
    told = call("info", tmp_path / "cache")
    assert "failed    broken: view image" in told and "failures.jsonl keeps a failure until" in told


def test_predictions_of_new_cases_are_written_with_their_columns(work: Path, tmp_path: Path) -> None:
    call("predict", work / "runs" / "lesion.grid", work / "cache", "-o", tmp_path / "predictions.parquet")
    frame = pl.read_parquet(tmp_path / "predictions.parquet")
    assert len(frame) == 24
    assert {"case_id", "patient_id", "score"} <= set(frame.columns)
    assert frame["score"].is_between(0, 1).all()


def test_predictions_as_json_are_those_of_the_table(work: Path, tmp_path: Path) -> None:
    run = work / "runs" / "lesion.grid"
    rows = json.loads(call("predict", run, work / "cache", "-o", tmp_path / "predictions.parquet", "--json"))
    assert rows == pl.read_parquet(tmp_path / "predictions.parquet").to_dicts()
    assert len(rows) == 24


def test_an_index_as_json_tells_cases_embedding_and_columns(work: Path, tmp_path: Path) -> None:
    labels = work / "scans" / "labels.csv"
    made = json.loads(call("index", work / "cache", "-o", tmp_path / "index", "--labels", labels, "--json"))
    assert (made["cases"], made["embedding"], made["dim"]) == (24, "aligned:patch@4:2", 8 * 16 * 417)
    assert made["columns"][:2] == ["case_id", "patient_id"] and "lesion" in made["columns"]
    assert (made["kind"], made["recall"], made["whitened"], made["slices"]) == ("flat", 1.0, 8, "grid:patch@4:2")


def test_an_explanation_as_json_tells_the_weight_of_every_slice(work: Path, tmp_path: Path) -> None:
    case = pl.read_csv(work / "scans" / "manifest.csv")["case_id"][1]
    run = work / "runs" / "lesion.grid"
    shown = json.loads(call("explain", run, work / "cache", "--case", case, "-o", tmp_path / "shown", "--json"))
    assert shown["case_id"] == case and "lesion" in shown["answer"]
    (view,) = shown["views"].values()
    assert len(view["slices"]) == len(view["weights"]) == 6
    assert sum(view["weights"]) == pytest.approx(1, abs=1e-4)
    assert Path(view["heatmap"]).is_file() and Path(shown["montage"]).is_file()


def test_training_writes_a_run_for_the_head_and_both_baselines(work: Path) -> None:
    assert sorted(path.name for path in (work / "runs").iterdir()) == [
        "lesion.grid",
        "lesion.logistic",
        "lesion.raptor",
    ]


def test_comparison_prints_every_pair_with_its_p_values(work: Path) -> None:
    runs = [work / "runs" / f"lesion.{head}" for head in ("grid", "logistic", "raptor")]
    found = json.loads(call("compare", *runs, "--json"))
    assert found["scores"].keys() == {"lesion.grid", "lesion.logistic", "lesion.raptor"}
    assert [(each["first"], each["second"]) for each in found["contrasts"]] == [
        ("lesion.grid", "lesion.logistic"), ("lesion.grid", "lesion.raptor"), ("lesion.logistic", "lesion.raptor"),
    ]  # fmt: skip
    assert all(0 <= each["p_delong"] <= each["p_holm"] <= 1 for each in found["contrasts"])
    printed = call("compare", *runs, "--reference", runs[1], "--metric", "brier")
    assert "lesion.raptor - lesion.logistic" in printed and "Benjamini-Hochberg" in printed
    assert "lesion.grid - lesion.raptor" not in printed


def test_evaluation_on_cases_of_the_training_is_refused(work: Path) -> None:
    with pytest.raises(EmbedkitError, match="trained on"):
        call("evaluate", work / "runs" / "lesion.grid", work / "cache", "--labels", work / "scans" / "labels.csv")


def test_evaluation_on_new_cases_gives_every_metric_with_its_interval(work: Path, tmp_path: Path) -> None:
    make_phantoms(tmp_path / "new", cases=8, seed=77)
    manifest = pl.read_csv(tmp_path / "new" / "manifest.csv")
    labels = pl.read_csv(tmp_path / "new" / "labels.csv")
    renamed = {"case_id": "new_" + pl.col("case_id"), "patient_id": "new_" + pl.col("patient_id")}
    manifest.with_columns(**renamed).write_csv(tmp_path / "new" / "manifest.csv")
    labels.with_columns(**renamed).write_csv(tmp_path / "new" / "labels.csv")
    options = ["--backbone", "embedkit/scattering", "--slices", "count:6", "--image-size", "64"]
    call("extract", tmp_path / "new" / "manifest.csv", "-o", tmp_path / "cache", *options)
    printed = call(
        "evaluate",
        work / "runs" / "lesion.grid",
        tmp_path / "cache",
        "--labels",
        tmp_path / "new" / "labels.csv",
        "--json",
    )
    metrics = json.loads(printed)
    assert {"auroc", "auprc", "balanced_accuracy", "accuracy", "f1", "brier", "ece"} <= metrics.keys()
    assert metrics["auroc"].keys() >= {"value", "low", "high"}


def test_explain_writes_a_heatmap_in_the_source_geometry_and_a_picture(work: Path, tmp_path: Path) -> None:
    import SimpleITK as sitk

    rows = pl.read_csv(work / "scans" / "manifest.csv")
    case, path = next(
        (case, path) for case, path in rows.select("case_id", "path").iter_rows() if path.endswith(".nii.gz")
    )
    printed = call("explain", work / "runs" / "lesion.grid", work / "cache", "--case", case, "-o", tmp_path / "shown")
    assert "lesion = 1 with probability" in printed
    (heatmap,) = (tmp_path / "shown").glob("*.nii.gz")
    source, drawn = sitk.ReadImage(str(work / "scans" / path)), sitk.ReadImage(str(heatmap))
    assert drawn.GetSize() == source.GetSize()
    assert drawn.GetSpacing() == pytest.approx(source.GetSpacing(), rel=1e-4)
    assert drawn.GetOrigin() == pytest.approx(source.GetOrigin(), abs=1e-3)
    assert drawn.GetDirection() == pytest.approx(source.GetDirection(), abs=1e-4)
    values = sitk.GetArrayFromImage(drawn)
    assert values.min() >= 0 and 0 < values.max() <= 1
    assert (tmp_path / "shown" / f"{case}.png").read_bytes().startswith(b"\x89PNG")


def test_search_by_case_gives_others_with_filter_and_montage(work: Path, tmp_path: Path) -> None:
    case = "--case", pl.read_csv(work / "scans" / "labels.csv")["case_id"][0]
    found = json.loads(call("search", work / "index", *case, "-k", "3", "--where", "lesion = 1", "--json"))
    assert [row["rank"] for row in found] == [1, 2, 3]
    assert all(row["lesion"] == 1 and row["case_id"] != case[1] for row in found)
    call("search", work / "index", *case, "-k", "3", "--montage", tmp_path / "similar.png")
    assert (tmp_path / "similar.png").read_bytes().startswith(b"\x89PNG")


def test_search_by_a_file_of_an_indexed_case_finds_that_case_first(work: Path) -> None:
    rows = pl.read_csv(work / "scans" / "manifest.csv")
    case, path = rows["case_id"][5], rows["path"][5]
    found = json.loads(call("search", work / "index", "--volume", work / "scans" / path, "-k", "2", "--json"))
    assert found[0]["case_id"] == case
    assert found[0]["similarity"] == pytest.approx(1, abs=2e-3)


def test_search_by_a_run_embedding_works_on_the_same_cases(work: Path) -> None:
    call("index", work / "cache", "-o", work / "by-run", "--run", work / "runs" / "lesion.grid")
    case = pl.read_csv(work / "scans" / "labels.csv")["case_id"][0]
    assert len(json.loads(call("search", work / "by-run", "--case", case, "-k", "4", "--json"))) == 4


def test_heads_and_backbones_are_listed() -> None:
    printed = call("heads")
    assert all(name in printed for name in ("linear", "query", "abmil", "grid", "logistic", "raptor"))
    assert "embedkit/scattering" in call("backbones")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "nowhere"], "nowhere does not exist"),
        (["extract", "nowhere.csv", "-o", "cache"], "nowhere.csv"),
        (["train", "nowhere", "--labels", "l.csv", "--target", "x", "-o", "runs"], "nowhere does not exist"),
        (["predict", "nowhere", "cache", "-o", "p.csv"], "nowhere is no run"),
        (["search", "nowhere", "--case", "a"], "nowhere is no index"),
        (["scan", "nowhere", "-o", "cases.csv"], "nowhere"),
    ],
)
def test_an_error_is_one_line_that_names_the_thing_and_the_exit_code_is_two(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Callable[..., Ended]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = program(*arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--head", "gird"], "did you mean grid"),
        (["--target", "lesoin"], "lesion"),
        (["--target", "nothing_alike"], "no column nothing_alike; it has case_id"),
        (["--tokens", "patch@9:2"], "patch@9:2"),
        (["--folds", "1"], "fold"),
        (["--kind", "ordinal"], "binary"),
    ],
)
def test_a_mistake_in_training_options_is_answered_with_what_would_work(
    work: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    target = [] if "--target" in arguments else ["--target", "lesion"]
    labels = work / "scans" / "labels.csv"
    with pytest.raises(EmbedkitError, match=words):
        call("train", work / "cache", "--labels", labels, "-o", tmp_path / "runs", *target, *arguments)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_a_run_is_not_replaced_unasked(work: Path) -> None:
    labels = work / "scans" / "labels.csv"
    with pytest.raises(EmbedkitError, match="--overwrite"):
        call("train", work / "cache", "--labels", labels, "--target", "lesion", "--head", "grid", "-o", work / "runs")


def test_an_unknown_backbone_is_answered_with_the_nearest(work: Path, tmp_path: Path) -> None:
    with pytest.raises(EmbedkitError, match="deit_tiny_patch16_224"):
        call("extract", work / "scans" / "manifest.csv", "-o", tmp_path / "c", "--backbone", "deit_tinny_patch16_224")

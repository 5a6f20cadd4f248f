"""The forecast of an extraction against what the extraction then gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedkit.cli.main import app
from typer.testing import CliRunner

from embedkit.backbones import load_backbone
from embedkit.cache import create_cache, open_cache
from embedkit.errors import EmbedkitError, RecipeError, VolumeError
from embedkit.estimate import ExtractionEstimate, estimate_cases, estimate_extraction, list_token_choices
from embedkit.extraction import extract, extract_cases
from embedkit.features import BackboneInfo
from embedkit.planning import make_recipe
from embedkit.sources import Case
from embedkit.volumes import write_volume

AFFINE = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]])
CPU = torch.device("cpu")


def write_cases(folder: Path, slices: list[int]) -> list[Case]:
    generator = np.random.default_rng(0)
    cases = []
    for number, count in enumerate(slices):
        path = folder / f"{number}.nii.gz"
        write_volume(path, generator.normal(100, 30, (count, 16, 16)).astype(np.float32), AFFINE)
        cases.append(Case(str(number), str(number), {"image": path}))
    return cases


def test_size_and_slices_are_those_of_the_extraction(tmp_path: Path) -> None:
    cases = write_cases(tmp_path, [8] * 6)
    backbone = load_backbone("embedkit/scattering", image_size=32)
    recipe = make_recipe(backbone.info, tokens=["cls", "patch@2:1"], preview=8)
    estimate = estimate_cases(cases, backbone, recipe, device=CPU, samples=3)
    assert (estimate.cases, estimate.sampled_cases, estimate.slices) == (6, 3, 48)
    assert estimate.seconds > 0 and estimate.forward_ms_per_slice > 0 and estimate.render_ms_per_slice > 0
    create_cache(tmp_path / "cache", recipe)
    extract_cases(cases, tmp_path / "cache", backbone, recipe, device=CPU)
    cache = open_cache(tmp_path / "cache")
    tokens = sum(cache.read(stack, name).nbytes for stack in range(6) for name in cache.token_sets)
    assert estimate.bytes == tokens + 48 * 8 * 8
    assert estimate.choices["patch@2:1"]["float16"] == sum(cache.read(stack, "patch@2:1").nbytes for stack in range(6))
    assert not (tmp_path / "cache" / "failures.jsonl").exists()


def test_blank_slices_cost_no_forward_time(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(100, 30, (8, 16, 16)).astype(np.float32)
    array[::2] = 0
    write_volume(tmp_path / "half.nii.gz", array, AFFINE)
    backbone = load_backbone("embedkit/scattering", image_size=32)
    recipe = make_recipe(backbone.info, tokens=["cls"])
    case = Case("half", "half", {"image": tmp_path / "half.nii.gz"})
    assert estimate_cases([case], backbone, recipe, device=CPU).blank_share == pytest.approx(0.5, abs=0.13)


def test_a_case_that_cannot_be_read_is_told_and_none_readable_is_an_error(tmp_path: Path) -> None:
    cases = write_cases(tmp_path, [4, 4, 4])
    (tmp_path / "1.nii.gz").write_bytes(b"nothing")
    backbone = load_backbone("embedkit/scattering", image_size=32)
    recipe = make_recipe(backbone.info, tokens=["cls"])
    estimate = estimate_cases(cases, backbone, recipe, device=CPU)
    assert len(estimate.unreadable) == 1 and estimate.unreadable[0].startswith("1: view image")
    assert (estimate.cases, estimate.failing, estimate.slices) == (3, 1, 8)
    with pytest.raises(VolumeError, match="none of the 1 cases read for the estimate gives slices; first: 1: view"):
        estimate_cases(cases[1:2], backbone, recipe, device=CPU)


def test_cases_that_would_fail_are_counted_out_listed_and_make_the_exit_code_that_of_the_extraction(
    tmp_path: Path,
) -> None:
    write_cases(tmp_path, [4] * 8)
    for number in (0, 2, 4, 6):
        (tmp_path / f"{number}.nii.gz").write_bytes(b"nothing")
    rows = "".join(f"{number},{number}.nii.gz\n" for number in range(8))
    (tmp_path / "cases.csv").write_text(f"case_id,path\n{rows}")
    command = ["extract", str(tmp_path / "cases.csv"), "-o", str(tmp_path / "c"), "--image-size", "32"]
    command += ["--backbone", "embedkit/scattering", "--tokens", "cls"]
    forecast = CliRunner().invoke(app, [*command, "--dry-run"])
    told = " ".join(forecast.output.split())
    failing = told.count("will fail: ")
    assert 0 < failing < 5 and forecast.exit_code == 1
    assert f"{failing} of the 5 cases looked at will fail, so about {round(8 * failing / 5)} of 8" in told
    assert f"about {4 * (8 - round(8 * failing / 5))} slices" in told and "does not begin like one" in told
    assert CliRunner().invoke(app, command).exit_code == 1


def test_nothing_left_to_do_takes_nothing() -> None:
    backbone = load_backbone("embedkit/scattering", image_size=32)
    estimate = estimate_cases([], backbone, make_recipe(backbone.info, tokens=["cls"]), device=CPU)
    assert (estimate.cases, estimate.slices, estimate.bytes, estimate.seconds) == (0, 0, 0, 0)


def test_choices_are_what_the_backbone_can_give() -> None:
    vit = BackboneInfo("vit", "w", 224, (0,) * 3, (1,) * 3, 12, (192,) * 12, ((14, 14),) * 12, 1, 0, 3, "class token")
    vit = replace(vit, summary_layers=(12,), has_tail=True)
    recipe = make_recipe(vit, tokens=["patch@4"])
    assert [str(kept) for kept in list_token_choices(vit, recipe)] == [
        "patch@4:8", "patch@7:8", "patch:8", "cls:12", "attention:12", "cut:8",
    ]  # fmt: skip


def test_a_dry_run_tells_of_the_cases_that_the_cache_lacks_and_writes_nothing(tmp_path: Path) -> None:
    write_cases(tmp_path, [8] * 4)
    rows = "".join(f"{number},{number}.nii.gz\n" for number in range(4))
    (tmp_path / "cases.csv").write_text(f"case_id,path\n{rows}")
    (tmp_path / "first.csv").write_text("case_id,path\n0,0.nii.gz\n")
    common = ["--backbone", "embedkit/scattering", "--image-size", "32", "--tokens", "cls", "--json"]
    runner = CliRunner()
    fresh = runner.invoke(
        app, ["extract", str(tmp_path / "cases.csv"), "-o", str(tmp_path / "c"), "--dry-run", *common]
    )
    assert fresh.exit_code == 0, fresh.output
    assert (json.loads(fresh.stdout)["cases"], json.loads(fresh.stdout)["slices"]) == (4, 32)
    assert not (tmp_path / "c").exists()
    extract(tmp_path / "first.csv", tmp_path / "c", backbone="embedkit/scattering", image_size=32, tokens=["cls"])
    before = sorted((tmp_path / "c").rglob("*"))
    rest = estimate_extraction(
        tmp_path / "cases.csv", tmp_path / "c", backbone="embedkit/scattering", image_size=32, tokens=["cls"]
    )
    assert (rest.cases, rest.slices) == (3, 24) and sorted((tmp_path / "c").rglob("*")) == before
    with pytest.raises(RecipeError, match="image_size"):
        estimate_extraction(tmp_path / "cases.csv", tmp_path / "c", backbone="embedkit/scattering", image_size=64)


def test_processes_that_share_the_cores_are_not_told_to_take_less_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cases(tmp_path, [8])
    (tmp_path / "cases.csv").write_text("case_id,path\n0,0.nii.gz\n")

    def in_a_minute(*arguments: Any, **options: Any) -> ExtractionEstimate:
        return replace(estimate_cases(*arguments, **options), seconds=60.0)

    monkeypatch.setattr("embedkit.estimate.estimate_cases", in_a_minute)
    options = {"backbone": "embedkit/scattering", "image_size": 32, "tokens": ["cls"], "device": "cpu,cpu"}
    two = estimate_extraction(tmp_path / "cases.csv", tmp_path / "c", **options)  # type: ignore[arg-type]
    assert two.seconds == 60.0


def test_a_dry_run_reads_well(tmp_path: Path) -> None:
    write_cases(tmp_path, [8] * 2)
    (tmp_path / "cases.csv").write_text("case_id,path\n0,0.nii.gz\n1,1.nii.gz\n")
    command = ["extract", str(tmp_path / "cases.csv"), "-o", str(tmp_path / "c"), "--dry-run", "--image-size", "32"]
    done = CliRunner().invoke(app, [*command, "--backbone", "embedkit/scattering", "--tokens", "cls,patch@2"])
    assert done.exit_code == 0, done.output
    assert "2 cases left to do, about 16 slices (0% blank), told from 2 cases" in done.stdout
    assert "int8" in done.stdout and "cls:2" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "batch_size is 0 and workers is 2, expected at least 1 of each"),
        (
            ["--batch-size", "9" * 20],
            "expected at most 65,536 slices and 1024 cases read ahead, which memory must hold",
        ),
        (["--workers", "1025"], "batch_size is 32 and workers is 1025, expected at most 65,536 slices"),
        (["--image-size", "99999984"], "image size 99999984 is beyond 4096 px, the most that is taken"),
        (["--part", ""], "part is '', expected i/n"),
        (["--engine", "ray"], "a dry run tells of this machine alone; leave --engine out"),
        (["--shard-size", "junk"], "size 'junk' means nothing"),
        (
            ["-o", "CASES"],
            "is a file, expected a folder: to a packed cache no case can be added; choose a new",
        ),
        (["-o", "FOLDER"], "is no cache and holds 0.nii.gz, 1.nii.gz, cases.csv; choose a new or empty folder"),
    ],
)
def test_a_dry_run_refuses_what_the_extraction_would(options: list[str], message: str, tmp_path: Path) -> None:
    write_cases(tmp_path, [8] * 2)
    (tmp_path / "cases.csv").write_text("case_id,path\n0,0.nii.gz\n1,1.nii.gz\n")
    places = {"CASES": str(tmp_path / "cases.csv"), "FOLDER": str(tmp_path)}
    command = ["extract", str(tmp_path / "cases.csv"), "-o", str(tmp_path / "c"), "--dry-run", "--image-size", "32"]
    done = CliRunner().invoke(
        app,
        [
            *command,
            "--backbone",
            "embedkit/scattering",
            "--tokens",
            "cls",
            *(places.get(text, text) for text in options),
        ],
    )
    assert done.exit_code != 0
    assert message in " ".join((done.output + str(done.exception)).split())
    assert isinstance(done.exception, SystemExit | EmbedkitError)

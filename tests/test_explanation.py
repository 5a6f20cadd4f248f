"""Explanations: evidence lands where the lesion is, in the geometry of the source, and in the folder asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from embedkit.cli.main import app
from scipy.stats import spearmanr
from typer.testing import CliRunner

from embedkit import sanity
from embedkit.cache import open_cache
from embedkit.errors import HeadError, OptionError, RunError
from embedkit.explanation import canonical_shape, explain
from embedkit.extraction import extract
from embedkit.patches import measure_patch_cover
from embedkit.phantoms import make_phantoms
from embedkit.runs import open_run
from embedkit.sanity import Sanity, check_sanity, shuffle_run
from embedkit.training import train
from embedkit.volumes import read_volume


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explained")
    made = make_phantoms(folder / "scans", cases=60, seed=5)
    extract(
        made.manifest,
        folder / "cache",
        backbone="embedkit/scattering",
        window="lung",
        tokens=["cls", "patch@4"],
        slices="count:14",
        image_size=64,
        preview=32,
    )
    train(folder / "cache", made.labels, targets=["lesion"], heads=["grid", "query"], folds=3, out=folder / "runs")
    return folder


def lesion_cases(work: Path) -> list[tuple[str, str]]:
    manifest = pl.read_csv(work / "scans" / "manifest.csv")
    labels = pl.read_csv(work / "scans" / "labels.csv")
    rows = manifest.join(labels, on="case_id").filter(pl.col("lesion") == 1)
    return list(rows.select("case_id", "mask").iter_rows())


@pytest.mark.parametrize(("head", "least"), [("raptor", 0.8), ("grid", 0.8)])
def test_the_patch_of_most_evidence_touches_the_lesion_in_most_cases_unseen_by_the_model(
    work: Path, head: str, least: float
) -> None:
    run, cache = open_run(work / "runs" / f"lesion.{head}"), open_cache(work / "cache")
    hits, share = [], []
    for case_id, mask in lesion_cases(work):
        (scores,) = run.find_evidence(cache, case_id, held_out=True).scores.values()
        stack = int(cache.stacks.filter(pl.col("case_id") == case_id)["stack"][0])
        record = cache.record(stack)
        cover = measure_patch_cover(
            read_volume(work / "scans" / mask).array > 0,
            indices=cache.slices(stack).indices,
            box=record.box,
            plane=record.plane,
            grid=(scores.shape[1], scores.shape[2]),
        )
        hits.append(cover.reshape(-1)[scores.argmax()] > 0)
        share.append((cover > 0).mean())
    assert np.mean(hits) > least
    assert np.mean(hits) > 4 * np.mean(share)


def test_evidence_against_a_class_is_evidence_for_the_other(work: Path) -> None:
    run, cache = open_run(work / "runs" / "lesion.grid"), open_cache(work / "cache")
    case_id = lesion_cases(work)[0][0]
    (lesion,) = run.find_evidence(cache, case_id, class_name="1").scores.values()
    (healthy,) = run.find_evidence(cache, case_id, class_name="0").scores.values()
    np.testing.assert_allclose(lesion, -healthy, atol=1e-6)


def test_weights_sum_to_one_and_the_heatmap_has_the_source_grid(work: Path, tmp_path: Path) -> None:
    case_id, mask = lesion_cases(work)[-1]
    shown = explain(work / "runs" / "lesion.grid", work / "cache", case_id, tmp_path / "out")
    (weights,) = shown.slice_weights.values()
    assert weights.weights.sum() == pytest.approx(1, abs=1e-5)
    assert weights.top(1)[0][1] == pytest.approx(weights.weights.max())
    (heatmap,) = shown.heatmaps.values()
    drawn, lesion = read_volume(heatmap), read_volume(work / "scans" / mask)
    assert drawn.source_shape == lesion.source_shape
    np.testing.assert_allclose(drawn.source_affine, lesion.source_affine, atol=1e-3)
    assert drawn.array.max() <= 1 and drawn.array.min() >= 0
    with open_cache(work / "cache") as cache:
        stack = int(cache.stacks.filter(pl.col("case_id") == case_id)["stack"][0])
        assert canonical_shape(cache.record(stack)) == drawn.array.shape


def test_a_manifest_gives_full_resolution_pictures(work: Path, tmp_path: Path) -> None:
    case_id, _ = lesion_cases(work)[0]
    run, cache = work / "runs" / "lesion.grid", work / "cache"
    shown = explain(run, cache, case_id, tmp_path, manifest=work / "scans" / "manifest.csv")
    assert shown.montage.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_case_or_class_is_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no case 'nobody'"):
        explain(work / "runs" / "lesion.grid", work / "cache", "nobody", tmp_path)
    with pytest.raises(RunError, match="0, 1"):
        explain(work / "runs" / "lesion.grid", work / "cache", lesion_cases(work)[0][0], tmp_path, class_name="maybe")


def test_a_manifest_without_the_case_is_refused(work: Path, tmp_path: Path) -> None:
    manifest = pl.read_csv(work / "scans" / "manifest.csv").filter(pl.col("case_id") != lesion_cases(work)[0][0])
    manifest.with_columns(path=str(work / "scans") + "/" + pl.col("path"), mask=None).write_csv(tmp_path / "other.csv")
    with pytest.raises(RunError, match="the manifest has no case"):
        explain(
            work / "runs" / "lesion.grid",
            work / "cache",
            lesion_cases(work)[0][0],
            tmp_path,
            manifest=tmp_path / "other.csv",
        )


def test_the_attention_of_a_head_that_has_one_is_told_beside_the_evidence(work: Path, tmp_path: Path) -> None:
    case_id, _ = lesion_cases(work)[0]
    with_attention = explain(work / "runs" / "lesion.query", work / "cache", case_id, tmp_path)
    assert with_attention.slice_attention is not None
    (attention,) = with_attention.slice_attention.values()
    (weights,) = with_attention.slice_weights.values()
    assert attention.shape == weights.weights.shape
    assert attention.sum() == pytest.approx(1, abs=1e-5)
    without = explain(work / "runs" / "lesion.grid", work / "cache", case_id, tmp_path)
    assert without.slice_attention is None


@pytest.mark.parametrize("method", ["contribution", "gradient", "occlusion"])
def test_maps_of_a_head_with_shuffled_numbers_have_little_in_common_with_its_own(work: Path, method: Any) -> None:
    """The sanity check of Adebayo et al. 2018: a map that stays as it is says nothing of what was learned."""
    cache, run = open_cache(work / "cache"), open_run(work / "runs" / "lesion.grid")
    folds = dict(run.predictions.select("case_id", "fold").iter_rows())
    alike = []
    for case_id, _ in lesion_cases(work)[:8]:
        (own,) = run.find_evidence(cache, case_id, method=method, held_out=True).scores.values()
        (random,) = (
            shuffle_run(run, seed=folds[case_id])
            .find_evidence(cache, case_id, method=method, held_out=True)
            .scores.values()
        )
        alike.append(spearmanr(own.ravel(), random.ravel()).statistic)
    assert abs(np.mean(alike)) < 0.3


def test_the_sanity_check_compares_a_map_with_those_of_shuffled_heads(work: Path) -> None:
    cache, run = open_cache(work / "cache"), open_run(work / "runs" / "lesion.grid")
    case_id, _ = lesion_cases(work)[0]
    evidence = run.find_evidence(cache, case_id, class_name="0", held_out=True)
    found = check_sanity(run, cache, case_id, evidence, held_out=True, shuffles=2)
    for seed, value in enumerate(found.correlations):
        other = shuffle_run(run, seed=seed).find_evidence(cache, case_id, class_name="0", held_out=True)
        ((own, theirs),) = zip(evidence.scores.values(), other.scores.values(), strict=True)
        real = ~cache.slices(int(cache.stacks.filter(pl.col("case_id") == case_id)["stack"][0])).blank
        assert value == pytest.approx(spearmanr(own[real].ravel(), theirs[real].ravel()).statistic)


def test_a_map_that_is_the_same_without_what_was_learned_fails_and_so_does_one_that_turns_over(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, run = open_cache(work / "cache"), open_run(work / "runs" / "lesion.grid")
    case_id, _ = lesion_cases(work)[0]
    evidence = run.find_evidence(cache, case_id)
    monkeypatch.setattr(sanity, "randomise_member", lambda member, **_: member)
    same = check_sanity(run, cache, case_id, evidence, shuffles=2)
    assert same.correlations == pytest.approx((1.0, 1.0))
    assert not same.passed and str(same).startswith("FAILED: much of the map is the same without what the head learned")
    assert Sanity((-0.9, 0.9)).alike == pytest.approx(0.9) and not Sanity((-0.9, 0.9)).passed
    fine = Sanity((0.1, -0.3))
    assert fine.passed and str(fine).startswith("passed: the map depends on what the head learned (rank correlation")
    assert "0.10, -0.30; mean magnitude 0.20" in str(fine)


def test_a_flat_map_has_nothing_in_common_with_any(work: Path) -> None:
    cache, run = open_cache(work / "cache"), open_run(work / "runs" / "lesion.grid")
    case_id, _ = lesion_cases(work)[0]
    evidence = run.find_evidence(cache, case_id)
    flat = replace(evidence, scores={view: np.ones_like(each) for view, each in evidence.scores.items()})
    found = check_sanity(run, cache, case_id, flat, shuffles=1)
    assert found.correlations == (0.0,) and found.passed is None
    assert str(found) == "cannot be told: the map is the same everywhere"


def test_of_a_map_of_few_scores_the_sanity_check_cannot_tell(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, run = open_cache(work / "cache"), open_run(work / "runs" / "lesion.grid")
    case_id, _ = lesion_cases(work)[0]
    evidence = run.find_evidence(cache, case_id)
    ((view, each),) = evidence.scores.items()
    scores = each[~cache.slices(cache.find_stacks(case_id, [view])[view]).blank].size
    assert check_sanity(run, cache, case_id, evidence, shuffles=1).passed is not None
    monkeypatch.setattr(sanity, "_FEWEST", scores + 1)
    found = check_sanity(run, cache, case_id, evidence, shuffles=1)
    assert found.passed is None
    assert str(found).startswith(f"cannot be told: a map of {scores} scores can be like another by chance, expected")


def test_methods_that_tell_of_the_answer_agree(work: Path) -> None:
    cache, run = open_cache(work / "cache"), open_run(work / "runs" / "lesion.grid")
    case_id, _ = lesion_cases(work)[0]
    maps = [
        next(iter(run.find_evidence(cache, case_id, method=each).scores.values())).ravel()
        for each in ("contribution", "gradient", "occlusion")
    ]
    assert spearmanr(maps[0], maps[1]).statistic > 0.4
    assert spearmanr(maps[0], maps[2]).statistic > 0.4


def test_a_method_that_the_head_or_the_cache_lacks_is_refused(work: Path, tmp_path: Path) -> None:
    case_id, _ = lesion_cases(work)[0]
    run, cache = work / "runs" / "lesion.grid", work / "cache"
    with pytest.raises(HeadError, match="'grid' weighs neither slices nor patches by attention"):
        explain(run, cache, case_id, tmp_path, method="attention")
    with pytest.raises(
        RunError, match=r"needs the token set attention.*extract again with --tokens cls:2,patch@4:2,att"
    ):
        explain(run, cache, case_id, tmp_path, method="backbone")
    done = CliRunner().invoke(app, ["explain", str(run), str(cache), "--case", case_id, "-o", "x", "--method", "magic"])
    assert isinstance(done.exception, OptionError) and "no method 'magic'" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_the_command_shows_what_was_asked_for(work: Path, tmp_path: Path) -> None:
    case_id, _ = lesion_cases(work)[0]
    where = [str(work / "runs" / "lesion.query"), str(work / "cache"), "--case", case_id, "-o", str(tmp_path)]
    fields = json.loads(CliRunner().invoke(app, ["explain", *where, "--method", "attention", "--json"]).stdout)
    assert fields["method"] == "attention"
    (view,) = fields["views"].values()
    np.testing.assert_allclose(view["weights"], view["attention"], atol=1e-5)
    shown = CliRunner().invoke(app, ["explain", *where, "--method", "attention"]).stdout
    assert "most heat on slice" in shown and "evidence" not in shown and "sanity" not in shown
    assert "most evidence on slice" in CliRunner().invoke(app, ["explain", *where, "--method", "gradient"]).stdout


def test_the_command_tells_whether_the_map_depends_on_what_was_learned(work: Path, tmp_path: Path) -> None:
    case_id, _ = lesion_cases(work)[0]
    where = [str(work / "runs" / "lesion.grid"), str(work / "cache"), "--case", case_id, "-o", str(tmp_path)]
    shown = CliRunner().invoke(app, ["explain", *where, "--sanity"]).stdout
    assert "sanity check passed: the map depends on what the head learned" in shown
    fields = json.loads(CliRunner().invoke(app, ["explain", *where, "--sanity", "--json"]).stdout)["sanity"]
    assert fields["passed"] and len(fields["correlations"]) == sanity.SHUFFLES
    assert fields["alike"] == pytest.approx(np.mean(np.abs(fields["correlations"])))
    assert json.loads(CliRunner().invoke(app, ["explain", *where, "--json"]).stdout)["sanity"] is None

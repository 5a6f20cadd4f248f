"""Explanations: evidence lands where the lesion is, in the geometry of the source, and in the folder asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from embedkit.cache import open_cache
from embedkit.errors import RunError
from embedkit.explanation import canonical_shape, explain
from embedkit.extraction import extract
from embedkit.patches import measure_patch_cover
from embedkit.phantoms import make_phantoms
from embedkit.runs import open_run
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

"""The whole pipeline on real scans with real weights: from a manifest to predictions, similar cases and heatmaps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

import embedkit
from embedkit.manifest import read_labels, read_manifest

pytestmark = pytest.mark.realdata


def test_hippocampus_from_scans_to_predictions_and_the_other_side(
    real_data: Path, deit_weights: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(real_data / "hippocampus" / "manifest.csv")
    summary = embedkit.extract(
        manifest,
        tmp_path / "cache",
        backbone="deit_tiny_patch16_224",
        weights=deit_weights,
        tokens=["cls", "patch@4"],
        slices="count:3",
        image_size=96,
    )
    assert summary.failures == () and summary.cases_done == manifest["case_id"].n_unique()
    labels = real_data / "hippocampus" / "labels.csv"
    trained = embedkit.train(
        tmp_path / "cache", labels, targets=["side", "anterior_mm3"], heads=["linear"], folds=3, out=tmp_path / "runs"
    )
    scores = {run.name: run.metrics for run in trained.runs}
    assert scores["side.raptor"]["auroc"].value > 0.7
    assert set(scores["anterior_mm3.logistic"]) == {"mae", "r2", "spearman"}
    predictions = embedkit.predict(tmp_path / "runs" / "side.linear", tmp_path / "cache")
    assert set(predictions["predicted"]) <= {"odd", "even"} and len(predictions) == summary.cases_done
    index = embedkit.build_index(tmp_path / "cache", tmp_path / "index", labels=labels)
    query = index.cases.filter(pl.col("patient_id").is_duplicated())["case_id"][0]
    found = embedkit.search(index, case_id=query, k=len(index))
    assert len(found) == len(index) - 1 and found["similarity"].is_sorted(descending=True)


def test_lgg_with_three_views_some_missing_gives_a_heatmap_on_every_view_there_is(
    real_data: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(real_data / "lgg" / "manifest.csv")
    counts = manifest.group_by("case_id", maintain_order=True).len()
    lacking = counts.filter(pl.col("len") < 3)["case_id"].head(2).to_list()
    whole = counts.filter(pl.col("len") == 3)["case_id"].head(14).to_list()
    assert lacking, "the data hold cases that lack a view"
    manifest = manifest.filter(pl.col("case_id").is_in(lacking + whole))
    summary = embedkit.extract(
        manifest,
        tmp_path / "cache",
        backbone="embedkit/scattering",
        image_size=64,
        slices="count:4",
        crop="foreground",
    )
    assert summary.failures == ()
    labels = real_data / "lgg" / "labels.csv"
    embedkit.train(tmp_path / "cache", labels, targets=["gender"], heads=["query"], folds=2, out=tmp_path / "runs")
    for case_id in (lacking[0], whole[0]):
        shown = embedkit.explain(tmp_path / "runs" / "gender.query", tmp_path / "cache", case_id, tmp_path / "shown")
        views = sorted(f"{view}/axial" for view in manifest.filter(pl.col("case_id") == case_id)["view"])
        assert sorted(shown.heatmaps) == views
        for view, heatmap in shown.heatmaps.items():
            path = manifest.filter((pl.col("case_id") == case_id) & (pl.col("view") == view.split("/")[0]))["path"][0]
            source, drawn = embedkit.read_volume(path), embedkit.read_volume(heatmap)
            assert drawn.array.shape == source.array.shape
            np.testing.assert_allclose(drawn.affine, source.affine, atol=1e-3)


def test_labels_of_both_sets_read_as_numbers_and_gaps(real_data: Path) -> None:
    labels = read_labels(real_data / "lgg" / "labels.csv")
    assert labels["tumour_voxels"].dtype.is_integer()
    assert labels["rnaseqcluster"].null_count() > 0

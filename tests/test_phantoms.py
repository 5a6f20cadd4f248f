"""Phantoms are what their labels say, the same for the same seed, and read like any other scan."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import SimpleITK as sitk

from embedkit.errors import OptionError, VolumeError
from embedkit.manifest import read_labels, read_manifest
from embedkit.phantoms import PhantomSet, make_phantoms
from embedkit.volumes import Volume, read_mask, read_volume


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> PhantomSet:
    return make_phantoms(tmp_path_factory.mktemp("phantoms") / "new" / "set", cases=20, seed=5)


@pytest.fixture(scope="module")
def exams(phantoms: PhantomSet) -> list[tuple[dict[str, Any], Volume, np.ndarray[Any, Any]]]:
    """Label, image and mask of every case."""
    rows = read_manifest(phantoms.manifest).join(read_labels(phantoms.labels), on=["case_id", "patient_id"])
    found = []
    for row in rows.iter_rows(named=True):
        volume = read_volume(row["path"])
        found.append((row, volume, read_mask(row["mask"], volume)))
    return found


def test_the_labels_are_those_of_the_masks_in_world_coordinates(phantoms: PhantomSet) -> None:
    labels = {row["case_id"]: row for row in read_labels(phantoms.labels).iter_rows(named=True)}
    assert len(labels) == 20
    for row in read_manifest(phantoms.manifest).iter_rows(named=True):
        label = labels[row["case_id"]]
        mask = sitk.ReadImage(row["mask"])  # by ITK alone: neither our orientation nor our reader
        count = int(sitk.GetArrayViewFromImage(mask).sum())
        assert label["volume_mm3"] == pytest.approx(count * np.prod(mask.GetSpacing()), rel=1e-4, abs=0.1)
        assert label["lesion"] == int(count > 0)
        if count:
            statistics = sitk.LabelShapeStatisticsImageFilter()
            statistics.Execute(mask)
            lps_x = statistics.GetCentroid(1)[0]
            assert label["side"] == ("left" if lps_x > 0 else "right")
        else:
            assert label["side"] is None


def test_both_classes_both_sides_and_second_exams_occur(phantoms: PhantomSet) -> None:
    labels = read_labels(phantoms.labels)
    assert 0.45 <= labels["lesion"].mean() <= 0.7  # type: ignore[operator]
    assert set(labels["side"].drop_nulls()) == {"left", "right"}
    exams = labels.group_by("patient_id").agg(pl.len(), pl.col("lesion").n_unique(), pl.col("side").n_unique())
    assert exams["len"].max() == 2
    assert exams["len"].min() == 1
    assert exams["lesion"].max() == 1
    assert exams["side"].max() == 1


def test_grey_values_are_those_of_air_lung_and_lesion(
    exams: list[tuple[dict[str, Any], Volume, np.ndarray[Any, Any]]],
) -> None:
    for row, volume, mask in exams:
        assert volume.array.dtype == np.int16
        assert np.median(volume.array[:, :4, :4]) == pytest.approx(-1000, abs=5)
        middle = volume.array[len(volume.array) // 2]
        assert ((middle > -900) & (middle < -750)).mean() > 0.05  # lungs
        assert (middle > 300).any()  # bone
        if row["lesion"]:
            assert -300 < np.median(volume.array[mask > 0]) < 120
            assert 10_000 < row["volume_mm3"] < 110_000


def test_files_come_in_several_orders_and_one_as_dicom(
    phantoms: PhantomSet, exams: list[tuple[dict[str, Any], Volume, np.ndarray[Any, Any]]]
) -> None:
    orders = {tuple(np.sign(np.round(volume.source_affine[:3, :3], 1)).ravel()) for _, volume, _ in exams}
    assert len(orders) >= 4
    assert {volume.array.shape[1:] for _, volume, _ in exams} == {(96, 96)}
    assert all(24 <= len(volume.array) <= 32 for _, volume, _ in exams)
    assert all(3.6 <= volume.spacing_mm[0] <= 4.6 for _, volume, _ in exams)
    paths = read_manifest(phantoms.manifest)["path"].to_list()
    assert [Path(path).is_dir() for path in paths] == [True] + [False] * 19
    assert len({path.suffix for path in Path(paths[0]).iterdir()}) == 1


def test_the_heart_is_on_the_left_in_every_file_order(
    exams: list[tuple[dict[str, Any], Volume, np.ndarray[Any, Any]]],
) -> None:
    for row, volume, mask in exams:
        soft = (volume.array > -200) & (volume.array < 200) & (mask == 0)
        lower_front = soft[: len(soft) // 2, 30:48]
        # a third of the width on each side of the middle; canonical columns run from right to left
        right, left = lower_front[..., 30:48].sum(), lower_front[..., 48:66].sum()
        assert left > 1.2 * right, row["case_id"]


def test_the_same_seed_gives_the_same_arrays_and_another_seed_others(tmp_path: Path) -> None:
    sets = [make_phantoms(tmp_path / name, cases=4, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    volumes = [[read_volume(path) for path in read_manifest(one.manifest)["path"]] for one in sets]
    for first, second, third in zip(*volumes, strict=True):
        np.testing.assert_array_equal(first.array, second.array)
        np.testing.assert_array_equal(first.source_affine, second.source_affine)
        assert first.array.shape != third.array.shape or (first.array != third.array).any()
    assert sets[0].labels.read_text() == sets[1].labels.read_text()
    assert sets[0].manifest.read_text() == sets[1].manifest.read_text()
    assert sets[0].labels.read_text() != sets[2].labels.read_text()


def test_the_folder_can_move_and_be_filled_again(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "here", cases=4, seed=3)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert (tmp_path / "there" / "manifest.csv").read_text().splitlines()[1].split(",")[3] == "volumes/phantom_000"
    made = make_phantoms(tmp_path / "there", cases=4, seed=4)
    for path in read_manifest(made.manifest)["path"]:
        read_volume(path)


def test_too_few_phantoms_or_no_place_for_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="3 phantoms of seed 0 were asked for, expected at least 4"):
        make_phantoms(tmp_path, cases=3)
    with pytest.raises(OptionError, match=r"seed -1 were asked for, expected .* a seed from 0 up"):
        make_phantoms(tmp_path, cases=4, seed=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(VolumeError, match=r"file: cannot be written \(Not a directory\); check its space"):
        make_phantoms(tmp_path / "file", cases=4)

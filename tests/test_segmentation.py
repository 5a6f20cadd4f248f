"""Masks: learned on the token grid, predicted in the source geometry, and found from clicks."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

import embedkit
from embedkit.alteration import draw_copies, move_slices
from embedkit.bags import BagShape, bag_shape
from embedkit.cache import open_cache
from embedkit.covers import Covers, Masks, read_stack_mask
from embedkit.errors import HeadError, ManifestError, OptionError, RunError, VolumeError
from embedkit.masklosses import dice_overlap, mask_losses
from embedkit.patches import find_patch, measure_patch_cover
from embedkit.plugins import create_head
from embedkit.prompts import Click, place_clicks
from embedkit.runs import Run, open_run
from embedkit.segmentation import predict_mask, segment
from embedkit.slices import plan_stacks, render_slices
from embedkit.volumes import read_volume, write_volume

SHAPE = (12, 20, 24)
CASES = 24
AFFINES = {
    "plain": np.diag([2.0, 1.0, 1.0, 1.0])[[2, 1, 0, 3]],
    "flipped": np.array([[0, 0, -1.5, 40], [0, -1.5, 0, 30], [-2.5, 0, 0, 9], [0, 0, 0, 1.0]]),
}


def oblique() -> np.ndarray:
    """Axes turned by 20 degrees about x and 10 about z, anisotropic and off the origin."""
    a, b = math.radians(20), math.radians(10)
    about_x = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    about_z = np.array([[math.cos(b), -math.sin(b), 0], [math.sin(b), math.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag([1.0, 1.2, 2.0])[:, [2, 1, 0]]
    affine[:3, 3] = [-11, 7, 23]
    return affine


AFFINES["oblique"] = oblique()


def write_case(folder: Path, name: str, *, seed: int, affine: np.ndarray, bright: bool) -> dict[str, Any]:
    """A noisy image with a bright cube (if any), and its mask, which every other case has in another orientation."""
    rng = np.random.default_rng(seed)
    image = rng.normal(100, 5, SHAPE).astype(np.float32)
    mask = np.zeros(SHAPE, np.uint8)
    corner = [int(rng.integers(1, size - 7)) for size in SHAPE]
    if bright:
        inside = tuple(slice(start, start + 6) for start in corner)
        image[inside] += 120
        mask[inside] = 1
    write_volume(folder / f"{name}.nii.gz", image, affine)
    turned, turned_affine = mask, affine
    if seed % 2:  # the same voxels, stored the other way round along the first axis
        turned, turned_affine = mask[::-1], affine.copy()
        turned_affine[:3, 3] = affine[:3, 3] + affine[:3, 0] * (SHAPE[0] - 1)
        turned_affine[:3, 0] = -affine[:3, 0]
    write_volume(folder / f"{name}_mask.nii.gz", np.ascontiguousarray(turned), turned_affine)
    row = {"case_id": name, "patient_id": f"p{seed // 2}", "path": f"{name}.nii.gz", "mask": f"{name}_mask.nii.gz"}
    return row | {"bright": int(bright), "seed": seed}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of small images of three geometries, most with a bright cube, and the mask of all but two."""
    folder = tmp_path_factory.mktemp("segmented")
    affines = list(AFFINES.values())
    rows = [
        write_case(folder, f"c{seed:02}", seed=seed, affine=affines[seed % 3], bright=seed // 2 % 3 != 2)
        for seed in range(CASES)
    ]
    for row in rows[-2:]:
        row["mask"] = None
    table = pl.DataFrame(rows)
    table.drop("bright", "seed").write_csv(folder / "cases.csv")
    table.select("case_id", "bright").write_csv(folder / "labels.csv")
    embedkit.extract(
        folder / "cases.csv",
        folder / "cache",
        backbone="embedkit/scattering",
        tokens=["cls", "patch"],
        image_size=96,
        window="range:60:260",
    )
    return folder


@pytest.fixture(scope="module")
def trained(work: Path) -> Run:
    """Label and mask learned together, with practice on clicks."""
    (run,) = (
        each
        for each in embedkit.train(
            work / "cache",
            work / "labels.csv",
            targets=["bright"],
            masks=work / "cases.csv",
            heads=["segment"],
            head_options={"segment": {"clicks": 3, "dropout": 0.0}},
            fit_options={"epochs": 40, "patience": 40},
            folds=2,
            out=work / "runs",
            resamples=100,
        ).runs
        if each.head == "segment"
    )
    return run


@pytest.mark.parametrize("case", ["c00", "c01", "c02", "c06", "c07"])
def test_a_cube_of_known_voxels_covers_the_patches_that_saw_them(work: Path, case: str) -> None:
    cache = open_cache(work / "cache")
    stack = int(cache.stacks.filter(pl.col("case_id") == case)["stack"][0])
    record = cache.record(stack)
    grid = bag_shape(cache, ["patch:2"]).grids["patch:2"]
    covers = Masks(cache, work / "cases.csv").measure([case], [grid])[grid]
    found = covers.batch([case], len(cache.slices(stack).indices))[0, 0].numpy()
    image = read_volume(work / f"{case}.nii.gz")
    expected = measure_patch_cover(
        image.array > 160, indices=cache.slices(stack).indices, box=record.box, plane="axial", grid=grid
    )
    np.testing.assert_allclose(found, expected.reshape(found.shape), atol=1e-3)
    assert found.max() > 0.9 and (found > 0).mean() < 0.5


def test_cover_is_unknown_for_cases_without_a_mask_and_padding(work: Path) -> None:
    cache = open_cache(work / "cache")
    covers = Masks(cache, work / "cases.csv").measure(["c00", "c23"], [(6, 6)])[6, 6]
    batch = covers.batch(["c00", "c23", "c01"], 14)
    assert covers.case_ids == {"c00"}
    assert batch[0, 0, :12].isfinite().all() and batch[0, 0, 12:].isnan().all() and batch[1:].isnan().all()


def test_the_volume_of_a_mask_is_in_millilitres(work: Path) -> None:
    table = Masks(open_cache(work / "cache"), work / "cases.csv").measure_ml(["c00", "c01", "c04"])
    voxel = {name: abs(np.linalg.det(affine[:3, :3])) for name, affine in AFFINES.items()}
    assert dict(table.iter_rows()) == pytest.approx(
        {"c00": 216 * voxel["plain"] / 1000, "c01": 216 * voxel["flipped"] / 1000, "c04": 0.0}
    )


def test_loss_is_least_at_the_truth_and_zero_where_nothing_is_known() -> None:
    cover = torch.full((3, 1, 2, 4), torch.nan)
    cover[0, 0, :, :] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    cover[1] = 0.0
    right = torch.where(cover.nan_to_num() > 0.5, 20.0, -20.0)
    assert mask_losses(right, cover).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    wrong = mask_losses(-right, cover)
    assert wrong[0] > 20 and wrong[1] > 20 and wrong[2] == 0
    half = mask_losses(torch.zeros_like(cover), cover)
    assert half[0].item() == pytest.approx(math.log(2) + 1 - (2 * 1 + 1) / (4 + 2 + 1), abs=1e-6)


def test_dice_is_twice_the_common_part_over_the_sum() -> None:
    found, truth = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    assert dice_overlap(found, truth) == pytest.approx(2 / 3)
    assert math.isnan(dice_overlap(found, torch.zeros(3, dtype=torch.bool)))


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_a_voxel_is_found_in_the_patch_that_it_covers(plane: str) -> None:
    rng = np.random.default_rng(0)
    shape, box, grid, indices = (9, 11, 13), (-1, 1, 12, 10), (4, 5), np.arange(8)
    for _ in range(30):
        voxel = (int(rng.integers(9)), int(rng.integers(11)), int(rng.integers(13)))
        volume = np.zeros(shape)
        volume[voxel] = 1
        found = find_patch(voxel, indices=indices, box=box, plane=plane, shape=shape, grid=grid)
        cover = measure_patch_cover(volume, indices=indices, box=box, plane=plane, grid=grid).reshape(8, -1)
        if cover.max() > 0:
            assert found is not None and cover[found] == cover.max()


def test_masks_are_learned_beside_the_label_and_told_in_the_record(trained: Run) -> None:
    record = open_run(trained.path).record
    assert record.masks == CASES - 2
    assert record.metrics["dice"].value > 0.45
    assert record.metrics["dice"].low <= record.metrics["dice"].value <= record.metrics["dice"].high
    assert record.fit_options["mask_weight"] == 1.0 and record.parameters < 1_000_000


def test_masks_too_small_for_the_grid_give_no_dice_but_a_note(work: Path, tmp_path: Path) -> None:
    coarse = {"backbone": "embedkit/scattering", "tokens": ["cls", "patch@2"], "image_size": 64}
    embedkit.extract(work / "cases.csv", tmp_path / "cache", **coarse)
    how = {"heads": ["segment"], "fit_options": {"epochs": 1}, "folds": 2, "resamples": 20, "targets": ["bright"]}
    (run,) = (
        each
        for each in embedkit.train(
            tmp_path / "cache", work / "labels.csv", masks=work / "cases.csv", out=tmp_path / "runs", **how
        ).runs
        if each.head == "segment"
    )
    record = open_run(run.path).record
    assert "dice" not in record.metrics
    assert any(
        "none of its masks covers half of a patch on the grid of patch@2:2; a finer" in each for each in record.notes
    )


@pytest.mark.parametrize("case", ["c00", "c01", "c02", "c07"])
def test_a_predicted_mask_lies_over_the_true_one_in_the_source_geometry(
    work: Path, trained: Run, case: str, tmp_path: Path
) -> None:
    (written,) = segment(trained, work / "cache", tmp_path, case_ids=[case], held_out=True)
    found, image = read_volume(written.path), read_volume(work / f"{case}.nii.gz")
    assert found.source_shape == image.source_shape
    np.testing.assert_allclose(found.source_affine, image.source_affine, atol=1e-5)
    cache = open_cache(work / "cache")
    record = cache.record(cache.find_stacks(case, trained.views)["image/axial"])
    truth = read_stack_mask(work / f"{case}_mask.nii.gz", record) > 0
    overlap = 2 * (truth & (found.array > 0)).sum() / (truth.sum() + (found.array > 0).sum())
    assert overlap > 0.5
    voxel_ml = abs(np.linalg.det(image.source_affine[:3, :3])) / 1000
    assert written.volume_ml == pytest.approx((found.array > 0).sum() * voxel_ml, rel=1e-4)


def test_held_out_members_are_those_of_the_fold_that_tested_the_case(work: Path, trained: Run) -> None:
    fold = trained.predictions.filter(pl.col("case_id") == "c00")["fold"][0]
    (member,) = trained.held_out_members("c00")
    place = [each["fold"] for each in trained.record.members].index(fold)
    assert member is trained.members[place]
    cache = open_cache(work / "cache")
    (alone, _), (together, _) = (
        predict_mask(trained, cache, "c00", held_out=held_out)["image/axial"] for held_out in (True, False)
    )
    assert not np.allclose(alone, together)


def test_a_click_reaches_the_token_under_it_in_voxels_and_in_millimetres(work: Path) -> None:
    cache = open_cache(work / "cache")
    for case in ("c00", "c01", "c02"):
        stack = cache.find_stacks(case, ["image/axial"])["image/axial"]
        record = cache.record(stack)
        truth = read_volume(work / f"{case}_mask.nii.gz")
        voxel = np.argwhere(read_volume(work / f"{case}.nii.gz").array > 160)[0]
        world = read_volume(work / f"{case}.nii.gz").affine @ [*voxel, 1]
        source = np.rint(np.linalg.inv(record.source_affine) @ world)[:3]
        size = (1, 1, 12, 36)
        by_mm = place_clicks([Click(tuple(world[:3]))], cache, {0: stack}, grid=(6, 6), size=size)
        by_voxel = place_clicks([Click(tuple(source[::-1]), "voxel")], cache, {0: stack}, grid=(6, 6), size=size)
        cover = Masks(cache, work / "cases.csv").measure([case], [(6, 6)])[6, 6].batch([case], 12)
        assert by_mm.sum() == 1 and torch.equal(by_mm, by_voxel) and (cover[by_mm > 0] > 0).all() and truth.array.any()


def test_clicks_change_the_mask_most_where_they_are(work: Path, trained: Run) -> None:
    cache = open_cache(work / "cache")
    image = read_volume(work / "c00.nii.gz")
    voxel = np.argwhere(image.array > 160).mean(0).round()
    click = Click(tuple((image.affine @ [*voxel, 1])[:3]))
    plain, _ = predict_mask(trained, cache, "c00")["image/axial"]
    clicked, _ = predict_mask(trained, cache, "c00", clicks=[click])["image/axial"]
    at = tuple(voxel.astype(int))
    assert clicked[at] > 0.5 and not np.allclose(plain, clicked)


def test_masks_alone_are_learned_without_a_label_table(work: Path) -> None:
    runs = embedkit.train(
        work / "cache",
        masks=work / "cases.csv",
        fit_options={"epochs": 4},
        folds=2,
        out=work / "alone",
        resamples=50,
    ).runs
    (run,) = (each for each in runs if each.head == "segment")
    assert run.record.target == "mask_ml" and run.record.kind == "regression" and run.record.masks == CASES - 2
    assert "dice" in run.metrics


def test_a_mask_is_dropped_at_prediction_unless_it_is_asked_for(work: Path, trained: Run) -> None:
    from embedkit.bags import stream_bags
    from embedkit.maskscores import predict_cover

    bag = next(stream_bags(open_cache(work / "cache"), ["c00", "c03"], trained.record.token_sets))
    assert trained.members[0](bag).mask_logits is None
    assert predict_cover(trained.members, bag, 36).shape == (2, 1, 12, 36)


def test_training_with_masks_that_nobody_can_use_is_refused(work: Path, tmp_path: Path) -> None:
    cache, labels, given = work / "cache", work / "labels.csv", {"targets": ["bright"], "folds": 2, "out": tmp_path}
    with pytest.raises(OptionError, match="none of the heads logistic, raptor, linear learns any; add one that does"):
        embedkit.train(cache, labels, masks=work / "cases.csv", heads=["linear"], **given)
    with pytest.raises(HeadError, match="option masks of head 'grid' follows from whether masks are given; leave it"):
        embedkit.train(cache, labels, heads=["grid"], head_options={"grid": {"masks": True}}, **given)
    with pytest.raises(HeadError, match="token sets cls:2 have 1 patches per slice, expected a square grid"):
        embedkit.train(cache, labels, masks=work / "cases.csv", heads=["grid"], token_sets=["cls:2"], **given)
    table = embedkit.read_manifest(work / "cases.csv")
    empty = table.with_columns(mask=pl.lit(None, pl.String))
    with pytest.raises(ManifestError, match="no row has a mask"):
        embedkit.train(cache, labels, masks=empty, heads=["segment"], **given)
    np.save(tmp_path / "nothing.npy", np.zeros(SHAPE, np.uint8))
    nothing = table.with_columns(mask=pl.when(pl.col("mask").is_not_null()).then(pl.lit(str(tmp_path / "nothing.npy"))))
    with pytest.raises(OptionError, match=f"masks of {CASES - 2} labelled cases were read, but none covers anything"):
        embedkit.train(cache, labels, masks=nothing, heads=["segment"], **given)
    strange = table.with_columns(case_id=pl.col("case_id") + "x")
    with pytest.raises(ManifestError, match=r"22 cases have a mask \(c00x, .*has none of them"):
        embedkit.train(cache, labels, masks=strange, heads=["segment"], **given)
    with pytest.raises(OptionError, match="no label table was given for the target bright"):
        embedkit.train(cache, masks=work / "cases.csv", **given)
    with pytest.raises(OptionError, match="no label table was given, expected one"):
        embedkit.train(cache, out=tmp_path)
    with pytest.raises(OptionError, match="mask_weight is -1"):
        embedkit.train(cache, labels, heads=["segment"], fit_options={"mask_weight": -1.0}, **given)


def train_grid(work: Path, out: Path, masks: pl.DataFrame | None, **how: Any) -> Run:
    fit = {"epochs": 3, "patience": 3}
    given: dict[str, Any] = {"targets": ["bright"], "heads": ["grid"], "folds": 2, "resamples": 10} | how
    runs = embedkit.train(work / "cache", work / "labels.csv", masks=masks, fit_options=fit, out=out, **given).runs
    return next(run for run in runs if run.head == "grid")


def test_a_head_with_a_decoder_learns_masks_only_where_some_are_given(work: Path, tmp_path: Path) -> None:
    table = embedkit.read_manifest(work / "cases.csv")
    with_masks = train_grid(work, tmp_path / "a", table)
    assert with_masks.record.head_options["masks"] is True and with_masks.record.masks == CASES - 2
    assert with_masks.metrics["dice"].value >= 0
    (written,) = segment(with_masks, work / "cache", tmp_path / "m", case_ids=["c00"], held_out=True)
    assert read_volume(written.path).array.shape == SHAPE
    with pytest.raises(OptionError, match="practised on none; head 'grid' hears none: train head segment, or give no"):
        segment(with_masks, work / "cache", tmp_path / "m", case_ids=["c00"], clicks=[Click((9.0, 9.0, 5.0), "voxel")])
    without = train_grid(work, tmp_path / "b", None)
    assert without.record.head_options["masks"] is False and without.record.parameters < with_masks.record.parameters
    with pytest.raises(RunError, match=r"run bright.grid learned no masks"):
        segment(without, work / "cache", tmp_path)


def test_no_mask_of_a_tested_patient_reaches_the_head_that_tests_him(work: Path, tmp_path: Path) -> None:
    table = embedkit.read_manifest(work / "cases.csv")
    first = train_grid(work, tmp_path / "a", table)
    tested = first.predictions.filter(pl.col("fold") == 0)["case_id"].implode()
    gone = pl.when(~pl.col("case_id").is_in(tested)).then("mask")
    second = train_grid(work, tmp_path / "b", table.with_columns(mask=gone))
    both = first.predictions.join(second.predictions, on="case_id").filter(pl.col("fold") == 0)
    assert both["score"].to_list() == both["score_right"].to_list()
    others = first.predictions.join(second.predictions, on="case_id").filter(pl.col("fold") == 1)
    assert others["score"].to_list() != others["score_right"].to_list()


def test_a_warm_start_takes_over_what_it_can_with_or_without_masks(work: Path, tmp_path: Path) -> None:
    table = embedkit.read_manifest(work / "cases.csv")
    old = train_grid(work, tmp_path / "a", table)
    new = train_grid(work, tmp_path / "b", None, start=old)
    assert new.record.head_options["masks"] is False and "started from run bright.grid" in new.record.notes[-1]


def test_a_sweep_with_masks_tries_no_tokens_without_places(work: Path, tmp_path: Path) -> None:
    table = embedkit.read_manifest(work / "cases.csv")
    run = train_grid(work, tmp_path, table, sweep="small")
    tried = {tuple(each["token_sets"]) for each in run.record.sweep["candidates"]}
    assert tried == {("patch:2",)}


def test_a_mask_of_another_geometry_or_an_unreadable_one_names_its_case(work: Path, tmp_path: Path) -> None:
    cache = open_cache(work / "cache")
    table = embedkit.read_manifest(work / "cases.csv")
    np.save(tmp_path / "small.npy", np.ones((3, 4, 5), np.uint8))
    far = AFFINES["plain"].copy()
    far[:3, 3] = 5000
    write_volume(tmp_path / "far.nii.gz", np.ones(SHAPE, np.uint8), far)
    for file, why in (
        ("small.npy", r"mask of case c00, view image: .*a mask without geometry of shape \(3, 4, 5\)"),
        ("far.nii.gz", "mask of case c00, view image: .*every labelled voxel of the mask lies outside"),
        ("absent.nii.gz", "mask of case c00, view image: .*absent.nii.gz"),
    ):
        wrong = table.with_columns(
            mask=pl.when(pl.col("case_id") == "c00").then(pl.lit(str(tmp_path / file))).otherwise("mask")
        )
        with pytest.raises(VolumeError, match=why):
            Masks(cache, wrong).measure(["c00"], [(6, 6)])


def test_masks_of_unknown_cases_are_reported(work: Path) -> None:
    table = embedkit.read_manifest(work / "cases.csv")
    more = pl.concat([table, table[:1].with_columns(case_id=pl.lit("stranger"))])
    assert Masks(open_cache(work / "cache"), more).strangers == ("stranger",)


def test_what_cannot_be_segmented_is_refused(work: Path, trained: Run, tmp_path: Path) -> None:
    cache = open_cache(work / "cache")
    plain = embedkit.train(
        cache, work / "labels.csv", targets=["bright"], heads=["logistic"], folds=2, out=tmp_path / "r", resamples=10
    ).runs[0]
    with pytest.raises(
        RunError,
        match=r"run bright.logistic learned no masks, .* a head that does \(grid, segment, tail\) with --masks",
    ):
        segment(plain, cache, tmp_path)
    with pytest.raises(RunError, match="lacks 1 of the cases asked for: nobody"):
        segment(trained, cache, tmp_path, case_ids=["nobody"])
    click = Click((0.0, 0.0, 0.0), "voxel")
    with pytest.raises(OptionError, match="clicks were given for 24 cases, expected one"):
        segment(trained, cache, tmp_path, clicks=[click])
    with pytest.raises(OptionError, match=r"4 clicks were given, but run bright\.segment practised on 3"):
        segment(trained, cache, tmp_path, case_ids=["c00"], clicks=[click] * 4)
    for point, unit in (((24.0, 0.0, 0.0), "voxel"), ((-900.0, 0.0, 0.0), "mm")):
        with pytest.raises(OptionError, match=r"lies in no slice that the backbone saw of case c00 .*24x20x12 voxels"):
            segment(trained, cache, tmp_path, case_ids=["c00"], clicks=[Click(point, unit)])
    with pytest.raises(OptionError, match=r"click at 1,1,1 voxel of flair, but case c00 has no view .* it has image"):
        segment(trained, cache, tmp_path, case_ids=["c00"], clicks=[Click((1.0, 1.0, 1.0), "voxel", "flair")])
    for threshold in (0.0, 1.0, math.nan):
        with pytest.raises(OptionError, match=f"threshold is {threshold:g}, expected a share above 0 and below 1"):
            segment(trained, cache, tmp_path, case_ids=["c00"], threshold=threshold)
    with pytest.raises(RunError, match="cannot write the masks"):
        segment(trained, cache, work / "labels.csv", case_ids=["c00"])


def test_clicks_and_head_options_that_mean_nothing_are_refused(work: Path) -> None:
    with pytest.raises(OptionError, match="click in 'inch', expected voxel or mm"):
        Click((1.0, 2.0, 3.0), "inch")
    with pytest.raises(OptionError, match="expected three finite numbers"):
        Click((1.0, math.nan, 3.0))
    shape = bag_shape(open_cache(work / "cache"), ["patch:2"])
    oblong = dataclasses.replace(shape, grids={"patch:2": (1, 36)})
    with pytest.raises(HeadError, match="have 36 patches per slice, expected a square grid of patches"):
        create_head("segment", oblong, ["patch:2"], 1)
    with pytest.raises(HeadError, match="clicks=-1, expected 0 or more"):
        create_head("segment", shape, ["patch:2"], 1, options={"clicks": -1})


def test_the_command_writes_masks_and_tells_their_volume(work: Path, trained: Run, tmp_path: Path) -> None:
    from embedkit.cli.main import app

    arguments = ["segment", str(trained.path), str(work / "cache"), "-o", str(tmp_path), "--case", "c00"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "c00 image/axial: " in done.output and " ml  " in done.output
    assert (tmp_path / "c00_image_axial_mask.nii.gz").is_file()
    volume = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)[0]["volume_ml"]
    assert volume == segment(trained, work / "cache", tmp_path, case_ids=["c00"])[0].volume_ml
    lower = CliRunner().invoke(app, [*arguments, "--threshold", "0.2", "--json"])
    assert json.loads(lower.output)[0]["volume_ml"] > volume > 0
    done = CliRunner().invoke(app, [*arguments, "--click", "12,10,6", "--json"])
    assert done.exit_code == 0 and '"volume_ml"' in done.output
    done = CliRunner().invoke(app, [*arguments, "--click", "12,10"])
    assert done.exit_code == 2 and "has 2 numbers, expected three" in done.output


def test_practice_clicks_lie_on_the_mask_alone_and_never_more_than_asked_for() -> None:
    shape = BagShape({"patch@2:1": (4, 6)}, {"patch@2:1": (2, 2)}, ("a/axial",))
    head = cast(Any, create_head("segment", shape, ["patch@2:1"], 1, options={"clicks": 2})).train()
    cover = torch.tensor([[0.0, 0.5, 0.2, 0.0], [1.0, 0.0, 0.0, math.nan], [0.9, 0.9, 0.9, 0.9]]).expand(1, 1, 3, 4)
    mask = torch.tensor([True, True, False]).expand(1, 1, 3)
    counts = set()
    for seed in range(40):
        torch.manual_seed(seed)
        clicks = head._practise(cover, mask)
        counts.add(int(clicks.sum()))
        assert ((cover.nan_to_num() > 0) & mask[..., None])[clicks > 0].all()
    assert counts == {0, 1, 2}
    assert head.eval()._practise(cover, mask).sum() == 0


def test_the_mask_of_a_copy_lies_where_its_image_was_moved_to(work: Path) -> None:
    cache = open_cache(work / "cache")
    recipe = dataclasses.replace(cache.recipe, augment="2:flip", windows=("range:0:1",))
    covers = Masks(cache, work / "cases.csv").measure(["c01"], [(6, 6)], copies=recipe)[6, 6]
    image = read_volume(work / "c01.nii.gz")
    volumes = {"image": dataclasses.replace(image, array=(image.array > 160).astype(np.float32))}
    (stack,) = plan_stacks(volumes, recipe)
    pictures, _ = render_slices(stack, volumes, recipe, 0, len(stack.indices))
    drawn = draw_copies("c01", plane="axial", sources=("image",), recipe=recipe)
    for case_id, alteration in [("c01", None), *drawn]:
        moved = pictures if alteration is None else move_slices(pictures, alteration)
        expected = torch.nn.functional.avg_pool2d(moved[:, 0], 16).flatten(1)
        found = covers.batch([case_id], len(stack.indices))[0, 0]
        real = ~found.isnan()
        assert real.any(1).sum() > 4
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=0.06)
        assert expected.max() > 0.5
    assert covers.case_ids == {"c01", "c01#1", "c01#2"}


def test_copies_are_learned_with_their_masks(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = pl.read_csv(work / "cases.csv")[:12].with_columns(pl.format(f"{work}/{{}}", "path").alias("path"))
    how: dict[str, Any] = {"backbone": "embedkit/scattering", "image_size": 96, "window": "range:60:260"}
    embedkit.extract(some.drop("mask"), tmp_path / "copies", tokens=["patch"], augment=1, **how)
    known, batch = dict[str, bool](), Covers.batch

    def watch(covers: Covers, case_ids: Any, slices: int) -> torch.Tensor:
        found = batch(covers, case_ids, slices)
        known.update(zip(case_ids, (~found.isnan()).flatten(1).any(1).tolist(), strict=True))
        return found

    monkeypatch.setattr(Covers, "batch", watch)
    trained = embedkit.train(
        work / "cache",
        pl.read_csv(work / "labels.csv").filter(pl.col("case_id").is_in(some["case_id"].implode())),
        targets=["bright"],
        masks=work / "cases.csv",
        copies=tmp_path / "copies",
        heads=["segment"],
        fit_options={"epochs": 2},
        folds=2,
        out=tmp_path / "runs",
        resamples=2,
    )
    assert {f"c{number:02}#1" for number in range(12)} <= known.keys()
    assert all(known.values())
    assert trained.runs[-1].record.masks == 12

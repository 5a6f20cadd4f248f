"""Slices: planes, windows, slice choice, boxes, channels, rendering by value, and patches placed back on voxels."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedkit import slices
from embedkit.errors import OptionError, VolumeError
from embedkit.patches import frame_image, measure_image_cover
from embedkit.planes import cut_slices, foreground_extent, restore_volume
from embedkit.recipe import Recipe
from embedkit.slices import (
    PLANES,
    WINDOW_PRESETS,
    choose_slices,
    measure_patch_cover,
    parse_window,
    place_patch_scores,
    plan_stacks,
    render_previews,
    render_slices,
    slice_choice_text,
    window_texts,
)
from embedkit.volumes import Volume, read_mask, read_volume
from embedkit.windows import measure_limits

Array = np.ndarray[Any, Any]
LPS = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], float)
"""(slice, row, column) of a canonical array with 1 mm voxels to RAS+ mm."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small operations on several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def volume(array: Array, spacing_mm: tuple[float, float, float] = (1, 1, 1), origin: Any = (0, 0, 0)) -> Volume:
    affine = LPS @ np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = origin
    return Volume(
        array=np.ascontiguousarray(array),
        spacing_mm=spacing_mm,
        affine=affine,
        source_shape=array.shape,
        source_affine=affine,
        source_bytes=array.nbytes,
        source_digest="0" * 64,
    )


def recipe(**changes: Any) -> Recipe:
    fixed: dict[str, Any] = {"backbone": "b", "weights": "w", "token_sets": ("cls:1",), "mean": (0.0,), "std": (1.0,)}
    return Recipe(**{**fixed, "image_size": 32, "windows": ("range:0:1",), **changes})


def render(volumes: dict[str, Volume], options: Recipe, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    stack = plan_stacks(volumes, options)[number]
    return render_slices(stack, volumes, options, 0, len(stack.indices))


def marked(*shape: int, at: tuple[int, int, int]) -> Array:
    array = np.zeros(shape, np.float32)
    array[at] = 1
    return array


# planes


@pytest.mark.parametrize(
    ("plane", "slice_index", "row", "column"),
    [("axial", 1, 3, 6), ("coronal", 3, 8 - 1, 6), ("sagittal", 6, 8 - 1, 3)],
)
def test_images_show_superior_and_anterior_at_the_top_and_the_patients_right_at_the_left(
    plane: str, slice_index: int, row: int, column: int
) -> None:
    array = marked(9, 9, 9, at=(1, 3, 6))  # low in the body, towards anterior, on the patient's left
    images, _ = render({"ct": volume(array)}, recipe(planes=(plane,), image_size=9))
    assert np.argwhere(images[:, 0].numpy() > 0.5).tolist() == [[slice_index, row, column]]


@pytest.mark.parametrize("plane", PLANES)
def test_restoring_undoes_cutting(plane: str) -> None:
    array = np.random.default_rng(0).random((3, 4, 5))
    assert np.array_equal(restore_volume(cut_slices(array, plane), plane), array)


def test_stacks_come_per_view_and_plane_with_positions_in_mm() -> None:
    views = {"pre": volume(np.zeros((4, 6, 8)), (5, 1, 2)), "post": volume(np.zeros((4, 6, 8)), (5, 1, 2))}
    stacks = plan_stacks(views, recipe(planes=("axial", "sagittal")))
    assert [(s.view, s.plane) for s in stacks] == [
        ("pre", "axial"),
        ("pre", "sagittal"),
        ("post", "axial"),
        ("post", "sagittal"),
    ]
    assert stacks[0].positions_mm.tolist() == [0, 5, 10, 15]
    assert stacks[1].positions_mm.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert (stacks[0].plane_shape, stacks[1].plane_shape) == ((6, 8), (4, 6))
    assert stacks[0].indices.dtype == np.int32 and stacks[0].positions_mm.dtype == np.float32


# boxes and resize


def test_padding_keeps_the_physical_aspect_and_centres_the_image() -> None:
    stack = plan_stacks({"ct": volume(np.zeros((20, 256, 256)), (5, 1, 1))}, recipe(planes=("coronal",)))[0]
    assert stack.box == (-16, 0, 51, 256)  # 256 mm high are 51 slices of 5 mm, of which 20 exist
    ones = volume(np.ones((10, 20, 20), np.float32))
    images, _ = render({"ct": ones}, recipe(planes=("coronal",), image_size=40))
    assert images[0, 0, :9].max() == 0 and images[0, 0, 31:].max() == 0
    assert images[0, 0, 11:29].min() == 1


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "side"),
    [
        ((3, 48, 61), (1, 1, 1), 32),
        ((3, 61, 48), (1, 0.7, 0.7), 32),
        ((2, 12, 70), (1, 0.5, 0.5), 224),
        ((2, 32, 32), (1, 1, 1), 32),
        ((2, 20, 32), (1, 1, 1), 32),
        ((2, 90, 24), (1, 0.4, 2.5), 37),
        ((1, 1, 9000), (1, 1, 1), 32),
        ((1, 500, 2), (1, 1, 1), 32),
    ],
)
@pytest.mark.parametrize("rows_at_a_time", [None, 7])
def test_an_image_is_what_padding_and_resizing_its_whole_square_gives_to_the_last_bit(
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    side: int,
    rows_at_a_time: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    array = np.random.default_rng(1).random(shape).astype(np.float32)
    views, options = {"ct": volume(array, spacing_mm)}, recipe(image_size=side)
    stack = plan_stacks(views, options)[0]
    top, left, height, width = stack.box
    if rows_at_a_time:
        monkeypatch.setattr(slices, "_STRIP_PIXELS", rows_at_a_time * shape[0] * width)
    square = torch.zeros(shape[0], 1, height, width)
    square[:, 0, -top : shape[1] - top, -left : shape[2] - left] = torch.from_numpy(array)
    whole = torch.nn.functional.interpolate(square, size=(side, side), mode="bilinear", antialias=True).clamp_(0, 1)
    images, _ = render_slices(stack, views, options, 0, shape[0])
    assert torch.equal(images, whole if (height, width) != (side, side) else square)


def test_an_image_of_extreme_aspect_is_rendered_in_little_memory_and_refused_where_it_is_absurd() -> None:
    long = np.zeros((1, 2, 60_000), np.float32)
    long[:, :, ::2] = 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images, _ = render({"ct": volume(long)}, recipe(image_size=32))  # its square has 3,600,000,000 voxels
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10 and 0 < float(images.max()) < 0.01
    told = (
        r"view ct: its axial slices of 1 x 200000 voxels of 1 x 1 mm make images of 200000 x 200000 voxels, expected"
        " 131072 a side at most; check the spacing in the header, crop the image, or leave the plane out"
    )
    for resize in ("pad", "stretch"):
        with pytest.raises(
            VolumeError, match=told if resize == "pad" else "make images of 1 x 200000 voxels"
        ) as caught:
            plan_stacks({"ct": volume(np.zeros((1, 1, 200_000), np.float32))}, recipe(resize=resize))
        assert caught.value.view == "ct"
    with pytest.raises(VolumeError, match=r"coronal slices of 3 x 10 voxels of 1 x 1e-05 mm make images of"):
        plan_stacks({"ct": volume(np.zeros((3, 10, 10), np.float32), (1, 1, 1e-5))}, recipe(planes=("coronal",)))


def test_stretching_fills_the_square() -> None:
    images, _ = render({"ct": volume(np.ones((10, 20, 20), np.float32))}, recipe(planes=("coronal",), resize="stretch"))
    assert float(images.min()) == 1
    stack = plan_stacks({"ct": volume(np.ones((10, 20, 20)))}, recipe(planes=("coronal",), resize="stretch"))[0]
    assert stack.box == (0, 0, 10, 20)


def test_shrinking_averages_instead_of_skipping_pixels() -> None:
    stripes = np.zeros((1, 64, 64), np.float32)
    stripes[:, :, ::2] = 1
    images, _ = render({"ct": volume(stripes)}, recipe(image_size=16))
    torch.testing.assert_close(images[0, 0, :, 2:-2], torch.full((16, 12), 0.5), atol=0.01, rtol=0)


def test_values_stay_within_0_and_1() -> None:
    noise = np.random.default_rng(0).normal(0, 3, (3, 50, 41)).astype(np.float32)
    images, _ = render({"ct": volume(noise)}, recipe(image_size=23))
    assert float(images.min()) >= 0 and float(images.max()) <= 1


def head(depth: int = 12, side: int = 100, rows: slice = slice(30, 70), columns: slice = slice(20, 50)) -> Array:
    noise = np.random.default_rng(0).random((depth, side, side)) * 5
    noise[2:-1, rows, columns] = 80 + noise[2:-1, rows, columns]
    return noise.astype(np.float32)


def test_foreground_is_the_bright_block_with_a_small_margin() -> None:
    assert foreground_extent(head()) == ((2, 11), (29, 71), (19, 51))


def test_foreground_ignores_specks_and_lines_outside_the_body() -> None:
    array = head()
    array[:, 5, 5] = 200
    array[:, 90, :] = 90  # one pixel wide, as a table's edge
    array[4:6, 80:83, 80:83] = 200
    assert foreground_extent(array) == ((2, 11), (29, 71), (19, 51))


def test_foreground_is_found_on_a_grey_background_and_in_hu() -> None:
    rng = np.random.default_rng(0)
    grey = (100 + rng.normal(0, 0.5, (12, 100, 100))).astype(np.float32)
    grey[2:-1, 30:70, 20:50] += rng.normal(0, 30, (9, 40, 30)).astype(np.float32)  # darker and brighter than the air
    found = foreground_extent(grey)
    assert found is not None
    assert np.abs(np.array(found[1:]) - np.array([[29, 71], [19, 51]])).max() <= 2
    lung = np.full((12, 100, 100), -1000, np.int16)
    lung[:, 30:70, 20:50] = 40
    lung[:, 40:60, 30:40] = -850  # air inside the body does not split it
    assert foreground_extent(lung) == ((0, 12), (29, 71), (19, 51))


def test_large_volumes_find_their_foreground_to_a_few_voxels() -> None:
    array = np.full((20, 400, 300), -1000, np.int16)
    array[:, 100:300, 50:250] = 0
    found = foreground_extent(array)
    assert found is not None
    assert np.abs(np.array(found[1:]) - np.array([[96, 304], [46, 254]])).max() <= 4


def test_the_crop_is_one_square_for_all_views_of_a_case() -> None:
    views = {"pre": volume(head()), "post": volume(head(rows=slice(40, 80), columns=slice(30, 60)))}
    stacks = plan_stacks(views, recipe(crop="foreground"))
    assert stacks[0].box == stacks[1].box == (29, 14, 52, 52)  # rows 29 to 81; columns 19 to 61, widened to a square


def test_views_on_other_grids_are_cropped_to_the_same_place_in_mm() -> None:
    fine = head()
    coarse = fine.reshape(12, 50, 2, 50, 2).mean((2, 4))  # its voxel (0, 0) is centred on 0.5, 0.5 mm of the fine grid
    views = {"fine": volume(fine), "coarse": volume(coarse, (1, 2, 2), origin=(-0.5, -0.5, 0))}
    stacks = plan_stacks(views, recipe(crop="foreground"))
    fine_box, coarse_box = np.array(stacks[0].box), np.array(stacks[1].box)
    assert np.abs(fine_box - 2 * coarse_box).max() <= 2
    images = [render_slices(stack, views, recipe(windows=("range:0:100",)), 5, 6)[0] for stack in stacks]
    assert float((images[0] - images[1]).abs().mean()) < 0.03


def test_a_view_away_from_the_foreground_is_refused() -> None:
    views = {"ct": volume(head()), "blank": volume(np.zeros((12, 100, 100)), origin=(-500, 0, 0))}
    with pytest.raises(VolumeError, match="does not overlap one of them; use --crop none"):
        plan_stacks(views, recipe(crop="foreground"))


def test_without_contrast_the_whole_image_is_kept() -> None:
    stack = plan_stacks({"ct": volume(np.full((3, 8, 8), 7))}, recipe(crop="foreground"))[0]
    assert stack.box == (0, 0, 8, 8)


# slice choice


@pytest.mark.parametrize(
    ("count", "spacing_mm", "choice", "expected"),
    [
        (5, 1.0, "all", [0, 1, 2, 3, 4]),
        (10, 1.0, "count:2", [2, 7]),
        (9, 1.0, "count:3", [1, 4, 7]),
        (4, 1.0, "count:9", [0, 1, 2, 3]),
        (11, 1.0, "every:5", [0, 5, 10]),
        (10, 1.0, "every:4", [0, 4, 8]),  # centred on 4.5: 0.5, 4.5 and 8.5, halves to even
        (5, 4.0, "every:1", [0, 1, 2, 3, 4]),
        (5, 1.0, "every:100", [2]),
        (1, 1.0, "every:2", [0]),
        (4, 1.0, "every:1e-300", [0, 1, 2, 3]),  # as many points would fill any memory
    ],
)
def test_slices_are_chosen_evenly(count: int, spacing_mm: float, choice: str, expected: list[int]) -> None:
    assert choose_slices(count, spacing_mm, choice).tolist() == expected


@given(
    count=st.integers(1, 400),
    spacing_mm=st.floats(0.1, 10),
    amount=st.floats(0.1, 50),
    kind=st.sampled_from(["e", "c"]),
)
def test_any_choice_gives_distinct_slices_of_the_volume(
    count: int, spacing_mm: float, amount: float, kind: str
) -> None:
    choice = f"every:{amount}" if kind == "e" else f"count:{int(amount) + 1}"
    chosen = choose_slices(count, spacing_mm, choice)
    assert len(chosen) >= 1 and chosen[0] >= 0 and chosen[-1] < count
    assert np.all(np.diff(chosen) > 0)


def test_slice_choices_have_one_spelling() -> None:
    assert [slice_choice_text(text) for text in ("all", "every:5.0", "every:2.50", "count:08")] == [
        "all",
        "every:5",
        "every:2.5",
        "count:8",
    ]


@pytest.mark.parametrize(
    "text", ["", "some", "all:3", "every:0", "every:x", "count:-1", "count:2.5", "every:inf", "count:"]
)
def test_other_slice_choices_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"is unknown; give all, every:MM .* or count:N"):
        slice_choice_text(text)


# windows


def test_presets_are_level_and_width_in_hu() -> None:
    assert WINDOW_PRESETS["lung"] == (-600 - 750, -600 + 750)
    assert WINDOW_PRESETS["brain"] == (0, 80)
    assert all(low < high for low, high in WINDOW_PRESETS.values())
    assert parse_window("soft") == parse_window("range:-150:250")


def test_a_window_maps_its_ends_to_black_and_white() -> None:
    ramp = np.linspace(-2000, 2000, 101, dtype=np.float32).reshape(1, 1, 101).repeat(101, axis=1)
    images, _ = render({"ct": volume(ramp)}, recipe(windows=("lung",), image_size=101))
    shown = images[0, 0, 0].numpy()
    expected = np.clip((ramp[0, 0] + 1350) / 1500, 0, 1)
    np.testing.assert_allclose(shown, expected, atol=1e-6)


def test_windows_have_one_spelling() -> None:
    assert window_texts("lung") == ("lung",)
    assert window_texts("range:-100.0:300,lung, percentile:0.50:99.5") == (
        "range:-100:300",
        "lung",
        "percentile:0.5:99.5",
    )
    assert window_texts(["bone"]) == ("bone",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("lungs", "window 'lungs' is unknown; give one of bone, brain"),
        ("range:1", "is unknown"),
        ("range:a:b", "is unknown"),
        ("range:nan:3", "is unknown"),
        ("range:5:5", "give LOW < HIGH"),
        ("percentile:-1:50", "leaves the percentiles 0 to 100"),
        ("lung,bone", "2 windows given"),
    ],
)
def test_other_windows_are_refused(value: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        window_texts(value)


def test_percentiles_do_not_depend_on_how_much_air_surrounds_the_object() -> None:
    rng = np.random.default_rng(0)
    body = rng.uniform(100, 200, (10, 40, 40))
    tight, roomy = np.zeros((10, 50, 50)), np.zeros((10, 120, 120))
    tight[:, 5:45, 5:45] = roomy[:, 40:80, 40:80] = body
    window = parse_window("percentile:0.5:99.5")
    assert measure_limits(tight, window) == pytest.approx(measure_limits(roomy, window), abs=1)
    assert measure_limits(roomy, window)[1] == pytest.approx(199.5, abs=0.5)


def test_percentiles_follow_the_scale_of_the_image() -> None:
    array = np.random.default_rng(0).gamma(2, 50, (20, 30, 30)).astype(np.float32)
    views, scaled = {"mr": volume(array)}, {"mr": volume(array * 1e4 - 7)}
    options = recipe(windows=("percentile:0.5:99.5",))
    torch.testing.assert_close(render(views, options)[0], render(scaled, options)[0], atol=1e-4, rtol=0)


def test_percentiles_of_large_volumes_are_sampled_without_favouring_columns() -> None:
    array = np.zeros((64, 256, 256), np.uint8)
    array[..., ::2] = 200  # a lattice of even steps would see one kind of column alone
    assert measure_limits(array, parse_window("percentile:10:90")) == (0, 200)


def test_a_constant_volume_is_black_and_blank() -> None:
    images, blank = render({"mr": volume(np.full((3, 9, 9), 7))}, recipe(windows=("percentile:0.5:99.5",)))
    assert float(images.max()) == 0
    assert blank.all()


# channels


def test_three_windows_make_three_channels_of_one_view() -> None:
    ramp = np.linspace(-1500, 1500, 64, dtype=np.float32).reshape(1, 1, 64).repeat(64, axis=1)
    options = recipe(windows=("lung", "soft", "bone"), image_size=64)
    stack = plan_stacks({"ct": volume(ramp)}, options)[0]
    assert (stack.view, stack.sources) == ("ct", ("ct", "ct", "ct"))
    images, _ = render({"ct": volume(ramp)}, options)
    for number, (low, high) in enumerate([(-1350, 150), (-150, 250), (-500, 1300)]):
        expected = np.clip((ramp[0, 0] - low) / (high - low), 0, 1)
        np.testing.assert_allclose(images[0, number, 0].numpy(), expected, atol=1e-6)


def three_views() -> dict[str, Volume]:
    return {name: volume(np.full((2, 8, 8), value, np.float32)) for name, value in (("a", 0.1), ("b", 0.5), ("c", 0.9))}


def test_views_become_channels_in_the_order_asked_for() -> None:
    options = recipe(channels=("c", "a", "b"), image_size=8)
    stacks = plan_stacks(three_views(), options)
    assert [(stack.view, stack.sources) for stack in stacks] == [("c+a+b", ("c", "a", "b"))]
    images, _ = render(three_views(), options)
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([0.9, 0.1, 0.5]))


def test_a_fill_view_stands_for_an_absent_channel_and_keeps_the_name() -> None:
    views = {name: item for name, item in three_views().items() if name != "c"}
    stack = plan_stacks(views, recipe(channels=("a", "b", "c"), fill="b"))[0]
    assert (stack.view, stack.sources) == ("a+b+c", ("a", "b", "b"))


def test_every_channel_may_have_its_own_window() -> None:
    options = recipe(channels=("a", "b", "c"), windows=("range:0:1", "range:0:0.5", "range:0.8:1"), image_size=8)
    images, _ = render(three_views(), options)
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([0.1, 1.0, 0.5]))


def test_one_channel_picks_one_view() -> None:
    stacks = plan_stacks(three_views(), recipe(channels=("b",)))
    assert [(stack.view, stack.sources) for stack in stacks] == [("b", ("b",))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": ("a", "b", "x")}, "case lacks the view x that a channel needs .it has a, b, c"),
        ({"channels": ("a", "b", "x"), "fill": "y"}, "case lacks the view x and the fill y"),
        ({"channels": ("a", "b", "other")}, r"channels a\+b\+other need views on one grid, but a is \(2, 8, 8\)"),
        ({"channels": ("a", "b", "moved")}, "or lies elsewhere"),
    ],
)
def test_channels_that_cannot_be_made_fail_the_case(changes: dict[str, Any], message: str) -> None:
    views = three_views()
    if "x" not in changes["channels"]:
        views["other"] = volume(np.zeros((2, 8, 9)))
        views["moved"] = volume(np.zeros((2, 8, 8)), origin=(0, 3, 0))
    with pytest.raises(VolumeError, match=message):
        plan_stacks(views, recipe(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": ("a", "b")}, "2 channels given .a, b.; give 1 or 3 views"),
        ({"planes": ("oblique",)}, "plane 'oblique' is unknown; give some of axial, coronal, sagittal"),
        ({"crop": "tight"}, "crop 'tight' is unknown; give none or foreground"),
        ({"resize": "fit"}, "resize 'fit' is unknown; give pad or stretch"),
    ],
)
def test_options_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan_stacks(three_views(), recipe(**changes))


# rendering


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32])
def test_a_slab_equals_the_same_slices_of_the_whole_stack(plane: str, dtype: Any) -> None:
    array = np.random.default_rng(0).integers(0, 100, (12, 14, 10)).astype(dtype)
    array.flags.writeable = False
    views, options = {"ct": volume(array)}, recipe(planes=(plane,), windows=("range:0:100",), slices="every:2")
    stack = plan_stacks(views, options)[0]
    whole, blank = render_slices(stack, views, options, 0, len(stack.indices))
    part, part_blank = render_slices(stack, views, options, 1, 4)
    assert whole.dtype == torch.float32 and whole.is_contiguous()
    assert torch.equal(part, whole[1:4]) and torch.equal(part_blank, blank[1:4])
    assert whole.shape == (len(stack.indices), 1, 32, 32)


def test_blank_slices_are_marked_even_where_the_image_is_padded() -> None:
    array = np.full((3, 20, 10), 0.5, np.float32)
    array[1, 8:12, 3:6] = 1
    _, blank = render({"ct": volume(array)}, recipe())
    assert blank.tolist() == [True, False, True]


def test_one_channel_with_content_is_enough() -> None:
    views = three_views()
    shown = np.full((2, 8, 8), 0.5, np.float32)
    shown[0, 2:6, 2:6] = 1
    views["b"] = volume(shown)
    _, blank = render(views, recipe(channels=("a", "b", "c")))
    assert blank.tolist() == [False, True]


def test_previews_are_the_mean_of_the_channels() -> None:
    images = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    previews = render_previews(images, 8)
    assert previews.dtype == torch.uint8
    assert previews.shape == (2, 8, 8)
    assert previews.unique().tolist() == [128]


def test_an_object_of_less_than_a_hundredth_of_the_volume_is_still_found() -> None:
    array = np.zeros((20, 64, 64), np.float32)
    array[4:12, 20:30, 40:46] = 7.0
    assert np.percentile(array, 99) == 0 < np.percentile(array, 99.5)
    extent = foreground_extent(array)
    assert extent == ((4, 12), (20, 30), (40, 46))


# patches and voxels


@pytest.mark.parametrize("plane", PLANES)
def test_a_hot_patch_lands_on_its_voxels(plane: str) -> None:
    shape, spot = (24, 32, 40), (13, 9, 27)
    array = np.zeros(shape, np.float32)
    array[spot[0] - 1 : spot[0] + 2, spot[1] - 1 : spot[1] + 2, spot[2] - 1 : spot[2] + 2] = 1
    views, options = {"ct": volume(array)}, recipe(planes=(plane,), image_size=40)
    stack = plan_stacks(views, options)[0]
    images, _ = render_slices(stack, views, options, 0, len(stack.indices))
    scores = torch.nn.functional.avg_pool2d(images, 4)[:, 0].numpy()  # a backbone with patches of 4 px that sees light
    placed = place_patch_scores(scores, indices=stack.indices, box=stack.box, plane=plane, shape=shape)
    assert placed.dtype == np.float32 and placed.shape == shape and placed.flags.c_contiguous
    peak = np.unravel_index(placed.argmax(), shape)
    assert np.abs(np.array(peak) - spot).max() <= 2
    assert placed.max() > 0.8 * scores.max()
    assert placed[tuple(0 for _ in shape)] == 0


@pytest.mark.parametrize("plane", PLANES)
def test_scores_are_zero_outside_the_box_and_exact_at_patch_centres(plane: str) -> None:
    shape = (30, 30, 30)
    scores = np.random.default_rng(0).random((30, 3, 3)).astype(np.float32) + 1
    placed = cut_slices(
        place_patch_scores(scores, indices=np.arange(30), box=(6, 3, 9, 15), plane=plane, shape=shape), plane
    )
    inside = np.zeros((30, 30), bool)
    inside[6:15, 3:18] = True
    assert (placed[:, ~inside] == 0).all() and (placed[:, inside] >= 1).all()
    np.testing.assert_allclose(placed[:, [7, 10, 13]][:, :, [5, 10, 15]], scores, rtol=1e-5)


def test_skipped_slices_are_interpolated_and_the_ends_are_held() -> None:
    scores = np.array([1.0, 3.0], np.float32).reshape(2, 1, 1)
    placed = place_patch_scores(scores, indices=np.array([2, 6]), box=(0, 0, 4, 4), plane="axial", shape=(9, 4, 4))
    np.testing.assert_allclose(placed[:, 0, 0], [1, 1, 1, 1.5, 2, 2.5, 3, 3, 3])


def test_scores_of_another_image_are_refused() -> None:
    for indices in (np.array([0, 9]), np.array([0]), np.array([], int)):
        with pytest.raises(VolumeError, match="do not fit a volume of 9 slices along their plane"):
            place_patch_scores(np.zeros((2, 2, 2)), indices=indices, box=(0, 0, 4, 4), plane="axial", shape=(9, 4, 4))


@settings(deadline=None)
@given(
    top=st.integers(-6, 6),
    left=st.integers(-6, 6),
    height=st.integers(4, 30),
    width=st.integers(4, 30),
    patches=st.integers(1, 7),
    plane=st.sampled_from(PLANES),
)
def test_cover_adds_up_to_the_mask_within_the_box(
    *, top: int, left: int, height: int, width: int, patches: int, plane: str
) -> None:
    mask = np.random.default_rng(0).random((10, 12, 14)) > 0.7
    images = cut_slices(mask, plane)
    indices = np.array([1, 4, 5])
    cover = measure_patch_cover(mask, indices=indices, box=(top, left, height, width), plane=plane, grid=(patches, 3))
    assert cover.shape == (3, patches, 3) and cover.min() >= 0 and cover.max() <= 1 + 1e-5
    within = images[indices, max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
    area = height * width / (patches * 3)
    np.testing.assert_allclose(cover.sum((1, 2)) * area, within.sum((1, 2)), rtol=1e-4, atol=1e-4)


def test_cover_is_the_share_of_each_patch() -> None:
    mask = np.zeros((1, 8, 8), np.int32)
    mask[0, 0:2, 0:4] = 1
    cover = measure_patch_cover(mask, indices=np.array([0]), box=(-4, 0, 12, 12), plane="axial", grid=(3, 3))
    np.testing.assert_allclose(cover[0], [[0, 0, 0], [0.5, 0, 0], [0, 0, 0]])


def test_image_cover_is_the_share_of_each_part_that_is_image() -> None:
    cover = measure_image_cover((8, 8), box=(-4, 2, 12, 12), grid=(3, 3))
    np.testing.assert_allclose(cover, np.outer([0, 1, 1], [1, 0.5, 0]))
    whole = measure_patch_cover(
        np.ones((1, 8, 8)), indices=np.array([0]), box=(-4, 2, 12, 12), plane="axial", grid=(3, 3)
    )
    np.testing.assert_allclose(cover, whole[0])
    assert frame_image((8, 8), (-4, 2, 12, 12)) == pytest.approx((0, 1 / 3, 0.5, 1))
    assert frame_image((8, 8), (0, 0, 8, 8)) == frame_image((8, 8), (2, 2, 4, 4)) == (0, 0, 1, 1)


# real scans


@pytest.mark.realdata
@pytest.mark.parametrize("plane", PLANES)
def test_a_real_tumour_goes_to_the_patch_grid_and_back(real_data: Path, plane: str) -> None:
    folder = real_data / "sts" / "nifti" / "STS_004"
    scan = read_volume(folder / "CT_image.nii.gz")
    mask = read_mask(folder / "CT_mask.nii.gz", scan) > 0
    options = recipe(planes=(plane,), image_size=224, windows=("soft",), crop="foreground")
    stack = plan_stacks({"CT": scan}, options)[0]
    cover = measure_patch_cover(mask, indices=stack.indices, box=stack.box, plane=plane, grid=(28, 28))
    back = place_patch_scores(cover, indices=stack.indices, box=stack.box, plane=plane, shape=scan.array.shape)
    dice = 2 * (mask & (back > 0.5)).sum() / (mask.sum() + (back > 0.5).sum())
    assert dice > 0.85


@pytest.mark.realdata
def test_real_scans_render_with_contrast_in_every_plane(real_data: Path) -> None:
    folder = real_data / "sts" / "nifti" / "STS_004"
    views = {name: read_volume(folder / f"{name}_image.nii.gz") for name in ("CT", "PET", "MR_T1")}
    options = recipe(
        planes=PLANES, windows=("percentile:0.5:99.5",), image_size=64, slices="count:5", crop="foreground"
    )
    for stack in plan_stacks(views, options):
        images, blank = render_slices(stack, views, options, 0, len(stack.indices))
        assert not blank[2], (stack.view, stack.plane)
        assert 0.05 < float(images[2].mean()) < 0.6, (stack.view, stack.plane)


@pytest.mark.realdata
def test_a_patients_views_on_one_grid_become_channels_of_one_place(real_data: Path) -> None:
    folder = real_data / "lgg" / "volumes"
    views = {name: read_volume(folder / f"TCGA_CS_4942_{name}.nii.gz") for name in ("pre", "flair", "post")}
    options = recipe(
        channels=("pre", "flair", "post"), windows=("percentile:0.5:99.5",), image_size=64, crop="foreground"
    )
    images, _ = render(views, options)
    middle = images[10].flatten(1)
    correlation = torch.corrcoef(middle)
    assert float(correlation.min()) > 0.5  # the same head in all three


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_renders_the_same_images() -> None:
    array = np.random.default_rng(0).integers(0, 1000, (6, 50, 40)).astype(np.uint16)
    views, options = {"mr": volume(array)}, recipe(windows=("range:0:1000",), planes=("sagittal",))
    stack = plan_stacks(views, options)[0]
    here, blank = render_slices(stack, views, options, 0, 6)
    there, there_blank = render_slices(stack, views, options, 0, 6, device="cuda")
    torch.testing.assert_close(there.cpu(), here, atol=1e-5, rtol=0)
    assert torch.equal(there_blank.cpu(), blank)

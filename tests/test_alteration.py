"""Altered copies: what is drawn is drawn alike by all, and what is done to slices is what was drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from embedkit.cli.main import app
from typer.testing import CliRunner

from embedkit import pipeline, sources
from embedkit.alteration import Alteration, alter_slices, draw_alteration, move_slices
from embedkit.cache import Cache, open_cache
from embedkit.errors import OptionError, RecipeError
from embedkit.estimate import estimate_extraction
from embedkit.extraction import ExtractionSummary, extract
from embedkit.volumes import write_volume

NOTHING = Alteration(mirrored=False, degrees=0.0, scale=1.0, shift=(0.0, 0.0), powers=(1.0,))
SIZE = 64


def light_pixel(row: int, column: int) -> torch.Tensor:
    images = torch.zeros(1, 1, SIZE, SIZE)
    images[0, 0, row, column] = 1.0
    return images


def find_pixel(images: torch.Tensor) -> tuple[int, int]:
    return divmod(int(images[0, 0].argmax()), SIZE)


def draw(case_id: str = "a", number: int = 1, *, plane: str = "axial", flips: bool = False) -> Alteration:
    return draw_alteration(case_id, number, plane=plane, sources=("t1", "t2"), flips=flips)


def test_nothing_drawn_leaves_slices_as_they_are() -> None:
    images = torch.rand(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(alter_slices(images, NOTHING), images, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"mirrored": True}, (10, 43)),  # the mirror lies between columns 31 and 32
        ({"degrees": 90.0}, (20, 53)),  # clockwise: from the top to the right
        ({"shift": (0.25, -0.125)}, (26, 12)),  # a quarter of the side down, an eighth to the left
        ({"mirrored": True, "degrees": 90.0}, (43, 53)),  # mirrored first, then turned
        ({"degrees": 90.0, "shift": (0.0, 0.125)}, (20, 61)),  # turned first, then moved
        ({"mirrored": True, "shift": (0.0, 0.125)}, (10, 51)),  # mirrored first, then moved to the right
    ],
)
def test_a_pixel_goes_where_it_was_sent(changes: dict[str, object], place: tuple[int, int]) -> None:
    altered = alter_slices(light_pixel(10, 20), dataclasses.replace(NOTHING, **changes))
    assert find_pixel(altered) == place
    assert altered.max() > 0.99
    assert altered.sum() < 1.01


def test_scaling_is_about_the_middle_and_what_comes_from_outside_is_black() -> None:
    white = torch.ones(1, 1, SIZE, SIZE)
    smaller = move_slices(white, dataclasses.replace(NOTHING, scale=0.5))
    assert smaller[0, 0, 17:47, 17:47].min() == 1.0
    assert smaller[0, 0, :15].max() == smaller[0, 0, :, 49:].max() == 0.0
    assert move_slices(white, dataclasses.replace(NOTHING, scale=2.0)).min() == 1.0


def test_contrast_is_bent_by_a_power_per_channel() -> None:
    grey = torch.full((2, 2, 8, 8), 0.25)
    altered = alter_slices(grey, dataclasses.replace(NOTHING, powers=(0.5, 2.0)))
    torch.testing.assert_close(altered[:, :, 4, 4], torch.tensor([[0.5, 0.0625]] * 2))


def test_draws_are_of_case_and_copy_alone_and_within_bounds() -> None:
    assert draw() == draw()
    assert draw().degrees == pytest.approx(-9.575614671067537, abs=1e-12)  # a cache may be resumed years later
    drawn = [draw(f"case{number % 50}", 1 + number // 50, flips=True) for number in range(200)]
    assert len({each.degrees for each in drawn}) == 200
    degrees, scales = (np.array([getattr(each, name) for each in drawn]) for name in ("degrees", "scale"))
    shifts, powers = np.array([each.shift for each in drawn]), np.log([each.powers for each in drawn])
    for values, most in ((degrees, 10), (scales - 1, 0.1), (shifts[:, 0], 0.1), (shifts[:, 1], 0.1), (powers, 0.25)):
        assert 0.9 * most < np.abs(values).max() <= most
        assert abs(values.mean()) < 0.2 * most
    assert 70 < sum(each.mirrored for each in drawn) < 130


def test_views_of_a_copy_share_its_motion_and_mirroring_is_asked_for() -> None:
    number = next(number for number in range(1, 99) if draw(flips=True, number=number).mirrored)
    sagittal = draw(flips=True, number=number, plane="sagittal")
    assert dataclasses.replace(draw(flips=True, number=number), mirrored=False) == sagittal == draw(number=number)
    one = draw_alteration("a", 1, plane="axial", sources=("t2",), flips=False)
    assert one.powers == draw().powers[1:]
    assert dataclasses.replace(one, powers=()) == dataclasses.replace(draw(), powers=())


# extraction

OPTIONS = {"backbone": "embedkit/scattering", "image_size": 32, "tokens": ["cls", "patch@2"], "preview": 16}
AFFINE = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]])


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Three cases of 5, 3 and 7 slices, the last with two blank ones."""
    generator = np.random.default_rng(0)
    for name, slices, blank in (("a", 5, []), ("b", 3, []), ("c", 7, [0, 6])):
        array = generator.normal(100, 30, (slices, 20, 24)).astype(np.float32)
        array[blank] = 0
        write_volume(tmp_path / f"{name}.nii.gz", array, AFFINE)
    rows = [{"case_id": name, "patient_id": f"p{name}", "path": f"{name}.nii.gz"} for name in "abc"]
    pl.DataFrame(rows).write_csv(tmp_path / "cases.csv")
    return tmp_path / "cases.csv"


def run(manifest: Path, out: Path, **changes: object) -> ExtractionSummary:
    return extract(manifest, out, **{**OPTIONS, "augment": 2, "augment_flip": True, **changes})  # type: ignore[arg-type]


def read_all(cache: Cache) -> dict[str, np.ndarray]:
    rows = cache.stacks.select("stack", "case_id").iter_rows()
    return {f"{case}/{name}": np.array(cache.read(stack, name)) for stack, case in rows for name in cache.token_sets}


def require_equal(one: Path, other: Path) -> None:
    found, expected = read_all(open_cache(one)), read_all(open_cache(other))
    assert found.keys() == expected.keys()
    for name, tokens in expected.items():
        np.testing.assert_array_equal(found[name], tokens, err_msg=name)


def test_copies_are_of_their_case_and_blank_where_it_is(manifest: Path, tmp_path: Path) -> None:
    summary = run(manifest, tmp_path / "copies")
    assert (summary.cases, summary.cases_done, summary.slices, summary.blank_slices) == (3, 3, 30, 4)
    cache = open_cache(tmp_path / "copies")
    assert cache.recipe.augment == "2:flip"
    assert cache.stacks["case_id"].to_list() == ["a#1", "a#2", "b#1", "b#2", "c#1", "c#2"]
    assert cache.stacks["patient_id"].to_list() == ["pa", "pa", "pb", "pb", "pc", "pc"]
    for stack in (4, 5):
        assert cache.slices(stack).blank.tolist() == [True, *[False] * 5, True]
        assert not cache.read(stack, "cls:2")[[0, 6]].any()
    assert not np.array_equal(cache.preview(0), cache.preview(1))


def test_tokens_of_a_copy_are_those_of_its_altered_slices(manifest: Path, tmp_path: Path) -> None:
    from embedkit.backbones import load_backbone
    from embedkit.slices import plan_stacks, render_slices
    from embedkit.volumes import read_volume

    run(manifest, tmp_path / "copies", batch_size=3)
    cache = open_cache(tmp_path / "copies")
    volumes = {"image": read_volume(tmp_path / "a.nii.gz")}
    (stack,) = plan_stacks(volumes, cache.recipe)
    images, _ = render_slices(stack, volumes, cache.recipe, 0, 5)
    backbone = load_backbone("embedkit/scattering", image_size=32)
    for number in (1, 2):
        drawn = draw_alteration("a", number, plane="axial", sources=("image",), flips=True)
        with torch.inference_mode():
            tokens = backbone.forward_layers(alter_slices(images, drawn), [2]).layers[2].summary
        assert tokens is not None
        np.testing.assert_allclose(cache.read(number - 1, "cls:2"), tokens.numpy(), rtol=2e-3, atol=2e-3)


def test_a_case_is_read_and_rendered_once_for_all_copies(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered, read = list[int](), list[Path]()
    render, read_volume = pipeline.render_slices, sources.read_volume

    def render_some(stack, volumes, recipe, start, stop, **how):  # type: ignore[no-untyped-def]
        rendered.append(stop - start)
        return render(stack, volumes, recipe, start, stop, **how)

    def read_one(path, **how):  # type: ignore[no-untyped-def]
        read.append(path.name)
        return read_volume(path, **how)

    monkeypatch.setattr(pipeline, "render_slices", render_some)
    monkeypatch.setattr(sources, "read_volume", read_one)
    run(manifest, tmp_path / "copies", augment=3)
    assert sum(rendered) == 15
    assert sorted(map(str, read)) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    assert open_cache(tmp_path / "copies").stacks["count"].sum() == 45


def test_copies_made_in_parts_and_resumed_are_those_of_one_call(manifest: Path, tmp_path: Path) -> None:
    run(manifest, tmp_path / "whole")
    for part in ("2/2", "1/2"):
        run(manifest, tmp_path / "parts", part=part, batch_size=32)
    require_equal(tmp_path / "parts", tmp_path / "whole")
    shard = min((tmp_path / "parts" / "shards").iterdir())
    shard.unlink()
    again = run(manifest, tmp_path / "parts")
    assert 0 < again.cases_done < 3 and again.cases_before == 3 - again.cases_done
    require_equal(tmp_path / "parts", tmp_path / "whole")
    assert run(manifest, tmp_path / "parts").cases_done == 0


def test_a_changed_file_makes_its_copies_anew_alone(manifest: Path, tmp_path: Path) -> None:
    run(manifest, tmp_path / "copies")
    before = read_all(open_cache(tmp_path / "copies"))
    write_volume(tmp_path / "b.nii.gz", np.random.default_rng(5).normal(100, 30, (3, 20, 24)), AFFINE)
    summary = run(manifest, tmp_path / "copies")
    assert (summary.cases_done, summary.changed) == (1, ("b",))
    after = read_all(open_cache(tmp_path / "copies"))
    for name, tokens in before.items():
        assert np.array_equal(after[name], tokens) == (not name.startswith("b#")), name


def test_a_dry_run_counts_the_slices_of_the_copies(manifest: Path, tmp_path: Path) -> None:
    told = [estimate_extraction(manifest, tmp_path / "new", **{**OPTIONS, "augment": copies}) for copies in (0, 4)]  # type: ignore[arg-type]
    assert [(each.cases, each.slices) for each in told] == [(3, 15), (3, 60)]
    assert told[1].bytes == 4 * told[0].bytes


def test_copies_and_cases_do_not_share_a_cache(manifest: Path, tmp_path: Path) -> None:
    run(manifest, tmp_path / "copies")
    with pytest.raises(RecipeError, match="augment is '2:flip' there and '' here"):
        run(manifest, tmp_path / "copies", augment=0, augment_flip=False)
    with pytest.raises(OptionError, match="augment_flip mirrors altered copies, but none were asked for"):
        run(manifest, tmp_path / "new", augment=0)
    with pytest.raises(OptionError, match="augment is 100 copies of each case, expected 0"):
        run(manifest, tmp_path / "new", augment=100)


def test_the_command_line_makes_copies_and_tells_of_them(manifest: Path, tmp_path: Path) -> None:
    options = ["--backbone", "embedkit/scattering", "--image-size", "32", "--tokens", "cls"]
    asked = ["extract", str(manifest), "-o", str(tmp_path / "copies"), *options, "--augment", "2", "--augment-flip"]
    made = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert made.exit_code == 0 and "3 cases extracted as 2 copies each (30 slices" in made.output
    told = CliRunner().invoke(app, ["info", str(tmp_path / "copies")], catch_exceptions=False)
    assert "these cases are 2 altered copies of each, half of them mirrored" in told.output

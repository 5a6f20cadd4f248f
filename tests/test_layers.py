"""Layers that are mixed: by value, as fits side by side, and what a run tells of their weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from embedkit.cli.main import app
from torch import nn
from typer.testing import CliRunner

from embedkit.bags import Bag, BagShape
from embedkit.cache import Cache, StackTokens, open_cache
from embedkit.errors import HeadError
from embedkit.folder import create_cache, write_shard
from embedkit.layers import LayeredLinear, ViewLinear, first_linear, layer_weights
from embedkit.passes import find_obstacle
from embedkit.plugins import create_head
from embedkit.pooling import join_tokens
from embedkit.recipe import Recipe
from embedkit.runs import open_run
from embedkit.training import train

DIM = 6
SETS = ("patch@2:4", "cls:12", "patch@2:8")
SHAPE = BagShape(
    {"patch@2:4": (4, DIM), "cls:12": (1, DIM), "patch@2:8": (4, DIM), "patch@3:8": (9, DIM), "cls:4": (1, 3)},
    {"patch@2:4": (2, 2), "patch@2:8": (2, 2), "patch@3:8": (3, 3)},
    ("a/axial", "b/axial"),
)
MIXING = ("grid", "conv", "fusion", "gridattention")


def make_bag(sets: tuple[str, ...] = SETS, *, seed: int = 0) -> Bag:
    """Two cases; the second lacks the second view."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(4) < torch.tensor([[4, 2], [3, 0]])[..., None]
    tokens = {name: torch.randn(*mask.shape, *SHAPE.token_sets[name], generator=generator) for name in sets}
    return Bag(tokens, mask, torch.linspace(0, 1, 4).expand(mask.shape), ("c0", "c1"))


def test_layers_of_one_kind_go_through_one_map_by_their_softmax_weights() -> None:
    layer, bag = first_linear(SHAPE, SETS, 5), make_bag()
    assert isinstance(layer, LayeredLinear)
    with torch.no_grad():
        layer.scores[0].copy_(torch.tensor([0.1, -0.05]))
    share = torch.tensor([1.0, -0.5]).softmax(0)
    mixed = share[0] * bag.tokens["patch@2:4"] + share[1] * bag.tokens["patch@2:8"]
    patch_map, cls_map = layer.maps
    expected = mixed @ patch_map.T + bag.tokens["cls:12"] @ cls_map.T + layer.bias
    real = bag.mask
    torch.testing.assert_close(layer(join_tokens(bag, SETS))[real], expected[real])
    assert layer_weights(layer) == pytest.approx({"patch@2:4": float(share[0]), "patch@2:8": float(share[1])})


def test_layers_start_equal_and_what_is_no_second_layer_has_no_weight() -> None:
    assert layer_weights(first_linear(SHAPE, SETS, 5)) == {"patch@2:4": 0.5, "patch@2:8": 0.5}
    assert isinstance(first_linear(SHAPE, ("cls:12", "patch@2:8"), 5), nn.Linear)
    assert isinstance(first_linear(SHAPE, ("cls:12", "cls:4"), 5), nn.Linear)  # 6 and 3 channels cannot be one map's
    assert layer_weights(nn.Linear(2, 2)) == {}
    with pytest.raises(HeadError, match="one head joins only sets on the same grid"):
        first_linear(SHAPE, ("patch@2:8", "patch@3:8"), 5)


@pytest.mark.parametrize("sets", [SETS, ("patch@2:8",)])
def test_views_with_weights_of_their_own_are_mapped_each_by_its_own(sets: tuple[str, ...]) -> None:
    own, bag = first_linear(SHAPE, sets, 5, per_view=True), make_bag(sets)
    joined = join_tokens(bag, sets)
    for view in range(2):
        shared = first_linear(SHAPE, sets, 5)
        state = {name: values if "scores" in name else values[view] for name, values in own.state_dict().items()}
        shared.load_state_dict(state)
        torch.testing.assert_close(own(joined)[:, view], shared(joined)[:, view])


def test_view_linear_takes_any_axes_between_view_and_channel() -> None:
    layer, values = ViewLinear(3, 2, views=2), torch.randn(4, 2, 3)
    expected = torch.stack([values[:, view] @ layer.weight[view].T + layer.bias[view] for view in range(2)], 1)
    torch.testing.assert_close(layer(values), expected)
    torch.testing.assert_close(layer(values[:, :, None, None])[:, :, 0, 0], expected)


@pytest.mark.parametrize("name", MIXING)
def test_a_head_on_layers_is_that_head_on_their_mean_and_can_be_stacked(name: str) -> None:
    sets, bag = ("patch@2:4", "patch@2:8"), make_bag(("patch@2:4", "patch@2:8"))
    torch.manual_seed(0)
    head = create_head(name, SHAPE, sets, 2).eval()
    assert find_obstacle(head, bag) == ""
    (layered,) = (module for module in head.modules() if isinstance(module, LayeredLinear))
    with torch.no_grad():
        layered.scores[0].copy_(torch.tensor([0.03, -0.07]))
    shares = torch.tensor([0.3, -0.7]).softmax(0)
    mean = sum(share * bag.tokens[text] for share, text in zip(shares, sets, strict=True))
    alone = create_head(name, SHAPE, sets[:1], 2).eval()
    renamed = {"maps.0": "weight", "bias": "bias"}
    state = {}
    for key, values in head.state_dict().items():
        place = next((key.removesuffix(old) + new for old, new in renamed.items() if key.endswith(old)), key)
        if "scores" not in key:
            state[place] = values
    alone.load_state_dict(state)
    expected = alone(Bag({sets[0]: mean}, bag.mask, bag.positions, bag.case_ids)).logits
    torch.testing.assert_close(head(bag).logits, expected, rtol=1e-4, atol=1e-5)


def build_cache(folder: Path) -> Cache:
    """Thirty patients; channel 0 of place 0 tells the odd ones, in layer 8 alone."""
    recipe = Recipe("tiny", "builtin:1", ("patch@2:4", "patch@2:8"), 32, (0.5,), (0.5,), preview=0)
    create_cache(folder, recipe)
    generator, stacks = np.random.default_rng(0), []
    for case in range(30):
        tokens = {name: generator.normal(size=(3, 4, DIM)).astype(np.float16) for name in recipe.token_sets}
        tokens["patch@2:8"][:, 0, 0] += 3 * (case % 2)
        stacks.append(
            StackTokens(
                case_id=f"c{case:02}", patient_id=f"p{case:02}", view="t1", plane="axial", sources=("t1",),
                indices=np.arange(3, dtype=np.int32), positions_mm=np.arange(3, dtype=np.float32),
                blank=np.zeros(3, bool), plane_shape=(8, 8), box=(0, 0, 8, 8), source_shape=(3, 8, 8),
                source_affine=np.eye(4), source_bytes=1, source_digest=str(case), tokens=tokens,
            )
        )  # fmt: skip
    write_shard(folder, recipe, stacks)
    return open_cache(folder)


def test_the_layer_that_tells_becomes_the_heavy_one() -> None:
    torch.manual_seed(0)
    sets = ("patch@2:4", "patch@2:8")
    layer, answer = first_linear(SHAPE, sets, 1), torch.arange(400) % 2
    joined = torch.randn(400, 2 * DIM)
    joined[:, DIM] += 2 * answer
    optimiser = torch.optim.AdamW(layer.parameters(), lr=5e-3)
    for _ in range(200):
        optimiser.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(layer(joined)[:, 0], answer.float()).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert layer_weights(layer)["patch@2:8"] > 0.8


def test_a_run_tells_how_heavy_each_layer_is(tmp_path: Path) -> None:
    cache = build_cache(tmp_path / "cache")
    labels = pl.DataFrame({"case_id": [f"c{case:02}" for case in range(30)], "odd": [case % 2 for case in range(30)]})
    labels.write_csv(tmp_path / "labels.csv")
    sets = ["patch@2:4", "patch@2:8"]
    how = {"fit_options": {"epochs": 15, "batch_size": 8, "learning_rate": 5e-2}, "folds": 2, "resamples": 20}
    run = train(cache, labels, targets=["odd"], heads=["grid"], token_sets={"grid": sets}, out=tmp_path / "a", **how)  # type: ignore[arg-type]
    (grid,) = (each for each in run.runs if each.head == "grid")
    for member in grid.record.members:
        assert set(member["layer_weights"]) == set(sets)
        assert sum(member["layer_weights"].values()) == pytest.approx(1, abs=1e-3)
    for member, told in zip(grid.members, grid.record.members, strict=True):
        assert layer_weights(member.head) == pytest.approx(told["layer_weights"], abs=1e-4)
    (note,) = (text for text in grid.record.notes if "weighs its layers" in text)
    mean = {name: np.mean([each["layer_weights"][name] for each in grid.record.members]) for name in sets}
    first = max(mean, key=lambda name: mean[name])
    assert note.startswith(f"grid weighs its layers {first} {mean[first]:.2f} [") and note.endswith("over its members")
    assert not any("layer_weights" in member for each in run.runs if each is not grid for member in each.record.members)
    written = json.loads((grid.path / "run.json").read_text())
    assert written["members"][0]["layer_weights"] == grid.record.members[0]["layer_weights"]
    again = open_run(grid.path).members[0].head.state_dict()
    assert all(torch.equal(values, again[name]) for name, values in grid.members[0].head.state_dict().items())


def test_train_prints_the_weights_of_layers(tmp_path: Path) -> None:
    cache = build_cache(tmp_path / "cache")
    labels = pl.DataFrame({"case_id": [f"c{case:02}" for case in range(30)], "odd": [case % 2 for case in range(30)]})
    labels.write_csv(tmp_path / "labels.csv")
    given = ["train", str(cache.path), "--labels", str(tmp_path / "labels.csv"), "--target", "odd", "--folds", "2"]
    given += ["--head", "conv", "--tokens", "patch@2:4,patch@2:8", "-o", str(tmp_path / "runs")]
    answer = CliRunner().invoke(app, given)
    assert answer.exit_code == 0, answer.output
    assert "note: conv weighs its layers patch@2:" in answer.output

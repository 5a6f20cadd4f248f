"""Views of a case: joined early or late, missing or dropped at random, and chosen for a training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import torch
from embedkit.cli.main import app
from torch import Tensor, nn
from typer.testing import CliRunner

from embedkit.augmentation import drop_views
from embedkit.bags import Bag, BagShape
from embedkit.cache import Cache, StackTokens, open_cache
from embedkit.errors import CacheError, HeadError, OptionError, RunError
from embedkit.fitting import FitOptions
from embedkit.folder import create_cache, write_shard
from embedkit.passes import find_obstacle
from embedkit.plugins import create_head
from embedkit.pooling import masked_max, masked_mean
from embedkit.recipe import Recipe
from embedkit.runs import Run, open_run, predict
from embedkit.training import train
from embedkit.viewfusion import merge_shape, merge_views

DIM = 4
SETS = ("patch@2:1",)
SHAPE = BagShape({"patch@2:1": (4, DIM)}, {"patch@2:1": (2, 2)}, ("a/axial", "b/axial", "b/coronal"))
PLACED = ("grid", "conv", "fusion")
WAYS = [(name, way) for name in PLACED for way in ("joint", "late", "early")]
WAYS += [(name, way) for name in ("query", "abmil") for way in ("late", "early")]
MISSING = [[3, 2, 4], [1, 0, 2], [0, 3, 0]]


def make_bag(lengths: list[list[int]] = MISSING, *, slices: int = 4) -> Bag:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(slices) < torch.tensor(lengths)[..., None]
    tokens = {"patch@2:1": torch.randn(*mask.shape, 4, DIM, generator=generator)}
    ids = tuple(f"c{number}" for number in range(len(lengths)))
    return Bag(tokens, mask, torch.linspace(0, 1, slices).expand(mask.shape), ids)


def make_head(name: str, way: str, *, shape: BagShape = SHAPE) -> nn.Module:
    """In evaluation, with random numbers in place of what starts at zero."""
    torch.manual_seed(0)
    head = create_head(name, shape, SETS, 2, options={"views": way}).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.5)
    return head


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_a_missing_view_may_hold_anything_and_fits_can_be_stacked(name: str, way: str) -> None:
    head, bag = make_head(name, way), make_bag()
    dirty = dataclasses.replace(
        bag, tokens={key: each.masked_fill(~bag.mask[..., None, None], 99.0) for key, each in bag.tokens.items()}
    )
    assert torch.equal(head(dirty).logits, head(bag).logits)
    assert find_obstacle(head, bag) == ""


@pytest.mark.parametrize(("name", "way"), [each for each in WAYS if each[0] != "conv"])
def test_evidence_adds_up_whichever_way_views_are_joined(name: str, way: str) -> None:
    head, bag = make_head(name, way), make_bag()
    evidence = cast(Any, head).evidence(bag, 1)
    assert evidence.shape == (*bag.mask.shape, 4) and (evidence[~bag.mask] == 0).all()
    rest = head(bag).logits[:, 1] - evidence.sum((1, 2, 3))
    if way == "joint" and name == "grid":  # the average of a view that is missing is missing too
        average = dataclasses.replace(bag, tokens={key: each * 0 for key, each in bag.tokens.items()})
        rest = rest - head(average).logits[:, 1]
    if way == "late" and name == "grid":  # what average tokens give depends on how heavy each view is
        shares = _weigh(head, bag)
        found = cast(Any, head).network(torch.zeros(1, 3, 1, 1, DIM))
        average = torch.cat([found, found], -1)[:, :, 0].expand(-1, -1, 4, -1).reshape(1, 3, -1)
        rest = rest - (shares[..., None] * average).sum(1) @ cast(Any, head).classify.weight[1]
    torch.testing.assert_close(rest, rest[:1].expand(3), rtol=0, atol=1e-4)


def _weigh(head: nn.Module, bag: Bag) -> Tensor:
    grid, mask = cast(Any, head), bag.mask[..., None, None]
    features = grid.network(bag.tokens["patch@2:1"])
    pooled = torch.cat([masked_mean(features, mask, 2), masked_max(features, mask, 2)], -1)
    shares: Tensor = grid.fuse.weigh(pooled, bag.mask.any(2))
    return shares


@pytest.mark.parametrize("name", ["grid", "fusion", "query", "abmil"])
def test_early_is_the_head_on_one_view_that_holds_all_slices(name: str) -> None:
    early, bag = make_head(name, "early"), make_bag()
    alone = make_head(name, "joint" if name in PLACED else "late", shape=merge_shape(SHAPE))
    alone.load_state_dict(early.state_dict())
    torch.testing.assert_close(early(bag).logits, alone(merge_views(bag)).logits)
    order = [2, 0, 1]
    turned = dataclasses.replace(
        bag, tokens={key: each[:, order] for key, each in bag.tokens.items()}, mask=bag.mask[:, order]
    )
    torch.testing.assert_close(early(turned).logits, early(bag).logits)


@pytest.mark.parametrize("name", ["conv", "abmil"])
def test_early_answers_alike_whichever_view_slices_come_in(name: str) -> None:
    early, bag = make_head(name, "early"), make_bag()
    order = [2, 0, 1]
    turned = {key: each[:, order] for key, each in bag.tokens.items()}
    found = early(dataclasses.replace(bag, tokens=turned, mask=bag.mask[:, order])).logits
    torch.testing.assert_close(found, early(bag).logits)


def test_an_early_convolution_never_reaches_from_one_view_into_another() -> None:
    shape = BagShape(SHAPE.token_sets, SHAPE.grids, SHAPE.views[:2])
    head, bag = cast(Any, make_head("conv", "early", shape=shape)), make_bag([[2, 1]])
    apart = {key: torch.cat([each[:, :1], each[:, 1:] * 3], 1) for key, each in bag.tokens.items()}
    volumes = []
    for tokens in (bag.tokens, apart):
        head.blocks[0].register_forward_hook(lambda *args: volumes.append(args[2]))
        head(dataclasses.replace(bag, tokens=tokens))
    assert torch.equal(volumes[0][:, 0], volumes[-1][:, 0]) and not torch.equal(volumes[0][:, 1], volumes[-1][:, 1])


def test_late_grid_pools_by_a_query_what_each_views_own_network_found() -> None:
    head, bag = cast(Any, make_head("grid", "late")), make_bag([[3, 2, 0]])
    _, first, gelu, _, second = head.network
    vectors = []
    for view, count in ((0, 3), (1, 2)):
        tokens = bag.tokens["patch@2:1"][0, view, :count]
        hidden = gelu(tokens @ first.weight[view].T + first.bias[view])
        found = hidden @ second.weight[view].T + second.bias[view]
        vectors.append(torch.cat([found.mean(0), found.amax(0)], -1).flatten())
    stacked = torch.stack(vectors)
    shares = (stacked @ head.fuse.query.query / stacked.shape[1] ** 0.5).softmax(0)
    torch.testing.assert_close(head(bag).embedding[0], shares @ stacked)


@pytest.mark.parametrize(("name", "known"), [("conv", "joint, late or early"), ("query", "late or early")])
def test_an_unknown_way_to_join_views_is_refused(name: str, known: str) -> None:
    with pytest.raises(HeadError, match=f"option views of head '{name}' is 'middle', expected {known}"):
        create_head(name, SHAPE, SETS, 2, options={"views": "middle"})


def test_views_are_dropped_at_the_rate_but_never_the_last_one() -> None:
    torch.manual_seed(0)
    bag = make_bag(MISSING * 400)
    dropped = drop_views(bag, 0.3)
    before, after = bag.mask.any(2), dropped.mask.any(2)
    assert not (after & ~before).any() and after.any(1).all()
    assert torch.equal(dropped.mask, bag.mask & after[..., None])
    full, two = after[0::3].float(), after[1::3].float()
    assert torch.equal(after[2::3], before[2::3])
    assert abs(float(full.mean()) - (0.7 + 0.3**3 / 3)) < 0.04
    assert abs(float(two[:, [0, 2]].mean()) - (0.7 + 0.3**2 / 2)) < 0.04
    assert torch.equal(drop_views(bag, 0.0).mask, bag.mask)


def test_merged_views_keep_their_masks() -> None:
    bag = make_bag()
    bag = dataclasses.replace(bag, cover=bag.positions[..., None].expand(-1, -1, -1, 4))
    merged = merge_views(bag)
    assert merged.cover is not None and merged.cover.shape == (3, 1, 12, 4)
    assert torch.equal(merged.cover[..., 0], merged.positions)


def test_batches_side_by_side_lose_the_same_views() -> None:
    torch.manual_seed(1)
    once = [[2, 2, 2]] * 20
    after = drop_views(make_bag(once * 3), 0.5, rows=3).mask.any(2).view(3, 20, 3)
    assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2]) and not after.all()


def build_cache(folder: Path) -> Cache:
    """Thirty patients; odd ones have a high channel 0 in views a and b; every fifth lacks b, c tells nothing."""
    recipe = Recipe("tiny", "builtin:1", SETS, 32, (0.5,), (0.5,), preview=0)
    create_cache(folder, recipe)
    generator, stacks = np.random.default_rng(0), []
    for case in range(30):
        for view in ("a", "b", "c") if case % 5 else ("a", "c"):
            tokens = generator.normal(size=(3, 4, DIM)).astype(np.float16)
            tokens[..., 0] += 2 * (case % 2) * (view != "c")
            stacks.append(
                StackTokens(
                    case_id=f"c{case:02}", patient_id=f"p{case:02}", view=view, plane="axial", sources=(view,),
                    indices=np.arange(3, dtype=np.int32), positions_mm=np.arange(3, dtype=np.float32),
                    blank=np.zeros(3, bool), plane_shape=(8, 8), box=(0, 0, 8, 8), source_shape=(3, 8, 8),
                    source_affine=np.eye(4), source_bytes=1, source_digest=f"{case}{view}", tokens={SETS[0]: tokens},
                )
            )  # fmt: skip
    write_shard(folder, recipe, stacks)
    return open_cache(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return build_cache(tmp_path_factory.mktemp("views") / "cache")


LABELS = pl.DataFrame({"case_id": [f"c{case:02}" for case in range(30)], "odd": [case % 2 for case in range(30)]})


def fit_grid(cache: Cache, out: Path, **options: Any) -> Run:
    how = {"epochs": 10, "batch_size": 8, "learning_rate": 2e-2} | options.pop("fit", {})
    settings: dict[str, Any] = {"heads": ["grid"], "folds": 2, "resamples": 20, "fit_options": how, "device": "cpu"}
    trained = train(cache, LABELS, targets=["odd"], out=out, **settings | options)
    return next(run for run in trained.runs if run.head == "grid")


@pytest.mark.parametrize("way", ["joint", "late", "early"])
def test_a_head_trained_with_view_dropout_still_knows_cases_with_one_view(
    cache: Cache, tmp_path: Path, way: str
) -> None:
    run = fit_grid(cache, tmp_path, head_options={"grid": {"views": way}}, fit={"view_dropout": 0.3})
    assert run.record.fit_options["view_dropout"] == 0.3
    assert run.metrics["auroc"].value > 0.9
    for view in ("a", "b"):
        scores = predict(run, cache.only_views([view])).join(LABELS, on="case_id")
        odd, even = (scores.filter(pl.col("odd") == value)["score"].mean() for value in (1, 0))
        assert cast(float, odd) > cast(float, even) + 0.1


def test_training_on_one_view_is_training_on_a_cache_of_that_view(cache: Cache, tmp_path: Path) -> None:
    run = fit_grid(cache, tmp_path, views=["b"])
    assert run.record.views == ("b/axial",)
    assert len(run.predictions) == 24  # six lack it
    assert run.metrics["auroc"].value > 0.9
    chance = fit_grid(cache, tmp_path / "c", views=["c/axial"])
    assert chance.metrics["auroc"].value < 0.8
    again = predict(open_run(run.path), cache)
    assert again.equals(predict(run, cache.only_views(["b"])).select(again.columns)) or len(again) > 24
    with pytest.raises(RunError, match="was trained with views"):
        fit_grid(cache, tmp_path, views=["a", "b"], resume=True)


def test_only_views_numbers_the_stacks_that_are_left(cache: Cache) -> None:
    chosen = cache.only_views(["b"])
    assert len(chosen) == 24 and chosen.stacks["stack"].to_list() == list(range(24))
    for stack, case_id in chosen.stacks.select("stack", "case_id").iter_rows():
        (whole,) = cache.stacks.filter((pl.col("case_id") == case_id) & (pl.col("view") == "b"))["stack"]
        assert np.array_equal(chosen.read(stack, SETS[0]), cache.read(whole, SETS[0]))
        assert chosen.record(stack).view == "b" and chosen.record(stack).case_id == case_id
    assert len(cache) == 84
    with pytest.raises(CacheError, match=r"has no view t1; it holds a/axial, b/axial, c/axial. Choose some"):
        cache.only_views(["a", "t1"])


def test_a_view_dropout_that_means_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match=r"view_dropout is 1\.0, expected from 0 to below 1"):
        FitOptions(view_dropout=1.0)


def test_train_takes_views_and_their_dropout_on_the_command_line(cache: Cache, tmp_path: Path) -> None:
    LABELS.write_csv(tmp_path / "labels.csv")
    given = ["train", str(cache.path), "--labels", str(tmp_path / "labels.csv"), "--target", "odd", "--folds", "2"]
    given += ["--head", "query", "--views", "a,b", "--view-dropout", "0.2", "-o", str(tmp_path / "runs")]
    answer = CliRunner().invoke(app, given)
    assert answer.exit_code == 0, answer.output
    run = open_run(tmp_path / "runs" / "odd.query")
    assert run.record.views == ("a/axial", "b/axial") and run.record.fit_options["view_dropout"] == 0.2

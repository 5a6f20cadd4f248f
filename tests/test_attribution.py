"""Attribution by value: linear heads on which all methods agree, blocks that cover every token once, shuffled heads."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from embedkit import attribution
from embedkit.attribution import METHODS, mean_scores, randomise_member, score_tokens
from embedkit.bags import Bag, BagShape
from embedkit.errors import HeadError, OptionError
from embedkit.members import Member, build_member, fitted_tensors
from embedkit.tails import Tail, TailShape
from embedkit.vit import VitBackbone

DIM, PATCHES = 5, 16
SHAPE = BagShape({"patch@4:1": (PATCHES, DIM)}, {"patch@4:1": (4, 4)}, ("a/axial", "b/axial"))


def make_bag(lengths: list[list[int]], shape: BagShape = SHAPE, *, tail: Tail | None = None) -> Bag:
    """Random tokens; ``lengths`` holds the real slices of each case and view."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor(lengths)
    mask = torch.arange(4) < counts[..., None]
    tokens = {name: torch.randn(*mask.shape, *size, generator=generator) for name, size in shape.token_sets.items()}
    return Bag(tokens, mask, torch.zeros(mask.shape), tuple(f"c{case}" for case in range(len(lengths))), tail=tail)


def make_member(head: str, shape: BagShape = SHAPE, *, spread: float = 1.0, **options: Any) -> Member:
    """A head whose every fitted number is random, ``spread`` being their deviation."""
    torch.manual_seed(0)
    member = build_member(head, shape, outputs=2, kind="multiclass", options=options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in fitted_tensors(member):
            values.copy_(spread * torch.randn(values.shape, generator=generator))
        member.sharpness.fill_(2.0)
    return member.requires_grad_(False)


BAG = make_bag([[3, 4], [2, 0]])


@pytest.mark.parametrize("method", ["gradient", "occlusion"])
def test_on_a_linear_head_every_method_tells_what_a_token_adds(method: Any) -> None:
    member = make_member("linear")
    weight = cast(Any, member.head).weight[:, 1]
    present = BAG.mask.any(2).sum(1)[:, None, None, None]
    counts = BAG.mask.sum(2).clamp(min=1)[..., None, None] * PATCHES * present
    expected = 2 * torch.einsum("bvspd,vd->bvsp", BAG.tokens["patch@4:1"], weight) / counts
    expected = expected.masked_fill(~BAG.mask[..., None], 0)
    torch.testing.assert_close(score_tokens(member, BAG, 1), expected)
    torch.testing.assert_close(score_tokens(member, BAG, 1, method=method), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_without_an_account_of_the_head_contributions_sum_to_what_the_logit_gains_over_average_tokens(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attribution, "_STEPS", 100)  # heads of random numbers are rougher than trained ones
    member = make_member(name, spread=0.3, dropout=0.0)
    assert not hasattr(member.head, "evidence")
    found = score_tokens(member, BAG, 1)
    average = dataclasses.replace(BAG, tokens={key: torch.zeros_like(each) for key, each in BAG.tokens.items()})
    with torch.no_grad():
        gained = (member(BAG).logits - member(average).logits)[:, 1]
    torch.testing.assert_close(found.sum((1, 2, 3)), gained, rtol=0.02, atol=0.02)
    assert (found[~BAG.mask] == 0).all()
    assert not torch.allclose(found, score_tokens(member, BAG, 1, method="gradient"), rtol=0.1)


def test_without_standardisation_the_average_token_is_that_of_the_case() -> None:
    member = make_member("raptor")
    moved = dataclasses.replace(BAG, tokens={"patch@4:1": BAG.tokens["patch@4:1"] + 100})
    for bag in (BAG, moved):
        tokens = bag.tokens["patch@4:1"][1, 0, :2]
        readout = cast(Any, member.head).readout
        weight = (readout.weight[0] * readout.scale).view(2, PATCHES, -1)[0] @ cast(Any, member.head).projection.T
        expected = 2 * torch.einsum("spd,pd->sp", tokens - tokens.mean((0, 1)), weight) / 2
        found = score_tokens(member, bag, 0, method="occlusion")[1, 0, :2]
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_occlusion_is_the_fall_of_the_logit_of_a_maximum_that_gradients_share_otherwise() -> None:
    member = make_member("grid", dropout=0.0)
    case = make_bag([[3, 2]])
    found = score_tokens(member, case, 0, method="occlusion")
    with torch.no_grad():
        for view, row, patch in ((0, 2, 5), (1, 0, 15)):
            tokens = case.tokens["patch@4:1"].clone()
            tokens[0, view, row, patch] = 0
            fall = (
                member(case).logits[0, 0] - member(dataclasses.replace(case, tokens={"patch@4:1": tokens})).logits[0, 0]
            )
            torch.testing.assert_close(found[0, view, row, patch], fall, rtol=1e-3, atol=1e-4)
    assert (found[~case.mask] == 0).all()


@pytest.mark.parametrize("most", [1, 7, 40, 1000])
def test_blocks_hold_every_real_token_once_and_stay_within_their_number(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attribution, "_MOST_BLOCKS", most)
    member, case = make_member("linear"), make_bag([[3, 2]])
    exact = score_tokens(member, case, 0)
    seen: list[Bag] = []
    monkeypatch.setattr(type(member.head), "forward", _watch(type(member.head).forward, seen))
    found = score_tokens(member, case, 0, method="occlusion")
    blocks = sum(len(bag) for bag in seen) - 1
    assert blocks <= max(most, 2)
    torch.testing.assert_close(found.sum((2, 3)), exact.sum((2, 3)), rtol=1e-3, atol=1e-3)
    if most == 1000:
        assert blocks == 5 * PATCHES
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)


def _watch(forward: Any, seen: list[Bag]) -> Any:
    def watched(head: Any, bag: Bag) -> Any:
        seen.append(bag)
        return forward(head, bag)

    return watched


def test_attention_is_the_heads_own_where_it_attends_to_patches() -> None:
    member = make_member("query")
    scores = score_tokens(member, BAG, 0, method="attention")
    expected = member.head(member.prepare(BAG)).token_attention
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(scores.sum((2, 3)), BAG.mask.any(2).float())


def test_slice_attention_is_shared_out_by_what_speaks_for_the_logit() -> None:
    member, bag = make_member("gru"), BAG
    scores = score_tokens(member, bag, 0, method="attention")
    attention = member.head(member.prepare(bag)).slice_attention
    positive = score_tokens(member, bag, 0).clamp(min=0)
    some = positive.sum(3) > 0
    torch.testing.assert_close(scores.sum(3)[some], attention[some])
    share = positive / positive.sum(3, keepdim=True)
    torch.testing.assert_close(scores[some], (attention[..., None] * share)[some])
    slices = BagShape({"cls:1": (1, DIM)}, {}, SHAPE.views)
    member, bag = make_member("gru", slices), make_bag([[3, 4]], slices)
    torch.testing.assert_close(
        score_tokens(member, bag, 0, method="attention")[..., 0], member.head(member.prepare(bag)).slice_attention
    )


def test_a_head_without_attention_has_none_to_show() -> None:
    with pytest.raises(HeadError, match=r"'grid' weighs neither slices nor patches .* choose another method \(contrib"):
        score_tokens(make_member("grid"), BAG, 0, method="attention")


def test_rows_of_the_backbone_are_weighed_by_slices_and_blind_to_the_class() -> None:
    rows = torch.rand(2, 2, 4, 9)
    found = score_tokens(make_member("query"), BAG, 0, method="backbone", rows=rows)
    attention = make_member("query").head(BAG).slice_attention
    torch.testing.assert_close(found, attention[..., None] * rows)
    assert torch.equal(found, score_tokens(make_member("query"), BAG, 1, method="backbone", rows=rows))
    plain = score_tokens(make_member("grid"), BAG, 0, method="backbone", rows=rows)
    torch.testing.assert_close(plain[0, 0, :3], rows[0, 0, :3] / 3)
    assert (plain[0, 0, 3] == 0).all()
    with pytest.raises(OptionError, match="needs the rows of the token set attention"):
        score_tokens(make_member("query"), BAG, 0, method="backbone")


def test_an_unknown_method_is_refused_by_the_known_ones() -> None:
    with pytest.raises(OptionError, match=f"no method 'magic'.*{', '.join(METHODS)}"):
        score_tokens(make_member("grid"), BAG, 0, method=cast(Any, "magic"))


def test_cut_tokens_are_scored_by_patch_without_the_class_token(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=2, embed_dim=6, depth=2, num_heads=2, num_classes=0)
    model.eval().requires_grad_(False)
    linears = tuple((name, *value.shape) for name, value in model.blocks[1].named_parameters() if value.ndim == 2)
    backbone = VitBackbone(model, name="tiny", weights="", mean=(0.5,), std=(0.5,))
    shape = BagShape({"cut:1": (17, 6)}, {}, ("a/axial",), TailShape(1, 2, 6, 1, 1, (4, 4), linears))
    bag = make_bag([[3]], shape, tail=Tail(cast(TailShape, shape.tail), backbone))
    member = make_member("tail", shape, grid=2, dropout=0.0)
    found = score_tokens(member, bag, 0, method="occlusion")
    assert found.shape == (1, 1, 4, 16)
    tokens = bag.tokens["cut:1"].clone()
    tokens[0, 0, 1, 1 + 7] = bag.tokens["cut:1"][0, 0, :3, 1:].mean((0, 1))
    with torch.no_grad():
        fall = member(bag).logits[0, 0] - member(dataclasses.replace(bag, tokens={"cut:1": tokens})).logits[0, 0]
    torch.testing.assert_close(found[0, 0, 1, 7], fall, rtol=1e-3, atol=1e-4)
    assert score_tokens(member, bag, 0, method="gradient").shape == found.shape
    tokens, member = bag.tokens["cut:1"], make_member("tail", shape, spread=0.2, grid=2, dropout=0.0)
    average = tokens.clone()
    average[0, 0, :3, 1:] = tokens[0, 0, :3, 1:].mean((0, 1))
    with torch.no_grad():
        gained = member(bag).logits[0, 0] - member(dataclasses.replace(bag, tokens={"cut:1": average})).logits[0, 0]
    monkeypatch.setattr(attribution, "_STEPS", 100)
    torch.testing.assert_close(score_tokens(member, bag, 0).sum(), gained, rtol=0.02, atol=0.02)


def test_shuffled_heads_hold_the_same_numbers_in_another_order() -> None:
    for name in ("grid", "raptor"):
        member = make_member(name)
        other = randomise_member(member, seed=3)
        for mine, theirs in zip(fitted_tensors(member), fitted_tensors(other), strict=True):
            assert torch.equal(mine.flatten().sort().values, theirs.flatten().sort().values)
        assert not torch.equal(score_tokens(member, BAG, 0), score_tokens(other, BAG, 0))
        again = randomise_member(member, seed=3)
        assert torch.equal(score_tokens(again, BAG, 0), score_tokens(other, BAG, 0))


def test_the_mean_of_scores_lies_on_the_finest_grid_and_keeps_every_slice_s_sum() -> None:
    fine, coarse = torch.rand(1, 1, 2, 16), torch.rand(1, 1, 2, 4)
    mean = mean_scores([fine, coarse])
    torch.testing.assert_close(mean.sum(3), (fine.sum(3) + coarse.sum(3)) / 2)
    torch.testing.assert_close(mean[0, 0, 0, 0], fine[0, 0, 0, 0] / 2 + coarse[0, 0, 0, 0] / 8)
    long = torch.rand(2, 1, 1, 3, 12)
    torch.testing.assert_close(mean_scores(list(long)), long.mean(0))

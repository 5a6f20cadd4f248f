"""Token sets: reading requests, what each backbone has, pooling by value."""

from __future__ import annotations

import pytest
import torch

from embedkit.errors import OptionError
from embedkit.features import BackboneInfo, BackboneOutput, LayerTokens
from embedkit.recipe import TokenSet
from embedkit.tokens import compute_token_sets, needs_attention, required_layers, resolve_token_sets, token_shape

VIT = BackboneInfo(
    name="vit",
    weights="sha256:0",
    image_size=64,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    depth=4,
    dims=(6,) * 4,
    grids=((4, 4),) * 4,
    class_tokens=1,
    register_tokens=2,
    attention_heads=3,
    summary="class token",
    summary_layers=(1, 2, 3, 4),
    has_tail=True,
)
POOLED = BackboneInfo(
    name="pooled",
    weights="sha256:0",
    image_size=64,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    depth=2,
    dims=(8, 16),
    grids=((8, 8), (4, 4)),
    summary="attention pool",
    summary_layers=(2,),
)


def resolve(
    *tokens: str, info: BackboneInfo = VIT, layers: list[int] | None = None, cut: int | None = None
) -> list[str]:
    return [str(item) for item in resolve_token_sets(tokens, layers=layers, cut=cut, info=info)]


def test_tokens_without_a_layer_come_from_the_last_one_but_patches_from_two_thirds_of_the_depth() -> None:
    assert resolve("cls", "patch", "attention") == ["attention:4", "cls:4", "patch:3"]


def test_layers_count_from_either_end_and_spread_over_entries_that_name_none() -> None:
    assert resolve("cls", "patch@2", layers=[-1, 2]) == ["cls:2", "cls:4", "patch@2:2", "patch@2:4"]
    assert resolve("cls:-2", "patch@2:1", layers=[4]) == ["cls:3", "patch@2:1"]


def test_attention_is_always_the_last_blocks() -> None:
    assert resolve("attention", layers=[1, 2]) == ["attention:4"]


def test_a_cut_names_the_block_that_its_tokens_leave() -> None:
    assert resolve("cls", cut=3) == ["cls:4", "cut:1"]
    assert resolve("cut:2") == ["cut:2"]
    assert resolve("cls", cut=0) == ["cls:4"]


def test_a_request_twice_is_one_token_set() -> None:
    assert resolve("cls", "cls:4", "cls:-1") == ["cls:4"]


@pytest.mark.parametrize(
    ("tokens", "layers", "cut", "message"),
    [
        (("clas",), None, None, "token set 'clas' is unknown; give cls, patch"),
        (("patch@0",), None, None, "pools to a grid of 0"),
        (("patch@5",), None, None, "vit at image size 64 has only 4 x 4 patches"),
        (("cls@2",), None, None, "only patch tokens are pooled"),
        (("cls",), [5], None, "vit has no layer 5; its layers are 1 to 4, or -4 to -1"),
        (("cls:0",), None, None, "vit has no layer 0"),
        (("cls",), [-5], None, "vit has no layer -5"),
        (("attention:2",), None, None, "only the last block, 4, has it"),
        (("cls",), None, 4, "cut 4 asks for the tokens that enter the last 4 of 4 layers of vit; give 1 to 3"),
        (("cut:4",), None, None, "cut:4 leaves no block after it; give a layer from 1 to 3"),
        ((), None, None, "no token set asked for"),
    ],
)
def test_requests_that_mean_nothing_are_refused(
    tokens: tuple[str, ...], layers: list[int] | None, cut: int | None, message: str
) -> None:
    with pytest.raises(OptionError) as caught:
        resolve_token_sets(tokens, layers=layers, cut=cut, info=VIT)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "cut", "message"),
    [
        (("cls:1",), None, "pooled has no cls at layer 1: its cls is an attention pool, which only layer 2 has"),
        (("attention",), None, "pooled gives no attention: it has no class token"),
        (("patch",), 1, "pooled has no cut tokens"),
    ],
)
def test_what_a_backbone_lacks_is_refused(tokens: tuple[str, ...], cut: int | None, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        resolve_token_sets(tokens, cut=cut, info=POOLED)
    assert message in str(caught.value)


def test_shapes_follow_the_layer() -> None:
    assert token_shape(TokenSet("cls", 2), VIT) == (6,)
    assert token_shape(TokenSet("patch", 2), VIT) == (16, 6)
    assert token_shape(TokenSet("patch", 2, 2), VIT) == (4, 6)
    assert token_shape(TokenSet("attention", 4), VIT) == (3, 16)
    assert token_shape(TokenSet("cut", 1), VIT) == (1 + 2 + 16, 6)
    assert token_shape(TokenSet("patch", 1), POOLED) == (64, 8)


def test_required_layers_leave_attention_to_its_own_flag() -> None:
    kept = (TokenSet("attention", 4), TokenSet("cut", 1), TokenSet("cls", 3), TokenSet("patch", 3))
    assert required_layers(kept) == (1, 3)
    assert needs_attention(kept)
    assert not needs_attention(kept[1:])


def test_tokens_are_picked_and_pooled_by_place() -> None:
    patches = torch.arange(2 * 16 * 6, dtype=torch.float32).view(2, 16, 6)
    sequence = torch.randn(2, 19, 6)
    output = BackboneOutput({4: LayerTokens(sequence[:, 0], patches, sequence)}, attention=torch.rand(2, 3, 16))
    kept = [
        TokenSet("cls", 4),
        TokenSet("patch", 4),
        TokenSet("patch", 4, 2),
        TokenSet("cut", 4),
        TokenSet("attention", 4),
    ]
    tokens = compute_token_sets(output, kept, VIT)
    assert tokens["cls:4"] is output.layers[4].summary
    assert tokens["patch:4"] is patches
    assert tokens["cut:4"] is sequence
    assert tokens["attention:4"] is output.attention
    top_right = patches[:, [2, 3, 6, 7]].mean(1)  # rows 0 and 1, columns 2 and 3 of the 4 x 4 grid
    torch.testing.assert_close(tokens["patch@2:4"][:, 1], top_right)
    for item in kept:
        assert tuple(tokens[str(item)].shape[1:]) == token_shape(item, VIT)


def test_pooling_to_one_place_is_the_mean_and_runs_in_float32() -> None:
    patches = torch.full((1, 16, 6), 0.1).to(torch.bfloat16)
    pooled = compute_token_sets(BackboneOutput({2: LayerTokens(None, patches)}), [TokenSet("patch", 2, 1)], VIT)
    assert pooled["patch@1:2"].dtype == torch.float32
    torch.testing.assert_close(pooled["patch@1:2"][:, 0], patches.float().mean(1))


def test_a_layer_that_was_not_computed_is_named() -> None:
    with pytest.raises(OptionError, match="cls:3 needs layer 3, which the forward pass was not asked for"):
        compute_token_sets(BackboneOutput(), [TokenSet("cls", 3)], VIT)
    with pytest.raises(OptionError, match="attention:4 is not among what the forward pass gave"):
        compute_token_sets(BackboneOutput(), [TokenSet("attention", 4)], VIT)

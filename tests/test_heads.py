"""The contract that every registered head keeps, and the formulas of each by value."""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.errors import HeadError
from embedkit.plugins import MASK_OPTION, check_output, create_head, learns_masks, list_heads, list_options, load_head
from embedkit.recipe import TokenSet
from embedkit.tails import Tail, TailShape
from embedkit.textvectors import write_vectors
from embedkit.vit import VitBackbone

HEADS = tuple(list_heads())
BY_GRADIENT = tuple(name for name in HEADS if load_head(name).fit_by == "gradient")
DIM = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "tail": {"grid": 2},
    "text": {"vectors": write_vectors(np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32))},
}
"""What a head cannot do without here."""


def make_tail() -> Tail:
    """One block and the norm of a tiny transformer, for slices of a class token and 2 x 2 patches."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=DIM, depth=2, num_heads=2, num_classes=0)
    model.eval().requires_grad_(False)
    backbone = VitBackbone(model, name="tiny", weights="", mean=(0.5,), std=(0.5,))
    linears = tuple((name, *value.shape) for name, value in model.blocks[1].named_parameters() if value.ndim == 2)
    return Tail(TailShape(1, 2, DIM, 1, 1, (2, 2), linears), backbone)


TAIL = make_tail()
SHAPE = BagShape(
    {"cut:1": (5, DIM), "cls:2": (1, DIM), "patch@2:1": (4, DIM)},
    {"patch@2:1": (2, 2)},
    ("a/axial", "b/axial"),
    TAIL.shape,
)


def reads(name: str) -> tuple[str, ...]:
    """A token set of `SHAPE` that the head can read: patches where it can."""
    readable = [text for text in SHAPE.token_sets if TokenSet.parse(text).kind in load_head(name).reads]
    return (readable[-1],)


def make_bag(lengths: list[list[int]], *, slices: int = 5, seed: int = 0, shape: BagShape = SHAPE) -> Bag:
    """Random tokens; ``lengths`` holds the real slices of each case and view."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lengths)
    mask = torch.arange(slices) < counts[..., None]
    tokens = {name: torch.randn(*mask.shape, *size, generator=generator) for name, size in shape.token_sets.items()}
    ids = tuple(f"c{number}" for number in range(len(lengths)))
    return Bag(tokens, mask, torch.linspace(0, 1, slices).expand(mask.shape), ids, tail=TAIL)


def take_slices(bag: Bag, order: list[int], *, positions: bool = True) -> Bag:
    """The bag with its slices in another order; ``positions`` False leaves the positions where they were."""
    tokens = {name: values[:, :, order] for name, values in bag.tokens.items()}
    found = bag.positions[:, :, order] if positions else bag.positions
    return dataclasses.replace(bag, tokens=tokens, mask=bag.mask[:, :, order], positions=found)


def build_head(name: str, shape: BagShape, sets: tuple[str, ...], outputs: int, **options: Any) -> nn.Module:
    return create_head(name, shape, sets, outputs, options=OPTIONS.get(name, {}) | options)


def make_head(name: str, outputs: int = 2, *, shape: BagShape = SHAPE, seed: int = 1, **options: Any) -> nn.Module:
    """A head in evaluation, with every number of it random, as if it had been trained."""
    torch.manual_seed(0)
    sets = (list(shape.token_sets)[-1],) if shape is not SHAPE else reads(name)
    head = build_head(name, shape, sets, outputs, **options).eval()
    return randomise(head, seed=seed)


def randomise(head: nn.Module, *, seed: int = 1) -> nn.Module:
    """Fills every number of a head that is fitted."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))
        for key, buffer in head.named_buffers():
            if key.startswith("readout") and not key.endswith("scale"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return head


def tensors(head: nn.Module, bag: Bag) -> dict[str, Tensor]:
    """All that a head says of a bag's cases, apart from what it says of single slices."""
    with torch.no_grad():
        output = head(bag)
    found = {key: getattr(output, key) for key in ("logits", "embedding", "auxiliary_logits")}
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def require_close(head: nn.Module, found: Bag, expected: Bag) -> None:
    """Both bags get the same answer from the head."""
    answer = tensors(head, found)
    for key, value in tensors(head, expected).items():
        torch.testing.assert_close(answer[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


BAG = make_bag([[3, 2], [5, 1], [1, 4]])


DECODERS: list[tuple[str, dict[str, Any]]] = [
    ("segment", {"clicks": 0}),
    ("segment", {"clicks": 2}),
    ("grid", {"masks": True}),
    ("grid", {"masks": True, "views": "late"}),
    ("grid", {"masks": True, "views": "early"}),
    ("tail", {"masks": True}),
    ("tail", {"masks": True, "grid": 0}),
]


@pytest.mark.parametrize(("name", "options"), DECODERS)
def test_padding_and_what_masked_slices_hold_never_change_a_mask(name: str, options: dict[str, Any]) -> None:
    head = make_head(name, **options)
    asked = dataclasses.replace(BAG, clicks=torch.zeros(*BAG.mask.shape, 4))
    cast(Tensor, asked.clicks)[0, 0, 1, 2] = cast(Tensor, asked.clicks)[1, 0, 4, 0] = 1
    expected = head(asked).mask_logits
    assert check_output(name, head(asked), asked, 2).mask_logits is not None and expected[BAG.mask].std() > 1e-3
    dirty = {key: value.masked_fill(~BAG.mask[..., None, None], math.nan) for key, value in BAG.tokens.items()}
    padded = take_slices(dataclasses.replace(asked, tokens=dirty), [0, 1, 2, 3, 4, 4, 4])
    padded.mask[:, :, 5:] = False
    clicked = torch.nn.functional.pad(cast(Tensor, asked.clicks), (0, 0, 0, 2))
    found = head(dataclasses.replace(padded, clicks=clicked)).mask_logits[:, :, :5]
    torch.testing.assert_close(found[BAG.mask], expected[BAG.mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), [each for each in DECODERS if "masks" in each[1]])
def test_a_decoder_leaves_the_label_as_it_is_and_answers_only_when_asked(name: str, options: dict[str, Any]) -> None:
    head = make_head(name, **options)
    plain = make_head(name, **options | {"masks": False})
    kept = plain.state_dict()
    plain.load_state_dict({key: value for key, value in head.state_dict().items() if key in kept})
    cover = dataclasses.replace(BAG, cover=torch.zeros(*BAG.mask.shape, 4))
    assert head(BAG).mask_logits is None and head(cover).mask_logits is not None and plain(cover).mask_logits is None
    require_close(head, cover, BAG)
    torch.testing.assert_close(head(BAG).logits, plain(BAG).logits)


def test_a_click_is_heard_in_its_own_case_alone_and_none_adds_nothing() -> None:
    head = make_head("segment", clicks=2)
    nothing = dataclasses.replace(BAG, clicks=torch.zeros(*BAG.mask.shape, 4))
    clicks = torch.zeros(*BAG.mask.shape, 4)
    clicks[0, 0, 0, 1] = 1
    plain, clicked = head(nothing).mask_logits, head(dataclasses.replace(BAG, clicks=clicks)).mask_logits
    assert torch.equal(plain[1:], clicked[1:]) and not torch.allclose(plain[0], clicked[0], atol=1e-3)
    deaf = make_head("segment")
    deaf.load_state_dict({key: value for key, value in head.state_dict().items() if not key.startswith("prompt")})
    torch.testing.assert_close(deaf(nothing).mask_logits, plain)


@pytest.mark.parametrize("name", HEADS)
def test_outputs_have_the_shapes_of_the_contract(name: str) -> None:
    head = make_head(name)
    output = check_output(name, head(BAG), BAG, 2)
    assert output.logits.isfinite().all()
    assert output.embedding is not None and output.embedding.shape[0] == 3


@pytest.mark.parametrize("garbage", [1e4, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", HEADS)
def test_what_masked_slices_hold_never_changes_the_result(name: str, garbage: float) -> None:
    head = make_head(name)
    dirty = {key: value.masked_fill(~BAG.mask[..., None, None], garbage) for key, value in BAG.tokens.items()}
    positions = BAG.positions.masked_fill(~BAG.mask, garbage)
    soiled = dataclasses.replace(BAG, tokens=dirty, positions=positions)
    expected, found = tensors(head, BAG), tensors(head, soiled)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    if hasattr(head, "evidence"):
        evidence = cast(Any, head).evidence(soiled, 1)
        assert torch.equal(evidence, cast(Any, head).evidence(BAG, 1))
        assert (evidence[~BAG.mask] == 0).all()


@pytest.mark.parametrize("name", HEADS)
def test_more_padding_never_changes_the_result(name: str) -> None:
    longer = make_bag([[3, 2], [5, 1], [1, 4]], slices=9, seed=7)
    tokens = {key: torch.cat([value, longer.tokens[key][:, :, 5:]], 2) for key, value in BAG.tokens.items()}
    positions = torch.cat([BAG.positions, longer.positions[:, :, 5:]], 2)
    padded = dataclasses.replace(BAG, tokens=tokens, mask=longer.mask, positions=positions)
    require_close(make_head(name), padded, BAG)


@pytest.mark.parametrize("name", HEADS)
def test_masked_slices_between_real_ones_never_change_the_result(name: str) -> None:
    apart = take_slices(BAG, [0, 4, 1, 4, 4, 2, 3, 4])
    kept = torch.tensor([True, False, True, False, False, True, True, True])
    require_close(make_head(name), dataclasses.replace(apart, mask=apart.mask & kept), BAG)


@pytest.mark.parametrize("name", HEADS)
def test_a_case_alone_gets_what_it_gets_among_others(name: str) -> None:
    head = make_head(name)
    tokens = {key: value[1:2] for key, value in BAG.tokens.items()}
    alone = Bag(tokens, BAG.mask[1:2], BAG.positions[1:2], ("c1",), tail=TAIL)
    for key, value in tensors(head, BAG).items():
        torch.testing.assert_close(tensors(head, alone)[key][0], value[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_the_order_of_slices_matters_as_the_head_says(name: str) -> None:
    head, order = make_head(name), [3, 0, 4, 1, 2]
    promise = cast(Any, load_head(name)).slice_order
    if promise != "sequence":
        require_close(head, take_slices(BAG, order), BAG)
    if promise == "free":
        require_close(head, take_slices(BAG, order, positions=False), BAG)
    else:
        mixed = take_slices(BAG, order, positions=promise == "sequence")
        assert not torch.allclose(tensors(head, mixed)["logits"], tensors(head, BAG)["logits"], atol=1e-3)


@pytest.mark.parametrize("name", HEADS)
def test_a_missing_view_one_slice_and_a_case_without_anything_give_finite_logits(name: str) -> None:
    head = make_head(name)
    bag = make_bag([[1, 0], [0, 1], [0, 0]], slices=1)
    assert tensors(head, bag)["logits"].isfinite().all()
    other = {key: value.clone() for key, value in bag.tokens.items()}
    for value in other.values():
        value[0, 1] = 99
    assert torch.equal(tensors(head, dataclasses.replace(bag, tokens=other))["logits"], tensors(head, bag)["logits"])


@pytest.mark.parametrize("name", HEADS)
def test_every_view_says_something_and_one_of_three_is_enough(name: str) -> None:
    shape = BagShape(SHAPE.token_sets, SHAPE.grids, ("a/axial", "a/coronal", "a/sagittal"), TAIL.shape)
    torch.manual_seed(0)
    head = randomise(build_head(name, shape, reads(name), 2).eval())
    bag = make_bag([[2, 0, 0], [0, 2, 0], [0, 0, 2]], slices=2, shape=shape)
    logits = tensors(head, bag)["logits"]
    assert logits.isfinite().all() and (logits[:, None] - logits).abs().sum(2).fill_diagonal_(1).min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_half_precision_stays_near_single(name: str, dtype: torch.dtype) -> None:
    head = make_head(name)
    expected = tensors(head, BAG)["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tensors(head, BAG)["logits"]
    found = tensors(head.to(dtype), BAG.to(dtype=dtype))["logits"]
    assert found.dtype == dtype
    scale = max(1.0, float(expected.abs().max()))
    assert float((found.float() - expected).abs().max()) < (0.01 if dtype == torch.float16 else 0.08) * scale
    assert float((mixed.float() - expected).abs().max()) < 0.08 * scale


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_gradients_reach_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    told = {MASK_OPTION: True} if MASK_OPTION in list_options(name) else {}
    head = build_head(name, SHAPE, reads(name), 2, **told).train()
    bag = dataclasses.replace(BAG, cover=torch.rand(*BAG.mask.shape, 4)) if learns_masks(name) else BAG
    output = head(bag)
    (output.logits.square().sum() + (0 if output.mask_logits is None else output.mask_logits.square().sum())).backward()
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
    optimiser.step()
    head.eval()
    head.zero_grad()
    output = head(bag)
    masks = 0 if output.mask_logits is None else output.mask_logits[BAG.mask].square().sum()
    ((output.logits * torch.tensor([1.0, -2.0])).sum() + masks).backward()
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), key


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_stacked_heads_answer_as_each_alone(name: str) -> None:
    if hasattr(load_head(name), "one_by_one"):
        pytest.skip(f"fits of {name} are run one after the other")
    heads = [make_head(name, seed=seed) for seed in (1, 2, 3)]
    parameters, buffers = torch.func.stack_module_state(heads)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        logits: Tensor = torch.func.functional_call(heads[0], (parameters, buffers), (BAG,)).logits
        return logits

    stacked = torch.func.vmap(call)(parameters, buffers)
    alone = torch.stack([tensors(head, BAG)["logits"] for head in heads])
    torch.testing.assert_close(stacked, alone, rtol=1e-4, atol=1e-5)
    slopes = torch.func.vmap(torch.func.grad(lambda *state: call(*state).square().sum()))(parameters, buffers)
    heads[1](BAG).logits.square().sum().backward()
    for key, parameter in heads[1].named_parameters():
        slope = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # of a mask not asked for
        torch.testing.assert_close(slopes[key][1], slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_a_head_has_at_most_a_million_parameters_at_384_dims(name: str) -> None:
    views = ("a/axial", "a/coronal", "a/sagittal")
    shape = BagShape({"cls:12": (1, 384), "patch@8:8": (64, 384)}, {"patch@8:8": (8, 8)}, views)
    for text in shape.token_sets:
        if TokenSet.parse(text).kind in load_head(name).reads:
            head = build_head(name, shape, (text,), 2)
            assert sum(parameter.numel() for parameter in head.parameters()) <= 1_000_000


@pytest.mark.parametrize("name", HEADS)
def test_evidence_adds_up_to_the_change_of_the_logit(name: str) -> None:
    head = make_head(name)
    if not hasattr(head, "evidence"):
        pytest.skip(f"{name} says nothing of its evidence")
    evidence = cast(Any, head).evidence(BAG, 1)
    assert evidence.shape == (*BAG.mask.shape, 4)
    rest = tensors(head, BAG)["logits"][:, 1] - evidence.sum((1, 2, 3))
    if name == "grid":
        average = BAG.tokens["patch@2:1"] * 0
        rest = rest - tensors(head, dataclasses.replace(BAG, tokens={"patch@2:1": average}))["logits"][:, 1]
        torch.testing.assert_close(rest, torch.zeros(3), rtol=0, atol=1e-4)
    else:
        torch.testing.assert_close(rest, rest[:1].expand(3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_attention_sums_to_one_over_the_real_slices_of_every_view(name: str) -> None:
    bag = make_bag([[3, 0], [5, 1]])
    output = make_head(name)(bag)
    if output.slice_attention is None:
        assert name in ("linear", "logistic", "mlp", "raptor", "grid", "conv", "transmil", "segment")
        return
    sums = bag.mask.any(2).float()
    torch.testing.assert_close(output.slice_attention.sum(2), sums)
    assert (output.slice_attention[~bag.mask] == 0).all()
    if output.token_attention is not None:
        torch.testing.assert_close(output.token_attention.sum(3), output.slice_attention)


ONE_VIEW = BagShape({"cls:2": (1, DIM)}, {}, ("a/axial",))


def test_linear_is_the_mean_over_slices_and_a_linear_layer_averaged_over_views() -> None:
    head = cast(Any, make_head("linear"))
    bag = make_bag([[3, 2], [4, 0]])
    tokens = bag.tokens["patch@2:1"]
    first, second = (tokens[0, view, :count].mean((0, 1)) for view, count in ((0, 3), (1, 2)))
    expected = (head.weight[0] @ first + head.weight[1] @ second) / 2 + head.bias
    torch.testing.assert_close(head(bag).logits[0], expected)
    torch.testing.assert_close(head(bag).logits[1], head.weight[0] @ tokens[1, 0, :4].mean((0, 1)) + head.bias)


def test_the_embedding_of_linear_weighs_each_channel_by_what_was_learned_for_it() -> None:
    head = cast(Any, make_head("linear"))
    with torch.no_grad():
        head.weight.zero_()
        head.weight[0, :, 2] = torch.tensor([3.0, -4.0])
        head.weight[1, 1, 5] = -2.0
    bag = make_bag([[3, 2], [4, 0]])
    tokens = bag.tokens["patch@2:1"]
    expected = torch.zeros(2, 2, DIM)
    expected[0, 0, 2] = 5 * tokens[0, 0, :3, :, 2].mean()
    expected[0, 1, 5] = 2 * tokens[0, 1, :2, :, 5].mean()
    expected[1, 0, 2] = 5 * tokens[1, 0, :4, :, 2].mean()
    torch.testing.assert_close(head(bag).embedding, expected.flatten(1))


def test_query_pools_by_equation_5() -> None:
    head = cast(Any, make_head("query", shape=ONE_VIEW))
    bag = make_bag([[4]], shape=ONE_VIEW)
    tokens = bag.tokens["cls:2"][0, 0, :4, 0]
    weights = (tokens @ head.query[0] / math.sqrt(DIM)).softmax(0)
    output = head(bag)
    torch.testing.assert_close(output.slice_attention[0, 0, :4], weights)
    torch.testing.assert_close(output.embedding[0], weights @ tokens)
    torch.testing.assert_close(output.logits[0], head.classify.weight @ (weights @ tokens) + head.classify.bias)


def test_query_pools_views_by_a_second_query() -> None:
    head = cast(Any, make_head("query"))
    bag = make_bag([[3, 2]])
    pooled = []
    for view, count in ((0, 3), (1, 2)):
        tokens = bag.tokens["patch@2:1"][0, view, :count].reshape(-1, DIM)
        pooled.append((tokens @ head.query[view] / math.sqrt(DIM)).softmax(0) @ tokens)
    stacked = torch.stack(pooled)
    weights = (stacked @ head.fuse.query / math.sqrt(DIM)).softmax(0)
    torch.testing.assert_close(head(bag).embedding[0], weights @ stacked)


def test_abmil_is_gated_attention() -> None:
    head = cast(Any, make_head("abmil", shape=ONE_VIEW, width=8, attention_width=5))
    bag = make_bag([[4]], shape=ONE_VIEW)
    hidden = torch.relu(head.embed[0](bag.tokens["cls:2"][0, 0, :4, 0]))
    gated = torch.tanh(hidden @ head.value.weight.T + head.value.bias)
    gated = gated * torch.sigmoid(hidden @ head.gate.weight.T + head.gate.bias)
    weights = (gated @ head.score[0]).softmax(0)
    output = head(bag)
    torch.testing.assert_close(output.slice_attention[0, 0, :4], weights)
    torch.testing.assert_close(output.logits[0], head.classify(weights @ hidden))


def test_evidence_of_grid_finds_the_token_that_made_the_difference() -> None:
    head = cast(Any, make_head("grid"))
    tokens = torch.zeros_like(BAG.tokens["patch@2:1"])
    tokens[0, 0, 2, 3] = 2
    evidence = head.evidence(dataclasses.replace(BAG, tokens={"patch@2:1": tokens}), 0)
    assert evidence[0].abs().argmax() == (2 * 4 + 3)
    torch.testing.assert_close(evidence[1:], torch.zeros_like(evidence[1:]))


def test_raptor_is_the_projected_mean_over_slices_with_places_side_by_side() -> None:
    head = cast(Any, make_head("raptor", projections=5))
    bag = make_bag([[3, 2], [2, 0]])
    projection = torch.randn(DIM, 5, generator=torch.Generator().manual_seed(0)) / math.sqrt(5)
    torch.testing.assert_close(head.projection, projection)
    features = head.features(bag).view(2, 2, 4, 5)
    torch.testing.assert_close(features[0, 1], bag.tokens["patch@2:1"][0, 1, :2].mean(0) @ projection)
    each_projected_first = torch.stack([part @ projection for part in bag.tokens["patch@2:1"][0, 1, :2]]).mean(0)
    torch.testing.assert_close(features[0, 1], each_projected_first)
    assert features[1, 1].isnan().all() and features[1, 0].isfinite().all()


def test_raptor_projections_keep_lengths_and_follow_their_seed() -> None:
    shape = BagShape({"patch@2:1": (4, 200)}, {}, ("a/axial",))
    first, again, other = (
        cast(Any, create_head("raptor", shape, ("patch@2:1",), 1, options={"seed": seed})).projection
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    vectors = torch.randn(50, 200, generator=torch.Generator().manual_seed(3))
    ratio = (vectors @ first).norm(dim=1) / vectors.norm(dim=1)
    assert 0.9 < float(ratio.mean()) < 1.1


@pytest.mark.parametrize("name", ["logistic", "raptor"])
def test_a_missing_view_counts_as_average_in_closed_form(name: str) -> None:
    torch.manual_seed(0)
    bag = make_bag([[3, 2], [2, 0], [4, 1], [1, 0]] * 5)
    head = cast(Any, create_head(name, SHAPE, reads(name), 1).eval())
    targets = (np.arange(20) // 2) % 2
    features = head.features(bag)
    head.fit(features, targets, kind="binary", holdouts=[np.arange(20) >= 10], class_weights=True)
    size = features.shape[1] // 2
    averaged = features[1:2].clone()
    averaged[0, size:] = features[:, size:].nanmean(0)
    torch.testing.assert_close(head.read_out(averaged), head(bag).logits[1:2], rtol=1e-4, atol=1e-5)


def test_sets_on_two_grids_are_refused_by_every_head() -> None:
    shape = BagShape({"patch@2:1": (4, DIM), "patch@3:1": (9, DIM)}, {}, ("a/axial",))
    for name in (name for name in HEADS if "patch" in load_head(name).reads):
        with pytest.raises(HeadError, match="4, 9 patches"):
            build_head(name, shape, ("patch@2:1", "patch@3:1"), 1)


def test_mlp_is_one_hidden_layer_on_the_mean_of_the_views() -> None:
    head = cast(Any, make_head("mlp"))
    bag = make_bag([[3, 2], [4, 0]])
    tokens = bag.tokens["patch@2:1"]
    first, second = (head.weight[view] @ tokens[0, view, :count].mean((0, 1)) for view, count in ((0, 3), (1, 2)))
    hidden = torch.nn.functional.gelu((first + second) / 2 + head.bias)
    torch.testing.assert_close(head(bag).embedding[0], hidden)
    torch.testing.assert_close(head(bag).logits[0], head.classify(hidden))


def test_mha_asks_with_the_mean_of_all_views_and_planes() -> None:
    head = cast(Any, make_head("mha", width=8, heads=2))
    bag = make_bag([[3, 2]])
    tokens = torch.cat([bag.tokens["patch@2:1"][0, view, :count].flatten(0, 1) for view, count in ((0, 3), (1, 2))])
    query, keys, values = head.query(tokens.mean(0)), head.key(tokens), head.value(tokens)
    weights = torch.stack([(keys[:, part] @ query[part] / 2).softmax(0) for part in (slice(4), slice(4, 8))])
    pooled = torch.cat([weights[0] @ values[:, :4], weights[1] @ values[:, 4:]])
    torch.testing.assert_close(head(bag).embedding[0], pooled)
    whole = weights.mean(0)[:12].view(3, 4)
    torch.testing.assert_close(head(bag).token_attention[0, 0, :3], whole / whole.sum())


def test_transformer_attends_from_its_class_token_as_torch_does() -> None:
    head = cast(Any, make_head("transformer", shape=ONE_VIEW, width=8, heads=2))
    bag = make_bag([[4]], shape=ONE_VIEW)
    layer = head.layers[0]
    theirs = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", norm_first=True, batch_first=True).eval()
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(layer.project.weight)
        theirs.self_attn.in_proj_bias.zero_()
        pairs = (
            (theirs.self_attn.out_proj, layer.mix), (theirs.norm1, layer.norm_attention),
            (theirs.norm2, layer.norm_network), (theirs.linear1, layer.network[0]), (theirs.linear2, layer.network[3]),
        )  # fmt: skip
        for their, own in pairs:
            their.load_state_dict(own.state_dict())
    phases = bag.positions[0, 0, :4, None] * math.pi * 2 ** torch.linspace(0, 6, 4)
    places = head.place(torch.cat([phases.sin(), phases.cos()], 1))
    slices = head.project(bag.tokens["cls:2"][0, 0, :4, 0]) + places
    encoded = theirs(torch.cat([head.class_token, slices])[None])[0, 0]
    torch.testing.assert_close(head(bag).embedding[0], head.norm(encoded))


def test_dsmil_weighs_tokens_by_their_likeness_to_the_critical_one() -> None:
    head = cast(Any, make_head("dsmil", shape=ONE_VIEW, width=8, query_width=4))
    bag = make_bag([[4]], shape=ONE_VIEW)
    hidden = torch.relu(head.embed(bag.tokens["cls:2"][0, 0, :4, 0]) + head.view_bias[0])
    scores, queries, values = head.score(hidden), head.query(hidden), head.value(hidden)
    pooled, weights = [], []
    for output in range(2):
        weights.append((queries @ queries[scores[:, output].argmax()] / 2).softmax(0))
        pooled.append(weights[-1] @ values)
    output = head(bag)
    torch.testing.assert_close(output.auxiliary_logits[0], scores.amax(0))
    torch.testing.assert_close(output.logits[0], (head.classify(torch.cat(pooled)) + scores.amax(0)) / 2)
    torch.testing.assert_close(output.slice_attention[0, 0, :4], torch.stack(weights).mean(0))


def test_gru_is_torchs_on_slices_and_their_differences_to_both_neighbours() -> None:
    head = cast(Any, make_head("gru", shape=ONE_VIEW, width=4, hidden=3))
    bag = make_bag([[4]], shape=ONE_VIEW)
    theirs = nn.GRU(12, 3, bidirectional=True)
    own = head.recurrence
    with torch.no_grad():
        for way, suffix in enumerate(("l0", "l0_reverse")):
            getattr(theirs, f"weight_ih_{suffix}").copy_(own.inward[way].T)
            getattr(theirs, f"weight_hh_{suffix}").copy_(own.recurrent[way].T)
            getattr(theirs, f"bias_ih_{suffix}").copy_(own.bias[way, 0])
            getattr(theirs, f"bias_hh_{suffix}").copy_(torch.cat([torch.zeros(6), own.candidate_bias[way, 0]]))
    slices = head.project(bag.tokens["cls:2"][0, 0, :4, 0])
    none = torch.zeros(1, 4)
    steps = slices[1:] - slices[:-1]
    states, _ = theirs(torch.cat([slices, torch.cat([none, steps]), torch.cat([steps, none])], 1))
    weights = (states @ head.score[0]).softmax(0)
    output = head(bag)
    torch.testing.assert_close(output.slice_attention[0, 0, :4], weights)
    torch.testing.assert_close(output.embedding[0], weights @ states)


def test_pyramid_encoding_convolves_the_square_that_its_first_tokens_fill_up() -> None:
    encode = cast(Any, make_head("transmil", shape=ONE_VIEW, width=4, heads=2)).encode
    slices = torch.randn(1, 1, 7, 4, generator=torch.Generator().manual_seed(0))
    square = torch.cat([slices[0, 0, :5], slices[0, 0, :4]]).T.view(1, 4, 3, 3)
    expected = square + encode.bias.view(4, 1, 1)
    for kernel in (encode.large, encode.middle, encode.small):
        expected = expected + torch.nn.functional.conv2d(square, kernel, padding="same", groups=4)
    found = encode(slices, torch.tensor([[5]]))
    torch.testing.assert_close(found[0, 0, :5], expected[0].flatten(1).T[:5])


def test_nystrom_attention_with_a_landmark_per_token_is_full_attention() -> None:
    head = cast(Any, make_head("transmil", shape=ONE_VIEW, width=8, heads=2, landmarks=9))
    layer = head.before
    with torch.no_grad():
        layer.project.weight[:16] = 6 * torch.eye(8).repeat(2, 1)  # sharp, so that six steps invert it
    tokens = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    parts = layer.project(layer.norm(tokens[0, 0, :5])).view(5, 3, 2, 4).permute(1, 2, 0, 3)
    mixed = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(0, 1).flatten(1)
    found = layer(tokens, torch.tensor([[5]]))
    torch.testing.assert_close(found[0, 0, :5], tokens[0, 0, :5] + layer.mix(mixed), rtol=0, atol=1e-3)


def test_landmarks_of_nystrom_attention_are_means_of_segments_of_the_real_tokens() -> None:
    layer = cast(Any, make_head("transmil", shape=ONE_VIEW, width=8, heads=2, landmarks=2)).before
    shares = layer._share_out(torch.arange(7), torch.tensor([[5]]))[0, 0]
    assert shares[:, :5].tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]


def test_six_steps_of_the_iterative_inverse_come_near_the_pseudo_inverse() -> None:
    transmil = importlib.import_module("embedkit.heads.transmil")
    matrix = (3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).softmax(-1) + torch.eye(4)
    padded = torch.nn.functional.pad(matrix, (0, 2, 0, 2))
    torch.testing.assert_close(transmil._invert(padded), torch.linalg.pinv(padded), rtol=0, atol=1e-3)


def test_conv_convolves_every_channel_over_slices_and_places() -> None:
    shape = BagShape({"patch@2:1": (4, DIM)}, {"patch@2:1": (2, 2)}, ("a/axial",))
    head = cast(Any, make_head("conv", shape=shape, width=3))
    bag = make_bag([[4]], shape=shape, slices=6)
    block = head.blocks[0]
    volume = head.project(bag.tokens["patch@2:1"][0, 0, :4])
    cube = torch.nn.functional.gelu(volume).permute(2, 0, 1).view(3, 4, 2, 2)
    mixed = torch.nn.functional.conv3d(cube, block.weight, padding=1, groups=3).flatten(2).permute(1, 2, 0)
    volume = volume + block.mix(torch.nn.functional.gelu(block.norm(mixed)))
    expected = torch.cat([volume.mean(0), volume.amax(0)], 1).flatten()
    torch.testing.assert_close(head(bag).embedding[0], expected)


def test_fusion_weighs_the_slices_of_every_place_given_the_mean_of_the_case() -> None:
    head = cast(Any, make_head("fusion", width=5, attention_width=3))
    bag = make_bag([[3, 2]])
    tokens = bag.tokens["patch@2:1"]
    hidden = [torch.nn.functional.gelu(head.project(tokens[0, view, :count])) for view, count in ((0, 3), (1, 2))]
    context = head.context(torch.cat([part.mean(1) for part in hidden]).mean(0))
    output = head(bag)
    for view, part in enumerate(hidden):
        weights = (torch.tanh(head.compare(part) + context) @ head.score[view]).softmax(0)
        fused = (weights[..., None] * part).sum(0)
        torch.testing.assert_close(output.embedding[0].view(2, 4, 5)[view], fused)
        torch.testing.assert_close(output.token_attention[0, view, : len(part)], weights / 4)


@pytest.mark.parametrize("places", ["learned", "sines"])
def test_gridattention_is_gated_attention_on_tokens_that_know_their_place(places: str) -> None:
    shape = BagShape({"patch@2:1": (4, DIM)}, {"patch@2:1": (2, 2)}, ("a/axial",))
    head = cast(Any, make_head("gridattention", shape=shape, width=4, heads=2, places=places))
    bag = make_bag([[3]], shape=shape)
    phases = bag.positions[0, 0, :3, None] * math.pi * torch.tensor([1.0, 64.0])
    axial = head.axial(torch.cat([phases.sin(), phases.cos()], 1))
    hidden = torch.nn.functional.gelu(
        head.project(bag.tokens["patch@2:1"][0, 0, :3]) + head.place() + axial[:, None]
    ).flatten(0, 1)
    gated = torch.tanh(head.value(hidden)) * torch.sigmoid(head.gate(hidden))
    weights = (gated @ head.score[0].T).softmax(0)
    torch.testing.assert_close(head(bag).embedding[0], (weights.T @ hidden).flatten())
    assert head.place().unique(dim=0).shape[0] == 4
    with pytest.raises(HeadError, match="'gridattention' is 'none', expected learned or sines"):
        make_head("gridattention", places="none")


@pytest.mark.parametrize("name", ["grid", "gridattention", "fusion", "conv"])
def test_heads_on_grids_tell_one_place_from_another(name: str) -> None:
    tokens = torch.zeros(2, 1, 1, 4, DIM)
    tokens[0, 0, 0, 0] = tokens[1, 0, 0, 3] = 3
    shape = BagShape({"patch@2:1": (4, DIM)}, {"patch@2:1": (2, 2)}, ("a/axial",))
    bag = Bag({"patch@2:1": tokens}, torch.ones(2, 1, 1, dtype=torch.bool), torch.zeros(2, 1, 1), ("left", "right"))
    left, right = make_head(name, shape=shape)(bag).logits
    assert (left - right).abs().max() > 0.05


def test_text_weighs_slices_by_their_product_with_the_projected_texts() -> None:
    head = cast(Any, make_head("text", shape=ONE_VIEW, temperature=0.5, width=4))
    bag = make_bag([[4]], shape=ONE_VIEW)
    slices = bag.tokens["cls:2"][0, 0, :4, 0]
    weights = (slices @ head.project(head.vectors).T / math.sqrt(DIM) / 0.5).softmax(0)
    output = head(bag)
    torch.testing.assert_close(output.slice_attention[0, 0, :4], weights.mean(1))
    torch.testing.assert_close(output.embedding[0], (weights.T @ head.value(slices)).flatten())
    with pytest.raises(HeadError, match="temperature of head 'text' is 0, expected above 0"):
        make_head("text", temperature=0)

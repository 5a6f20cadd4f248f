"""Pooling under a mask: right values, and nothing masked ever shows."""

from __future__ import annotations

import math

import pytest
import torch

from embedkit.bags import Bag, BagShape
from embedkit.errors import HeadError
from embedkit.pooling import (
    ViewQuery,
    join_tokens,
    joined_size,
    masked_max,
    masked_mean,
    masked_softmax,
    pool_views,
    weigh_slices,
)

MASK = torch.tensor([[True, False, True], [False, False, False]])
VALUES = torch.tensor([[-1.0, math.nan, -3.0], [math.inf, 7.0, -math.inf]])


def test_mean_and_maximum_pass_over_what_is_masked_and_give_zero_for_nothing() -> None:
    assert masked_mean(VALUES, MASK, 1).tolist() == [-2, 0]
    assert masked_max(VALUES, MASK, 1).tolist() == [-1, 0]


def test_softmax_is_exact_on_the_real_places_and_zero_on_the_others() -> None:
    weights = masked_softmax(VALUES, MASK, 1)
    share = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(weights, torch.tensor([[share, 0, 1 - share], [0, 0, 0]]))


def test_softmax_takes_huge_scores_and_two_axes() -> None:
    scores = torch.tensor([[[1e30, 1e30], [0.0, 0.0]]])
    weights = masked_softmax(scores, torch.tensor([[[True], [True]]]), (1, 2))
    assert weights.tolist() == [[[0.5, 0.5], [0, 0]]]


def test_softmax_of_nothing_has_finite_gradients() -> None:
    scores = torch.zeros(2, 3, requires_grad=True)
    masked_softmax(scores, MASK, 1).square().sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all()


def test_a_mean_of_many_large_halves_does_not_overflow() -> None:
    values = torch.full((1, 3000), 1000.0, dtype=torch.float16)
    assert masked_mean(values, torch.ones(1, 3000, dtype=torch.bool), 1).item() == 1000


def shape_of(**token_sets: tuple[int, int]) -> BagShape:
    return BagShape({name.replace("_", ":"): size for name, size in token_sets.items()}, {}, ("t1/axial",))


def test_token_sets_are_joined_along_dim_and_the_class_token_stands_at_every_patch() -> None:
    tokens = {"cls:2": torch.full((1, 1, 2, 1, 2), 5.0), "patch@2:1": torch.arange(8.0).view(1, 1, 2, 4, 1)}
    bag = Bag(tokens, torch.tensor([[[True, False]]]), torch.zeros(1, 1, 2), ("a",))
    joined = join_tokens(bag, ("cls:2", "patch@2:1"))
    assert joined[0, 0, 0].tolist() == [[5, 5, 0], [5, 5, 1], [5, 5, 2], [5, 5, 3]]
    assert (joined[0, 0, 1] == 0).all()
    assert joined_size(shape_of(cls_2=(1, 2), patch_1=(4, 1)), ("cls:2", "patch:1")) == (4, 3)


def test_token_sets_on_two_grids_are_refused() -> None:
    with pytest.raises(HeadError, match="have 4, 9 patches per slice; one head joins only sets on the same grid"):
        joined_size(shape_of(patch_1=(4, 1), patch_2=(9, 1)), ("patch:1", "patch:2"))
    with pytest.raises(HeadError, match="no token set was given"):
        joined_size(shape_of(cls_2=(1, 2)), ())


def test_view_query_starts_as_the_mean_of_the_views_that_are_there() -> None:
    vectors = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[1.0, 2.0], [3.0, 6.0]]])
    present = torch.tensor([[True, True], [True, False]])
    assert ViewQuery(2, 2)(vectors, present).tolist() == [[2, 4], [1, 2]]
    assert list(ViewQuery(2, 1).parameters()) == []


def test_view_query_weighs_by_softmax_of_the_scaled_product() -> None:
    fuse = ViewQuery(4, 2)
    with torch.no_grad():
        assert fuse.query is not None
        fuse.query.copy_(torch.tensor([2.0, 0, 0, 0]))
    vectors = torch.tensor([[[1.0, 0, 0, 0], [3.0, 0, 0, 0]]])
    weights = torch.tensor([1.0, 3.0]).softmax(0)
    torch.testing.assert_close(fuse.weigh(vectors, torch.ones(1, 2, dtype=torch.bool))[0], weights)


def test_views_are_pooled_to_means_that_share_equally_where_they_are_there() -> None:
    tokens = {
        "cls:2": torch.tensor([[[[[2.0]], [[4.0]]], [[[5.0]], [[9.0]]]], [[[[7.0]], [[1.0]]], [[[3.0]], [[3.0]]]]])
    }
    mask = torch.tensor([[[True, True], [True, False]], [[True, False], [False, False]]])
    pooled, share = pool_views(Bag(tokens, mask, torch.zeros(2, 2, 2), ("a", "b")), ("cls:2",))
    assert pooled[..., 0].tolist() == [[3, 5], [7, 0]]
    assert share.tolist() == [[0.5, 0.5], [1, 0]]


def test_weights_over_all_views_become_attention_within_each() -> None:
    slices, tokens = weigh_slices(torch.tensor([[[[0.1, 0.1], [0.2, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]]))
    torch.testing.assert_close(slices, torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]))
    torch.testing.assert_close(tokens[0, 0], torch.tensor([[0.25, 0.25], [0.5, 0.0]]))

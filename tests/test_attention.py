"""Attention between tokens, their positions, and the order of real slices."""

from __future__ import annotations

import math

import torch

from embedkit.attention import attend, encode_positions, order_slices

MASK = torch.tensor([[True, False, True, True, False], [False, False, False, False, False]])


def test_attention_is_torchs_scaled_dot_product_on_the_tokens_that_may_be_attended() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, size, 6, generator=generator) for size in (3, 5, 5))
    mixed, weights = attend(query, key, value, MASK, heads=2)
    parts = [each[0].unflatten(-1, (2, 3)).transpose(0, 1) for each in (query, key[:, MASK[0]], value[:, MASK[0]])]
    expected = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mixed[0], expected)
    torch.testing.assert_close(weights.sum(-1)[0], torch.ones(2, 3))
    assert (weights[0][:, :, ~MASK[0]] == 0).all() and (mixed[1] == 0).all()


def test_positions_are_sines_and_cosines_from_half_a_wave_to_thirty_two() -> None:
    found = encode_positions(torch.tensor([[0.0, 0.5, 1.0]]), 4)
    expected = [[math.sin(p * math.pi), math.sin(p * 64 * math.pi), math.cos(p * math.pi), math.cos(p * 64 * math.pi)]
                for p in (0, 0.5, 1)]  # fmt: skip
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=0, atol=1e-4)


def test_real_slices_come_to_the_front_in_their_order_and_go_back() -> None:
    slices = torch.arange(1.0, 6.0).expand(2, 5)[..., None]
    order = order_slices(MASK)
    assert (order @ slices)[..., 0].tolist() == [[1, 3, 4, 0, 0], [0, 0, 0, 0, 0]]
    assert (order.mT @ (order @ slices))[0, :, 0].tolist() == [1, 0, 3, 4, 0]
    assert (order_slices(MASK, backwards=True) @ slices)[0, :, 0].tolist() == [4, 3, 1, 0, 0]

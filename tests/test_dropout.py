"""Dropout by bytes: what it drops, and that it keeps the mean."""

from __future__ import annotations

import pytest
import torch

from embedkit.dropout import Dropout


@pytest.mark.parametrize(("rate", "dropped"), [(0.2, 51), (0.5, 128), (0.999, 255), (0.003, 1)])
def test_drops_its_share_and_scales_up_the_rest(rate: float, dropped: int) -> None:
    torch.manual_seed(0)
    values = torch.ones(1000, 203)
    found = Dropout(rate)(values)
    kept = found[found != 0]
    assert kept.unique().tolist() == pytest.approx([256 / (256 - dropped)])
    share = 1 - len(kept) / values.numel()
    assert share == pytest.approx(dropped / 256, abs=4 * (0.25 / values.numel()) ** 0.5)


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(0)
    found = (Dropout(0.5)(torch.ones(8 * 50_000)) != 0).float().view(-1, 8)
    assert torch.corrcoef(found.T).sub(torch.eye(8)).abs().max() < 0.02


def test_gradients_pass_where_values_do() -> None:
    torch.manual_seed(0)
    values = torch.randn(64, 9, requires_grad=True)
    found = Dropout(0.4)(values)
    (slope,) = torch.autograd.grad(found.sum(), values)
    assert torch.equal(slope * values, found)


def test_nothing_is_dropped_outside_training_or_at_rate_zero() -> None:
    values = torch.randn(5, 7)
    assert Dropout(0.5).eval()(values) is values
    assert Dropout(0.0)(values) is values


def test_one_draw_for_all_rows_under_vmap() -> None:
    layer = Dropout(0.5)
    rows = torch.randn(3, 10, 6)
    torch.manual_seed(0)
    together = torch.vmap(layer, randomness="same")(rows)
    torch.manual_seed(0)
    assert torch.equal(together[0], layer(rows[0]))
    assert torch.equal(together != 0, (together[:1] != 0).expand(3, -1, -1))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_another_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="expected from 0 to below 1"):
        Dropout(rate)

"""Products of shared tokens are those of einsum, alone and for many heads at once, and so are their gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from embedkit.products import project_views, score_tokens, weigh_tokens

BATCH, VIEWS, SLICES, PATCHES, DIM, HIDDEN, ROWS = 3, 2, 5, 4, 7, 6, 9
TOKENS = torch.randn(BATCH, VIEWS, SLICES, PATCHES, DIM, generator=torch.Generator().manual_seed(0))
PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str, tuple[int, ...]]] = {
    "score": (lambda learned, tokens: score_tokens(tokens, learned), "vd,bvspd->bvsp", (VIEWS, DIM)),
    "weigh": (weigh_tokens, "bvsp,bvspd->bvd", (BATCH, VIEWS, SLICES, PATCHES)),
    "project": (
        lambda learned, tokens: project_views(tokens[:, :, 0, 0], learned),
        "vhd,bvd->bvh",
        (VIEWS, HIDDEN, DIM),
    ),
}


def answers(name: str, run: Callable[[Tensor, Tensor], Tensor], learned: Tensor, tokens: Tensor) -> list[Tensor]:
    """The product and the gradients of its squares by both sides."""
    sides = [learned.clone().requires_grad_(), tokens.clone().requires_grad_()]
    product = run(*sides)
    return [product.detach(), *torch.autograd.grad(product.square().sum(), sides)]


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("how", ["alone", "shared", "apart", "tokens"])
def test_a_product_is_that_of_einsum(name: str, how: str) -> None:
    product, formula, shape = PRODUCTS[name]
    generator = torch.Generator().manual_seed(1)
    learned = torch.randn(*(() if how in {"alone", "tokens"} else (ROWS,)), *shape, generator=generator)
    tokens = TOKENS if how in {"alone", "shared"} else torch.randn(ROWS, *TOKENS.shape, generator=generator)

    def plain(own: Tensor, given: Tensor) -> Tensor:
        return torch.einsum(formula, own, given[:, :, 0, 0] if name == "project" else given)

    dims = {"shared": (0, None), "apart": (0, 0), "tokens": (None, 0)}
    wanted, found = (
        answers(name, run if how == "alone" else torch.vmap(run, in_dims=dims[how]), learned, tokens)
        for run in (plain, product)
    )
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_rows_of_all_heads_are_multiplied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One product on the tokens as they are, however many heads look at them."""
    sizes: list[tuple[int, ...]] = []
    bmm = torch.bmm

    def count(left: Tensor, right: Tensor) -> Tensor:
        sizes.append((*left.shape, right.shape[-1]))
        return bmm(left, right)

    monkeypatch.setattr(torch, "bmm", count)
    torch.vmap(lambda queries: score_tokens(TOKENS, queries))(torch.randn(ROWS, VIEWS, DIM))
    assert sizes == [(VIEWS, ROWS, DIM, BATCH * SLICES * PATCHES)]


@pytest.mark.parametrize("name", PRODUCTS)
def test_autocast_multiplies_in_its_dtype_both_ways(name: str) -> None:
    product, _, shape = PRODUCTS[name]
    learned = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    exact = answers(name, product, learned, TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        assert product(learned, TOKENS).dtype == torch.bfloat16
        found = answers(name, lambda own, tokens: product(own, tokens).float(), learned, TOKENS)
    for one, other in zip(exact, found, strict=True):
        torch.testing.assert_close(other.float(), one, rtol=0.05, atol=0.2)

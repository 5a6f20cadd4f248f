"""Owns the passes over the tokens that fits are trained in: each block is read once and feeds every fit of the pass.

Fits of one architecture go into one stack; stacks of several architectures take turns on the same block.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from embedkit.bags import Bag
from embedkit.plugins import HeadOutput
from embedkit.stacks import Fit, Outcome, Stack
from embedkit.storage import ResidentStore

__all__ = ["find_obstacle", "run_passes"]

_AGREEMENT = 1e-3  # relative; vmap and the plain call round differently


def run_passes(
    fits: Sequence[Fit], obstacles: Mapping[str, str], on_done: Callable[[Fit, Outcome], None] | None = None
) -> dict[Fit, Outcome]:
    """Trains all fits to their end.

    Draws from torch's global generators, seeded anew at every step: isolate them around the call.

    Args:
        fits: Of any heads, tasks and training sets.
        obstacles: Heads that must be run fit by fit.
        on_done: Called with every fit that is done.
    """
    passes: dict[Hashable, list[Fit]] = {}
    for fit in fits:  # cases that lie in memory as one block need not be told apart
        resident = isinstance(fit.store, ResidentStore) and fit.deck.blocks == 1
        passes.setdefault((fit.store, None if resident else fit.deck), []).append(fit)
    outcomes: dict[Fit, Outcome] = {}
    for together in passes.values():
        for fit, outcome in _run_pass(together, obstacles):
            outcomes[fit] = outcome
            if on_done is not None:
                on_done(fit, outcome)
    return outcomes


def _run_pass(fits: Sequence[Fit], obstacles: Mapping[str, str]) -> Iterator[tuple[Fit, Outcome]]:
    """Epoch after epoch until no fit is left."""
    store = fits[0].store
    token_sets = list(dict.fromkeys(name for fit in fits for name in fit.standardiser.token_sets))
    kin: dict[Hashable, list[Fit]] = {}
    for fit in fits:
        kin.setdefault(fit.kin, []).append(fit)
    stacks = [Stack(each, stackable=each[0].name not in obstacles) for each in kin.values()]
    while stacks:
        deck, epoch = stacks[0].fits[0].deck, stacks[0].epoch
        blocks = [deck.places[cases] for cases in deck.deal(epoch)]
        for block, _ in enumerate(store.visit(blocks, token_sets)):
            for stack in stacks:
                stack.train_block(block)
        judged = np.unique(np.concatenate([stack.judged_places for stack in stacks]))
        parts = np.array_split(judged, deck.blocks) if len(judged) else []
        for part, _ in zip(parts, store.visit(parts, token_sets), strict=True):
            for stack in stacks:
                stack.judge_part(part)
        for stack in stacks:
            yield from stack.end_epoch()
        stacks = [stack for stack in stacks if stack.fits]


def find_obstacle(head: nn.Module, bag: Bag) -> str:
    """Why a head cannot be run for several rows at once; nothing where it can.

    It is tried: outputs of two rows, and gradients in training, must be what the head gives alone.

    Args:
        head: Of the rows; in any mode.
        bag: Standardised, of few cases.
    """
    names = [name for name, _ in head.named_parameters()]
    state = {name: value.detach() for name, value in head.state_dict().items()}
    other = {name: value + 0.01 if value.is_floating_point() else value for name, value in state.items()}
    rows = {name: torch.stack([state[name], other[name]]) for name in state}

    def run(each: dict[str, torch.Tensor]) -> torch.Tensor:
        output: HeadOutput = torch.func.functional_call(head, each, (bag,))
        return output.logits

    def fit(values: dict[str, torch.Tensor], stacked: bool) -> list[torch.Tensor]:
        leaves = {name: value.clone().requires_grad_(name in names) for name, value in values.items()}
        logits = torch.vmap(run, randomness="same")(leaves) if stacked else run(leaves)
        found = torch.autograd.grad(logits.square().sum(), [leaves[name] for name in names], allow_unused=True)
        return [logits.detach(), *[torch.zeros(()) if each is None else each for each in found]]

    training = head.training
    try:
        for mode in (False, True):
            head.train(mode)
            torch.manual_seed(0)
            together = fit(rows, True)
            for row in range(2):
                torch.manual_seed(0)
                alone = fit({name: value[row] for name, value in rows.items()}, False)
                for many, one in zip(together, alone, strict=True):
                    part = many[row] if many.ndim else many
                    if not torch.allclose(part, one, rtol=_AGREEMENT, atol=_AGREEMENT * float(one.abs().max() + 1e-6)):
                        return "its numbers differ under torch.vmap"
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, AttributeError) as error:
        return f"torch.vmap: {str(error).strip().splitlines()[0]}" if str(error).strip() else type(error).__name__
    finally:
        head.train(training)
    return ""

"""Stacks: fits trained side by side become what each becomes alone, whatever lies beside it and wherever tokens lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from embedkit.bags import Bag, BagShape, BagStore
from embedkit.batching import Deck
from embedkit.descent import StackedAdamW, one_cycle
from embedkit.fitting import FitOptions
from embedkit.losses import StackedLoss, TaskLoss, count_outputs
from embedkit.passes import find_obstacle, run_passes
from embedkit.plugins import HeadOutput, create_head
from embedkit.stacks import Fit, Outcome
from embedkit.standardisation import compute_moments, fit_standardiser
from embedkit.stopping import Watch
from embedkit.storage import ResidentStore, TokenStore
from embedkit.targets import TaskKind

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, CASES = 6, 30
SHAPE = BagShape({"cls:2": (1, DIM)}, {}, ("t1/axial", "t2/axial"))
HOW = FitOptions(epochs=4, batch_size=6, learning_rate=2e-2)


def build_bags() -> BagStore:
    """Cases of 2 to 6 slices in two views, of which every fifth case lacks the second."""
    generator = np.random.default_rng(0)
    rows = np.full((CASES, 2, 6), -1)
    count = 0
    for case in range(CASES):
        for view in range(2 if case % 5 else 1):
            slices = 2 + (case + view) % 5
            rows[case, view, :slices] = np.arange(count, count + slices)
            count += slices
    tokens = generator.normal(size=(count + 1, 1, DIM)).astype(np.float16)
    for case in range(CASES):
        tokens[rows[case][rows[case] >= 0], 0, 0] += 2 * (case % 2)
    tokens[-1] = 0
    rows[rows < 0] = count
    ids = [f"c{case:02}" for case in range(CASES)]
    table = {"cls:2": torch.from_numpy(tokens)}
    return BagStore(SHAPE, ids, table, torch.from_numpy(rows), torch.zeros(rows.shape))


BAGS = build_bags()
STORE = ResidentStore(BAGS, torch.device("cpu"))


def make_fit(
    head: str | nn.Module = "abmil",
    *,
    part: int = 0,
    seed: int = 0,
    kind: TaskKind = "binary",
    epochs: int = 4,
    store: TokenStore = STORE,
    options: dict[str, Any] | None = None,
    blocks: int = 1,
    **how: Any,
) -> Fit:
    """A fit on the cases whose number is not ``part`` modulo 3; those of part + 1 are held out."""
    cases = np.arange(CASES)
    training = cases % 3 != part
    held_out = training & (cases % 3 == (part + 1) % 3) & (cases % 4 < 2)
    targets = {
        "binary": cases % 2,
        "multiclass": cases % 4,
        "multilabel": np.stack([cases % 2, cases % 3 == 0], 1).astype(np.int64),
        "regression": np.sin(cases),
        "survival": np.column_stack([1 + cases * 7 % 11, cases % 5 > 1]).astype(np.float64),
    }[kind]
    likelihood = "mtlr" if head == "mtlr" else "cox"
    outputs = {"multiclass": 4, "multilabel": 2}.get(kind, 1)
    outputs = count_outputs(kind, outputs, targets, likelihood=likelihood)
    if isinstance(head, str):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            name, built = head, create_head(head, SHAPE, ["cls:2"], outputs, options=options)
    else:
        name, built = "own", head
    moments = compute_moments(SHAPE, [BAGS.batch(range(CASES))], ["cls:2"])
    lengths = np.array([max(2 + (case + view) % 5 for view in range(2 if case % 5 else 1)) for case in cases])
    return Fit(
        name=name,
        head=built,
        how=dataclasses.replace(HOW, **how),
        store=store,
        standardiser=fit_standardiser(SHAPE, moments, np.flatnonzero(training).tolist()),
        loss=TaskLoss(kind, targets, training, likelihood=likelihood),
        deck=Deck(cases, lengths, longest=6, blocks=blocks, seed=1),
        key=f"{kind} {part}",
        training=training & ~held_out,
        held_out=held_out,
        noise=5,
        epochs=epochs,
    )


def run(fits: Sequence[Fit], obstacles: dict[str, str] | None = None) -> list[Outcome]:
    with torch.random.fork_rng():
        found = run_passes(fits, obstacles or {})
    return [found[fit] for fit in fits]


def assert_same(first: Outcome, second: Outcome) -> None:
    assert first.epochs == second.epochs
    torch.testing.assert_close(first.logits, second.logits, rtol=1e-3, atol=1e-4)
    for name, value in first.state.items():
        torch.testing.assert_close(second.state[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("head", ["linear", "query", "abmil", "mlp", "grid", "transformer", "mha", "dsmil"])
def test_a_fit_becomes_in_a_stack_what_it_becomes_alone(head: str) -> None:
    """Candidates of one training set, other training sets, and fits that stop early beside it: with dropout."""
    fits = [
        make_fit(head),
        make_fit(head, learning_rate=5e-3, weight_decay=0.3),
        make_fit(head, part=1),
        make_fit(head, part=2, seed=3),
        make_fit(head, epochs=1),
    ]
    together = run(fits)
    for fit, outcome in zip(fits, together, strict=True):
        assert_same(run([fit])[0], outcome)
    assert not torch.allclose(together[0].logits, together[1].logits, atol=1e-4)


@pytest.mark.parametrize("head", ["linear", "abmil"])
def test_views_are_dropped_in_a_stack_as_alone(head: str) -> None:
    fits = [make_fit(head, part=part, view_dropout=0.4) for part in (0, 1, 2)]
    together = run(fits)
    for fit, outcome in zip(fits, together, strict=True):
        assert_same(run([fit])[0], outcome)
    (plain,) = run([make_fit(head)])
    assert not torch.allclose(plain.logits, together[0].logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel", "regression"])
def test_every_kind_of_task_is_trained_side_by_side_as_alone(kind: TaskKind) -> None:
    fits = [make_fit("query", kind=kind, part=part) for part in range(3)]
    for fit, outcome in zip(fits, run(fits), strict=True):
        assert_same(run([fit])[0], outcome)


@pytest.mark.parametrize("head", ["cox", "mtlr"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_survival_heads_are_trained_side_by_side_as_alone(head: str, blocks: int) -> None:
    """With risk sets cut by batches and by blocks; by cox the level of the logits is left to rounding."""
    fits = [make_fit(head, kind="survival", part=part, blocks=blocks, batch_size=16) for part in range(3)]
    for fit, together in zip(fits, run(fits), strict=True):
        alone = run([fit])[0]
        assert alone.epochs == together.epochs > 0
        assert alone.loss == pytest.approx(together.loss, rel=1e-4)
        level = [each.logits.mean(0) if head == "cox" else 0 for each in (alone, together)]
        torch.testing.assert_close(alone.logits - level[0], together.logits - level[1], rtol=1e-3, atol=1e-4)
        assert alone.logits.std() > 1e-3


@pytest.mark.parametrize("kind_of_head", ["abmil", "dsmil"])
def test_a_fit_alone_is_what_plain_torch_makes_of_it(kind_of_head: str) -> None:
    """The textbook loop: module, AdamW, OneCycleLR, the same batches; an auxiliary answer has half of the loss."""
    fit = make_fit(kind_of_head, options={"dropout": 0.0}, epochs=3)
    outcome = run([dataclasses.replace(fit, held_out=np.zeros(CASES, bool))])[0]
    head = create_head(kind_of_head, SHAPE, ["cls:2"], 1, options={"dropout": 0.0})
    head.load_state_dict(fit.head.state_dict())
    optimiser = torch.optim.AdamW(head.parameters(), lr=fit.how.learning_rate, weight_decay=fit.how.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, fit.how.learning_rate, total_steps=fit.how.epochs * fit.steps, pct_start=0.2
    )
    for epoch in range(3):
        for cases in fit.deck.batches("again", fit.training, epoch, 0, fit.steps):
            bag = fit.standardiser(BAGS.batch(torch.from_numpy(cases)))
            output = head(bag)
            answers = [each for each in (output.logits, output.auxiliary_logits) if each is not None]
            loss = torch.stack([fit.loss(each, torch.from_numpy(cases)) for each in answers]).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    for name, value in head.state_dict().items():
        torch.testing.assert_close(outcome.state[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("length", [7, 8200])  # rows taken together, and through the fused kernel
def test_stacked_adamw_is_torchs_row_by_row(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, length, generator=generator)
    rates, decays = torch.tensor([1e-1, 1e-2, 1e-3]), torch.tensor([0.0, 0.1, 0.5])
    stacked = StackedAdamW(start.clone(), rates, decays)
    rows = [nn.Parameter(row.clone()) for row in start]
    optimisers = [
        torch.optim.AdamW([row], lr=float(rate), weight_decay=float(decay))
        for row, rate, decay in zip(rows, rates, decays, strict=True)
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(each, float(rate), total_steps=21, pct_start=0.2)
        for each, rate in zip(optimisers, rates, strict=True)
    ]
    for step in range(20):
        slopes = torch.randn(3, length, generator=generator)
        for rows_of in (slice(0, 1), [2, 1]):  # a view, and rows that lie apart
            part = slopes[rows_of]
            stacked.update(
                rows_of, {(0, 4): part[:, :4].reshape(-1, 2, 2), (4, length): part[:, 4:]}, one_cycle(step, 21)
            )
        for row, slope, optimiser, schedule in zip(rows, slopes, optimisers, schedules, strict=True):
            row.grad = slope.clone()
            optimiser.step()
            schedule.step()
    torch.testing.assert_close(stacked.values, torch.stack([row.detach() for row in rows]), rtol=1e-5, atol=1e-6)
    stacked.keep(torch.tensor([2]))
    slope = torch.randn(1, length, generator=generator)
    stacked.update(slice(0, 1), {(0, length): slope}, one_cycle(20, 21))
    rows[2].grad = slope[0]
    optimisers[2].step()
    torch.testing.assert_close(stacked.values, rows[2].detach()[None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 40])
def test_the_schedule_is_torchs(steps: int) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.AdamW([parameter], lr=3.0)
    if steps == 5:  # torch divides by zero there: the rate rises over no step at all
        assert one_cycle(0, 5).rate == 1.0
        return
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3.0, total_steps=steps, pct_start=0.2)
    for step in range(steps):
        at = one_cycle(step, steps)
        assert at.step == step + 1
        assert at.rate * 3 == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-6)
        assert at.momentum == pytest.approx(optimiser.param_groups[0]["betas"][0], rel=1e-6)
        optimiser.step()
        if step < steps - 1:
            schedule.step()


class GruHead(nn.Module):
    """Bidirectional recurrent units over the slices of the first view, which torch.vmap refuses."""

    reads: ClassVar[frozenset[str]] = frozenset({"cls"})
    fit_by: ClassVar[str] = "gradient"

    def __init__(self) -> None:
        super().__init__()
        self.recur = nn.GRU(DIM, 4, batch_first=True)
        self.classify = nn.Linear(4, 1)

    def forward(self, bag: Bag) -> HeadOutput:
        tokens = bag.tokens["cls:2"][:, 0, :, 0].masked_fill(~bag.mask[:, 0, :, None], 0.0)
        last: Tensor = self.recur(tokens)[1][0]
        return HeadOutput(self.classify(last))


class SlyHead(GruHead):
    """Gives other numbers when it is run for many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.recur = nn.Linear(DIM, 1)  # type: ignore[assignment]

    def forward(self, bag: Bag) -> HeadOutput:
        value = self.recur(bag.tokens["cls:2"][:, 0, 0, 0])
        many = torch._C._functorch.is_batchedtensor(value)
        return HeadOutput(value * (2.0 if many else 1.0))


def test_heads_that_cannot_be_stacked_are_found_out() -> None:
    bag = BAGS.batch([1, 2]).to(dtype=torch.float32)
    assert find_obstacle(create_head("abmil", SHAPE, ["cls:2"], 1), bag) == ""
    assert "torch.vmap" in find_obstacle(GruHead(), bag)
    assert find_obstacle(SlyHead(), bag) == "its numbers differ under torch.vmap"


def test_a_head_that_cannot_be_stacked_is_fitted_in_turn_on_the_same_batches() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = GruHead()
    fits = [make_fit(head), make_fit(head, learning_rate=1e-3), make_fit(head, part=1)]
    together = run(fits, {"own": "because"})
    for fit, outcome in zip(fits, together, strict=True):
        assert_same(run([fit], {"own": "because"})[0], outcome)
    assert together[0].epochs > 0


def test_a_deck_deals_every_case_once_and_each_set_its_own() -> None:
    lengths = np.arange(CASES) % 7 + 1
    deck = Deck(np.arange(CASES), lengths, longest=7, blocks=3, seed=0)
    training = np.arange(CASES) % 3 > 0
    blocks = deck.deal(4)
    assert sorted(np.concatenate(blocks).tolist()) == list(range(CASES))
    count = deck.steps(int(training.sum()), 4)
    batches = [deck.batches("a", training, 4, block, count) for block in range(3)]
    dealt = np.concatenate([case for each in batches for case in each])
    assert sorted(dealt.tolist()) == np.flatnonzero(training).tolist()
    assert all(np.isin(np.concatenate(each), block).all() for each, block in zip(batches, blocks, strict=True))
    assert len(batches[0]) == count == 2
    again = Deck(np.arange(CASES), lengths, longest=7, blocks=3, seed=0)
    assert all((a == b).all() for a, b in zip(again.batches("b", training, 4, 0, count), batches[0], strict=True))
    assert not np.array_equal(np.concatenate(deck.deal(5)), np.concatenate(blocks))


def test_balanced_batches_hold_each_class_alike_and_spread_a_rare_class_evenly() -> None:
    training, classes = np.arange(60) % 6 > 0, (np.arange(60) % 10 == 1).astype(np.int64)  # 44 common, 6 rare
    deck = Deck(np.arange(60), np.ones(60, np.int64), longest=1, blocks=1, seed=0)
    dealt = [np.concatenate(deck.batches("a", training, epoch, 0, 5, classes=classes)) for epoch in range(2)]
    for cases in dealt:
        counts = np.bincount(cases, minlength=60)
        assert len(cases) == 50 and not counts[~training].any()
        assert counts[classes == 1].sum() == 25 and set(counts[training & (classes == 1)]) == {4, 5}
        assert set(counts[training & (classes == 0)]) == {0, 1}
    assert set(dealt[0]) != set(dealt[1])
    plain = np.concatenate(deck.batches("b", training, 0, 0, 5))
    assert sorted(plain) == np.flatnonzero(training).tolist()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_focal_loss_is_that_of_torchvision_and_of_the_paper(weighted: bool) -> None:
    truth = np.array([0, 1, 1, 0, 0, 0, 0, 0])
    logits = torch.tensor([-3.0, 2.0, -0.5, 0.3, 1.0, -9.0, 60.0, -200.0])[:, None].requires_grad_()
    cases, everyone = torch.arange(8), np.ones(8, bool)
    loss = TaskLoss("binary", truth, everyone, class_weights=weighted, gamma=2.0)
    expected = sigmoid_focal_loss(logits[:, 0], torch.from_numpy(truth).float(), alpha=-1, gamma=2.0)
    expected = expected * torch.where(torch.from_numpy(truth) == 1, 3.0 if weighted else 1.0, 1.0)
    torch.testing.assert_close(loss.each(logits, cases), expected)
    wide = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.2, 0.1], [90.0, 0.0, 0.0]], requires_grad=True)
    codes = np.array([0, 2, 0])
    for gamma in (0.5, 2.0):
        several = TaskLoss("multiclass", codes, everyone[:3], class_weights=weighted, gamma=gamma)
        chances = wide.detach().double().softmax(1)[torch.arange(3), codes]
        by_hand = -((1 - chances) ** gamma) * chances.log() * (torch.tensor([0.75, 1.5, 0.75]) if weighted else 1)
        found = several.each(wide, torch.arange(3))
        torch.testing.assert_close(found.double(), by_hand, atol=1e-6, rtol=1e-4)
        (slope,) = torch.autograd.grad(found.sum(), wide)
        assert slope.isfinite().all()
        plain = TaskLoss("multiclass", codes, everyone[:3], class_weights=weighted)
        torch.testing.assert_close(several.judge.each(wide, torch.arange(3)), plain.each(wide, torch.arange(3)))


def test_balanced_batches_are_not_weighted_too_but_judged_with_weights() -> None:
    truth, everyone = np.array([0, 0, 0, 1]), np.ones(4, bool)
    logits, cases = torch.zeros(4, 1), torch.arange(4)
    loss = TaskLoss("binary", truth, everyone, balanced=True)
    np.testing.assert_allclose(loss.each(logits, cases), np.log(2) * np.ones(4), rtol=1e-6)
    np.testing.assert_allclose(loss.judge.each(logits, cases), np.log(2) * np.array([1, 1, 1, 3]), rtol=1e-6)


def test_batches_differ_by_one_case_at_most_and_are_alike_in_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 100)
    deck = Deck(np.arange(100), lengths, longest=90, blocks=1, seed=0)
    batches = deck.batches("all", np.ones(100, bool), 0, 0, deck.steps(100, 16))
    assert sorted(map(len, batches)) == [14, 14, 14, 14, 14, 15, 15]
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < 0.3 * np.ptp(lengths)
    assert deck.slices(np.flatnonzero(lengths == lengths.max())) <= 90


def test_the_watch_takes_the_latest_epoch_that_is_not_worse() -> None:
    """Two fits: one gets better for two epochs and then much worse, one is never finite."""
    truth = np.array([0, 1, 0, 1, 1])
    loss = StackedLoss([TaskLoss("binary", truth, np.ones(5, bool), class_weights=False)] * 2)
    cases = torch.tensor([[0, 1, 2, 3, 0], [0, 1, 2, 3, 4]])
    watch = Watch(cases, torch.tensor([[True] * 4 + [False], [True] * 5]), patience=2)
    signs = torch.tensor(2.0 * truth - 1, dtype=torch.float32)[cases][..., None]
    going = []
    for size in (0.5, 2.0, -3.0, -3.0, -3.0):
        logits = size * signs
        logits[1] = torch.nan
        logits[0, 4] = torch.nan  # padding
        going.append(watch.judge(logits, loss).tolist())
    assert watch.epochs.tolist() == [2, 0]
    assert [each[0] for each in going] == [True, True, True, False, False]
    assert watch.logits[0, :4, 0].tolist() == (2.0 * signs[0, :4, 0]).tolist()
    factor = watch.sharpness[0]
    expected = torch.nn.functional.softplus(-2.0 * factor)
    torch.testing.assert_close(watch.losses[0], expected)


def test_a_fit_that_diverges_leaves_its_neighbours_alone() -> None:
    fits = [make_fit("linear"), make_fit("linear", learning_rate=1e30)]
    fine, diverged = run(fits)
    assert diverged.epochs == 0
    assert_same(run(fits[:1])[0], fine)


def test_half_precision_is_near_full() -> None:
    full, half = (run([make_fit("abmil", precision=each)])[0] for each in ("fp32", "bf16"))
    torch.testing.assert_close(half.logits, full.logits, rtol=0.2, atol=0.2)
    assert not torch.equal(half.logits, full.logits)
    assert half.state["embed.0.weight"].dtype == torch.float32

"""Time of 64 heads in one sweep over 64 times one head; and of 20 tasks in one call over 20 calls of one task.

The tasks have folds of their own, and then, as `train --same-folds` deals them, one partition of the cases for all.

Tokens are random, in memory, as class tokens of a ViT-S (384 numbers). Five folds, no
bootstrap, no file: what is timed is `embedkit.crossfitting.cross_fit` on a preparation that both sides share. Single
fits are timed on a few and multiplied; since a choice takes three inner splits where one head alone takes one, "one
head" is half the time of a choice between two.

    python benchmarks/train_sweep.py [--cases 120] [--slices 40] [--head query] [--heads 64] [--tasks 20] [--epochs 10]
        [--threads 2] [--cpu-time]

Ends with the ratio of the sweep of the head given last.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch

from embedkit.allocator import keep_freed_memory
from embedkit.crossfitting import cross_fit
from embedkit.fitting import FitOptions
from embedkit.foldjobs import FoldedTask
from embedkit.headplans import HeadPlan
from embedkit.jointfitting import deal_together
from embedkit.members import complete_options
from embedkit.preparation import Preparation
from embedkit.sweeps import Candidate
from embedkit.tasks import Task, make_folds, make_task

TOKENS, DIM, SINGLES = "cls:12", 384, 3


class RandomTokens:
    """A cache of random tokens, in memory."""

    def __init__(self, cases: int, slices: int) -> None:
        generator = np.random.default_rng(0)
        self._tokens = generator.normal(size=(cases, slices, DIM)).astype(np.float16)
        self._tokens[::2, :, :8] += 0.3
        ids = [f"c{case:05}" for case in range(cases)]
        self.stacks = pl.DataFrame(
            {"stack": range(cases), "case_id": ids, "patient_id": ids, "view": "t1", "plane": "axial", "count": slices}
        )
        self.token_sets = {TOKENS: _Shape((DIM,))}

    def read(self, stack: int, _token_set: str, /) -> np.ndarray[Any, Any]:
        return self._tokens[stack]

    def slices(self, _stack: int, /) -> _Slices:
        return _Slices(self._tokens.shape[1])


class _Shape:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


class _Slices:
    def __init__(self, slices: int) -> None:
        self.positions_mm = np.arange(slices, dtype=np.float32)
        self.blank = np.zeros(slices, dtype=bool)


def make_tasks(source: RandomTokens, number: int) -> list[FoldedTask]:
    """Tasks of the same cases, all with a little signal, each with folds of its own."""
    ids = source.stacks["case_id"].to_list()
    found = []
    for seed in range(number):
        flips = np.random.default_rng(seed).random(len(ids)) < 0.2
        labels = pl.DataFrame(
            {"case_id": ids, f"task{seed}": [int(place % 2 ^ flip) for place, flip in enumerate(flips)]}
        )
        task, _ = make_task(labels, f"task{seed}", source.stacks.select("case_id", "patient_id"))
        found.append(FoldedTask(task, make_folds(task, 5, seed=seed)[None]))
    return found


def time_fits(source: RandomTokens, plan: HeadPlan, targets: Sequence[FoldedTask], clock: Callable[[], float]) -> float:
    """Seconds of one call, everything read anew."""
    started = clock()
    ids = source.stacks["case_id"].to_list()
    preparation = Preparation(source, [plan], ids, torch.device("cpu"), storage="memory")
    cross_fit(preparation, [(plan, target) for target in targets], seed=0)
    return clock() - started


def deal(task: Task) -> FoldedTask:
    return FoldedTask(task, make_folds(task, 5, seed=0)[None])


def plan_of(head: str, how: Sequence[FitOptions]) -> HeadPlan:
    return HeadPlan(head, tuple(Candidate((TOKENS,), complete_options(head, {}), each) for each in how))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("cases", 120), ("slices", 40), ("heads", 64), ("tasks", 20), ("epochs", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--head", action="append", help="again for more; default: abmil, linear, mlp, query")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, not those of a clock on the wall")
    given = parser.parse_args()
    clock = time.process_time if given.cpu_time else time.perf_counter
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    source = RandomTokens(given.cases, given.slices)
    base = FitOptions(epochs=given.epochs, patience=given.epochs)
    rates = [base.replace(learning_rate=float(rate)) for rate in np.logspace(-4, -2, given.heads)]
    tasks = make_tasks(source, given.tasks)
    same = list(deal_together([each.task for each in tasks], deal).values())
    print(f"{given.cases} cases of {given.slices} slices, {DIM} numbers each, {given.epochs} epochs, 5 folds")
    ratio = 0.0
    for head in given.head or ["abmil", "linear", "mlp", "query"]:

        def time_one(how: Sequence[FitOptions], targets: Sequence[FoldedTask], head: str = head) -> float:
            return time_fits(source, plan_of(head, how), targets, clock)

        time_one(rates[:1], tasks[:1])
        pair = float(np.median([time_one([rates[at], rates[at]], tasks[:1]) / 2 for at in range(SINGLES)]))
        sweep = time_one(rates, tasks[:1])
        ratio = sweep / (given.heads * pair)
        print(f"{head:7} {given.heads} heads in one sweep {sweep:7.2f} s, one {pair:6.3f} s, ratio {ratio:.3f}")
        single = float(np.median([time_one(rates[:1], [task]) for task in tasks[:SINGLES]]))
        for name, targets in (("of their own", tasks), ("the same", same)):
            together = time_one(rates[:1], targets)
            print(
                f"{head:7} {given.tasks} tasks in one call, folds {name}, {together:7.2f} s,"
                f" one {single:6.3f} s, ratio {together / (given.tasks * single):.3f}",
                flush=True,
            )
    print(f"ratio {ratio:.2f}")


if __name__ == "__main__":
    main()

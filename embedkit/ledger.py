"""Owns what is known of an extraction that several workers share; extracts nothing, and speaks to no worker.

Which cases are left, which worker has which, what became of each.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from embedkit.account import ExtractionProgress, ExtractionSummary
from embedkit.cache import Cache, open_cache
from embedkit.failures import Failure, Stray, record_failure
from embedkit.orders import Begin, Done, Failed, Same, Settled
from embedkit.sources import CachedSources, Case
from embedkit.strays import Looks

__all__ = ["MOST_LOSSES", "Ledger", "Seat", "Work"]

MOST_LOSSES = 2
"""A case that was in work each time as many workers were lost is put on record as failed, and not tried again."""


@dataclass
class Seat:
    """A worker as the dispatcher sees it; ``cases`` are those given to it that may not be on disk yet."""

    number: int
    state: Literal["starting", "idle", "working", "gone"] = "starting"
    replaced: bool = False
    cases: dict[str, Case] = field(default_factory=dict)


@dataclass
class Ledger:
    """What became of each pending case, as workers tell it; a lost worker's cases can be taken back.

    Attributes:
        cases: Given to the call.
        pending: Of these, those that the cache lacked.
        on_progress: Called after every case.
        started: `time.perf_counter` at the start of the call.
        outcomes: By case, the latest.
        looks: By folder that was looked through, its strays.
    """

    cases: int
    pending: int
    on_progress: Callable[[ExtractionProgress], None] | None
    started: float
    outcomes: dict[str, Settled] = field(default_factory=dict)
    looks: dict[Path, Sequence[Sequence[Stray]]] = field(default_factory=dict)
    _counts: Counter[type[Settled]] = field(default_factory=Counter)
    _slices: int = 0
    _blank_slices: int = 0
    _in_work: int = 0
    _waits: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        """Cases on record as failed so far."""
        return self._counts[Failed]

    def look(self, looks: Looks) -> None:
        """Takes down what strays there are in folders."""
        self.looks.update(looks)

    def settle(self, outcome: Settled) -> None:
        """Takes down what became of a case."""
        self.forget(outcome.case_id)
        self.outcomes[outcome.case_id] = outcome
        self._count(outcome, 1)
        if isinstance(outcome, Done):
            self._in_work -= outcome.slices - outcome.blank_slices
        self._report()

    def compute(self, slices: int) -> None:
        """Counts slices of cases in work; those of a lost worker are counted again when they are done again."""
        self._in_work += slices
        self._report()

    def _report(self) -> None:
        if self.on_progress is not None:
            self.on_progress(
                ExtractionProgress(
                    cases=self.cases,
                    cases_before=self.cases - self.pending + self._counts[Same],
                    cases_done=self._counts[Done],
                    cases_failed=self._counts[Failed],
                    slices=self._slices + max(0, self._in_work),
                    seconds=time.perf_counter() - self.started,
                )
            )

    def forget(self, case_id: str) -> None:
        """Takes a case back, if it was settled: its tokens were lost before they were on disk."""
        outcome = self.outcomes.pop(case_id, None)
        if outcome is not None:
            self._count(outcome, -1)

    def wait(self, waits: Mapping[str, float]) -> None:
        """Adds the waits of one worker; those of several workers overlap."""
        self._waits.update(waits)

    def summarise(self, cache: Path, fingerprint: str, strays: tuple[Stray, ...] = ()) -> ExtractionSummary:
        """What the call did, at its end; ``fingerprint`` of the cache's recipe, ``strays`` as they are on record."""
        done = [each for each in self.outcomes.values() if isinstance(each, Done)]
        return ExtractionSummary(
            cache=cache,
            fingerprint=fingerprint,
            cases=self.cases,
            cases_before=self.cases - self.pending + self._counts[Same],
            cases_done=len(done),
            changed=tuple(each.case_id for each in done if each.changed),
            failures=tuple(each.failure for each in self.outcomes.values() if isinstance(each, Failed)),
            strays=strays,
            slices=self._slices,
            blank_slices=self._blank_slices,
            seconds=time.perf_counter() - self.started,
            waits=dict(self._waits),
            interrupted=len(self.outcomes) < self.pending,
        )

    def _count(self, outcome: Settled, sign: int) -> None:
        self._counts[type(outcome)] += sign
        if isinstance(outcome, Done):
            self._slices += sign * outcome.slices
            self._blank_slices += sign * outcome.blank_slices


@dataclass
class Work:
    """What is known from the first worker's recipe on, and what is left to do.

    Attributes:
        begin: Order to every worker; names the cache.
        sources: What the cache held at the start.
        ledger: Of the cases that it did not hold.
        queue: Cases that no worker has; those that were with a lost worker come last.
        held: Ids of the cases that were cached before.
        losses: By case, how many workers were lost that had it in work.
    """

    begin: Begin
    sources: CachedSources
    ledger: Ledger
    queue: deque[Case]
    held: list[str]
    losses: Counter[str] = field(default_factory=Counter)

    def next_for(self, seat: Seat) -> Case | None:
        """Takes a worker's next case from the queue; None where it is to finish what it has before it gets more.

        A case that was with a lost worker is worked on by itself, so that the next loss tells which one is to blame.
        """
        alone = any(case_id in self.losses for case_id in seat.cases)
        busy = seat.state == "working" and bool(self.queue) and self.queue[0].case_id in self.losses
        return None if alone or busy or not self.queue else self.queue.popleft()

    def take_back(self, given: Sequence[Case], reason: str) -> int:
        """Queues again those cases of a lost worker that are not on disk; returns how many.

        ``reason`` is put on record where a case was in work too often.
        """
        again = 0
        with open_cache(self.begin.cache) as cache:
            held = CachedSources(cache.stacks, self.begin.recipe)
            for case in given:
                outcome = self.ledger.outcomes.get(case.case_id)
                if outcome is not None and not isinstance(outcome, Done):
                    continue
                if held.holds(case):
                    if outcome is None:
                        self.ledger.settle(self._describe_stored(cache, case))
                    continue
                self.ledger.forget(case.case_id)
                if outcome is None and self._lost_too_often(case, reason):
                    continue
                self.queue.append(case)
                again += 1
        return again

    def _describe_stored(self, cache: Cache, case: Case) -> Done:
        """What a worker would have told of a case that it wrote, had it not been lost before."""
        rows = cache.stacks.filter(cache.stacks["case_id"].is_in(cache.recipe.stored_ids(case.case_id)))
        blank = sum(int(cache.slices(stack).blank.sum()) for stack in rows["stack"])
        digests = {
            (view, plane): digest for view, plane, digest in rows.select("view", "plane", "source_digest").iter_rows()
        }
        return Done(case.case_id, int(rows["count"].sum()), blank, self.sources.changed(case, digests))

    def _lost_too_often(self, case: Case, reason: str) -> bool:
        """Counts a worker lost with the case in work, and puts the case on record once there are too many."""
        self.losses[case.case_id] += 1
        if self.losses[case.case_id] < MOST_LOSSES:
            return False
        failure = Failure(
            case_id=case.case_id,
            reason=f"{MOST_LOSSES} workers were lost with this case in work, the last one: {reason}; it may take more"
            " memory than there is: try it with fewer workers, or leave it out",
        )
        record_failure(self.begin.cache, failure)
        self.ledger.settle(Failed(failure))
        return True

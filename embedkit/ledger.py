"""Owns the counts of an extraction that several workers share: what became of each case; extracts nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from embedkit.account import ExtractionProgress, ExtractionSummary
from embedkit.orders import Done, Failed, Same, Settled
from embedkit.recipe import Recipe

__all__ = ["Ledger"]


@dataclass
class Ledger:
    """What became of each pending case, as workers tell it; a lost worker's cases can be taken back.

    Attributes:
        cases: Given to the call.
        pending: Of these, those that the cache lacked.
        on_progress: Called after every case.
        started: `time.perf_counter` at the start of the call.
        outcomes: By case, the latest.
    """

    cases: int
    pending: int
    on_progress: Callable[[ExtractionProgress], None] | None
    started: float
    outcomes: dict[str, Settled] = field(default_factory=dict)
    _counts: Counter[type[Settled]] = field(default_factory=Counter)
    _slices: int = 0
    _blank_slices: int = 0
    _waits: Counter[str] = field(default_factory=Counter)

    def settle(self, outcome: Settled) -> None:
        """Takes down what became of a case."""
        self.forget(outcome.case_id)
        self.outcomes[outcome.case_id] = outcome
        self._count(outcome, 1)
        if self.on_progress is not None:
            self.on_progress(
                ExtractionProgress(
                    cases=self.cases,
                    cases_before=self.cases - self.pending + self._counts[Same],
                    cases_done=self._counts[Done],
                    cases_failed=self._counts[Failed],
                    slices=self._slices,
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

    def summarise(self, cache: Path, recipe: Recipe) -> ExtractionSummary:
        """What the call did, at its end."""
        done = [each for each in self.outcomes.values() if isinstance(each, Done)]
        return ExtractionSummary(
            cache=cache,
            fingerprint=recipe.fingerprint,
            cases=self.cases,
            cases_before=self.cases - self.pending + self._counts[Same],
            cases_done=len(done),
            changed=tuple(each.case_id for each in done if each.changed),
            failures=tuple(each.failure for each in self.outcomes.values() if isinstance(each, Failed)),
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

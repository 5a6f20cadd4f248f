"""Owns the counts of an extraction: how far it is, and what it did in the end; extracts nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from embedkit.casework import CaseWork
from embedkit.failures import Failure, Stray
from embedkit.readahead import Waits
from embedkit.recipe import Recipe
from embedkit.sources import Case
from embedkit.strays import Looks

__all__ = ["Account", "ExtractionProgress", "ExtractionSummary"]

_TELL_EVERY_S = 1.0


@dataclass(frozen=True)
class ExtractionProgress:
    """Where an extraction stands.

    Attributes:
        cases: Cases in the manifest.
        cases_before: Of these, those that the cache held already.
        cases_done: Of these, those extracted by this call so far.
        cases_failed: Of these, those that failed so far.
        slices: Slices computed so far, blank ones counted with the case that they belong to.
        seconds: Wall time so far.
    """

    cases: int
    cases_before: int
    cases_done: int
    cases_failed: int
    slices: int
    seconds: float

    @property
    def cases_left(self) -> int:
        """Cases neither cached, nor extracted, nor failed."""
        return self.cases - self.cases_before - self.cases_done - self.cases_failed

    @property
    def seconds_left(self) -> float | None:
        """What the rest will take at the pace so far; None before the first case is settled."""
        settled = self.cases_done + self.cases_failed
        return self.seconds / settled * self.cases_left if settled else None


@dataclass(frozen=True)
class ExtractionSummary:
    """What one call of `extract` did.

    Attributes:
        cache: The cache's folder.
        fingerprint: Of its recipe; empty where the call was stopped before a worker knew it.
        cases: Cases in the manifest.
        cases_before: Cases that the cache held already, unchanged.
        cases_done: Cases extracted by this call.
        changed: Of those, the ids of cases that were cached from files with other bytes.
        failures: Cases without tokens, and why.
        strays: Damaged DICOM files of which no series can be told, in the folders that were looked through.
        slices: Slices stored by this call, blank ones included.
        blank_slices: Of those, constant ones: marked, and never sent through the backbone.
        seconds: Wall time.
        waits: Seconds that a stage stood still, by "who for what" (``backbone for slices``); stages overlap.
        interrupted: True where ``stop`` was set before all cases were done.
    """

    cache: Path
    fingerprint: str
    cases: int
    cases_before: int
    cases_done: int
    changed: tuple[str, ...]
    failures: tuple[Failure, ...]
    strays: tuple[Stray, ...]
    slices: int
    blank_slices: int
    seconds: float
    waits: dict[str, float]
    interrupted: bool


@dataclass
class Account:
    """Counts of one extraction, told to ``on_progress`` after every case, and once a second in between."""

    cases: int
    pending: int
    on_progress: Callable[[ExtractionProgress], None] | None
    started: float = field(default_factory=time.perf_counter)
    waits: Waits = field(default_factory=Waits)
    settled: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    looks: dict[Path, Sequence[Sequence[Stray]]] = field(default_factory=dict)
    cases_same: int = 0
    slices: int = 0
    blank_slices: int = 0
    _in_work: int = 0
    _told: float = -math.inf

    @property
    def left(self) -> int:
        """Cases not settled yet."""
        return self.pending - len(self.settled) - len(self.failures)

    def looked(self, looks: Looks) -> None:
        """Takes down what strays there are in folders."""
        self.looks.update(looks)

    def done(self, work: CaseWork, *, changed: bool) -> None:
        """Counts an extracted case; ``changed`` where it was cached from files with other bytes."""
        self.settled.append(work.case.case_id)
        self.slices += work.slices
        self.blank_slices += work.blank_slices
        self._in_work -= work.slices - work.blank_slices
        if changed:
            self.changed.append(work.case.case_id)
        self._report()

    def failed(self, failure: Failure) -> None:
        """Counts a failed case."""
        self.failures.append(failure)
        self._report()

    def same(self, case: Case) -> None:
        """Counts a case whose files were touched but hold the cached bytes."""
        self.settled.append(case.case_id)
        self.cases_same += 1
        self._report()

    def tick(self, slices: int) -> None:
        """Counts slices of cases in work, and tells where the extraction stands, at most once a second."""
        self._in_work += slices
        if time.perf_counter() - self._told >= _TELL_EVERY_S:
            self._report()

    def _report(self) -> None:
        self._told = time.perf_counter()
        if self.on_progress is not None:
            self.on_progress(
                ExtractionProgress(
                    cases=self.cases,
                    cases_before=self.cases - self.pending + self.cases_same,
                    cases_done=len(self.settled) - self.cases_same,
                    cases_failed=len(self.failures),
                    slices=self.slices + max(0, self._in_work),
                    seconds=time.perf_counter() - self.started,
                )
            )

    def summarise(
        self, cache: Path, recipe: Recipe, *, strays: tuple[Stray, ...], interrupted: bool
    ) -> ExtractionSummary:
        """What the call did, at its end."""
        return ExtractionSummary(
            cache=cache,
            fingerprint=recipe.fingerprint,
            cases=self.cases,
            cases_before=self.cases - self.pending + self.cases_same,
            cases_done=len(self.settled) - self.cases_same,
            changed=tuple(self.changed),
            failures=tuple(self.failures),
            strays=strays,
            slices=self.slices,
            blank_slices=self.blank_slices,
            seconds=time.perf_counter() - self.started,
            waits=dict(self.waits.seconds),
            interrupted=interrupted,
        )

"""Owns sharing out the cases of one extraction to several workers, and what happens when one of them is lost.

Knows neither processes nor clusters: a `Transport` starts workers (`embedkit.worker`) and carries orders and events.
What the cache holds is the truth about a lost worker: only cases that are not on disk are done again.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from embedkit.account import ExtractionProgress, ExtractionSummary
from embedkit.cache import create_cache, open_cache
from embedkit.confirmations import read_confirmations
from embedkit.errors import EmbedkitError, ExtractionError
from embedkit.failures import settle_cases
from embedkit.ledger import Ledger, Seat, Work
from embedkit.orders import (
    Begin,
    Broken,
    Computed,
    Drain,
    Drained,
    Event,
    Failed,
    Looked,
    Lost,
    Quit,
    Ready,
    Stop,
    Transport,
    Wanted,
)
from embedkit.recipe import require_same_recipe
from embedkit.sources import CachedSources, Case
from embedkit.strays import account_strays, look_again

__all__ = ["dispatch_cases"]

_POLL_S = 0.2
_LONG_START_S = 30.0
"""A wait for the first worker, or for those in the places of lost ones, that is worth a word."""


def dispatch_cases(
    cases: Sequence[Case],
    cache: Path,
    transport: Transport,
    *,
    on_progress: Callable[[ExtractionProgress], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
    manifest: Sequence[Case] = (),
) -> ExtractionSummary:
    """Extracts the cases that ``cache`` lacks with the workers of a transport.

    Args:
        cases: Of the manifest, with absolute paths.
        cache: Absolute; made once the first worker knows the recipe.
        transport: Closed at the end.
        on_progress: As for `embedkit.extract`, like all that follow.
        on_notice: Told in one line of every worker that is lost or started anew, and once of a long wait for workers.
        stop: Once set, the workers write what is finished. Set before any worker is ready, it ends the call at once:
            the cache is not touched, and the summary has no fingerprint.
        manifest: All cases of it, where others than ``cases`` are done by another call.

    Raises:
        ExtractionError: every worker was lost, and those in their places as well.
        EmbedkitError: whatever stops a single process (see `embedkit.extract`) stops all workers, after they have
            written what is finished.
    """
    with closing(transport):
        dispatcher = _Dispatcher(
            cases,
            cache,
            transport,
            on_progress=on_progress,
            on_notice=on_notice,
            stop=stop or threading.Event(),
            manifest=manifest or cases,
        )
        return dispatcher.run()


class _Dispatcher:
    """State of one call of `dispatch_cases`."""

    def __init__(
        self,
        cases: Sequence[Case],
        cache: Path,
        transport: Transport,
        *,
        on_progress: Callable[[ExtractionProgress], None] | None,
        on_notice: Callable[[str], None] | None,
        stop: threading.Event,
        manifest: Sequence[Case],
    ) -> None:
        self._cases, self._cache, self._transport, self._manifest = cases, cache, transport, manifest
        self._on_progress, self._on_notice, self._stop = on_progress, on_notice, stop
        self._started = time.perf_counter()
        self._seats = [Seat(number) for number in range(transport.size)]
        self._restarts = transport.size
        self._last_reason = ""
        self._fatal: EmbedkitError | None = None
        self._stopping = False
        self._last_ready: float | None = self._started
        self._work: Work | None = None

    def run(self) -> ExtractionSummary:
        for seat in self._seats:
            self._transport.start(seat.number)
        while (work := self._finished()) is None:
            gone: set[int] = set()
            for number, event in self._transport.poll(_POLL_S):
                if number not in gone:
                    self._handle(self._seats[number], event)
                if isinstance(event, Broken | Lost):
                    gone.add(number)
            if self._stop.is_set() and self._work is None and self._fatal is None:
                self._dismiss()
                return Ledger(len(self._cases), len(self._cases), None, self._started).summarise(self._cache, "")
            if self._stop.is_set():
                self._halt()
            self._tell_long_start()
        self._dismiss()
        settled = [name for name, each in work.ledger.outcomes.items() if not isinstance(each, Failed)]
        failed = [each.failure for each in work.ledger.outcomes.values() if isinstance(each, Failed)]
        settle_cases(self._cache, [*work.held, *settled], failed)
        strays = account_strays(self._cache, self._manifest, work.ledger.looks)
        return work.ledger.summarise(self._cache, work.begin.recipe.fingerprint, strays)

    def _tell_long_start(self) -> None:
        """Says once that there is no worker yet, as where a cluster has no room for one."""
        if self._last_ready is None or self._on_notice is None:
            return
        starting = sum(seat.state == "starting" for seat in self._seats)
        now = time.perf_counter()
        if any(seat.state in {"idle", "working"} for seat in self._seats):
            self._last_ready = now
        elif starting and now - self._last_ready >= _LONG_START_S:
            self._last_ready = None
            self._on_notice(f"still waiting for {starting} workers to start")

    def _finished(self) -> Work | None:
        """The work once all is done or given up; None before. Raises what stopped it."""
        if any(seat.state == "working" for seat in self._seats):
            return None
        if self._fatal is not None:
            self._dismiss()
            raise self._fatal
        if self._work is not None and (self._stopping or not self._work.queue):
            return self._work
        if all(seat.state == "gone" for seat in self._seats):
            left = f"{len(self._work.queue)} of {len(self._cases)} cases" if self._work else "all cases"
            raise ExtractionError(
                f"every worker was lost ({len(self._seats)}, and those started in their places), {left} are left; the"
                f" last one: {self._last_reason}. See to that (often too little memory), then the same command resumes"
            )
        return None

    def _handle(self, seat: Seat, event: Event) -> None:
        match event:
            case Ready():
                self._welcome(seat, event)
            case Wanted():
                self._feed(seat)
            case Looked():
                self._require_work().ledger.look(event.looks)
            case Computed():
                self._require_work().ledger.compute(event.slices)
            case Drained():
                self._require_work().ledger.wait(event.waits)
                seat.cases.clear()
                seat.state = "idle"
                self._feed_idle()
            case Broken(error=EmbedkitError() as error) if not (seat.replaced and seat.state == "starting"):
                self._transport.kill(seat.number)
                self._lose(seat, event)
                self._fatal = self._fatal or error
                self._halt()
            case Broken():
                self._transport.kill(seat.number)
                self._lose(seat, event)
            case Lost():
                self._lose(seat, event)
            case outcome:
                self._require_work().ledger.settle(outcome)

    def _require_work(self) -> Work:
        if self._work is None:
            raise RuntimeError("a worker tells of cases before it was given any")
        return self._work

    def _welcome(self, seat: Seat, event: Ready) -> None:
        """Gives the cache to a worker that is ready; the first one's recipe is everyone's."""
        try:
            if self._work is None:
                self._work = self._open_work(event)
            name = f"worker {self._transport.name(seat.number)} on {event.host}"
            ways_out = "Give the precision, and the same weights and the same embedkit to every machine"
            require_same_recipe(event.recipe, self._work.begin.recipe, where=name, ways_out=ways_out)
        except EmbedkitError as error:
            self._fatal = self._fatal or error
            self._halt()
            return
        self._transport.send(seat.number, self._work.begin)
        seat.state = "idle"
        self._feed_idle()

    def _open_work(self, event: Ready) -> Work:
        create_cache(self._cache, event.recipe)
        sources = CachedSources(open_cache(self._cache).stacks, event.recipe, read_confirmations(self._cache))
        sources.require_same_patients(self._cases)
        sources.require_same_views(self._cases)
        held, pending = sources.split_cases(self._cases, stop=self._stop)
        look_again(self._cache, held, sources.folders, stop=self._stop)
        ledger = Ledger(len(self._cases), len(pending), self._on_progress, self._started)
        ledger.look(sources.folders.take_looks())
        probe = next((path for case in pending for path in case.images.values() if path.exists()), None)
        return Work(
            begin=Begin(self._cache, event.recipe, probe),
            sources=sources,
            ledger=ledger,
            queue=deque(pending),
            held=[case.case_id for case in held],
        )

    def _feed(self, seat: Seat) -> None:
        """Gives a worker its next case, or tells it to finish what it has."""
        work = self._require_work()
        case = None if self._stopping else work.next_for(seat)
        if case is not None:
            seat.cases[case.case_id] = case
            self._transport.send(seat.number, case)
            seat.state = "working"
        else:
            self._transport.send(seat.number, Drain())

    def _feed_idle(self) -> None:
        work = self._require_work()
        for seat in self._seats:
            if seat.state == "idle" and work.queue and not self._stopping:
                self._feed(seat)

    def _halt(self) -> None:
        if not self._stopping and (self._work is not None or self._fatal is not None):
            self._stopping = True
            for seat in self._seats:
                if seat.state in {"idle", "working"}:
                    self._transport.send(seat.number, Stop())

    def _dismiss(self) -> None:
        for seat in self._seats:
            if seat.state == "starting":
                self._transport.kill(seat.number)
            elif seat.state == "idle":
                self._transport.send(seat.number, Quit())

    def _lose(self, seat: Seat, event: Broken | Lost) -> None:
        """Takes back what a lost worker leaves undone, and starts another in its place while that is worth it."""
        given, seat.cases, seat.state = list(seat.cases.values()), {}, "gone"
        reason = self._last_reason = f"{event.reason}: {event.found}" if event.found else event.reason
        before = self._work.ledger.failed if self._work else 0
        again = self._require_work().take_back(given, event.reason) if given else 0
        blamed = (
            self._work is not None and self._work.ledger.failed > before
        )  # a case was: that can happen once to each
        notice = f"worker {self._transport.name(seat.number)} was lost ({reason}), {again} cases taken back"
        wanted = not self._stopping and (self._work is None or bool(self._work.queue))
        if wanted and (self._restarts or blamed):
            self._restarts -= not blamed
            self._transport.start(seat.number)
            seat.state, seat.replaced = "starting", True
            notice += "; another is started in its place"
        if self._on_notice is not None:
            self._on_notice(notice)
        if self._work is not None:
            self._feed_idle()

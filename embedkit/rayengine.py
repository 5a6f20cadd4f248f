"""Owns workers as actors of a Ray cluster, one per GPU or share of CPUs; knows no case and no cache, loads Ray late."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from embedkit.errors import OptionError
from embedkit.orders import Event, Lost, Order
from embedkit.worker import ExtractionJob, serve

__all__ = ["RayTransport", "share_cpus"]

_CPUS_PER_WORKER = 4
_LISTEN_S = 5.0
"""How long one call for events may wait inside the actor."""

_CONNECT_S = 10.0
_PLACE = re.compile(r"(?:ray://)?(?P<host>[^/:]+):(?P<port>[0-9]{1,5})")
_LONGEST_REASON = 300
_STATISTICS = "RAY_USAGE_STATS_ENABLED"
_GROUPS = {"work": 1, "orders": 1, "events": 1}
"""Threads of the actor; one for each kind of call keeps orders and events in the order in which they were given."""


def share_cpus(node_cpus: Sequence[int], workers: int | None) -> tuple[int, int]:
    """How many workers of how many CPUs each fit on machines with so many CPUs.

    Args:
        node_cpus: Of each machine.
        workers: As many as wanted; None is one per four CPUs, and at least one.

    Returns:
        (workers, CPUs of each).

    Raises:
        OptionError: more workers than CPUs.
    """
    total = sum(node_cpus)
    wanted = workers if workers is not None else max(1, sum(cpus // _CPUS_PER_WORKER for cpus in node_cpus))
    if not 1 <= wanted <= total:
        raise OptionError(f"{wanted} Ray workers are asked for, expected 1 to {total}, the CPUs of the cluster")
    return wanted, max(each for each in range(1, total + 1) if sum(cpus // each for cpus in node_cpus) >= wanted)


class RayTransport:
    """One actor per GPU of the cluster, or per share of its CPUs; see `embedkit.orders.Transport`."""

    def __init__(self, job: ExtractionJob, device: str, *, address: str | None, workers: int | None) -> None:
        """Connects to Ray; a cluster that this process is connected to already is used and left as it is.

        Args:
            job: For every worker.
            device: ``auto`` (GPUs where the cluster has any), ``cuda`` or ``cpu``.
            address: As for `embedkit.extract`.
            workers: As for `embedkit.extract`.

        Raises:
            OptionError: Ray is not installed or not to be reached, or the cluster has not what is asked for.
        """
        if device not in {"auto", "cpu", "cuda"}:
            raise OptionError(f"device is {device!r}, expected auto, cuda or cpu with engine ray, which places workers")
        self._job = job
        self._actors: dict[int, Any] = {}
        self._calls: dict[int, Any] = {}
        self._ray, self._own = _connect(address)
        try:
            self.size, self._device, self._resources = self._plan(device, workers)
        except OptionError:
            self.close()
            raise
        self._actor_class = self._ray.remote(max_restarts=0, concurrency_groups=_GROUPS)(_Actor)

    def _plan(self, device: str, workers: int | None) -> tuple[int, str, dict[str, int]]:
        """(workers, device, what Ray is to reserve for each)."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        if device == "cuda" or (device == "auto" and gpus):
            wanted = gpus if workers is None else workers
            if not 1 <= wanted <= gpus:
                raise OptionError(f"{wanted} Ray workers on CUDA are asked for, but the cluster has {gpus} GPUs")
            return wanted, "cuda", {"num_gpus": 1, "num_cpus": 1}
        wanted, cpus = share_cpus([int(node.get("CPU", 0)) for node in nodes], workers)
        return wanted, "cpu", {"num_gpus": 0, "num_cpus": cpus}

    def name(self, number: int) -> str:
        """Number, from 1, and device."""
        return f"{number + 1} (Ray, {self._device})"

    def start(self, number: int) -> None:
        """Asks for an actor; Ray starts it once the cluster has room."""
        actor = self._actor_class.options(**self._resources).remote()
        threads = self._resources["num_cpus"] if self._device == "cpu" else None
        actor.run.options(concurrency_group="work").remote(self._job, self._device, threads)
        self._actors[number] = actor
        self._listen(number)

    def _listen(self, number: int) -> None:
        events = self._actors[number].events.options(concurrency_group="events")
        self._calls[number] = events.remote(_LISTEN_S)

    def send(self, number: int, order: Order) -> None:
        """As a call of the actor, whose end is told by `poll`."""
        if number in self._actors:
            self._actors[number].order.options(concurrency_group="orders").remote(order)

    def poll(self, timeout_s: float) -> list[tuple[int, Event]]:
        """What the actors have to tell; a call that fails means that the actor is gone."""
        if not self._calls:
            time.sleep(timeout_s)
            return []
        calls = list(self._calls.values())
        self._ray.wait(calls, num_returns=1, timeout=timeout_s)
        ready, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        told: list[tuple[int, Event]] = []
        for number in [number for number, call in self._calls.items() if call in ready]:
            told += [(number, event) for event in self._receive(number)]
        return told

    def _receive(self, number: int) -> list[Event]:
        try:
            events: list[Event] = self._ray.get(self._calls[number])
        except self._ray.exceptions.RayError as error:
            self.kill(number)
            return [Lost(type(error).__name__, found=" ".join(str(error).split())[:_LONGEST_REASON])]
        self._listen(number)
        return events

    def kill(self, number: int) -> None:
        """Ends an actor at once."""
        if number in self._actors:
            del self._calls[number]
            self._ray.kill(self._actors.pop(number), no_restart=True)

    def close(self) -> None:
        """Ends the actors at once, and the connection to Ray if it was made here."""
        for number in list(self._actors):
            self.kill(number)
        if self._own:
            self._ray.shutdown()


def _connect(address: str | None) -> tuple[Any, bool]:
    """The module, connected, and whether the connection is this call's own."""
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise OptionError(
            f"engine ray needs Ray, which cannot be imported ({error}); pip install 'embedkit[ray]'"
        ) from error
    if ray.is_initialized():
        return ray, False
    try:
        if address is not None and (place := _PLACE.fullmatch(address)):  # Ray itself tries for minutes
            socket.create_connection((place["host"], int(place["port"])), timeout=_CONNECT_S).close()
        with _undisturbed():
            ray.init(address=address, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise OptionError(f"cannot reach Ray at {address or 'this machine'}: {reason}; see `ray status`") from error
    return ray, True


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps what Ray changes in its start as it was: the handler of SIGTERM, which would end the call at once.

    A Ray that is started here sends no usage statistics, unless the environment says that it may.
    """
    handler = signal.getsignal(signal.SIGTERM)
    asked = _STATISTICS in os.environ
    os.environ.setdefault(_STATISTICS, "0")
    try:
        yield
    finally:
        if not asked:
            del os.environ[_STATISTICS]
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


class _Actor:
    """A worker inside of Ray, and its `embedkit.orders.Channel`."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def run(self, job: ExtractionJob, device: str, threads: int | None) -> None:
        """Works until told to quit."""
        serve(job, device, threads, self)

    def order(self, order: Order) -> None:
        """Takes an order."""
        self._orders.put(order)

    def events(self, timeout_s: float) -> list[Event]:
        """What there is to tell, waiting at most so long for the first."""
        try:
            told = [self._events.get(timeout=timeout_s)]
        except queue.Empty:
            return []
        while not self._events.empty():
            told.append(self._events.get())
        return told

    def send(self, event: Event) -> None:
        """See `Channel`."""
        self._events.put(event)

    def receive(self) -> Order:
        """See `Channel`."""
        return self._orders.get()

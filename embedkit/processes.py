"""Owns worker processes on this machine, one per device, each behind a pipe; knows no case and no cache."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import torch

from embedkit.allocator import keep_freed_memory
from embedkit.errors import OptionError
from embedkit.orders import Event, Lost, Order
from embedkit.worker import ExtractionJob, serve

__all__ = ["ProcessTransport", "split_devices"]

_PATIENCE_S = 10.0
"""How long a worker that was told to end may take to write its shard."""


def split_devices(device: str) -> list[str]:
    """The devices that ``device`` names: one, several with commas between them, or ``cuda:all``.

    Raises:
        OptionError: ``cuda:all`` beside other devices, or without a CUDA device, or devices of different kinds, whose
            tokens would differ.
    """
    devices = [part.strip() for part in device.split(",") if part.strip()]
    if "cuda:all" in devices:
        if len(devices) > 1:
            raise OptionError(
                f"device is {device!r}, but cuda:all stands alone for every CUDA device there is; name each one"
                " instead, as cuda:0,cuda:1"
            )
        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        if not devices:
            raise OptionError("device is cuda:all, but torch finds no CUDA device here; use cpu or auto")
    if not devices:
        raise OptionError(f"device is {device!r}, expected auto, cpu, cuda, cuda:all or several as cuda:0,cuda:1")
    kinds = sorted({name.partition(":")[0] for name in devices})
    if len(kinds) > 1 or (len(devices) > 1 and kinds == ["auto"]):
        raise OptionError(
            f"device is {device!r}, expected devices of one kind (as cuda:0,cuda:1 or cpu,cpu): others give other"
            " tokens"
        )
    return devices


class ProcessTransport:
    """One spawned process per device; see `embedkit.orders.Transport`.

    A spawned process imports the main module anew, so a script that extracts on several devices needs
    ``if __name__ == "__main__":`` around what it does.
    """

    def __init__(self, job: ExtractionJob, devices: Sequence[str]) -> None:
        """Starts nothing yet.

        Args:
            job: For every worker.
            devices: One worker each; those on the CPU share torch's threads.
        """
        self._job, self._devices = job, list(devices)
        share = max(1, torch.get_num_threads() // len(self._devices))
        self._threads = share if self._devices[0].startswith("cpu") else None
        self._workers: dict[int, tuple[SpawnProcess, Connection]] = {}

    @property
    def size(self) -> int:
        """One per device."""
        return len(self._devices)

    def name(self, number: int) -> str:
        """Number, from 1, and device."""
        return f"{number + 1} ({self._devices[number]})"

    def start(self, number: int) -> None:
        """Spawns a process."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(
            target=_run_worker,
            args=(self._job, self._devices[number], self._threads, there),
            name=f"embedkit-worker-{number + 1}",
            daemon=True,
        )
        process.start()
        there.close()
        self._workers[number] = (process, here)

    def send(self, number: int, order: Order) -> None:
        """Through the pipe; a pipe without another end is told by `poll`."""
        if number in self._workers:
            with suppress(BrokenPipeError, ConnectionResetError):
                self._workers[number][1].send(order)

    def poll(self, timeout_s: float) -> list[tuple[int, Event]]:
        """What is in the pipes; the end of one means that its process is gone."""
        numbers = {connection: number for number, (_, connection) in self._workers.items()}
        events: list[tuple[int, Event]] = []
        for ready in multiprocessing.connection.wait(list(numbers), timeout_s):
            if isinstance(ready, Connection):
                events += [(numbers[ready], event) for event in self._receive(numbers[ready], ready)]
        return events

    def _receive(self, number: int, connection: Connection) -> list[Event]:
        events: list[Event] = []
        try:
            while connection.poll():
                events.append(connection.recv())
        except (EOFError, OSError):  # OSError: it was killed in the middle of a message
            process = self._workers.pop(number)[0]
            connection.close()
            process.join(_PATIENCE_S)
            events.append(Lost(_explain_exit(process.exitcode)))
        return events

    def kill(self, number: int) -> None:
        """With SIGKILL, for the workers leave all other signals to their parent."""
        if number in self._workers:
            process, connection = self._workers.pop(number)
            process.kill()
            process.join()
            connection.close()

    def close(self) -> None:
        """Closes the pipes, at which workers finish their shard and end; kills those that do not."""
        for _, connection in self._workers.values():
            connection.close()
        for process, _ in self._workers.values():
            process.join(_PATIENCE_S)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers.clear()


def _explain_exit(code: int | None) -> str:
    if code is not None and code < 0:
        hint = ", as the kernel does when memory runs out" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    return f"ended with exit code {code}"


class _Pipe:
    """A worker's end of the pipe; see `embedkit.orders.Channel`."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._sending = connection, threading.Lock()

    def send(self, event: Event) -> None:
        with self._sending, suppress(BrokenPipeError, ConnectionResetError):  # `receive` tells that nobody listens
            self._connection.send(event)

    def receive(self) -> Order:
        order: Order = self._connection.recv()
        return order


def _run_worker(job: ExtractionJob, device: str, threads: int | None, connection: Connection) -> None:
    """A worker process; a signal to the whole group is for the parent to act upon, who then says what to do."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory()
    serve(job, device, threads, _Pipe(connection))

"""Owns the work of one extracting process: a backbone from plain values, cases as they come; knows no transport.

A worker asks for one case at a time, a few ahead of what the backbone is at, so that work is shared out by what each
worker gets done. Its shard stays open until there are no more cases: shards are as large as those of a single process.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from embedkit.backbones import compile_backbone, load_backbone
from embedkit.cache import open_cache
from embedkit.casework import CaseWork
from embedkit.confirmations import read_confirmations
from embedkit.errors import BackboneError, CacheError, EmbedkitError, VolumeError
from embedkit.failures import Failure
from embedkit.features import Backbone
from embedkit.forward import require_compiled, require_precision
from embedkit.orders import (
    Begin,
    Broken,
    Channel,
    Computed,
    Done,
    Drain,
    Drained,
    Failed,
    Looked,
    Order,
    Quit,
    Ready,
    Same,
    Stop,
    Wanted,
)
from embedkit.planning import (
    COMPILED,
    DEFAULT_WINDOW,
    choose_device,
    choose_precision,
    make_recipe,
    require_channel_count,
)
from embedkit.readahead import Waits
from embedkit.recipe import Recipe
from embedkit.slices import window_texts
from embedkit.sources import CachedSources, Case
from embedkit.strays import Looks
from embedkit.stream import extract_stream

__all__ = ["ExtractionJob", "serve"]

_TELL_EVERY_S = 1.0


@dataclass(frozen=True)
class ExtractionJob:
    """What a process needs to know to extract cases: plain values, the same on every machine.

    Attributes:
        backbone: As for `embedkit.extract`, like all that follow.
        weights: Of the backbone.
        image_size: In pixels.
        precision: ``auto`` is settled by the device.
        compiled: Whether the backbone's blocks are compiled.
        recipe_options: The further options of `embedkit.planning.make_recipe`.
        batch_size: Slices per forward pass.
        workers: Cases read ahead.
        shard_bytes: Of a full shard.
        shard_seconds: Most time that a shard stays open.
    """

    backbone: str
    weights: Path | None
    image_size: int | None
    precision: str
    compiled: bool
    recipe_options: Mapping[str, Any]
    batch_size: int
    workers: int
    shard_bytes: int
    shard_seconds: float

    def load(self, device: torch.device) -> tuple[Backbone, Recipe]:
        """The backbone on a device, and the recipe that the options mean there.

        Raises:
            OptionError: an option has a value that means nothing.
            BackboneError: unknown backbone, its weights cannot be had, or it cannot be compiled here.
        """
        channels = self.recipe_options.get("channels", ())
        window = self.recipe_options.get("window", DEFAULT_WINDOW)
        require_channel_count(channels, window)
        backbone = load_backbone(
            self.backbone,
            weights=self.weights,
            image_size=self.image_size,
            channels=max(len(channels), len(window_texts(window))),
            device=str(device),
        )
        compiled = self.compiled or self.precision.endswith(COMPILED)
        precision = choose_precision(self.precision.removesuffix(COMPILED), device, backbone.info)
        precision += COMPILED if compiled else ""
        recipe = make_recipe(backbone.info, precision=precision, **self.recipe_options)
        if compiled:
            compile_backbone(backbone)
            require_compiled(backbone, recipe, device, batch_size=self.batch_size)
        return backbone, recipe


def serve(job: ExtractionJob, device: str, threads: int | None, channel: Channel) -> None:
    """Extracts the cases that ``channel`` gives until it says `Quit`; whatever goes wrong is told as `Broken`.

    Args:
        job: What to do.
        device: Of torch.
        threads: For torch's work on the CPU; None leaves its own choice.
        channel: Where orders come from and events go to.
    """
    inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
    stop = threading.Event()
    threading.Thread(target=_listen, args=(channel, inbox, stop), name="embedkit-orders", daemon=True).start()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        target = choose_device(device)
        _require_weights(job)
        backbone, recipe = job.load(target)
        channel.send(Ready(recipe, os.getpid(), socket.gethostname()))
        begin = inbox.get()
        if isinstance(begin, Begin):
            require_precision(backbone, recipe, target)
            _serve_rounds(job, begin, _Desk(channel, inbox, stop), backbone, target)
    except EmbedkitError as error:
        channel.send(Broken(type(error).__name__, error, found=str(error)))
    except Exception as error:
        channel.send(Broken(type(error).__name__, None, found=" ".join(str(error).split())))


def _listen(channel: Channel, inbox: queue.SimpleQueue[Order], stop: threading.Event) -> None:
    """Passes orders on; a stop takes effect at once, and so does the end of the line."""
    order: Order = Drain()
    while not isinstance(order, Quit):
        try:
            order = channel.receive()
        except (EOFError, OSError):
            stop.set()
            inbox.put(Drain())
            order = Quit()
        if isinstance(order, Stop):
            stop.set()
            order = Drain()
        inbox.put(order)


@dataclass
class _Desk:
    """Where a worker takes cases from and tells what became of them."""

    channel: Channel
    inbox: queue.SimpleQueue[Order]
    stop: threading.Event
    waits: Waits = field(default_factory=Waits)
    quit: bool = False
    _computed: int = 0
    _told: float = field(default_factory=time.perf_counter)

    def next_round(self) -> Case | None:
        """Waits for the first case after a pause; None once there is nothing left to wait for."""
        while not self.quit:
            order = self.inbox.get()
            if isinstance(order, Quit):
                self.quit = True
            elif isinstance(order, Case) and not self.stop.is_set():
                return order
        return None

    def cases(self, first: Case) -> Iterator[Case]:
        """The cases of one round, each asked for when there is room for it."""
        yield first
        while not self.stop.is_set():
            self.channel.send(Wanted())
            order = self.inbox.get()
            if not isinstance(order, Case):
                self.quit = isinstance(order, Quit)
                return
            yield order

    def looked(self, looks: Looks) -> None:
        """See `Tally`."""
        if looks:
            self.channel.send(Looked(looks))

    def done(self, work: CaseWork, *, changed: bool) -> None:
        """See `Tally`."""
        self.channel.send(Done(work.case.case_id, work.slices, work.blank_slices, changed))

    def failed(self, failure: Failure) -> None:
        """See `Tally`."""
        self.channel.send(Failed(failure))

    def same(self, case: Case) -> None:
        """See `Tally`."""
        self.channel.send(Same(case.case_id))

    def tick(self, slices: int) -> None:
        """See `Tally`; whoever gives the cases tells how far they are, and is told once a second."""
        self._computed += slices
        if time.perf_counter() - self._told >= _TELL_EVERY_S:
            self.channel.send(Computed(self._computed))
            self._computed, self._told = 0, time.perf_counter()


def _serve_rounds(job: ExtractionJob, begin: Begin, desk: _Desk, backbone: Backbone, device: torch.device) -> None:
    """Extracts until told to quit; between two rounds everything is on disk and the worker waits."""
    _require_reachable(begin)
    sources = CachedSources(open_cache(begin.cache).stacks, begin.recipe, read_confirmations(begin.cache))
    while (first := desk.next_round()) is not None:
        extract_stream(
            desk.cases(first),
            begin.cache,
            backbone,
            begin.recipe,
            sources=sources,
            tally=desk,
            device=device,
            batch_size=job.batch_size,
            workers=job.workers,
            shard_bytes=job.shard_bytes,
            shard_seconds=job.shard_seconds,
            stop=desk.stop,
        )
        desk.channel.send(Drained(dict(desk.waits.seconds)))
        desk.waits.seconds.clear()


def _require_weights(job: ExtractionJob) -> None:
    if job.weights is not None and not job.weights.exists():
        raise BackboneError(
            f"weights {job.weights} do not exist on {socket.gethostname()}; pass a file that every machine finds under"
            " this path"
        )


def _require_reachable(begin: Begin) -> None:
    host = socket.gethostname()
    if not begin.cache.is_dir():
        raise CacheError(
            f"{begin.cache} does not exist on {host}; put the cache where every machine finds it under this path"
        )
    if begin.probe is not None and not begin.probe.exists():
        raise VolumeError(
            f"does not exist on {host}, but does where the call was made; put the images where every machine finds"
            " them under the same path",
            file=begin.probe,
        )

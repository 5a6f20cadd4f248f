"""Owns the path of a slice through extraction: read ahead, render, batch, forward, reassemble; knows no file format.

Batches are filled across stack and case boundaries, blank slices never reach the backbone, and every batch has the
same shape (the last one is padded), so that a resumed extraction runs the same arithmetic as an uninterrupted one.
"""

from __future__ import annotations

import math
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedkit.alteration import alter_slices
from embedkit.casework import CaseWork, FailedCase, SameCase
from embedkit.errors import CacheError, EmbedkitError, VolumeError
from embedkit.features import Backbone
from embedkit.forward import PendingTokens, start_backbone
from embedkit.readahead import Waits, read_ahead, run_in_background
from embedkit.recipe import Recipe
from embedkit.slices import render_previews, render_slices
from embedkit.sources import Case, CaseImages
from embedkit.spill import release_pages

__all__ = ["Rendered", "compute_cases", "explain_failure", "fail_case", "render_cases"]

Item = TypeVar("Item")

_CHUNKS_AHEAD = 4
_PIXELS = 1 << 23
"""Pixels of slices, before they are resized, that are rendered at a time, so that large slices take no more memory."""
_BATCHES_IN_FLIGHT = {"cuda": 1}
"""Batches that are started before the one before them is taken from the device."""


@dataclass(frozen=True)
class Rendered:
    """Some slices of one stack on their way to the backbone.

    Attributes:
        work: The case they belong to.
        stack: Which of its stacks.
        rows: Which slices of the stack the images are, int [batch]; blank slices are left out.
        images: Float [batch channels height width] in 0..1.
        slices: How many slices of the stack this part accounts for, blank ones included.
    """

    work: CaseWork
    stack: int
    rows: NDArray[np.intp]
    images: Tensor
    slices: int

    def split(self, size: int) -> tuple[Rendered, Rendered]:
        """The first ``size`` images, and the rest (which keeps the account of blank slices)."""
        head = Rendered(self.work, self.stack, self.rows[:size], self.images[:size], size)
        return head, Rendered(self.work, self.stack, self.rows[size:], self.images[size:], self.slices - size)


def render_cases(
    cases: Iterable[Case],
    read: Callable[[Case], CaseImages | SameCase],
    recipe: Recipe,
    backbone: Backbone,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    spill: Path,
    waits: Waits,
) -> Iterator[Rendered | FailedCase | SameCase]:
    """Yields the slices of all cases in order, reading ``workers`` cases ahead, and rendering ahead on an accelerator.

    On a CPU slices are rendered when they are asked for: rendering and backbone both use all cores, so that nothing is
    gained side by side. Whatever goes wrong with one case, foreseen or not, makes it a `FailedCase` and stops no other.

    Args:
        cases: In the order wanted.
        read: Gives the images of a case; called in threads.
        recipe: Of the cache.
        backbone: Whose tokens the slices are rendered for.
        batch_size: Slices rendered at a time, fewer where they are large.
        workers: Cases read ahead.
        device: Where slices are rendered.
        spill: Folder for the temporary files of large stacks.
        waits: Counts who waited for whom.

    Raises:
        CacheError: nothing can be written to ``spill``, be it that the disk is full.
    """

    waiting = "backbone for images" if device.type == "cpu" else "renderer for images"

    def stream() -> Iterator[Rendered | FailedCase | SameCase]:
        for case, images in read_ahead(read, cases, workers=workers, waits=waits, name=waiting):
            if isinstance(images, SameCase):
                yield images
                continue
            try:
                if isinstance(images, Exception):
                    raise images
                work = CaseWork(case, images, recipe, backbone.info, spill=spill)
                del images
                for numbers in work.list_renderings(recipe):
                    yield from _render_stacks(work, numbers, recipe, batch_size, device)
                work.release_volumes()
            except CacheError:  # no room, or no right, to write: that is of the cache, and would fail every case
                raise
            except Exception as error:
                yield fail_case(case, error)

    if device.type == "cpu":
        return stream()
    rendered = _in_own_stream(stream(), device) if device.type == "cuda" else stream()
    return run_in_background(
        rendered, depth=_CHUNKS_AHEAD, waits=waits, taking="backbone for slices", putting="renderer for the backbone"
    )


def _in_own_stream(rendered: Iterator[Item], device: torch.device) -> Iterator[Item]:
    """Renders in a CUDA stream beside the backbone's, so that a wait for slices is none for the batches before them.

    What is yielded is complete, so that the backbone may read it from its own stream. Its memory goes back to this
    stream, which is safe because `compute_cases` keeps the slices of a batch until the batch is done.
    """
    own = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(own):
        for item in rendered:
            own.synchronize()
            yield item


def fail_case(case: Case, error: Exception) -> FailedCase:
    """The case with why it failed, and with files and what they say apart."""
    if isinstance(error, VolumeError):
        return FailedCase(case, error.problem, view=error.view, file=error.file, found=error.found)
    found = "" if isinstance(error, EmbedkitError) else " ".join(str(error).split())
    return FailedCase(case, explain_failure(error), found=found)


def explain_failure(error: Exception) -> str:
    """Why something failed, in one line: nothing in it comes out of a file but its own name.

    What embedkit did not foresee is told with its place in the code.
    """
    if isinstance(error, VolumeError):
        return error.reason
    if isinstance(error, EmbedkitError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" at {Path(place[0].filename).name}:{place[0].lineno}" if place else ""
    return f"unforeseen {type(error).__name__}{where}; please report it, and leave the case out meanwhile"


def _render_stacks(
    work: CaseWork, numbers: Sequence[int], recipe: Recipe, batch_size: int, device: torch.device
) -> Iterator[Rendered]:
    """Renders slices once for all stacks of these numbers, which are of one plan; what is blank is so in each."""
    stack = work.stacks[numbers[0]].stack
    count = len(stack.indices)
    step = min(batch_size, max(1, _PIXELS // math.prod(stack.box[2:])))
    for start in range(0, count, step):
        stop = min(start + step, count)
        rendered, blank = render_slices(stack, work.volumes, recipe, start, stop, device=device)
        flags = blank.cpu().numpy()
        rows = start + np.flatnonzero(~flags)
        for number in numbers:
            target = work.stacks[number]
            images = rendered if target.alteration is None else alter_slices(rendered, target.alteration)
            if target.preview is not None:
                target.preview[start:stop] = render_previews(images, recipe.preview).cpu().numpy()
            target.blank[start:stop] = flags
            shown = images if len(rows) == stop - start else images[~blank]
            yield Rendered(work, number, rows, shown, stop - start)


def compute_cases(
    rendered: Iterable[Rendered | FailedCase | SameCase],
    backbone: Backbone,
    recipe: Recipe,
    *,
    batch_size: int,
    stop: threading.Event | None = None,
    after_batch: Callable[[int], None] = lambda _: None,
) -> Iterator[CaseWork | FailedCase | SameCase]:
    """Sends full batches through the backbone and yields each case as soon as its last slice is back.

    Args:
        rendered: Of `render_cases`.
        backbone: Frozen.
        recipe: Of the cache.
        batch_size: Slices per forward pass.
        stop: Once set, no further batch is begun, and cases that are not complete are not yielded.
        after_batch: Called whenever the tokens of a batch are in their places, with its number of slices.
    """
    waiting: deque[Rendered] = deque()
    flying: deque[_Batch] = deque()

    def launch(parts: list[Rendered]) -> Iterator[CaseWork]:
        images = torch.cat([part.images for part in parts])
        flying.append(_Batch(parts, start_backbone(_pad(images, batch_size), backbone, recipe)))
        in_flight = _BATCHES_IN_FLIGHT.get(images.device.type, 0)
        while len(flying) > in_flight:
            batch = flying.popleft()
            yield from _settle_batch(batch, backbone, recipe)
            after_batch(sum(len(part.rows) for part in batch.parts))

    for part in rendered:
        if stop is not None and stop.is_set():
            return
        if isinstance(part, FailedCase | SameCase):
            yield part
            continue
        if not len(part.rows):  # blank slices alone: nothing to wait for
            yield from _settle_batch(_Batch([part], None), backbone, recipe)
            continue
        waiting.append(part)
        while sum(len(each.rows) for each in waiting) >= batch_size:
            yield from launch(_take(waiting, batch_size))
    if waiting:
        yield from launch(list(waiting))
    while flying:
        yield from _settle_batch(flying.popleft(), backbone, recipe)


@dataclass(frozen=True)
class _Batch:
    """Slices that the backbone has been given, and their tokens to come; None where all of them are blank."""

    parts: Sequence[Rendered]
    pending: PendingTokens | None


def _take(waiting: deque[Rendered], size: int) -> list[Rendered]:
    """Removes exactly ``size`` images from the front of ``waiting``."""
    taken: list[Rendered] = []
    while size:
        part = waiting.popleft()
        if len(part.rows) > size:
            part, rest = part.split(size)
            waiting.appendleft(rest)
        taken.append(part)
        size -= len(part.rows)
    return taken


def _settle_batch(batch: _Batch, backbone: Backbone, recipe: Recipe) -> Iterator[CaseWork]:
    """Puts the tokens of a batch in their places and yields the cases that are now complete."""
    tokens = batch.pending.result() if batch.pending else {}
    start = 0
    for part in batch.parts:
        stop = start + len(part.rows)
        if stop > start:
            _keep_tokens(part, {name: values[start:stop] for name, values in tokens.items()}, backbone, recipe)
        start = stop
        if part.work.count_down(part.slices):
            yield part.work


def _keep_tokens(part: Rendered, tokens: dict[str, NDArray[np.float16]], backbone: Backbone, recipe: Recipe) -> None:
    target = part.work.stacks[part.stack].tokens
    for name, values in tokens.items():
        target[name][part.rows] = values
        release_pages(target[name])
        if not np.isfinite(values).all():
            part.work.problem = (
                f"{backbone.info.name} gives {name} tokens outside float16's range at precision"
                f" {recipe.precision}; leave that layer out or use --precision fp32"
            )


def _pad(images: Tensor, batch_size: int) -> Tensor:
    missing = batch_size - len(images)
    return torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing > 0 else images

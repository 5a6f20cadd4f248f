"""Owns the path of a slice through extraction: read ahead, render, batch, forward, reassemble; knows no file format.

Batches are filled across stack and case boundaries, blank slices never reach the backbone, and every batch has the
same shape (the last one is padded), so that a resumed extraction runs the same arithmetic as an uninterrupted one.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedkit.cache import StackTokens, check_stack
from embedkit.errors import BackboneError, EmbedkitError, VolumeError
from embedkit.features import Backbone
from embedkit.planning import AUTOCAST_DTYPES
from embedkit.recipe import Recipe
from embedkit.slices import Stack, plan_stacks, render_previews, render_slices
from embedkit.sources import Case, CaseImages, combine_digests, combine_stats
from embedkit.tokens import compute_token_sets, needs_attention, required_layers, token_shape

__all__ = ["CaseWork", "FailedCase", "Rendered", "SameCase", "compute_cases", "render_cases", "run_backbone"]

_CHUNKS_AHEAD = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class FailedCase:
    """A case that gives no tokens, and why, in one line."""

    case: Case
    reason: str


@dataclass(frozen=True)
class SameCase:
    """A case whose files were touched since they were cached, but hold the same bytes."""

    case: Case


class _StackWork:
    """The token arrays of one stack, filled as its slices come back from the backbone."""

    def __init__(self, stack: Stack, recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> None:
        count = len(stack.indices)
        self.stack = stack
        self.blank = np.zeros(count, bool)
        self.tokens = {name: np.zeros((count, *shape), np.float16) for name, shape in shapes.items()}
        self.preview = np.zeros((count, recipe.preview, recipe.preview), np.uint8) if recipe.preview else None


class CaseWork:
    """One case in progress: complete once the backbone has seen every slice of every stack that is not blank."""

    def __init__(self, case: Case, images: CaseImages, recipe: Recipe, backbone: Backbone) -> None:
        shapes = {str(kept): token_shape(kept, backbone.info) for kept in recipe.parsed_token_sets()}
        self.case = case
        self.images = images
        self._recipe = recipe
        self.stacks = [_StackWork(stack, recipe, shapes) for stack in plan_stacks(images.volumes, recipe)]
        self.slices = sum(len(work.blank) for work in self.stacks)
        self.problem = ""
        self._remaining = self.slices

    @property
    def blank_slices(self) -> int:
        return sum(int(work.blank.sum()) for work in self.stacks)

    def count_down(self, slices: int) -> bool:
        """Marks ``slices`` as computed; True once none is left."""
        self._remaining -= slices
        return self._remaining == 0

    def finish(self) -> list[StackTokens]:
        """The stacks as the cache takes them.

        Raises:
            VolumeError: every slice of a view is blank.
            CacheError: a stack cannot be stored as it is; see `embedkit.cache.check_stack`.
            BackboneError: a token is outside float16's range.
        """
        if self.problem:
            raise BackboneError(self.problem)
        stacks = [self._stack_tokens(work) for work in self.stacks]
        for stack in stacks:
            check_stack(stack, self._recipe)
        return stacks

    def _stack_tokens(self, work: _StackWork) -> StackTokens:
        stack, views = work.stack, list(dict.fromkeys(work.stack.sources))
        sources = [self.images.volumes[view] for view in views]
        source_bytes, source_modified_ns = combine_stats([self.images.stats[view] for view in views])
        if work.blank.all():
            raise VolumeError(
                f"view {stack.view} has no content: all {len(work.blank)} {stack.plane} slices are constant after the"
                " grey window; check the image and the window"
            )
        return StackTokens(
            case_id=self.case.case_id,
            patient_id=self.case.patient_id,
            view=stack.view,
            plane=stack.plane,
            sources=stack.sources,
            indices=stack.indices,
            positions_mm=stack.positions_mm,
            blank=work.blank,
            plane_shape=stack.plane_shape,
            box=stack.box,
            source_shape=sources[0].source_shape,
            source_affine=sources[0].source_affine,
            source_bytes=source_bytes,
            source_modified_ns=source_modified_ns,
            source_digest=combine_digests(sources),
            tokens=work.tokens,
            preview=work.preview,
        )


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
) -> Iterator[Rendered | FailedCase | SameCase]:
    """Yields the slices of all cases in order, reading ``workers`` cases ahead and rendering in the background."""

    def stream() -> Iterator[Rendered | FailedCase | SameCase]:
        for case, images in _read_ahead(read, cases, workers=workers):
            if isinstance(images, EmbedkitError):
                yield FailedCase(case, str(images))
                continue
            if isinstance(images, SameCase):
                yield images
                continue
            try:
                work = CaseWork(case, images, recipe, backbone)
            except EmbedkitError as error:
                yield FailedCase(case, str(error))
                continue
            for number in range(len(work.stacks)):
                yield from _render_stack(work, number, recipe, batch_size, device)

    return _in_background(stream(), depth=_CHUNKS_AHEAD)


def _render_stack(
    work: CaseWork, number: int, recipe: Recipe, batch_size: int, device: torch.device
) -> Iterator[Rendered]:
    target = work.stacks[number]
    count = len(target.blank)
    for start in range(0, count, batch_size):
        stop = min(start + batch_size, count)
        images, blank = render_slices(target.stack, work.images.volumes, recipe, start, stop, device=device)
        if target.preview is not None:
            target.preview[start:stop] = render_previews(images, recipe.preview).cpu().numpy()
        target.blank[start:stop] = blank.cpu().numpy()
        rows = start + np.flatnonzero(~target.blank[start:stop])
        yield Rendered(work, number, rows, images[~blank], stop - start)


def compute_cases(
    rendered: Iterable[Rendered | FailedCase | SameCase], backbone: Backbone, recipe: Recipe, *, batch_size: int
) -> Iterator[CaseWork | FailedCase | SameCase]:
    """Sends full batches through the backbone and yields each case as soon as its last slice is back."""
    waiting: deque[Rendered] = deque()
    for part in rendered:
        if isinstance(part, FailedCase | SameCase):
            yield part
            continue
        waiting.append(part)
        while sum(len(each.rows) for each in waiting) >= batch_size:
            yield from _compute_batch(_take(waiting, batch_size), backbone, recipe, batch_size)
    if waiting:
        yield from _compute_batch(list(waiting), backbone, recipe, batch_size)


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


def _compute_batch(
    parts: Sequence[Rendered], backbone: Backbone, recipe: Recipe, batch_size: int
) -> Iterator[CaseWork]:
    images = torch.cat([part.images for part in parts])
    if len(images):
        tokens = run_backbone(_pad(images, batch_size), backbone, recipe)
    start = 0
    for part in parts:
        stop = start + len(part.rows)
        if stop > start:
            target = part.work.stacks[part.stack].tokens
            for name, values in tokens.items():
                target[name][part.rows] = values[start:stop]
                if not np.isfinite(values[start:stop]).all():
                    part.work.problem = (
                        f"{backbone.info.name} gives {name} tokens outside float16's range at precision"
                        f" {recipe.precision}; leave that layer out or use --precision fp32"
                    )
        start = stop
        if part.work.count_down(part.slices):
            yield part.work


def _pad(images: Tensor, batch_size: int) -> Tensor:
    missing = batch_size - len(images)
    return torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing > 0 else images


def run_backbone(images: Tensor, backbone: Backbone, recipe: Recipe) -> dict[str, NDArray[np.float16]]:
    """Token sets of images, float [batch channels height width] in 0..1, by name: float16 [batch ...]."""
    token_sets = recipe.parsed_token_sets()
    autocast_dtype = AUTOCAST_DTYPES[recipe.precision]
    with (
        torch.inference_mode(),
        torch.autocast(images.device.type, autocast_dtype, enabled=autocast_dtype is not None),
    ):
        output = backbone.forward_layers(images, required_layers(token_sets), attention=needs_attention(token_sets))
    with torch.inference_mode():
        tokens = compute_token_sets(output, token_sets, backbone.info)
        return {name: values.to(torch.float16).cpu().numpy() for name, values in tokens.items()}


def _read_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int
) -> Iterator[tuple[Item, Result | EmbedkitError]]:
    """Maps ``function`` over ``items`` in order with at most ``workers`` results in flight."""

    def attempt(item: Item) -> Result | EmbedkitError:
        try:
            return function(item)
        except EmbedkitError as error:
            return error

    remaining = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="embedkit-read") as pool:
        flying: deque[tuple[Item, Future[Result | EmbedkitError]]] = deque(
            (item, pool.submit(attempt, item)) for item in itertools.islice(remaining, workers)
        )
        while flying:
            item, future = flying.popleft()
            result = future.result()
            flying.extend((following, pool.submit(attempt, following)) for following in itertools.islice(remaining, 1))
            yield item, result


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _in_background(items: Iterator[Item], *, depth: int) -> Iterator[Item]:
    """Runs ``items`` in a thread, at most ``depth`` ahead; errors surface here, and leaving early stops the thread."""
    ready: queue.Queue[Item | _Raised | None] = queue.Queue(depth)
    left = threading.Event()

    def put(entry: Item | _Raised | None) -> None:
        while not left.is_set():
            try:
                ready.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for item in items:
                put(item)
                if left.is_set():
                    return
            put(None)
        except BaseException as error:
            put(_Raised(error))

    thread = threading.Thread(target=work, name="embedkit-render", daemon=True)
    thread.start()
    try:
        while (entry := ready.get()) is not None:
            if isinstance(entry, _Raised):
                raise entry.error
            yield entry
    finally:
        left.set()
        thread.join()

"""Owns the way of cases, as they come, into shards of a cache, each failed one on record; knows no manifest."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from embedkit.cache import StackTokens
from embedkit.casework import CaseWork, FailedCase, SameCase
from embedkit.confirmations import record_confirmation
from embedkit.errors import BackboneError, CacheError, VolumeError
from embedkit.failures import Failure, record_failure
from embedkit.features import Backbone
from embedkit.pipeline import compute_cases, fail_case, render_cases
from embedkit.readahead import Waits
from embedkit.recipe import Recipe
from embedkit.sources import CachedSources, Case, CaseImages, read_case
from embedkit.strays import Looks
from embedkit.tails import keep_tail
from embedkit.writing import ShardWriter

__all__ = ["Tally", "extract_stream"]


class Tally(Protocol):
    """Is told what became of each case, and before it what folders were looked through."""

    waits: Waits

    def looked(self, looks: Looks) -> None:
        """Folders were looked through for DICOM series."""

    def done(self, work: CaseWork, *, changed: bool) -> None:
        """The case is extracted; ``changed`` where it was cached from files with other bytes."""

    def failed(self, failure: Failure) -> None:
        """The case gives no tokens; the failure is on record."""

    def same(self, case: Case) -> None:
        """The files of the case were touched, but hold the cached bytes."""

    def tick(self, slices: int) -> None:
        """Time has passed: another batch, of so many slices that are not blank, is done."""


def extract_stream(
    cases: Iterable[Case],
    cache: Path,
    backbone: Backbone,
    recipe: Recipe,
    *,
    sources: CachedSources,
    tally: Tally,
    device: torch.device,
    batch_size: int,
    workers: int,
    shard_bytes: int,
    shard_seconds: float,
    stop: threading.Event | None,
) -> None:
    """Extracts cases as they come and writes their shards; all are on disk when it returns.

    Args:
        cases: Taken one by one, in a thread.
        cache: Made by `create_cache`.
        backbone: Frozen.
        recipe: Of the cache.
        sources: What the cache holds already.
        tally: Told of every case once its tokens are with the shard writer.
        device: Of the backbone.
        batch_size: As for `embedkit.extract`, like all that follow.
        workers: Cases read ahead.
        shard_bytes: Of a full shard.
        shard_seconds: Most time that a shard stays open.
        stop: Once set, what is finished is written and no more begun.

    Raises:
        CacheError: a shard, or a temporary file of a large case, cannot be written; what is finished is kept.
    """

    keep_tail(cache, backbone, recipe)

    def read(case: Case) -> CaseImages | SameCase:
        images = read_case(case, spill=cache, folders=sources.folders, stop=stop)
        if not sources.holds_same_bytes(case, images):
            return images
        for view, confirmation in sources.confirmations(case, images).items():
            record_confirmation(cache, case.case_id, view, confirmation)
        return SameCase(case)

    rendered = render_cases(
        cases,
        read,
        recipe,
        backbone,
        batch_size=batch_size,
        workers=workers,
        device=device,
        spill=cache,
        waits=tally.waits,
    )
    with ShardWriter(cache, recipe, shard_bytes=shard_bytes, shard_seconds=shard_seconds, waits=tally.waits) as writer:

        def after_batch(slices: int) -> None:
            writer.tick()
            tally.tick(slices)

        results = compute_cases(rendered, backbone, recipe, batch_size=batch_size, stop=stop, after_batch=after_batch)
        for result in results:
            tally.looked(sources.folders.take_looks())
            _settle(result, tally, writer, cache, sources)
            if stop is not None and stop.is_set():
                break


def _settle(
    result: CaseWork | FailedCase | SameCase, tally: Tally, writer: ShardWriter, cache: Path, sources: CachedSources
) -> None:
    """Hands a finished case to the writer, or puts a failed one on record."""
    if isinstance(result, CaseWork):
        try:
            stacks = result.finish()
        except (BackboneError, CacheError, VolumeError) as error:
            result = fail_case(result.case, error)
        else:
            digests = {(stack.view, stack.plane): stack.source_digest for stack in stacks}
            changed = sources.changed(result.case, digests)
            writer.add([stack for stack in stacks if not sources.holds_stack(*_name_stack(stack))])
            tally.done(result, changed=changed)
            return
    if isinstance(result, FailedCase):
        failure = Failure(result.case.case_id, result.told, view=result.view, path=result.path)
        record_failure(cache, replace(failure, reason=result.kept))
        tally.failed(failure)
    else:
        tally.same(result.case)


def _name_stack(stack: StackTokens) -> tuple[str, str, str, str]:
    return stack.case_id, stack.view, stack.plane, stack.source_digest

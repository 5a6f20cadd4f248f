"""Owns `extract`: from a manifest to a cache, resumable, with every failed case on record."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
import torch

from embedkit.account import Account, ExtractionProgress, ExtractionSummary
from embedkit.backbones import load_backbone
from embedkit.cache import create_cache, open_cache
from embedkit.casework import CaseWork, FailedCase, SameCase
from embedkit.errors import BackboneError, CacheError, OptionError, VolumeError
from embedkit.failures import Failure, clear_failures, record_failure
from embedkit.features import Backbone
from embedkit.forward import require_precision
from embedkit.manifest import read_manifest
from embedkit.pipeline import compute_cases, render_cases
from embedkit.planning import (
    DEFAULT_BACKBONE,
    DEFAULT_TOKENS,
    DEFAULT_WINDOW,
    choose_device,
    choose_precision,
    make_recipe,
    require_channel_count,
)
from embedkit.recipe import Recipe
from embedkit.slices import window_texts
from embedkit.sources import CachedSources, Case, CaseImages, group_cases, read_case
from embedkit.writing import ShardWriter

__all__ = ["ExtractionProgress", "ExtractionSummary", "extract", "extract_cases"]


def extract(
    manifest: str | Path | pl.DataFrame,
    out: str | Path,
    *,
    backbone: str = DEFAULT_BACKBONE,
    weights: str | Path | None = None,
    image_size: int | None = None,
    tokens: Sequence[str] = DEFAULT_TOKENS,
    layers: Sequence[int] | None = None,
    cut: int | None = None,
    planes: Sequence[str] = ("axial",),
    slices: str = "all",
    window: str | Sequence[str] = DEFAULT_WINDOW,
    channels: Sequence[str] = (),
    fill: str = "",
    crop: str = "none",
    resize: str = "pad",
    dtype: str = "float16",
    precision: str = "auto",
    preview: int = 64,
    device: str = "auto",
    batch_size: int = 32,
    workers: int = 2,
    shard_bytes: int = 64 << 20,
    shard_seconds: float = 120.0,
    on_progress: Callable[[ExtractionProgress], None] | None = None,
    stop: threading.Event | None = None,
) -> ExtractionSummary:
    """Runs a frozen backbone once over every slice of every image and keeps its tokens in a cache.

    A cache that exists is resumed: cases it holds are not repeated, cases that failed are tried again, and a case
    whose files hold other bytes than before is extracted anew. A case fails as a whole, and never stops the others.

    Args:
        manifest: CSV, TSV or Parquet file, or the frame that `read_manifest` gives.
        out: The cache's folder.
        backbone: A timm model name or ``embedkit/scattering``; see `list_backbones`.
        weights: Local safetensors or torch state dict; None downloads timm's pretrained weights.
        image_size: Side in pixels of the square image that enters the backbone; None is the backbone's own.
        tokens: Token sets: ``cls``, ``patch``, ``patch@G``, ``attention``, or one with its layer as ``patch@4:8``.
        layers: For the token sets without a layer; counted from 1, or from the end (-1 is the last). None is the
            default of `embedkit.tokens.resolve_token_sets`.
        cut: Also keep every token that enters the last ``cut`` blocks.
        planes: Some of axial, coronal, sagittal.
        slices: ``all``, ``every:MM`` or ``count:N``.
        window: A preset name (``lung``), ``range:LOW:HIGH`` or ``percentile:LOW:HIGH``; three make three channels.
        channels: One or three views of one grid that become the channels of one image.
        fill: The view that stands for an absent channel.
        crop: ``none``, or ``foreground`` for the bounding square of body or head, common to all views of a case.
        resize: ``pad`` keeps the physical aspect, ``stretch`` does not.
        dtype: How tokens are stored: ``float16``.
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``: the fastest that the device computes natively.
        preview: Side in pixels of the grey preview kept per slice; 0 keeps none.
        device: ``auto`` or a torch device.
        batch_size: Slices per forward pass.
        workers: Cases read ahead, each in a thread.
        shard_bytes: A shard is closed once it holds this many bytes of tokens.
        shard_seconds: A shard is closed at the latest after this many seconds, so that a kill costs little.
        on_progress: Called after every case.
        stop: Once set, the finished cases are written and the call returns with ``interrupted``.

    Raises:
        OptionError: an option has a value that means nothing.
        ManifestError: the manifest is unreadable, contradicts itself, or gives a cached case another patient or fewer
            views.
        BackboneError: unknown backbone, or its weights cannot be had.
        RecipeError: ``out`` holds a cache of another recipe.
        CacheError: ``out`` cannot be written, or holds a damaged shard.
    """
    if batch_size < 1 or workers < 1:
        raise OptionError(f"batch_size is {batch_size} and workers is {workers}, expected at least 1 of each")
    cases = group_cases(manifest if isinstance(manifest, pl.DataFrame) else read_manifest(manifest))
    target = choose_device(device)
    require_channel_count(channels, window)
    model = load_backbone(
        backbone,
        weights=None if weights is None else Path(weights),
        image_size=image_size,
        channels=max(len(channels), len(window_texts(window))),
        device=str(target),
    )
    recipe = make_recipe(
        model.info,
        tokens=tokens,
        layers=layers,
        cut=cut,
        planes=planes,
        slices=slices,
        window=window,
        channels=channels,
        fill=fill,
        crop=crop,
        resize=resize,
        dtype=dtype,
        precision=choose_precision(precision, target, model.info),
        preview=preview,
    )
    create_cache(Path(out), recipe)
    return extract_cases(
        cases,
        Path(out),
        model,
        recipe,
        device=target,
        batch_size=batch_size,
        workers=workers,
        shard_bytes=shard_bytes,
        shard_seconds=shard_seconds,
        on_progress=on_progress,
        stop=stop,
    )


def extract_cases(
    cases: Sequence[Case],
    cache: Path,
    backbone: Backbone,
    recipe: Recipe,
    *,
    device: torch.device,
    batch_size: int = 32,
    workers: int = 2,
    shard_bytes: int = 64 << 20,
    shard_seconds: float = 120.0,
    on_progress: Callable[[ExtractionProgress], None] | None = None,
    stop: threading.Event | None = None,
) -> ExtractionSummary:
    """Extracts the cases that ``cache`` (made by `create_cache`) lacks; the options are those of `extract`."""
    sources = CachedSources(open_cache(cache).stacks, recipe)
    sources.require_same_patients(cases)
    sources.require_same_views(cases)
    pending = [case for case in cases if not sources.holds(case)]
    account = Account(cases=len(cases), pending=len(pending), on_progress=on_progress)
    if pending:
        require_precision(backbone, recipe, device)

    def read(case: Case) -> CaseImages | SameCase:
        images = read_case(case)
        return SameCase(case) if sources.holds_same_bytes(case, images) else images

    rendered = render_cases(
        pending,
        read,
        recipe,
        backbone,
        batch_size=batch_size,
        workers=workers,
        device=device,
        spill=cache,
        waits=account.waits,
    )
    with ShardWriter(
        cache, recipe, shard_bytes=shard_bytes, shard_seconds=shard_seconds, waits=account.waits
    ) as writer:
        for result in compute_cases(rendered, backbone, recipe, batch_size=batch_size):
            _settle(result, account, writer, cache, sources)
            if stop is not None and stop.is_set():
                break
    clear_failures(cache, [(case_id, "") for case_id in account.settled])
    return account.summarise(cache, recipe, interrupted=account.left > 0)


def _settle(
    result: CaseWork | FailedCase | SameCase,
    account: Account,
    writer: ShardWriter,
    cache: Path,
    sources: CachedSources,
) -> None:
    """Hands a finished case to the writer, or puts a failed one on record."""
    if isinstance(result, CaseWork):
        try:
            stacks = result.finish()
        except (BackboneError, CacheError, VolumeError) as error:
            result = FailedCase(result.case, str(error))
        else:
            writer.add(stacks)
            account.done(result, changed=sources.holds_some(result.case))
            return
    if isinstance(result, FailedCase):
        failure = Failure(case_id=result.case.case_id, view="", reason=result.reason)
        record_failure(cache, replace(failure, reason=_without_folders(result)))
        account.failed(failure)
    else:
        account.same(result.case)


def _without_folders(failed: FailedCase) -> str:
    """The reason with file names alone: a folder's name can be a patient's, and the record stays in the cache."""
    reason = failed.reason
    for path in failed.case.images.values():
        reason = reason.replace(str(path), path.name).replace(f"{path.parent}/", "")
    return reason

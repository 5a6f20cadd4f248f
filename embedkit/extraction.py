"""Owns `extract`: from a manifest to a cache, resumable, with every failed case on record."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
import torch

from embedkit.account import Account, ExtractionProgress, ExtractionSummary
from embedkit.cache import create_cache, open_cache
from embedkit.confirmations import read_confirmations
from embedkit.engines import dispatch_cases
from embedkit.errors import OptionError
from embedkit.failures import settle_cases
from embedkit.features import DEFAULT_BACKBONE, Backbone
from embedkit.folder import require_writable
from embedkit.forward import require_precision
from embedkit.manifest import read_manifest
from embedkit.orders import Transport
from embedkit.parts import take_part
from embedkit.planning import DEFAULT_TOKENS, DEFAULT_WINDOW, choose_device, require_counts
from embedkit.processes import ProcessTransport, split_devices
from embedkit.rayengine import RayTransport
from embedkit.recipe import Recipe
from embedkit.sources import CachedSources, Case, group_cases, tell_absent_channels
from embedkit.strays import account_strays, look_again
from embedkit.stream import extract_stream
from embedkit.worker import ExtractionJob

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
    compiled: bool = False,
    preview: int = 64,
    augment: int = 0,
    augment_flip: bool = False,
    device: str = "auto",
    batch_size: int = 32,
    workers: int = 2,
    part: str | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    ray_workers: int | None = None,
    shard_bytes: int = 64 << 20,
    shard_seconds: float = 120.0,
    on_progress: Callable[[ExtractionProgress], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> ExtractionSummary:
    """Runs a frozen backbone once over every slice of every image and keeps its tokens in a cache.

    A cache that exists is resumed: cases it holds are not repeated, cases that failed are tried again, and a case
    whose files hold other bytes than before is extracted anew. A case fails as a whole, and never stops the others. A
    damaged DICOM file of which no series can be told fails none, and is told as a stray.

    Args:
        manifest: CSV, TSV or Parquet file, or a frame, as `read_manifest` takes it.
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
        dtype: How tokens are stored: ``float16`` or ``int8`` (half the bytes).
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``: the fastest that the device computes natively.
        compiled: Compile the blocks of a transformer with torch.compile: pays in long runs on a GPU, hardly on a CPU.
        preview: Side in pixels of the grey preview kept per slice; 0 keeps none.
        augment: Keep so many altered copies ``CASE#1``, ``CASE#2``, ... of each case in its place, of the same patient:
            turned, scaled, moved and in another contrast (`embedkit.alteration`), to train on beside the cases
            (``copies`` of `embedkit.train`). The case is read and rendered once for all of them.
        augment_flip: Mirror half of the copies left-right; not for a target that asks for a side.
        device: ``auto`` or a torch device. Several with commas between them (``cuda:0,cuda:1``) or ``cuda:all`` take
            one spawned process each, so that a script needs ``if __name__ == "__main__":`` around the call.
        batch_size: Slices per forward pass.
        workers: Cases read ahead, each in a thread; per process.
        part: ``i/n`` for the i-th of n parts of the manifest's cases, each done by a call of its own, wherever it
            runs; a part without cases does nothing.
        engine: ``local``, or ``ray`` for a Ray cluster, whose machines all find images, weights and ``out`` under the
            same paths.
        ray_address: Of the cluster; None is the one of this process or of ``RAY_ADDRESS``, else this machine alone.
        ray_workers: Actors; None is one per GPU, or one per four CPUs where there is no GPU.
        shard_bytes: A shard is closed once it holds this many bytes of tokens.
        shard_seconds: A shard is closed at the latest after this many seconds, so that a kill costs little.
        on_progress: Called after every case.
        on_notice: Called with a line of text when no case has one of the ``channels``, and when a worker is lost,
            replaced, or long in starting.
        stop: Once set, the finished cases are written and the call returns with ``interrupted``.

    Raises:
        OptionError: an option has a value that means nothing.
        ManifestError: the manifest is unreadable, contradicts itself, or gives a cached case another patient or fewer
            views.
        BackboneError: unknown backbone, or its weights cannot be had.
        RecipeError: ``out`` holds a cache of another recipe.
        CacheError: ``out`` cannot be written, or holds a damaged shard.
        ExtractionError: every worker process or actor was lost, and those in their places as well.
    """
    require_counts(batch_size, workers)
    cases = group_cases(read_manifest(manifest))
    if on_notice is not None:
        for notice in tell_absent_channels(cases, channels, fill):
            on_notice(notice)
    everyone = cases
    if part is not None:
        cases = take_part(cases, part)
    job = ExtractionJob(
        backbone=backbone,
        weights=None if weights is None else Path(weights),
        image_size=image_size,
        precision=precision,
        compiled=compiled,
        recipe_options={
            "tokens": tokens,
            "layers": layers,
            "cut": cut,
            "planes": planes,
            "slices": slices,
            "window": window,
            "channels": channels,
            "fill": fill,
            "crop": crop,
            "resize": resize,
            "dtype": dtype,
            "preview": preview,
            "augment": augment,
            "augment_flip": augment_flip,
        },
        batch_size=batch_size,
        workers=workers,
        shard_bytes=shard_bytes,
        shard_seconds=shard_seconds,
    )
    transport = _choose_transport(job, engine, device, ray_address=ray_address, ray_workers=ray_workers)
    if transport is None:
        return _extract_here(job, cases, everyone, Path(out), device, on_progress=on_progress, stop=stop)
    return dispatch_cases(
        [_absolute(case) for case in cases],
        Path(out).absolute(),
        transport,
        on_progress=on_progress,
        on_notice=on_notice,
        stop=stop,
        manifest=[_absolute(case) for case in everyone],
    )


def _choose_transport(
    job: ExtractionJob, engine: str, device: str, *, ray_address: str | None, ray_workers: int | None
) -> Transport | None:
    """What carries cases to worker processes; None where this process does all."""
    if engine not in {"local", "ray"}:
        raise OptionError(f"engine {engine!r} is unknown; expected local or ray")
    if engine == "local" and (ray_address is not None or ray_workers is not None):
        raise OptionError("a Ray address or a number of Ray workers is given, but the engine is local; use engine ray")
    elsewhere = job if job.weights is None else replace(job, weights=job.weights.absolute())
    if engine == "ray":
        return RayTransport(elsewhere, device, address=ray_address, workers=ray_workers)
    devices = split_devices(device)
    return ProcessTransport(elsewhere, devices) if len(devices) > 1 else None


def _absolute(case: Case) -> Case:
    return replace(case, images={view: path.absolute() for view, path in case.images.items()})


def _extract_here(
    job: ExtractionJob,
    cases: Sequence[Case],
    manifest: Sequence[Case],
    cache: Path,
    device: str,
    *,
    on_progress: Callable[[ExtractionProgress], None] | None,
    stop: threading.Event | None,
) -> ExtractionSummary:
    (only,) = split_devices(device)
    target = choose_device(only)
    backbone, recipe = job.load(target)
    create_cache(cache, recipe)
    return extract_cases(
        cases,
        cache,
        backbone,
        recipe,
        device=target,
        batch_size=job.batch_size,
        workers=job.workers,
        shard_bytes=job.shard_bytes,
        shard_seconds=job.shard_seconds,
        on_progress=on_progress,
        stop=stop,
        manifest=manifest,
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
    manifest: Sequence[Case] = (),
) -> ExtractionSummary:
    """Extracts the cases that ``cache`` (made by `create_cache`) lacks; the options are those of `extract`.

    ``manifest`` is all cases of it, where others than ``cases`` are done by another call.
    """
    sources = CachedSources(open_cache(cache).stacks, recipe, read_confirmations(cache))
    sources.require_same_patients(cases)
    sources.require_same_views(cases)
    held, pending = sources.split_cases(cases, stop=stop)
    look_again(cache, held, sources.folders, stop=stop)
    account = Account(cases=len(cases), pending=len(pending), on_progress=on_progress)
    account.tick(0)
    stopped = stop is not None and stop.is_set()
    if pending and not stopped:
        require_writable(cache)
        require_precision(backbone, recipe, device)
    if not stopped:
        extract_stream(
            pending,
            cache,
            backbone,
            recipe,
            sources=sources,
            tally=account,
            device=device,
            batch_size=batch_size,
            workers=workers,
            shard_bytes=shard_bytes,
            shard_seconds=shard_seconds,
            stop=stop,
        )
    account.looked(sources.folders.take_looks())
    # held may have been mended before a kill, and not yet cleared
    settle_cases(cache, [*(case.case_id for case in held), *account.settled], account.failures)
    strays = account_strays(cache, manifest or cases, account.looks)
    return account.summarise(cache, recipe, strays=strays, interrupted=account.left > 0)

"""Owns `embedkit extract`: parses, calls `embedkit.extract`, prints what was done."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from embedkit.cli.console import (
    Meter,
    format_bytes,
    format_seconds,
    name_some,
    parse_size,
    print_json,
    print_table,
    show_progress,
    split_list,
)

if TYPE_CHECKING:
    from embedkit.estimate import EstimateOptions
    from embedkit.extraction import ExtractionProgress, ExtractionSummary
    from embedkit.failures import Stray

__all__ = ["run"]


def extract_command(
    manifest: Annotated[
        Path, typer.Argument(help="CSV, TSV or Parquet: case_id, path, optional patient_id, view, mask.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the cache; an existing one is resumed.")],
    backbone: Annotated[str, typer.Option(help="timm model or embedkit/scattering; see `embedkit backbones`.")] = (
        "vit_small_patch14_reg4_dinov2.lvd142m"
    ),
    weights: Annotated[Path | None, typer.Option(help="Local safetensors or torch state dict.")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side in pixels of the image that enters the backbone.")
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="Of cls, patch, patch@G, attention, or with a layer: patch@4:8.")
    ] = "cls,patch@4",
    layers: Annotated[str, typer.Option(help="Layers for token sets named without one, as 8,12 or -1.")] = "",
    cut: Annotated[int | None, typer.Option(help="Also keep all tokens that enter the last K blocks.")] = None,
    planes: Annotated[str, typer.Option(help="Of axial, coronal, sagittal.")] = "axial",
    slices: Annotated[str, typer.Option(help="all, every:MM or count:N.")] = "all",
    window: Annotated[
        str,
        typer.Option(
            help="Preset (lung, soft, ...), range:LOW:HIGH or percentile:LOW:HIGH; three make three channels."
        ),
    ] = "percentile:0.5:99.5",
    channels: Annotated[
        str, typer.Option(help="Three views that become the channels of one image: pre,flair,post.")
    ] = "",
    fill: Annotated[str, typer.Option(help="View that stands for an absent channel.")] = "",
    crop: Annotated[str, typer.Option(help="none or foreground.")] = "none",
    resize: Annotated[str, typer.Option(help="pad (keeps the aspect) or stretch.")] = "pad",
    dtype: Annotated[str, typer.Option(help="How tokens are stored: float16, or int8 for half the bytes.")] = "float16",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the transformer's blocks: for long runs on a GPU.")
    ] = False,
    preview: Annotated[int, typer.Option(help="Side in pixels of the preview kept per slice; 0 keeps none.")] = 64,
    augment: Annotated[
        int,
        typer.Option(help="Keep so many altered copies of each case in its place, for train --copies; 0 keeps cases."),
    ] = 0,
    augment_flip: Annotated[
        bool,
        typer.Option("--augment-flip", help="Mirror half of the copies: not for a target that asks for a side."),
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1, mps; cuda:all or cuda:0,cuda:1 takes one process each.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="Slices per forward pass.")] = 32,
    workers: Annotated[int, typer.Option(help="Cases read ahead, per process.")] = 2,
    part: Annotated[
        str | None, typer.Option(help="i/n: only the i-th of n parts of the cases; one job each on one cache.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for a Ray cluster (pip install 'embedkit[ray]').")] = (
        "local"
    ),
    ray_address: Annotated[str | None, typer.Option(help="Of the cluster; without it Ray on this machine.")] = None,
    ray_workers: Annotated[
        int | None, typer.Option(help="Ray actors; without it one per GPU, or per four CPUs.")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="A shard is closed at this size of tokens: 64MB, 1GB.")] = "64MB",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell size and time, from a few slices of a few cases.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Run the backbone once over every slice and keep its tokens; resumes where it was stopped."""
    options: EstimateOptions = {
        "backbone": backbone,
        "weights": weights,
        "image_size": image_size,
        "tokens": split_list(tokens),
        "layers": [_layer(text) for text in split_list(layers)] or None,
        "cut": cut,
        "planes": split_list(planes),
        "slices": slices,
        "window": split_list(window),
        "channels": split_list(channels),
        "fill": fill,
        "crop": crop,
        "resize": resize,
        "dtype": dtype,
        "precision": precision,
        "compiled": compiled,
        "preview": preview,
        "augment": augment,
        "augment_flip": augment_flip,
        "device": device,
        "batch_size": batch_size,
        "workers": workers,
        "part": part,
    }
    shard_bytes = parse_size(shard_size)
    if dry_run:
        if engine != "local" or ray_address is not None or ray_workers is not None:
            raise typer.BadParameter(
                "a dry run tells of this machine alone; leave --engine out", param_hint="--dry-run"
            )
        if _print_estimate(manifest, out, options, json=json):
            raise typer.Exit(1)
        return
    summary, signals = _extract(
        manifest,
        out,
        options,
        engine=engine,
        ray_address=ray_address,
        ray_workers=ray_workers,
        shard_bytes=shard_bytes,
    )
    _print_summary(summary, copies=augment, json=json)
    if part is not None and not summary.cases:
        typer.echo(f"part {part} holds no case: the manifest has fewer cases than parts", err=True)
    if summary.interrupted:
        raise typer.Exit(128 + signals[0])
    if summary.failures or summary.strays:
        raise typer.Exit(1)


run = extract_command


def _extract(
    manifest: Path,
    out: Path,
    options: EstimateOptions,
    *,
    engine: str,
    ray_address: str | None,
    ray_workers: int | None,
    shard_bytes: int,
) -> tuple[ExtractionSummary, list[int]]:
    """What was done, and the signals that came meanwhile."""
    try:
        from embedkit.allocator import keep_freed_memory
        from embedkit.extraction import extract
    except KeyboardInterrupt:
        typer.echo("embedkit: interrupted; nothing was begun", err=True)
        raise typer.Exit(130) from None
    keep_freed_memory()
    with _stop_on_signals() as (stop, caught), show_progress("extract", "cases") as meter:
        summary = extract(
            manifest,
            out,
            **options,
            engine=engine,
            ray_address=ray_address,
            ray_workers=ray_workers,
            shard_bytes=shard_bytes,
            on_progress=lambda progress: _show(meter, progress),
            on_notice=lambda notice: typer.echo(notice, err=True),
            stop=stop,
        )
    return summary, caught


def _print_estimate(manifest: Path, out: Path, options: EstimateOptions, *, json: bool) -> int:
    """Tells the estimate, and gives the number of sampled cases that will fail and of damaged files beside them."""
    from embedkit.estimate import estimate_extraction

    estimate = estimate_extraction(manifest, out, **options)
    if json:
        print_json(dataclasses.asdict(estimate))
        return len(estimate.unreadable) + len(estimate.strays)
    typer.echo(
        f"{estimate.cases} cases left to do, about {estimate.slices} slices ({estimate.blank_share:.0%} blank),"
        f" told from {estimate.sampled_cases} cases\n"
        f"size  about {format_bytes(estimate.bytes)}, {estimate.bytes_per_slice} bytes per slice\n"
        f"time  about {format_seconds(estimate.seconds)}: reading {estimate.read_seconds_per_case:.2f} s per case,"
        f" rendering {estimate.render_ms_per_slice:.1f} ms, backbone {estimate.forward_ms_per_slice:.1f} ms per slice"
    )
    rows = [[name, *map(format_bytes, sizes.values())] for name, sizes in sorted(estimate.choices.items())]
    print_table(["token set", *next(iter(estimate.choices.values()))], rows)
    if estimate.unreadable:
        typer.echo(
            f"{len(estimate.unreadable)} of the {estimate.sampled_cases} cases looked at will fail, so about"
            f" {estimate.failing} of {estimate.cases}; size and time are those of the others",
            err=True,
        )
    for problem in estimate.unreadable:
        typer.echo(f"  will fail: {problem}", err=True)
    _tell_strays(estimate.strays)
    return len(estimate.unreadable) + len(estimate.strays)


def _tell_strays(strays: Sequence[Stray]) -> None:
    for stray in strays:
        typer.echo(f"  stray {stray.path}, beside {name_some(stray.beside)}: {stray.reason}", err=True)


def _layer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"layer {text!r} is not a whole number", param_hint="--layers") from None


def _show(meter: Meter, progress: ExtractionProgress) -> None:
    done = progress.cases_before + progress.cases_done + progress.cases_failed
    rate = progress.slices / progress.seconds if progress.seconds else 0.0
    left = f", about {format_seconds(progress.seconds_left)} left" if progress.seconds_left is not None else ""
    counts = f"{progress.cases_done} done, {progress.cases_failed} failed, {progress.cases_left} left"
    meter(done, progress.cases, f"{counts}, {rate:.1f} slices/s{left}")


def _print_summary(summary: ExtractionSummary, *, copies: int, json: bool) -> None:
    if json:
        print_json(dataclasses.asdict(summary))
        return
    from embedkit.targets import count_noun

    rate = summary.slices / summary.seconds if summary.seconds else 0.0
    each = f" as {copies} copies each" if copies else ""
    typer.echo(
        f"{summary.cache}: {summary.cases_done} cases extracted{each} ({summary.slices} slices,"
        f" {summary.blank_slices} blank, {rate:.1f} slices/s), {summary.cases_before} there before,"
        f" {len(summary.failures)} failed"
        f"{', ' + count_noun(len(summary.strays), 'stray file') if summary.strays else ''}"
    )
    for case_id in summary.changed:
        typer.echo(f"  {case_id}: its files changed since they were cached; extracted anew")
    for failure in summary.failures:
        typer.echo(f"  {failure.case_id} failed: {failure.reason}", err=True)
    _tell_strays(summary.strays)
    if summary.interrupted:
        typer.echo("interrupted; the finished cases are in the cache, the same command resumes", err=True)


@contextmanager
def _stop_on_signals() -> Iterator[tuple[threading.Event, list[int]]]:
    """The first Ctrl-C or SIGTERM sets the event, so that the shard is finished; the second one ends at once."""
    stop, caught = threading.Event(), list[int]()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _: FrameType | None) -> None:
        caught.append(number)
        stop.set()
        typer.echo("stopping: writing the finished cases (again to stop at once)", err=True)
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop, caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

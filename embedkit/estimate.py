"""Owns the forecast of an extraction, its size and its time, from a few slices of a few cases; writes nothing."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
import polars as pl
import torch
from torch import Tensor

from embedkit.alteration import alter_slices
from embedkit.cache import open_cache
from embedkit.casework import list_kept
from embedkit.confirmations import read_confirmations
from embedkit.dicomfolders import SeriesFolders
from embedkit.errors import CacheError, OptionError, VolumeError
from embedkit.failures import Stray
from embedkit.features import DEFAULT_BACKBONE, Backbone, BackboneInfo
from embedkit.folder import require_room, stored_recipe
from embedkit.forward import run_backbone
from embedkit.manifest import read_manifest
from embedkit.parts import take_part
from embedkit.pipeline import fail_case
from embedkit.planning import choose_device, require_counts
from embedkit.processes import split_devices
from embedkit.quantisation import TOKEN_DTYPES, token_set_bytes
from embedkit.recipe import Recipe, TokenSet, require_same_recipe
from embedkit.slices import Stack, plan_stacks, render_previews, render_slices
from embedkit.sources import CachedSources, Case, CaseImages, group_cases, read_case
from embedkit.strays import find_strays, look_again
from embedkit.worker import ExtractionJob

__all__ = ["EstimateOptions", "ExtractionEstimate", "estimate_cases", "estimate_extraction", "list_token_choices"]

_PIECES = 4
_GRIDS = (4, 7)


@dataclass(frozen=True)
class ExtractionEstimate:
    """What an extraction will take, told from a sample.

    Attributes:
        cases: Cases left to do.
        sampled_cases: Of these, those that were read for the estimate.
        unreadable: Of the sampled, those that will fail, and why.
        strays: Damaged DICOM files of which no series can be told, in the folders looked through.
        failing: Cases that are expected to fail: of all as many as of the sampled.
        slices: Expected in the others.
        blank_share: Of the rendered sample, the share that shows nothing.
        bytes: Expected size of the tokens and previews, without tables (some kilobytes per case).
        bytes_per_slice: Of the recipe's token sets and preview together.
        seconds: Expected wall time, the loading of the backbone left out.
        read_seconds_per_case: Reading and decoding.
        render_ms_per_slice: Window, resize, preview; of copies a share of it, and the alteration.
        forward_ms_per_slice: Backbone, in full batches.
        choices: What each token set would take in bytes for the same slices, by token set, then dtype.
    """

    cases: int
    sampled_cases: int
    unreadable: tuple[str, ...]
    strays: tuple[Stray, ...]
    failing: int
    slices: int
    blank_share: float
    bytes: int
    bytes_per_slice: int
    seconds: float
    read_seconds_per_case: float
    render_ms_per_slice: float
    forward_ms_per_slice: float
    choices: dict[str, dict[str, int]]


class EstimateOptions(TypedDict, total=False):
    """Those options of `embedkit.extract` that decide what an extraction takes."""

    backbone: str
    weights: str | Path | None
    image_size: int | None
    tokens: Sequence[str]
    layers: Sequence[int] | None
    cut: int | None
    planes: Sequence[str]
    slices: str
    window: str | Sequence[str]
    channels: Sequence[str]
    fill: str
    crop: str
    resize: str
    dtype: str
    precision: str
    compiled: bool
    preview: int
    augment: int
    augment_flip: bool
    device: str
    batch_size: int
    workers: int
    part: str | None


_NOT_OF_THE_RECIPE = frozenset(
    {"backbone", "weights", "image_size", "precision", "compiled", "device", "batch_size", "workers", "part"}
)


@dataclass
class _Sample:
    """What was measured so far."""

    read_seconds: list[float] = field(default_factory=list)
    slices: list[int] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    rendered: int = 0
    render_seconds: float = 0.0


def estimate_extraction(
    manifest: str | Path | pl.DataFrame, out: str | Path, *, samples: int = 5, **options: Unpack[EstimateOptions]
) -> ExtractionEstimate:
    """Tells what `embedkit.extract` with these arguments will take, for the cases that ``out`` lacks; writes nothing.

    With several accelerators the time is that of the first alone, divided by their number; processes on the CPU share
    its cores, so that several take about as long as one.

    Args:
        manifest: As for `embedkit.extract`, like ``out`` and ``options``.
        out: The cache's folder; it need not exist.
        samples: Cases to read.
        **options: With the defaults of `embedkit.extract`.

    Raises:
        EmbedkitError: as `embedkit.extract` does for the same arguments.
        VolumeError: none of the sampled cases can be read.
    """
    weights, batch_size, workers = options.get("weights"), options.get("batch_size", 32), options.get("workers", 2)
    require_counts(batch_size, workers)
    everyone = cases = group_cases(read_manifest(manifest))
    if (part := options.get("part")) is not None:
        cases = take_part(cases, part)
    job = ExtractionJob(
        backbone=options.get("backbone", DEFAULT_BACKBONE),
        weights=None if weights is None else Path(weights),
        image_size=options.get("image_size"),
        precision=options.get("precision", "auto"),
        compiled=options.get("compiled", False),
        recipe_options={name: value for name, value in options.items() if name not in _NOT_OF_THE_RECIPE},
        batch_size=batch_size,
        workers=workers,
        shard_bytes=0,
        shard_seconds=0,
    )
    devices = split_devices(options.get("device", "auto"))
    device = choose_device(devices[0])
    backbone, recipe = job.load(device)
    folders = SeriesFolders()
    pending = _without_cached(cases, Path(out), recipe, folders)
    estimate = estimate_cases(
        pending,
        backbone,
        recipe,
        device=device,
        batch_size=batch_size,
        workers=workers,
        samples=samples,
        folders=folders,
    )
    return replace(
        estimate,
        strays=find_strays(everyone, folders.take_looks()),
        seconds=estimate.seconds / (1 if device.type == "cpu" else len(devices)),
    )


def _without_cached(cases: list[Case], out: Path, recipe: Recipe, folders: SeriesFolders) -> list[Case]:
    """The cases that a cache lacks; raises what extracting to it would."""
    require_room(out)
    found = stored_recipe(out)
    if found is None:
        return cases
    ways_out = "Choose another --out, or pass the options that made it"
    require_same_recipe(found, recipe, where=f"cache {out}", ways_out=ways_out)
    sources = CachedSources(open_cache(out).stacks, recipe, read_confirmations(out), folders=folders)
    sources.require_same_patients(cases)
    sources.require_same_views(cases)
    held, pending = sources.split_cases(cases)
    look_again(out, held, folders)
    return pending


def estimate_cases(
    cases: Sequence[Case],
    backbone: Backbone,
    recipe: Recipe,
    *,
    device: torch.device,
    batch_size: int = 32,
    workers: int = 2,
    samples: int = 5,
    folders: SeriesFolders | None = None,
) -> ExtractionEstimate:
    """Reads a few of ``cases``, evenly spread, runs one batch of their slices, and scales up.

    On a CPU reading, rendering and backbone share the cores, so their times add up; with an accelerator they overlap,
    and the slowest of them decides.

    Args:
        cases: Those left to do.
        backbone: Loaded on ``device``.
        recipe: What would be extracted.
        device: Where the backbone runs.
        batch_size: Slices per forward pass.
        workers: Cases read at once.
        samples: Cases to read.
        folders: Remembers the DICOM series of folders; what it saw of strays is left for the caller to take.

    Raises:
        OptionError: an option of the recipe means nothing.
        VolumeError: none of the sampled cases can be read.
    """
    chosen = [cases[i] for i in np.unique(np.linspace(0, len(cases) - 1, min(samples, len(cases))).round().astype(int))]
    sample, folders = _Sample(), folders or SeriesFolders()
    for case in chosen:
        most = max(1, batch_size // max(1, len(chosen)))
        _sample_case(case, recipe, sample, folders=folders, device=device, most=most)
    if chosen and not sample.slices:
        raise VolumeError(
            f"none of the {len(chosen)} cases read for the estimate gives slices; first: {sample.unreadable[0]}"
        )
    failing = round(len(cases) * len(sample.unreadable) / max(1, len(chosen)))
    good = len(cases) - failing
    slices = round(float(np.mean(sample.slices)) * good) if sample.slices else 0
    forward = _time_forward(sample.images, backbone, recipe, batch_size) if sample.images else 0.0
    shown = sum(len(part) for part in sample.images) / max(1, sample.rendered)
    reading = float(np.mean(sample.read_seconds)) if sample.read_seconds else 0.0
    rendering = sample.render_seconds / max(1, sample.rendered)
    stages = (reading * good, rendering * slices, forward * slices * shown)
    per_slice = sum(token_set_bytes(kept, backbone.info, dtype=recipe.dtype) for kept in recipe.parsed_token_sets())
    per_slice += recipe.preview**2
    return ExtractionEstimate(
        cases=len(cases),
        sampled_cases=len(chosen),
        unreadable=tuple(sample.unreadable),
        strays=(),
        failing=failing,
        slices=slices,
        blank_share=1 - shown if sample.rendered else 0.0,
        bytes=per_slice * slices,
        bytes_per_slice=per_slice,
        seconds=sum(stages) if device.type == "cpu" else max(stages[0] / workers, *stages[1:]),
        read_seconds_per_case=reading,
        render_ms_per_slice=1e3 * rendering,
        forward_ms_per_slice=1e3 * forward,
        choices={
            str(kept): {dtype: token_set_bytes(kept, backbone.info, dtype=dtype) * slices for dtype in TOKEN_DTYPES}
            for kept in list_token_choices(backbone.info, recipe)
        },
    )


def list_token_choices(info: BackboneInfo, recipe: Recipe) -> list[TokenSet]:
    """The recipe's own token sets and, at its deepest layers, the others that this backbone could give."""
    layer = max((kept.layer for kept in recipe.parsed_token_sets() if kept.kind == "patch"), default=info.depth)
    side = min(info.grids[layer - 1])
    others = [TokenSet("patch", layer, grid) for grid in _GRIDS if grid < side] + [TokenSet("patch", layer)]
    if info.depth in info.summary_layers:
        others.append(TokenSet("cls", info.depth))
    if info.attention_heads:
        others.append(TokenSet("attention", info.depth))
    if info.has_tail and info.depth > 4:
        others.append(TokenSet("cut", info.depth - 4))
    return list(dict.fromkeys([*recipe.parsed_token_sets(), *others]))


def _sample_case(
    case: Case, recipe: Recipe, sample: _Sample, *, folders: SeriesFolders, device: torch.device, most: int
) -> None:
    started = time.perf_counter()
    try:
        images = read_case(case, spill=Path(tempfile.gettempdir()), folders=folders)
        stacks = plan_stacks(images.volumes, recipe)
        took = time.perf_counter() - started
        _render_some(case, stacks, images, recipe, sample, device=device, most=most)
    except (CacheError, OptionError):
        raise
    except Exception as error:  # told, as an extraction tells it, and no other case suffers
        sample.unreadable.append(f"{case.case_id}: {fail_case(case, error).told}")
        return
    sample.read_seconds.append(took)
    sample.slices.append(max(1, recipe.copies) * sum(len(stack.indices) for stack in stacks))


def _render_some(
    case: Case,
    stacks: Sequence[Stack],
    images: CaseImages,
    recipe: Recipe,
    sample: _Sample,
    *,
    device: torch.device,
    most: int,
) -> None:
    """Renders about ``most`` slices of a case, in pieces spread over its stacks, and alters them for its copies."""
    each = max(1, round(most / (len(stacks) * _PIECES)))
    for stack in stacks:
        count = len(stack.indices)
        for start in np.unique(np.linspace(0, max(0, count - each), _PIECES).astype(int)).tolist():
            stop = min(start + each, count)
            started = time.perf_counter()
            rendered, blank = render_slices(stack, images.volumes, recipe, start, stop, device=device)
            for _, alteration in list_kept(case.case_id, stack, recipe):
                shown = rendered if alteration is None else alter_slices(rendered, alteration)
                if recipe.preview:
                    render_previews(shown, recipe.preview).cpu()
                sample.rendered += stop - start
                sample.images.append(shown[~blank])
            sample.render_seconds += time.perf_counter() - started


def _time_forward(images: Sequence[Tensor], backbone: Backbone, recipe: Recipe, batch_size: int) -> float:
    """Seconds per slice of a full batch, the first of two runs not counted; 0 where every slice is blank."""
    shown = torch.cat(list(images))
    if not len(shown):
        return 0.0
    batch = shown.repeat(-(-batch_size // len(shown)), 1, 1, 1)[:batch_size]
    run_backbone(batch, backbone, recipe)
    started = time.perf_counter()
    run_backbone(batch, backbone, recipe)
    return (time.perf_counter() - started) / batch_size

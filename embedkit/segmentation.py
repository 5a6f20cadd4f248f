"""Owns `segment`: the masks that a run predicts, with or without clicks, as NIfTI in the source geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedkit.bags import Bag, stream_bags
from embedkit.cache import Cache, open_originals
from embedkit.catalogue import canonical_shape
from embedkit.errors import OptionError, RunError
from embedkit.files import explain_os_error, safe_name
from embedkit.maskscores import predict_cover
from embedkit.members import Member
from embedkit.patches import place_patch_scores
from embedkit.plugins import learns_masks, list_heads
from embedkit.pooling import joined_grid
from embedkit.prompts import Click, place_clicks
from embedkit.runs import Run, check_cache, open_run
from embedkit.volumes import to_source, write_volume

__all__ = ["THRESHOLD", "Segmentation", "predict_mask", "segment"]

THRESHOLD = 0.5
"""The share from which on a voxel is in the mask, unless said otherwise."""
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Segmentation:
    """One mask that `segment` wrote.

    Attributes:
        case_id: The case.
        view: ``view/plane`` whose slices it comes from.
        path: NIfTI, uint8 0 or 1, in the size and geometry of the source image.
        volume_ml: Of what it covers.
    """

    case_id: str
    view: str
    path: Path
    volume_ml: float


def segment(
    run: Run | Path | str,
    cache: Cache | Path | str,
    out: Path | str,
    *,
    case_ids: Sequence[str] | None = None,
    clicks: Sequence[Click] = (),
    held_out: bool = False,
    threshold: float = THRESHOLD,
) -> tuple[Segmentation, ...]:
    """Writes the masks of cases, one file per case, view and plane: where the mean of the members is high enough.

    Between the centres of patches, and between slices, what is predicted is interpolated before it is cut.

    Args:
        run: A run that was trained with masks, or its folder.
        cache: A cache of the run's recipe, or its path.
        out: Folder to write to; made if need be.
        case_ids: Which cases; None for all of the cache, sorted.
        clicks: Points inside of what the mask is to cover, in one case; for a head that practised on clicks.
        held_out: Each case only by the members that were trained without it.
        threshold: Share of the surroundings from which on a voxel is in the mask, above 0 and below 1. What is small
            beside a patch reaches half of its share nowhere.

    Raises:
        RunError: the run learned no masks, the cache lacks a case or what the run reads, a case was in no fold that
            ``held_out`` could ask, or the folder cannot be written.
        OptionError: clicks for several cases, for a run that takes none or not as many, or outside of the images; a
            threshold that is none.
        RecipeError: the cache has another recipe.
    """
    if not 0 < threshold < 1:
        raise OptionError(f"threshold is {threshold:g}, expected a share above 0 and below 1")
    opened = run if isinstance(run, Run) else open_run(run)
    source = open_originals(cache)
    known = sorted(set(source.stacks["case_id"]))
    wanted = known if case_ids is None else list(case_ids)
    if unknown := [case for case in wanted if case not in known]:
        raise RunError(f"cache {source.path} lacks {len(unknown)} of the cases asked for: {', '.join(unknown[:5])}")
    if clicks and len(wanted) != 1:
        raise OptionError(f"clicks were given for {len(wanted)} cases, expected one: name it with --case")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write the masks: {explain_os_error(error, folder)}") from error
    written = []
    for case in wanted:
        for view, (shares, stack) in predict_mask(opened, source, case, clicks=clicks, held_out=held_out).items():
            path = folder / f"{safe_name(case)}_{view.replace('/', '_')}_mask.nii.gz"
            affine = source.record(stack).source_affine
            mask = shares >= threshold
            write_volume(path, to_source(mask.astype(np.uint8), affine), affine)
            voxel_mm3 = abs(float(np.linalg.det(affine[:3, :3])))
            written.append(Segmentation(case, view, path, round(float(mask.sum()) * voxel_mm3 / 1000, 6)))
    return tuple(written)


def predict_mask(
    run: Run, cache: Cache, case_id: str, *, clicks: Sequence[Click] = (), held_out: bool = False
) -> dict[str, tuple[FloatArray, int]]:
    """The mask of a case as shares, by ``view/plane``: float32 canonical volume in 0..1, and the number of its stack.

    Args:
        run, cache, case_id, clicks, held_out: As in `segment`.

    Raises:
        RunError, OptionError, RecipeError: as `segment`.
    """
    _require_masks(run, clicks)
    check_cache(run.record, cache)
    members = run.held_out_members(case_id) if held_out else run.members
    stacks = cache.find_stacks(case_id, run.views)
    totals: dict[str, FloatArray] = {}
    for (_, token_sets), together in _by_reading(members).items():
        bag = next(stream_bags(cache, [case_id], token_sets, views=run.views))
        grid = joined_grid(run.record.shape, token_sets)
        places = {run.views.index(view): stack for view, stack in stacks.items()}
        shares = _ask(together, bag, cache, places, clicks=clicks, grid=grid)
        for view, stack in stacks.items():
            record, indices = cache.record(stack), cache.slices(stack).indices
            own = np.zeros((len(indices), *grid), np.float32)
            found = shares[run.views.index(view)][: len(indices)]
            own[: len(found)] = found.reshape(-1, *grid)
            placed = place_patch_scores(
                own, indices=indices, box=record.box, plane=record.plane, shape=canonical_shape(record)
            )
            total = totals.setdefault(view, np.zeros_like(placed))
            total += placed * np.float32(len(together) / len(members))
    return {view: (total, stacks[view]) for view, total in totals.items()}


def _ask(
    members: Sequence[Member],
    bag: Bag,
    cache: Cache,
    stacks: Mapping[int, int],
    *,
    clicks: Sequence[Click],
    grid: tuple[int, int],
) -> FloatArray:
    """Shares [views slices patches] of a bag of one case."""
    size = (*bag.mask.shape, grid[0] * grid[1])
    placed = place_clicks(clicks, cache, stacks, grid=grid, size=size) if clicks else None
    shares: FloatArray = predict_cover(members, bag, size[3], placed)[0].numpy()
    return shares


def _by_reading(members: Sequence[Member]) -> dict[tuple[str, tuple[str, ...]], list[Member]]:
    """Members by what they read: a sweep may have chosen otherwise in every fold."""
    found: dict[tuple[str, tuple[str, ...]], list[Member]] = {}
    for member in members:
        token_sets = member.standardiser.token_sets if member.standardiser is not None else ()
        found.setdefault((member.name, token_sets), []).append(member)
    return found


def _require_masks(run: Run, clicks: Sequence[Click]) -> None:
    record = run.record
    if not record.masks or not record.fit_options.get("mask_weight"):
        able = [name for name in list_heads() if learns_masks(name)]
        raise RunError(
            f"run {run.name} learned no masks, so it cannot predict any; train a head that does ({', '.join(able)})"
            " with --masks, and with a --mask-weight above 0"
        )
    most = min(int(each["head_options"].get("clicks", 0)) for each in record.members)
    if len(clicks) > most:
        hears = "clicks" in record.head_options
        way = f"train it with --head-option {run.head}.clicks={len(clicks)}, or give fewer"
        raise OptionError(
            f"{len(clicks)} clicks were given, but run {run.name} practised on {most or 'none'};"
            f" {way if hears else f'head {run.head!r} hears none: train head segment, or give no click'}"
        )

"""Owns `explain`: which slices and which patches made a run's answer, as numbers, NIfTI heatmaps and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from embedkit.attribution import SIGNED, Method
from embedkit.cache import Cache, open_originals
from embedkit.catalogue import canonical_shape
from embedkit.errors import RunError
from embedkit.files import explain_os_error, safe_name
from embedkit.manifest import read_manifest
from embedkit.patches import place_patch_scores
from embedkit.pictures import upsample_heat, write_picture
from embedkit.plots import plot_montage
from embedkit.runs import Evidence, Run, open_run
from embedkit.sanity import Sanity, check_sanity
from embedkit.slices import plan_stacks, render_slices
from embedkit.sources import group_cases, read_case
from embedkit.volumes import to_source, write_volume

__all__ = ["Explanation", "SliceWeights", "draw_evidence", "explain"]

_SHOWN = 6
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class SliceWeights:
    """Each slice's share of all evidence for the class explained, in one view.

    Attributes:
        indices: int32 [slices], index along the plane's axis of the canonical volume.
        weights: float32 [slices], 0 or more, summing to 1 over all views of the case.
    """

    indices: NDArray[np.int32]
    weights: FloatArray

    def top(self, count: int) -> list[tuple[int, float]]:
        """The ``count`` slices of most weight as (index, weight)."""
        rows = np.argsort(-self.weights, kind="stable")[:count]
        return [(int(self.indices[row]), float(self.weights[row])) for row in rows]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found and wrote.

    Attributes:
        case_id: The case.
        answer: The run's answer in words.
        method: How patches were scored.
        slice_weights: By ``view/plane``, each slice's share of the evidence.
        slice_attention: By ``view/plane``, float32 [slices]: the weights that the head itself pools slices with; None
            where it has no attention.
        heatmaps: By ``view/plane``, the NIfTI file: float32 in 0..1, in the size and geometry of the source image.
        montage: PNG of the slices of most weight with the heatmap over them.
        sanity: What is left of the map without what the head learned; None where it was not asked for.
    """

    case_id: str
    answer: str
    method: Method
    slice_weights: dict[str, SliceWeights]
    slice_attention: dict[str, FloatArray] | None
    heatmaps: dict[str, Path]
    montage: Path
    sanity: Sanity | None = None

    @property
    def word(self) -> str:
        """What the heat is: ``evidence`` where it speaks for the class explained, else ``heat``."""
        return _word(self.method)


def explain(
    run: Run | str | Path,
    cache: Cache | str | Path,
    case_id: str,
    out: str | Path,
    *,
    method: Method = "contribution",
    manifest: str | Path | pl.DataFrame | None = None,
    class_name: str | None = None,
    held_out: bool = False,
    sanity: bool = False,
) -> Explanation:
    """Shows where a run looked in one case.

    The score of a patch is how much it speaks for the class explained (`embedkit.runs.Run.find_evidence`), averaged
    over the run's fold models; what speaks against the class is left out of the pictures.

    Args:
        run: A run or its folder.
        cache: A cache of the run's recipe, or its path.
        case_id: The case.
        out: Folder to write to; made if need be.
        method: How patches are scored, see `embedkit.attribution.score_tokens`.
        manifest: Draw over the images it names; None draws over the cache's previews.
        class_name: The class explained; None is the positive class of a binary task, the predicted one of others.
        held_out: Only by the fold model that was trained without the case.
        sanity: Also compare the map with those of shuffled heads, see `embedkit.sanity.check_sanity`.

    Raises:
        RunError: the cache lacks the case or what the method reads, the class is unknown, or nothing can be drawn.
        RecipeError: the cache has another recipe than the run.
        HeadError: ``attention`` of a head that has none.
        OptionError: no such method.
    """
    opened = run if isinstance(run, Run) else open_run(run)
    source = open_originals(cache)
    evidence = opened.find_evidence(source, case_id, method=method, class_name=class_name, held_out=held_out)
    stacks = source.find_stacks(case_id, evidence.scores)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write the explanation: {explain_os_error(error, folder)}") from error
    scaled = _scale(evidence)
    heatmaps = {view: folder / f"{safe_name(case_id)}_{view.replace('/', '_')}_heatmap.nii.gz" for view in stacks}
    for view, stack in stacks.items():
        _write_heatmap(heatmaps[view], scaled[view], source, stack)
    weights = _slice_weights(evidence, source, stacks)
    montage = folder / f"{safe_name(case_id)}.png"
    images = _read_images(source, stacks, case_id, manifest)
    write_picture(montage, _draw(images, scaled, weights, word=_word(method)))
    checked = check_sanity(opened, source, case_id, evidence, method=method, held_out=held_out) if sanity else None
    return Explanation(case_id, evidence.answer, method, weights, evidence.slice_attention, heatmaps, montage, checked)


def draw_evidence(
    run: Run, cache: Cache, case_id: str, *, class_name: str | None = None, held_out: bool = False, slices: int = _SHOWN
) -> bytes:
    """The picture of `explain` alone, as PNG bytes over the cache's previews: the slices of most weight of each view.

    Args:
        run, cache, case_id, class_name, held_out: As in `explain`.
        slices: At most so many of each view.

    Raises:
        RunError, RecipeError: as `explain`; RunError also where the cache keeps no previews.
    """
    evidence = run.find_evidence(cache, case_id, class_name=class_name, held_out=held_out)
    stacks = cache.find_stacks(case_id, evidence.scores)
    images = _read_images(cache, stacks, case_id, None)
    return _draw(images, _scale(evidence), _slice_weights(evidence, cache, stacks), slices)


def _scale(evidence: Evidence) -> dict[str, FloatArray]:
    """What speaks for the class, 1 where it is highest in the case."""
    positive = {view: np.maximum(scores, 0) for view, scores in evidence.scores.items()}
    highest = max((float(scores.max(initial=0)) for scores in positive.values()), default=0.0) or 1.0
    return {view: (scores / highest).astype(np.float32) for view, scores in positive.items()}


def _word(method: Method) -> str:
    return "evidence" if method in SIGNED else "heat"


def _slice_weights(evidence: Evidence, cache: Cache, stacks: Mapping[str, int]) -> dict[str, SliceWeights]:
    """Each slice's share of all that speaks for the class."""
    raw = {view: np.maximum(evidence.scores[view], 0).sum((1, 2)) for view in stacks}
    total = sum(float(values.sum()) for values in raw.values()) or 1.0
    return {
        view: SliceWeights(cache.slices(stack).indices, (raw[view] / total).astype(np.float32))
        for view, stack in stacks.items()
    }


def _write_heatmap(path: Path, scores: FloatArray, cache: Cache, stack: int) -> None:
    record = cache.record(stack)
    heat = place_patch_scores(
        scores,
        indices=cache.slices(stack).indices,
        box=record.box,
        plane=record.plane,
        shape=canonical_shape(record),
    )
    write_volume(path, to_source(heat, record.source_affine), record.source_affine)


def _read_images(
    cache: Cache, stacks: Mapping[str, int], case_id: str, manifest: str | Path | pl.DataFrame | None
) -> dict[str, NDArray[np.uint8]]:
    """By view, what the backbone saw, uint8 [slices height width]."""
    if manifest is None:
        found: dict[str, NDArray[np.uint8]] = {}
        for view, stack in stacks.items():
            previews = cache.preview(stack)
            if previews is None:
                raise RunError(f"cache {cache.path} keeps no previews to draw over; name the images with --manifest")
            found[view] = np.array(previews)
        return found
    cases = [case for case in group_cases(read_manifest(manifest)) if case.case_id == case_id]
    if not cases:
        raise RunError(f"the manifest has no case {case_id}; give the manifest that it was extracted from")
    volumes = read_case(cases[0]).volumes
    rendered = {}
    for plan in plan_stacks(volumes, cache.recipe):
        images, _ = render_slices(plan, volumes, cache.recipe, 0, len(plan.indices))
        rendered[f"{plan.view}/{plan.plane}"] = (images.mean(1) * 255).round().to(torch.uint8).numpy()
    return {view: rendered[view] for view in stacks}


def _draw(
    images: Mapping[str, NDArray[np.uint8]],
    scores: Mapping[str, FloatArray],
    weights: Mapping[str, SliceWeights],
    slices: int = _SHOWN,
    *,
    word: str = "evidence",
) -> bytes:
    """The slices of most weight of each view, in their order along the stack; ``word`` says what the heat is."""
    pictures, overlays, titles = [], [], []
    for view, shown in images.items():
        rows = sorted(np.argsort(-weights[view].weights, kind="stable")[:slices])
        for row in rows:
            picture = shown[row]
            pictures.append(picture)
            overlays.append(upsample_heat(scores[view][row], picture.shape[0]))
            titles.append(f"{view} slice {weights[view].indices[row]}\n{weights[view].weights[row]:.0%} of the {word}")
    return plot_montage(pictures, titles, overlays=overlays, columns=slices, scale=word)

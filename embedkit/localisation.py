"""Owns how well a heatmap finds what a mask outlines; knows no run, no cache and no way to make a heatmap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from embedkit.errors import VolumeError
from embedkit.patches import Box, measure_patch_cover, place_patch_scores

__all__ = ["Localisation", "judge_heatmap"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Localisation:
    """How well the scores of one stack's patches find a mask.

    Attributes:
        pointing: 1 where the voxel of most heat lies in the mask, else 0: the pointing game (Zhang et al., arXiv
            1608.00507) without a margin.
        energy: Share of all positive heat that lies in the mask (Wang et al., "Score-CAM", arXiv 1910.01279); 0 where
            there is none.
        auroc: That a score lies higher in the mask than outside it: each patch counts as in the mask with the part of
            it that the mask covers, and as outside with the rest; 0.5 for scores that know nothing.
        share: Of the mask in all voxels that the patches saw: what pointing and energy are by chance.
    """

    pointing: float
    energy: float
    auroc: float
    share: float


def judge_heatmap(scores: Array, mask: Array, *, indices: Array, box: Box, plane: str) -> Localisation:
    """Judges the scores of one stack against a mask, in voxels that the stack's slices saw.

    Args:
        scores: [slices grid_height grid_width]; negative ones speak against.
        mask: Bool, canonical volume [slices height width].
        indices, box, plane: Of the stack, as for `embedkit.patches.place_patch_scores`.

    Raises:
        VolumeError: the mask is empty, or fills all that the patches saw; scores and mask do not belong together.
    """
    scores = np.asarray(scores, np.float32)
    cover = measure_patch_cover(mask, indices=indices, box=box, plane=plane, grid=(scores.shape[1], scores.shape[2]))
    if not 0 < (share := float(cover.mean())) < 1:
        raise VolumeError(
            f"the mask covers {share:.0%} of what the patches saw, so no heatmap can find it; judge cases whose mask"
            " lies within the image"
        )
    where: dict[str, Any] = {"indices": indices, "box": box, "plane": plane, "shape": mask.shape}
    inside, seen = np.asarray(mask) > 0, place_patch_scores(np.ones_like(scores), **where) > 0
    heat = place_patch_scores(scores, **where)
    highest = np.unravel_index(np.where(seen, heat, -np.inf).argmax(), heat.shape)
    positive = place_patch_scores(np.maximum(scores, 0), **where)
    weights, marks = cover.ravel().astype(np.float64).clip(0, 1), np.repeat([1, 0], cover.size)
    return Localisation(
        pointing=float(inside[highest]),
        energy=float(positive[inside].sum() / (positive.sum() or 1.0)),
        auroc=float(
            roc_auc_score(marks, np.tile(scores.ravel(), 2), sample_weight=np.concatenate([weights, 1 - weights]))
        ),
        share=float(inside[seen].mean()),
    )

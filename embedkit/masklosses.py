"""Owns how a predicted mask is compared with the true one, both as shares of patches; knows no head and no file."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["dice_overlap", "mask_losses"]


def mask_losses(logits: Tensor, cover: Tensor) -> Tensor:
    """Loss of the mask of each case: cross entropy plus one minus the soft Dice overlap, both over its known patches.

    Cross entropy takes the share that is covered for the probability. The overlap (Milletari et al., "V-Net", arXiv
    1606.04797) keeps a small mask from being lost among the many empty patches; both together are what nnU-Net
    descends on (Isensee et al., Nature Methods 18, 2021). One patch is added above and below, so that an image without
    anything to find has an overlap as well: 1 where nothing is predicted.

    Args:
        logits: [batch views slices patches].
        cover: [batch views slices patches], in 0..1, NaN where unknown.

    Returns:
        float32 [batch]; 0 for a case of which nothing is known.
    """
    known = cover.isfinite()
    truth = torch.where(known, cover, 0.0).float().flatten(1)
    inside = known.flatten(1).float()
    logits = logits.float().flatten(1)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * inside
    chances = logits.sigmoid() * inside
    overlap = (2 * (chances * truth).sum(1) + 1) / (chances.sum(1) + truth.sum(1) + 1)
    counts = inside.sum(1)
    return torch.where(counts > 0, entropy.sum(1) / counts.clamp(min=1) + 1 - overlap, 0.0)


def dice_overlap(found: Tensor, truth: Tensor) -> float:
    """Dice coefficient of two masks, bool of one shape; NaN where the true one is empty.

    Twice the common part over the sum of both (Dice, Ecology 26, 1945).
    """
    if not truth.any():
        return float("nan")
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))

"""Owns how good the masks are that heads predict out of fold, on the token grid; trains nothing and writes no file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedkit.bags import Bag, bag_shape, stream_bags
from embedkit.bootstrap import Interval, bootstrap_values, form_interval
from embedkit.cache import Cache
from embedkit.covers import Covers
from embedkit.foldjobs import FoldedTask
from embedkit.formulas import weigh_mean
from embedkit.masklosses import dice_overlap
from embedkit.members import Member
from embedkit.pooling import joined_grid

__all__ = ["mean_interval", "predict_cover", "score_masks"]


def predict_cover(members: Sequence[Member], bag: Bag, patches: int, clicks: Tensor | None = None) -> Tensor:
    """The share of each patch that the mask covers, float32 [batch views slices patches]: the mean over members.

    Args:
        members: All on one grid.
        bag: Raw, of the members' token sets.
        patches: Of that grid.
        clicks: As in `Bag`; None for none.
    """
    nothing = torch.zeros((*bag.mask.shape, patches), device=bag.mask.device)
    asked = dataclasses.replace(bag, clicks=nothing if clicks is None else clicks)
    with torch.no_grad():
        each = [torch.as_tensor(member(asked).mask_logits).float().sigmoid().cpu() for member in members]
    return torch.stack(each).mean(0).masked_fill(~bag.mask[..., None].cpu(), 0.0)


def score_masks(
    cache: Cache,
    target: FoldedTask,
    members: Mapping[int, Sequence[Member]],
    covers: Mapping[tuple[int, int], Covers],
) -> NDArray[np.float64]:
    """Dice overlap of each case's mask with what the members of the fold that tested it say, on their token grid.

    A patch belongs to a mask that covers at least half of it.

    Args:
        cache: Holds the cases.
        target: Tells which fold tests which case.
        members: Of each fold.
        covers: Of the cases, by grid.

    Returns:
        float64 [repeats cases]; NaN for a case without a mask, with an empty one, or that no fold tested.
    """
    scores = np.full(target.folds.shape, np.nan)
    for fold, fitted in members.items():
        token_sets = fitted[0].standardiser.token_sets if fitted[0].standardiser is not None else ()
        known = covers[joined_grid(bag_shape(cache, token_sets), token_sets)]
        tested = [
            case for case in np.flatnonzero(target.find_tested(fold)) if target.task.case_ids[case] in known.case_ids
        ]
        bags = stream_bags(cache, [target.task.case_ids[case] for case in tested], token_sets)
        found = [part for bag in bags for part in _score_bag(fitted, bag, known)]
        scores[target.find_repeat(fold), tested] = found
    return scores


def _score_bag(members: Sequence[Member], bag: Bag, covers: Covers) -> list[float]:
    truth = covers.batch(bag.case_ids, bag.mask.shape[2])
    found = predict_cover(members, bag, truth.shape[3])
    known = truth.isfinite()
    return [
        dice_overlap((one >= 0.5) & there, (two >= 0.5) & there)
        for one, two, there in zip(found, truth, known, strict=True)
    ]


def mean_interval(
    scores: NDArray[np.float64], patients: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean over cases of scores [cases], NaN left out, with its interval over patients."""
    there = np.flatnonzero(np.isfinite(scores))
    if not len(there):
        return Interval(float("nan"), float("nan"), float("nan"))
    values, owners = scores[there], [patients[case] for case in there.tolist()]
    drawn = bootstrap_values({"mean": weigh_mean(values)}, owners, resamples=resamples, seed=seed)["mean"]
    return form_interval(float(values.mean()), drawn, owners)

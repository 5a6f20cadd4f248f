"""How well heatmaps find masks, by hand-made maps whose scores are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from embedkit.errors import VolumeError
from embedkit.localisation import judge_heatmap

WHERE: dict[str, Any] = {"indices": np.arange(2), "box": (0, 0, 8, 8), "plane": "axial"}


def make_mask() -> np.ndarray[Any, Any]:
    """Of two slices of 8 x 8 voxels: the upper left patch of 4 x 4 in the first one."""
    mask = np.zeros((2, 8, 8), bool)
    mask[0, :4, :4] = True
    return mask


def test_a_map_that_is_the_mask_finds_it() -> None:
    scores = np.zeros((2, 2, 2))
    scores[0, 0, 0] = 3
    found = judge_heatmap(scores, make_mask(), **WHERE)
    assert (found.pointing, found.auroc, found.share) == (1.0, 1.0, 1 / 8)
    # between the centres of patches of 4 voxels: 1 up to the centre, then 7/8, 5/8, 3/8, 1/8, 0 along each axis
    assert found.energy == pytest.approx((2 + 7 / 8 + 5 / 8) ** 2 / 4**2)


def test_a_map_of_the_opposite_misses_it() -> None:
    scores = np.ones((2, 2, 2))
    scores[0, 0, 0] = -1
    found = judge_heatmap(scores, make_mask(), **WHERE)
    assert (found.pointing, found.auroc) == (0.0, 0.0)
    assert 0 < found.energy < found.share


def test_a_flat_map_is_chance_and_an_empty_one_has_no_energy() -> None:
    flat = judge_heatmap(np.ones((2, 2, 2)), make_mask(), **WHERE)
    assert (flat.auroc, flat.energy) == (0.5, pytest.approx(flat.share))
    assert judge_heatmap(-np.ones((2, 2, 2)), make_mask(), **WHERE).energy == 0


def test_a_patch_counts_by_the_part_of_it_that_the_mask_covers() -> None:
    mask = np.zeros((1, 8, 8), bool)
    mask[0, :4, :2] = True  # half of the first patch
    where = WHERE | {"indices": np.arange(1)}
    scores = np.array([[[4.0, 3.0], [2.0, 1.0]]])
    # inside: half a patch at 4; outside: half a patch at 4 (a tie) and three patches below
    assert judge_heatmap(scores, mask, **where).auroc == pytest.approx((3 + 0.5 * 0.5) / 3.5)


@pytest.mark.parametrize(("full", "share"), [(False, "0%"), (True, "100%")])
def test_a_mask_that_no_map_can_find_is_refused(full: bool, share: str) -> None:
    with pytest.raises(VolumeError, match=f"covers {share} of what the patches saw"):
        judge_heatmap(np.ones((2, 2, 2)), np.full((2, 8, 8), full), **WHERE)

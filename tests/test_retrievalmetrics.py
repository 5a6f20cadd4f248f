"""Measures of ranked lists: values by hand."""

from __future__ import annotations

import numpy as np
import pytest

from embedkit.retrievalmetrics import (
    average_precision,
    ndcg,
    precision_at,
    recall_at,
    reciprocal_rank,
    vote_nearest,
)

HITS = np.array([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
RELEVANT = np.array([3, 1, 2, 9])


def test_precision_counts_places_and_recall_counts_what_is_relevant() -> None:
    assert precision_at(HITS, 3).tolist() == pytest.approx([2 / 3, 0, 0, 1])
    assert recall_at(HITS, RELEVANT, 3).tolist() == pytest.approx([2 / 3, 0, 0, 1 / 3])
    assert precision_at(HITS, 8)[3] == 4 / 8


def test_average_precision_takes_the_precision_at_every_hit() -> None:
    expected = [(1 + 2 / 3) / 3, 1 / 4, 0, 1]
    assert average_precision(HITS, RELEVANT).tolist() == pytest.approx(expected)


def test_ndcg_is_the_discounted_gain_over_that_of_the_best_list() -> None:
    best = 1 + 1 / np.log2(3) + 1 / 2
    assert ndcg(HITS, RELEVANT).tolist() == pytest.approx([(1 + 1 / 2) / best, 1 / np.log2(5), 0, 1])


def test_reciprocal_rank_is_of_the_first_hit_and_0_without_one() -> None:
    assert reciprocal_rank(HITS).tolist() == [1, 1 / 4, 0, 1]


def test_the_nearest_decides_between_classes_of_equally_many_votes() -> None:
    codes = np.array([[2, 1, 1, 0], [0, 1, 1, 0], [-1, -1, 3, -1], [-1, -1, -1, -1]])
    assert vote_nearest(codes, 1).tolist() == [2, 0, -1, -1]
    assert vote_nearest(codes, 3).tolist() == [1, 1, 3, -1]
    assert vote_nearest(codes, 4).tolist() == [1, 0, 3, -1]

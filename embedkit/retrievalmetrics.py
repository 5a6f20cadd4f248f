"""Owns the measures of ranked lists: what each query's list is worth, by formula; knows no index, no case and no file.

Of every query is given which places of its list hold something relevant, best first, and how much there is to be found.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from embedkit.bootstrap import Floats

__all__ = ["average_precision", "ndcg", "precision_at", "recall_at", "reciprocal_rank", "vote_nearest"]

Hits = NDArray[np.bool_]
"""[queries depth], whether the case at each place is relevant; False where the list has ended."""
Counts = NDArray[np.int64]


def precision_at(hits: Hits, k: int) -> Floats:
    """The share of the first k places that are relevant, [queries]; a list that ends before counts as wrong there."""
    return cast(Floats, hits[:, :k].sum(1) / k)


def recall_at(hits: Hits, relevant: Counts, k: int) -> Floats:
    """The share of all that is relevant, [queries], at least 1 each, that the first k places hold."""
    return cast(Floats, hits[:, :k].sum(1) / relevant)


def average_precision(hits: Hits, relevant: Counts) -> Floats:
    """The mean of the precision at the place of each relevant case, [queries] (Manning et al. 2008, section 8.4).

    What is not found counts 0, of no more relevant cases than the list has places.
    """
    precisions = hits.cumsum(1) / np.arange(1, hits.shape[1] + 1)
    return cast(Floats, (precisions * hits).sum(1) / np.minimum(relevant, hits.shape[1]))


def ndcg(hits: Hits, relevant: Counts) -> Floats:
    """The gain discounted by log2(1 + place) over that of the best list, [queries] (Jarvelin and Kekalainen 2002)."""
    discounts = 1 / np.log2(np.arange(2, hits.shape[1] + 2))
    best = np.concatenate([[0.0], discounts.cumsum()])
    return cast(Floats, (hits @ discounts) / best[np.minimum(relevant, hits.shape[1])])


def reciprocal_rank(hits: Hits) -> Floats:
    """One over the place of the first relevant case, 0 without any, [queries] (Voorhees 1999)."""
    return cast(Floats, np.where(hits.any(1), 1 / (hits.argmax(1) + 1), 0.0))


def vote_nearest(codes: Counts, k: int) -> Counts:
    """The class that most of the first k have, of equally many that of the nearest, [queries]; -1 where none has one.

    Args:
        codes: int64 [queries depth], class of the case at each place; -1 without.
        k: How many vote.
    """
    voters = codes[:, :k]
    votes = (voters[:, :, None] == voters[:, None, :]).sum(2) * (voters >= 0)
    chosen = np.take_along_axis(voters, votes.argmax(1)[:, None], 1)[:, 0]
    return cast(Counts, np.where(votes.max(1) > 0, chosen, -1))

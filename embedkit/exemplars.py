"""Owns the choice of a few vectors that stand for many; knows no case, token or head."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["choose_exemplars"]


def choose_exemplars(vectors: NDArray[np.floating[Any]], count: int) -> NDArray[np.int64]:
    """Chooses vectors so that every other one is near to one of them: the greedy k-centre.

    The first is the one nearest to the mean, each further one the one farthest from all before it; among equals the
    first counts. The largest distance to the chosen is at most twice the smallest that any choice of ``count`` has
    (Gonzalez, "Clustering to minimize the maximum intercluster distance", Theoretical Computer Science 38, 1985); as a
    core set for training a network: Sener and Savarese 2018 (arXiv 1708.00489).

    Args:
        vectors: [cases dim].
        count: How many to choose; all where there are no more.

    Returns:
        int64 [chosen], places of the chosen in the order they were chosen.
    """
    values = np.asarray(vectors, np.float64)
    chosen: list[int] = []
    apart = np.square(values - values.mean(0)).sum(1) if len(values) else np.zeros(0)
    nearest = np.full(len(values), np.inf)
    for _ in range(min(count, len(values))):
        place = int(nearest.argmax()) if chosen else int(apart.argmin())
        chosen.append(place)
        nearest = np.minimum(nearest, np.square(values - values[place]).sum(1))
        nearest[chosen] = -1.0
    return np.array(chosen, np.int64)

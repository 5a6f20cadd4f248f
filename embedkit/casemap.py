"""Owns the map of cases: their pooled vectors laid out in two dimensions; draws nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from embedkit.bootstrap import Floats
from embedkit.cache import Cache
from embedkit.embeddings import Embedding, embed_cases
from embedkit.errors import RunError
from embedkit.recipe import TokenSet

__all__ = ["choose_embedding", "map_cases"]

_FEWEST = 12
"""Below this t-SNE has no neighbourhoods to keep, and principal components are shown."""
_COMPONENTS = 50


def choose_embedding(token_sets: Sequence[str]) -> Embedding:
    """The mean over slices and patches of the first token set that has vectors of patches or slices.

    Raises:
        RunError: none has.
    """
    for name in token_sets:
        if TokenSet.parse(name).kind in ("cls", "patch"):
            return Embedding("mean", name)
    raise RunError(f"no cls or patch tokens among {', '.join(token_sets)}, so there is nothing to map cases by")


def map_cases(cache: Cache, case_ids: Sequence[str], embedding: Embedding, *, seed: int = 0) -> tuple[Floats, str]:
    """Places of cases in two dimensions, alike cases near each other.

    Each view is centred over the cases, a missing one at the centre; views lie side by side. t-SNE (van der Maaten and
    Hinton 2008) of scikit-learn on the leading principal components, begun at the first two, perplexity 30 or a third
    of the cases. Distances between far groups mean little in it.

    Args:
        cache: Holds the cases.
        case_ids: Which, in this order.
        embedding: Of their tokens.
        seed: Of t-SNE.

    Returns:
        float64 [cases 2], and how they were made in words.

    Raises:
        RunError: fewer than three cases, or the cache lacks one.
        SearchError: the cache lacks the token set.
    """
    if len(case_ids) < 3:
        raise RunError(f"{len(case_ids)} cases to map, expected three or more")
    found = embed_cases(cache, embedding)
    rows = {case: row for row, case in enumerate(found.cases["case_id"])}
    if absent := [case for case in case_ids if case not in rows]:
        raise RunError(
            f"cache {cache.path} lacks {len(absent)} of the cases judged ({', '.join(absent[:5])}); give the cache that"
            " they came from"
        )
    chosen = np.array([rows[case] for case in case_ids])
    present = found.present[chosen]
    vectors = found.vectors[chosen].astype(np.float64)
    means = vectors.sum(axis=0) / np.maximum(present.sum(axis=0), 1)[:, None]
    centred = np.where(present[..., None], vectors - means, 0.0).reshape(len(chosen), -1)
    parts = PCA(min(_COMPONENTS, *centred.shape), random_state=seed).fit_transform(centred)
    if len(chosen) < _FEWEST:
        return np.pad(parts, ((0, 0), (0, 2)))[:, :2], f"first two principal components of {embedding}"
    perplexity = min(30.0, (len(chosen) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(parts)
    return np.asarray(places, np.float64), f"t-SNE of {embedding}, perplexity {perplexity:.0f}, seed {seed}"

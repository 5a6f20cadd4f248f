"""Owns PCA whitening: principal components of vectors, each scaled to unit variance; knows no case and no label."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from embedkit.errors import OptionError

__all__ = ["fit_whitening"]

FloatArray = NDArray[np.float32]

_SAMPLE, _SAMPLE_BYTES = 20_000, 1 << 29
_EXACT_UP_TO = 512
_SEED = 7


def fit_whitening(vectors: NDArray[Any], mean: FloatArray, components: int) -> FloatArray:
    """The matrix that whitens centred vectors (Jegou and Chum 2012, doi 10.1007/978-3-642-33709-3_55).

    A component of hardly any variance would be blown up to noise, so the variances are first drawn towards their mean
    by as much as their number asks for against that of the vectors. Beyond 512 vectors and dimensions the components
    are those of a randomised decomposition (Halko et al. 2011, arXiv 0909.4061).

    Args:
        vectors: [vectors dim], not centred; more than 20,000, or than 512 MiB as float32, are sampled.
        mean: float32 [dim].
        components: How many are kept, those of most variance.

    Returns:
        float32 [dim components].

    Raises:
        OptionError: not 1 to ``min(dim, vectors - 1)`` components.
    """
    most = min(vectors.shape[1], len(vectors) - 1)
    if not 1 <= components <= most:
        raise OptionError(
            f"{components} whitened components were asked for; {len(vectors)} vectors of length {vectors.shape[1]} have"
            f" 1 to {most}"
        )
    rows = np.arange(len(vectors))
    sampled = max(components + 1, min(_SAMPLE, _SAMPLE_BYTES // (4 * vectors.shape[1])))
    if len(rows) > sampled:
        rows = np.sort(np.random.default_rng(_SEED).choice(rows, sampled, replace=False))
    centred = vectors[rows].astype(np.float32, copy=False)  # rows picked by number are a copy
    centred -= mean
    if min(centred.shape) <= _EXACT_UP_TO:
        _, spreads, axes = np.linalg.svd(centred, full_matrices=False)
    else:
        from sklearn.utils.extmath import randomized_svd  # slow to load, and no search needs it

        _, spreads, axes = randomized_svd(centred, components, n_iter=4, random_state=_SEED)
    variances = np.asarray(spreads, np.float64) ** 2 / len(rows)
    share = min(1.0, components / len(rows))
    drawn = (1 - share) * variances[:components] + share * variances[:components].mean()
    return cast(FloatArray, (axes[:components].T / np.sqrt(np.maximum(drawn, 1e-12))).astype(np.float32))

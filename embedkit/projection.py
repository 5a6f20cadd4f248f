"""Owns the map: vectors of many dimensions laid out in the plane; knows no case and draws nothing."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from embedkit.errors import OptionError

__all__ = ["list_projections", "project_vectors"]

FloatArray = NDArray[np.float32]

_MOST_TSNE = 20_000
_COMPONENTS = 50
_SAMPLE = 1_024
_BATCH = 1_024
_SEED = 0


def list_projections() -> list[str]:
    """The projections that can be had here: ``umap`` only where umap-learn is installed."""
    return [name for name in _PROJECTIONS if name != "umap" or find_spec("umap") is not None]


def project_vectors(vectors: NDArray[Any], projection: str = "pca") -> FloatArray:
    """Lays out vectors in the plane so that those of like direction lie close; the same every time.

    ``pca``: the two directions of most variance. ``tsne``: van der Maaten and Hinton 2008 (JMLR 9). ``umap``: McInnes,
    Healy and Melville 2018 (arXiv 1802.03426). All see the 50 leading principal components alone, found on 1,024 cases
    where there are more, and the vectors in batches: they may be a memory map of any size.

    Args:
        vectors: float32 or float16 [cases dim]; may be a memory map.
        projection: One of `list_projections`.

    Returns:
        float32 [cases 2], centred, the larger extent reaching from -1 to 1.

    Raises:
        OptionError: unknown projection, one that is not installed, or too many cases for t-SNE.
    """
    known = list_projections()
    if projection not in known:
        hint = "; pip install 'embedkit[umap]' for umap" if "umap" not in known else ""
        raise OptionError(f"there is no projection {projection!r}; expected one of {', '.join(known)}{hint}")
    if projection == "tsne" and len(vectors) > _MOST_TSNE:
        raise OptionError(f"t-SNE takes too long for {len(vectors)} cases, at most {_MOST_TSNE}; use pca or umap")
    places: FloatArray
    if len(vectors) < 4 or vectors.shape[1] < 2:  # neither neighbours nor variance to speak of: side by side
        places = np.stack([np.arange(len(vectors)), np.zeros(len(vectors))], 1).astype(np.float32)
    else:
        places = _PROJECTIONS[projection](_reduce(vectors))
    places = places - (places.max(0) + places.min(0)) / 2
    return cast(FloatArray, (places / (np.abs(places).max() or 1.0)).astype(np.float32))


def _reduce(vectors: NDArray[Any]) -> FloatArray:
    """The leading principal components of the vectors at length 1, float32 [cases components]; in bounded memory."""
    from sklearn.decomposition import PCA

    rows = np.arange(len(vectors))
    if len(rows) > _SAMPLE:
        rows = np.sort(np.random.default_rng(_SEED).choice(rows, _SAMPLE, replace=False))
    sample = _unit(vectors[rows])
    model = PCA(n_components=min(_COMPONENTS, *sample.shape), random_state=_SEED).fit(sample)
    blocks = (vectors[start : start + _BATCH] for start in range(0, len(vectors), _BATCH))
    return np.concatenate([model.transform(_unit(block)) for block in blocks]).astype(np.float32)


def _unit(vectors: NDArray[Any]) -> FloatArray:
    floats = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(floats, axis=1, keepdims=True)
    return cast(FloatArray, floats / np.maximum(lengths, np.finfo(np.float32).tiny))


def _pca(reduced: FloatArray) -> FloatArray:
    return reduced[:, :2]


def _tsne(reduced: FloatArray) -> FloatArray:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(reduced) - 1) / 3)
    return cast(FloatArray, TSNE(perplexity=perplexity, init="pca", random_state=_SEED).fit_transform(reduced))


def _umap(reduced: FloatArray) -> FloatArray:
    model = import_module("umap").UMAP(n_neighbors=min(15, len(reduced) - 1), metric="cosine", random_state=_SEED)
    return cast(FloatArray, np.asarray(model.fit_transform(reduced), np.float32))


_PROJECTIONS: dict[str, Callable[[FloatArray], FloatArray]] = {"pca": _pca, "umap": _umap, "tsne": _tsne}

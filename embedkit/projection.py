"""Owns the map: vectors of many dimensions laid out in the plane; knows no case and draws nothing."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import cast

import numpy as np
from numpy.typing import NDArray

from embedkit.errors import OptionError

__all__ = ["list_projections", "project_vectors"]

FloatArray = NDArray[np.float32]

_MOST_TSNE = 20_000
_SEED = 0


def list_projections() -> list[str]:
    """The projections that can be had here: ``umap`` only where umap-learn is installed."""
    return [name for name in _PROJECTIONS if name != "umap" or find_spec("umap") is not None]


def project_vectors(vectors: FloatArray, projection: str = "pca") -> FloatArray:
    """Lays out vectors in the plane so that those of like direction lie close; the same every time.

    ``pca``: the two directions of most variance. ``tsne``: van der Maaten and Hinton 2008 (JMLR 9). ``umap``: McInnes,
    Healy and Melville 2018 (arXiv 1802.03426).

    Args:
        vectors: float32 [cases dim].
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
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    places: FloatArray
    if len(unit) < 4 or unit.shape[1] < 2:  # neither neighbours nor variance to speak of: side by side
        places = np.stack([np.arange(len(unit)), np.zeros(len(unit))], 1).astype(np.float32)
    else:
        places = _PROJECTIONS[projection](unit - unit.mean(0))
    places = places - (places.max(0) + places.min(0)) / 2
    return cast(FloatArray, (places / (np.abs(places).max() or 1.0)).astype(np.float32))


def _pca(vectors: FloatArray) -> FloatArray:
    from sklearn.decomposition import PCA

    return cast(FloatArray, PCA(n_components=2, random_state=_SEED).fit_transform(vectors))


def _tsne(vectors: FloatArray) -> FloatArray:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(vectors) > _MOST_TSNE:
        raise OptionError(f"t-SNE takes too long for {len(vectors)} cases, at most {_MOST_TSNE}; use pca or umap")
    reduced = PCA(n_components=min(50, *vectors.shape), random_state=_SEED).fit_transform(vectors)
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    return cast(FloatArray, TSNE(perplexity=perplexity, init="pca", random_state=_SEED).fit_transform(reduced))


def _umap(vectors: FloatArray) -> FloatArray:
    model = import_module("umap").UMAP(n_neighbors=min(15, len(vectors) - 1), metric="cosine", random_state=_SEED)
    return cast(FloatArray, np.asarray(model.fit_transform(vectors), np.float32))


_PROJECTIONS: dict[str, Callable[[FloatArray], FloatArray]] = {"pca": _pca, "umap": _umap, "tsne": _tsne}

"""Owns texts as queries: whether an index can be compared with texts at all, and by which vectors; searches nothing.

A text and a case can be compared only where one model gave both vectors in one space, as CLIP does (Radford et al.
2021, arXiv 2103.00020): by the text tower of that model, or by vectors that the user has. A cache holds tokens from
before any last projection of the image tower. Where there is one, of matrix W, the model compares t with W v; a user's
vector W^T t has the same product with v, but its cosine divides by |v| and not by |W v|, so that ranks can differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embedkit.errors import SearchError
from embedkit.index import Index
from embedkit.textvectors import read_vectors

if TYPE_CHECKING:
    from embedkit.texttowers import PairedTexts

__all__ = ["embed_text_queries", "read_text_queries"]


def embed_text_queries(index: Index, texts: Sequence[str], model: str, weights: str | Path) -> PairedTexts:
    """Texts by the text tower that was trained with the backbone, and what maps the index's vectors to their space.

    Args:
        index: What is to be searched: the mean class token of the backbone's last layer.
        texts: One or more.
        model, weights: As in `embedkit.texttowers.embed_paired_texts`.

    Raises:
        SearchError: an index of other vectors, or as `embedkit.texttowers.embed_paired_texts`.
        BackboneError: the model's image tower does not fit the backbone.
    """
    if not texts:
        raise SearchError(f"no text was given for the text tower of {model} to read; give one or more (--text)")
    _require_plain_mean(index)
    from embedkit.texttowers import embed_paired_texts  # loads torch, which no other search by texts needs

    return embed_paired_texts(texts, model, weights, recipe=index.recipe, embedding=index.embedding)


def read_text_queries(
    index: Index, texts: Sequence[str], vectors: str | Path | NDArray[np.floating] | None, *, shared_space: bool
) -> NDArray[np.float32]:
    """Query vectors of texts, float32 [texts dim].

    Args:
        index: What is to be searched.
        texts: One or more.
        vectors: Of the texts, [texts dim], or what `embedkit.textvectors.read_vectors` reads.
        shared_space: The user's word that the vectors lie in the space of the backbone's tokens; nothing in a cache
            could tell.

    Raises:
        SearchError: no vectors, or as many as there are not texts, or of another length; an index whose vectors no text
            shares; or no word that they are shared.
        HeadError: the file cannot be read.
    """
    if vectors is None:
        from embedkit.texttowers import require_learned  # loads torch, on the way to an error

        require_learned(index.recipe)
        raise SearchError(
            f"a text needs its vector: name the open_clip model whose image tower is {index.recipe.backbone} and its"
            " weights (--text-model, --text-weights), or give the vectors of the texts as a file (--text-vectors), made"
            " by the text tower that was trained with the backbone"
        )
    _require_plain_mean(index)
    found = vectors if isinstance(vectors, np.ndarray) else read_vectors(str(vectors))
    if found.ndim != 2 or found.shape != (len(texts), index.dim):
        raise SearchError(
            f"text vectors have shape {list(found.shape)}, expected [{len(texts)}, {index.dim}]: a row per text, as"
            f" long as the {index.embedding} of index {index.path}; where the image tower ends in a projection,"
            " multiply them with its transpose"
        )
    if not shared_space:
        raise SearchError(
            f"nothing tells whether tokens of {index.recipe.backbone} and these text vectors share one space, and in"
            " two spaces their cosine means nothing; if they do, say so (--shared-space)"
        )
    return np.asarray(found, np.float32)


def _require_plain_mean(index: Index) -> None:
    """Stops where vectors are not the plain mean of one kind of token."""
    mean = index.embedding.startswith("mean:") and "+" not in index.embedding
    if index.level != "case" or not mean or index.mean is not None or "run" in index.details:
        whitened = ", whitened" if index.whitening is not None else ", centred" if index.mean is not None else ""
        raise SearchError(
            f"index {index.path} holds {index.embedding} of each {index.level}{whitened}, a space that no text shares;"
            " build one of plain means (embedkit index --embedding mean:cls --whiten 0)"
        )

"""Owns the vectors of texts that a head may be told to look for: from a file, a language model, or a run's options.

Knows no head. A text model is loaded only to make the vectors; whoever keeps them as `write_vectors` gives them needs
neither model nor file again.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from embedkit.errors import HeadError

__all__ = ["embed_texts", "read_vectors", "write_vectors"]

_WRITTEN = re.compile(r"float32\[(\d+),(\d+)\]:([A-Za-z0-9+/=]*)")

Vectors = NDArray[np.float32]


def read_vectors(source: str) -> Vectors:
    """Vectors [texts dim] from a file, or from the text that `write_vectors` gave.

    Args:
        source: A ``.npy`` file of one array, a ``.safetensors`` file of one tensor (or with one called ``vectors``), or
            ``float32[TEXTS,DIM]:BASE64``.

    Raises:
        HeadError: no such file, not these formats, or not finite vectors [texts dim].
    """
    if written := _WRITTEN.fullmatch(source):
        data = base64.b64decode(written[3])
        size = int(written[1]), int(written[2])
        if len(data) != 4 * math.prod(size):
            raise HeadError(f"text vectors of {size[0]} x {size[1]} float32 hold {len(data)} bytes; restore the run")
        return np.frombuffer(data, "<f4").reshape(size).astype(np.float32)
    path = Path(source)
    try:
        found = np.load(path, allow_pickle=False) if path.suffix == ".npy" else _read_safetensors(path)
    except (OSError, EOFError, ValueError, SafetensorError) as error:
        raise HeadError(
            f"text vectors cannot be read from {path}: {error}; give a .npy or .safetensors file of one array"
            " [texts, dim]"
        ) from error
    return _check(found, str(path))


def write_vectors(vectors: Vectors) -> str:
    """The vectors [texts dim] as a text, exactly."""
    data = np.ascontiguousarray(vectors, dtype="<f4").tobytes()
    return f"float32[{vectors.shape[0]},{vectors.shape[1]}]:{base64.b64encode(data).decode('ascii')}"


def embed_texts(texts: Sequence[str], model: str) -> Vectors:
    """Vectors [texts dim] of texts by a sentence-transformers model, of length 1 each.

    Args:
        texts: One or more.
        model: Its folder, or its name on the hub.

    Raises:
        HeadError: sentence-transformers is not installed, or the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise HeadError(
            f"a text model needs sentence-transformers, which cannot be imported ({error});"
            " pip install 'embedkit[text]', or give the vectors as a file"
        ) from error
    try:
        found = SentenceTransformer(model, device="cpu").encode(list(texts), normalize_embeddings=True)
    except (OSError, ValueError, RuntimeError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise HeadError(
            f"text model {model!r} cannot be loaded: {first}; give the folder of a sentence-transformers model, a name"
            " that the hub knows, or the vectors as a file"
        ) from error
    return _check(np.asarray(found), f"model {model!r}")


def _read_safetensors(path: Path) -> NDArray[np.generic]:
    if path.suffix != ".safetensors":
        raise ValueError(f"its name ends in {path.suffix!r}")
    tensors = safetensors.numpy.load_file(path)
    if "vectors" not in tensors and len(tensors) != 1:
        raise ValueError(f"it holds {', '.join(sorted(tensors)) or 'nothing'}, and none is called vectors")
    found: NDArray[np.generic] = tensors.get("vectors", next(iter(tensors.values())))
    return found


def _check(found: NDArray[np.generic], where: str) -> Vectors:
    if found.ndim != 2 or 0 in found.shape or not np.issubdtype(found.dtype, np.floating):
        raise HeadError(f"text vectors of {where} are {found.dtype} {list(found.shape)}, expected floats [texts, dim]")
    vectors = found.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise HeadError(f"text vectors of {where} hold NaN or infinity; make them again")
    return vectors

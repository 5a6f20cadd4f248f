"""Owns what FAISS can do on a GPU: which indexes and searches fit its limits, and moving an index there and back.

Knows no case. What does not fit stays on the CPU, and the reason is told in words.
"""

from __future__ import annotations

from typing import Any

from embedkit.indextypes import CODES, Kind, faiss
from embedkit.sizes import format_bytes

__all__ = ["explain_search_refusal", "explain_stay", "fetch_from_gpu", "send_to_gpu"]

_MOST_SELECTED = 2048
"""The greatest k and nprobe of FAISS's selection kernels (its ``getMaxKSelection``)."""
_CODE_BYTES = frozenset({1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48})
"""Bytes of product codes that its scan has a kernel for (``IVFPQ::isSupportedPQCodeLength``) with float32 tables."""
_TABLE_BYTES = 48 << 10
"""Of shared memory for a query's tables, which every GPU has."""
_MEMORY_SHARE = 0.8
"""Of a GPU's free memory; the rest is for queries and results."""


def explain_stay(kind: Kind, *, bytes_: int, code_bytes: int = 0) -> str | None:
    """Why an index of inner products cannot be built or searched on a GPU; None where it can.

    Args:
        kind: Of index.
        bytes_: That it takes.
        code_bytes: Per vector, of ``ivfpq``.
    """
    if faiss.get_num_gpus() == 0:
        return "FAISS sees no GPU"
    if kind == "hnsw":
        return "FAISS has no graph index for GPUs"
    if kind == "ivfpq" and (code_bytes not in _CODE_BYTES or 4 * CODES * code_bytes > _TABLE_BYTES):
        known = ", ".join(map(str, sorted(_CODE_BYTES)))
        return f"codes of {code_bytes} bytes are not among those that FAISS's GPU index takes ({known})"
    free = _measure_free()
    if free is not None and bytes_ > _MEMORY_SHARE * free:
        return f"it takes {format_bytes(bytes_)} and the GPU has {format_bytes(free)} free"
    return None


def explain_search_refusal(k: int, effort: int) -> str | None:
    """Why a search goes beyond what FAISS does on a GPU; None where it does not.

    Args:
        k: Rows asked for.
        effort: Cells looked into; 0 of ``flat``.
    """
    for name, value in (("rows asked for", k), ("cells looked into", effort)):
        if value > _MOST_SELECTED:
            return f"{value:,} {name} are more than the {_MOST_SELECTED:,} that FAISS takes on a GPU"
    return None


def send_to_gpu(index: Any) -> Any:
    """A copy of an index on the first GPU."""
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)


def fetch_from_gpu(index: Any) -> Any:
    """A copy on the CPU of an index that `send_to_gpu` gave."""
    return faiss.index_gpu_to_cpu(index)


def _measure_free() -> int | None:
    """Bytes free on the first GPU; None where PyTorch was built without CUDA, and nothing tells."""
    import torch

    return int(torch.cuda.mem_get_info(0)[0]) if torch.cuda.is_available() else None

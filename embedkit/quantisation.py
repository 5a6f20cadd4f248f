"""Owns tokens as int8: quantising those of one stack, restoring them, and what each form takes; knows no file.

A token value is stored as ``value * token_scale * channel_scale + centre``: the residual stream of a transformer has a
few channels that are tens of times as large as the others and often far from zero, which centre and scale per channel
take away, and a few tokens of huge norm, which the scale per token keeps from costing all others their precision
(channels as in SmoothQuant, arXiv 2211.10438, tokens as in ZeroQuant, arXiv 2206.01861). All that is stored of a stack
follows from that stack alone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedkit.errors import CacheError, OptionError
from embedkit.spill import release_pages

if TYPE_CHECKING:
    from torch import Tensor

    from embedkit.features import BackboneInfo
    from embedkit.recipe import TokenSet

__all__ = [
    "TOKEN_DTYPES",
    "QuantisedTokens",
    "bytes_per_slice",
    "bytes_per_stack",
    "dequantise_tokens",
    "quantise_tokens",
    "token_set_bytes",
]

TOKEN_DTYPES = ("float16", "int8")
"""How a cache can store tokens."""

_LEVELS = 127
_LARGEST = 65504.0  # of float16
_SMALLEST = 2.0**-24  # above zero in float16
_SPREADS = 16
"""A token is at most so many channel scales from the centre: bounds what a rare, huge value costs its own token."""
_BLOCK = 1 << 17
"""Values worked on at a time, so that what lies between int8 and float16 stays in the processor's cache."""
_HELD = threading.local()


@dataclass(frozen=True)
class QuantisedTokens:
    """The tokens of one stack and one token set as int8.

    Attributes:
        values: int8 [slices ... dim], -127 to 127.
        scales: float32 [slices ...], one per token, 0 or more.
        channels: float16 [2 dim]: the centre of each channel, then its scale, which is above 0.
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float32]
    channels: NDArray[np.float16]


def _empty(shape: tuple[int, ...]) -> NDArray[np.int8]:
    return np.empty(shape, np.int8)


def quantise_tokens(
    tokens: NDArray[np.float16],
    blank: NDArray[np.bool_],
    *,
    allocate: Callable[[tuple[int, ...]], NDArray[np.int8]] = _empty,
) -> QuantisedTokens:
    """Quantises the tokens of one stack, a block at a time: of tokens mapped from a file few are in memory at once.

    A channel's centre is its mean, its scale the mean distance from it, or a sixteenth of the largest where that is
    more; both are taken over the slices that are not blank (over all where every one is), summed in double precision,
    so that the numbers do not depend on how many threads sum them.

    Args:
        tokens: float16 [slices ... dim], finite.
        blank: bool [slices].
        allocate: Makes the C-contiguous array of a given shape that the values are put into.
    """
    import torch

    dim = tokens.shape[-1]
    rows = tokens.reshape(-1, dim)
    centre, spread = _channel_moments(rows, blank)
    stored, scales = allocate(tokens.shape), np.empty(len(rows), np.float32)
    values = stored.reshape(-1, dim)
    block = max(1, _BLOCK // dim)
    for start in range(0, len(rows), block):
        part = _as_float(rows[start : start + block]).sub_(centre).div_(spread)
        scale = part.abs().amax(1).div_(_LEVELS)
        part.div_(torch.where(scale > 0, scale, 1.0)[:, None]).round_().clamp_(-_LEVELS, _LEVELS)
        values[start : start + block] = part.to(torch.int8).numpy()
        release_pages(values)
        scales[start : start + block] = scale.numpy()
    channels = torch.stack([centre, spread]).to(torch.float16).numpy()
    return QuantisedTokens(stored, scales.reshape(tokens.shape[:-1]), channels)


def _channel_moments(rows: NDArray[np.float16], blank: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    """Centre and scale of each channel of [tokens dim], float32 [dim] that float16 holds exactly.

    Args:
        rows: All tokens, slice by slice.
        blank: bool [slices]; unless all are blank, tokens of blank slices do not count.
    """
    import torch

    dim = rows.shape[1]
    count = len(rows) if blank.all() else len(rows) // len(blank) * int((~blank).sum())
    total = torch.zeros(dim, dtype=torch.float64)
    for part in _shown_blocks(rows, blank):
        total += part.sum(0, dtype=torch.float64)
    centre = (total / count).to(torch.float16).to(torch.float32)
    total, largest = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim)
    for part in _shown_blocks(rows, blank):
        distance = part.sub_(centre).abs_()
        total += distance.sum(0, dtype=torch.float64)
        largest = torch.maximum(largest, distance.amax(0))
    spread = torch.maximum(total / count, largest.double() / _SPREADS).clamp_(_SMALLEST, _LARGEST)
    return centre, torch.where(largest > 0, spread, 1.0).to(torch.float16).to(torch.float32)


def _shown_blocks(rows: NDArray[np.float16], blank: NDArray[np.bool_]) -> Iterator[Tensor]:
    """Float32 copies of the tokens that count, in order, block by block, as if the others were not there at all."""
    import torch

    block = max(1, _BLOCK // rows.shape[1])
    if blank.all() or not blank.any():
        yield from (_as_float(rows[start : start + block]) for start in range(0, len(rows), block))
        return
    shown, per_slice = np.flatnonzero(~blank), len(rows) // len(blank)
    for start in range(0, len(shown) * per_slice, block):
        place = np.arange(start, min(start + block, len(shown) * per_slice))
        yield torch.from_numpy(rows[shown[place // per_slice] * per_slice + place % per_slice]).to(torch.float32)
        release_pages(rows)


def _as_float(part: NDArray[Any]) -> Tensor:
    """A float32 copy of a part of an array that may be read-only, or mapped from a file."""
    import torch

    copied = np.array(part)
    release_pages(part)
    return torch.from_numpy(copied).to(torch.float32)


def dequantise_tokens(
    values: NDArray[np.int8], scales: NDArray[np.float32], channels: NDArray[np.float16], *, what: str
) -> NDArray[np.float16]:
    """Restores tokens, in any part of their slices, as float16 [slices ... dim]; all of them are finite.

    ``(value * token scale) * channel scale + centre`` is computed in float32, each step rounded, then held within the
    range of float16 and rounded to it: every machine gives the same bits.

    Args:
        values: int8 [slices ... dim].
        scales: float32 [slices ...].
        channels: float16 [2 dim].
        what: Whose tokens these are, for the message.

    Raises:
        CacheError: a scale is no number, infinite or negative, or a channel's is zero.
    """
    wide = channels.astype(np.float32)
    reach = _check_scales(scales, wide, what=what)
    dim = values.shape[-1]
    rows, token_scales = values.reshape(-1, dim), scales.reshape(-1, 1)
    restored = np.empty(rows.shape, np.float16)
    block = max(1, _BLOCK // dim)
    for start in range(0, len(rows), block):
        some = slice(start, start + block)
        _restore(rows[some], token_scales[some], wide, restored[some], clamped=reach > _LARGEST)
    return restored.reshape(values.shape)


def _restore(
    values: NDArray[np.int8],
    scales: NDArray[np.float32],
    channels: NDArray[np.float32],
    target: NDArray[np.float16],
    *,
    clamped: bool,
) -> None:
    """Restores one block [rows dim] into its place, by way of memory that stays in the processor's cache."""
    import torch

    wide = _workspace(values.size).reshape(values.shape)
    np.copyto(wide, values)  # by numpy, which takes what may not be written to
    part = torch.from_numpy(wide)
    centre, spread = torch.from_numpy(channels[0]), torch.from_numpy(channels[1])
    part.mul_(torch.from_numpy(scales.copy())).mul_(spread).add_(centre)  # one by one: a fused step rounds once less
    if clamped:
        part.clamp_(-_LARGEST, _LARGEST)
    torch.from_numpy(target).copy_(part)


def _workspace(size: int) -> NDArray[np.float32]:
    """Float32 [size] of this thread's own that the next call takes again: fresh memory costs as much as the sums."""
    if size > _BLOCK:
        return np.empty(size, np.float32)
    held: NDArray[np.float32] | None = getattr(_HELD, "workspace", None)
    if held is None:
        held = _HELD.workspace = np.empty(_BLOCK, np.float32)
    return held[:size]


def _check_scales(scales: NDArray[np.float32], channels: NDArray[np.float32], *, what: str) -> float:
    """How far from zero a restored value can be, before it is held within the range of float16.

    Raises:
        CacheError: as `dequantise_tokens`. A comparison with NaN is false, so that one NaN is enough.
    """
    smallest, largest = float(scales.min()), float(scales.max())
    if not 0 <= smallest <= largest < math.inf:
        raise CacheError(f"{what} is damaged: a token scale is NaN, infinite or negative; run embedkit verify")
    low, narrow = channels.min(1).tolist()
    high, broad = channels.max(1).tolist()
    if not (-math.inf < low <= high < math.inf and 0 < narrow <= broad < math.inf):
        raise CacheError(
            f"{what} is damaged: a channel's centre or scale is NaN or infinite, or its scale not above 0;"
            " run embedkit verify"
        )
    return float((1 + _LEVELS) * largest * broad + max(-low, high))


def bytes_per_slice(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes that one slice of a token set takes: its values, and as int8 a scale per token.

    Args:
        shape: Per slice, as of `embedkit.tokens.token_shape`: (dim,), (patches, dim), (heads, patches), (tokens, dim).
        dtype: float16 or int8.

    Raises:
        OptionError: another dtype.
    """
    _require_dtype(dtype)
    return 2 * math.prod(shape) if dtype == "float16" else math.prod(shape) + 4 * math.prod(shape[:-1])


def bytes_per_stack(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes that a token set takes per stack, whatever its slices: as int8 a centre and a scale per channel.

    Raises:
        OptionError: dtype is neither float16 nor int8.
    """
    _require_dtype(dtype)
    return 0 if dtype == "float16" else 4 * shape[-1]


def token_set_bytes(token_set: TokenSet, info: BackboneInfo, *, dtype: str) -> int:
    """Bytes per slice of a token set of a backbone, as `bytes_per_slice`.

    Raises:
        OptionError: dtype is neither float16 nor int8.
    """
    from embedkit.tokens import token_shape

    return bytes_per_slice(token_shape(token_set, info), dtype)


def _require_dtype(dtype: str) -> None:
    if dtype not in TOKEN_DTYPES:
        raise OptionError(f"dtype {dtype!r} is unknown; expected one of {', '.join(TOKEN_DTYPES)}")

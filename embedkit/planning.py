"""Owns what the options of an extraction mean: the recipe, the device, the precision; extracts nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from embedkit.errors import OptionError
from embedkit.features import BackboneInfo
from embedkit.quantisation import TOKEN_DTYPES
from embedkit.recipe import Recipe
from embedkit.slices import PLANES, slice_choice_text, window_texts
from embedkit.tokens import resolve_token_sets

__all__ = [
    "AUTOCAST_DTYPES",
    "COMPILED",
    "DEFAULT_TOKENS",
    "DEFAULT_WINDOW",
    "choose_device",
    "choose_precision",
    "make_recipe",
    "require_channel_count",
    "require_counts",
]

DEFAULT_TOKENS = ("cls", "patch@4")
DEFAULT_WINDOW = "percentile:0.5:99.5"
COMPILED = "+compile"
"""Ends the precision of a recipe whose backbone was compiled: another order of rounding."""

_MOST_SLICES, _MOST_WORKERS = 65_536, 1_024
_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTOCAST_DTYPES = _PRECISIONS | {f"{name}{COMPILED}": dtype for name, dtype in _PRECISIONS.items()}


def choose_device(device: str = "auto") -> torch.device:
    """``auto`` is CUDA where there is one, then Apple's MPS, then the CPU.

    Raises:
        OptionError: ``device`` is no device that torch has here.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device {device!r} cannot be used here ({reason}); use cpu or auto") from error
    return chosen


def require_counts(batch_size: int, workers: int) -> None:
    """Checks the options that count things.

    Raises:
        OptionError: one of them is below 1, or more than any machine takes.
    """
    if batch_size < 1 or workers < 1:
        raise OptionError(f"batch_size is {batch_size} and workers is {workers}, expected at least 1 of each")
    if batch_size > _MOST_SLICES or workers > _MOST_WORKERS:
        raise OptionError(
            f"batch_size is {batch_size} and workers is {workers}, expected at most {_MOST_SLICES:,} slices and"
            f" {_MOST_WORKERS} cases read ahead, which memory must hold"
        )


def make_recipe(
    info: BackboneInfo,
    *,
    tokens: Sequence[str] = DEFAULT_TOKENS,
    layers: Sequence[int] | None = None,
    cut: int | None = None,
    planes: Sequence[str] = ("axial",),
    slices: str = "all",
    window: str | Sequence[str] = DEFAULT_WINDOW,
    channels: Sequence[str] = (),
    fill: str = "",
    crop: str = "none",
    resize: str = "pad",
    dtype: str = "float16",
    precision: str = "fp32",
    preview: int = 64,
    augment: int = 0,
    augment_flip: bool = False,
) -> Recipe:
    """The recipe that these options mean for a backbone; the options are those of `extract`.

    Raises:
        OptionError: an option has a value that means nothing; the message lists the ones that do.
    """
    _require_one_of("plane", planes, PLANES)
    _require_one_of("crop", [crop], ("none", "foreground"))
    _require_one_of("resize", [resize], ("pad", "stretch"))
    _require_one_of("dtype", [dtype], TOKEN_DTYPES)
    _require_one_of("precision", [precision], tuple(AUTOCAST_DTYPES))
    if fill and not channels:
        raise OptionError(f"fill {fill!r} names a stand-in for absent channels, but no channels are given")
    if not 0 <= preview <= 512:
        raise OptionError(f"preview is {preview} pixels, expected 0 (none) to 512")
    if not 0 <= augment < 100:
        raise OptionError(f"augment is {augment} copies of each case, expected 0 (none) to 99")
    if augment_flip and not augment:
        raise OptionError("augment_flip mirrors altered copies, but none were asked for; say how many with augment")
    token_sets = resolve_token_sets(tokens, layers=layers, cut=cut, info=info)
    return Recipe(
        backbone=info.name,
        weights=info.weights,
        token_sets=tuple(sorted(map(str, token_sets))),
        image_size=info.image_size,
        mean=tuple(info.mean),
        std=tuple(info.std),
        planes=tuple(sorted(set(planes))),
        slices=slice_choice_text(slices),
        windows=window_texts(window),
        channels=tuple(channels),
        fill=fill,
        crop=crop,
        resize=resize,
        dtype=dtype,
        precision=precision,
        preview=preview,
        augment=f"{augment}{':flip' if augment_flip else ''}" if augment else "",
    )


def choose_precision(precision: str, device: torch.device, info: BackboneInfo) -> str:
    """Resolves ``auto``: bf16 where the device computes it natively and the backbone has learned weights.

    Raises:
        OptionError: another precision than ``auto``, ``fp32``, ``bf16`` or ``fp16``.
    """
    _require_one_of("precision", [precision], ("auto", *_PRECISIONS))
    if precision != "auto":
        return precision
    if info.weights.startswith("builtin:"):
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and native else "fp32"


def _require_one_of(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    if not values:
        raise OptionError(f"no {name} given; expected some of {', '.join(known)}")
    for value in values:
        if value not in known:
            raise OptionError(f"{name} {value!r} is unknown; expected one of {', '.join(known)}")


def require_channel_count(channels: Sequence[str], window: str | Sequence[str]) -> None:
    windows = len(window_texts(window))
    if channels and (len(channels) != 3 or windows not in (1, 3)):
        raise OptionError(
            f"{len(channels)} channels and {windows} windows; expected three channels and one or three windows"
        )

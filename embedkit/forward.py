"""Owns the frozen forward pass over one batch: precision, pooling on the device and the way back to the host.

On CUDA a batch is started without waiting for the one before: its tokens are copied into pinned memory while the next
batch already runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedkit.errors import BackboneError
from embedkit.features import Backbone
from embedkit.planning import AUTOCAST_DTYPES
from embedkit.recipe import Recipe
from embedkit.tokens import compute_token_sets, needs_attention, required_layers

__all__ = ["MOST_DEVIATION", "PendingTokens", "require_compiled", "require_precision", "run_backbone", "start_backbone"]

MOST_DEVIATION = 0.1
"""Largest relative deviation (root mean square over that of float32) of tokens at a lower precision."""


@dataclass(frozen=True)
class PendingTokens:
    """Tokens of a batch on their way to the host."""

    _tokens: Mapping[str, Tensor]
    _done: torch.cuda.Event | None

    def result(self) -> dict[str, NDArray[np.float16]]:
        """Token sets by name, float16 [batch ...]; waits until they are there."""
        if self._done is not None:
            self._done.synchronize()
        return {name: values.numpy() for name, values in self._tokens.items()}


def start_backbone(images: Tensor, backbone: Backbone, recipe: Recipe) -> PendingTokens:
    """Starts the forward pass over images, float [batch channels height width] in 0..1, at the recipe's precision."""
    tokens = _compute(images, backbone, recipe, recipe.precision)
    if images.device.type != "cuda":
        return PendingTokens({name: values.to(torch.float16).cpu() for name, values in tokens.items()}, None)
    hosts = {name: _copy_out(values.to(torch.float16)) for name, values in tokens.items()}
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(images.device))
    return PendingTokens(hosts, done)


def run_backbone(images: Tensor, backbone: Backbone, recipe: Recipe) -> dict[str, NDArray[np.float16]]:
    """Token sets of images, float [batch channels height width] in 0..1, by name: float16 [batch ...]."""
    return start_backbone(images, backbone, recipe).result()


def require_precision(backbone: Backbone, recipe: Recipe, device: torch.device) -> None:
    """Checks on two smooth random images that the recipe's precision gives what float32 gives.

    Raises:
        BackboneError: tokens that are no number or deviate by more than `MOST_DEVIATION`; names the token set.
    """
    if AUTOCAST_DTYPES[recipe.precision] is None:
        return
    images = _probe_images(backbone, recipe, device, count=2)
    with torch.compiler.set_stance("force_eager"):  # two images are not worth compiling for
        low, exact = (_compute(images, backbone, recipe, name) for name in (recipe.precision, "fp32"))
    _require_near(low, exact, f"{backbone.info.name} at precision {recipe.precision}", "fp32; use --precision fp32")


def require_compiled(backbone: Backbone, recipe: Recipe, device: torch.device, *, batch_size: int) -> None:
    """Compiles the backbone for one full batch and checks that it still gives what it gave before.

    Raises:
        BackboneError: it cannot be compiled here, or its tokens deviate by more than `MOST_DEVIATION`.
    """
    images = _probe_images(backbone, recipe, device, count=batch_size)
    with torch.compiler.set_stance("force_eager"):
        plain = _compute(images, backbone, recipe, recipe.precision)
    try:
        compiled = _compute(images, backbone, recipe, recipe.precision)
    except Exception as error:  # whatever the compiler, or the C++ compiler behind it, finds wrong
        first = next(iter(str(error).splitlines()), "")
        raise BackboneError(
            f"{backbone.info.name} cannot be compiled here ({type(error).__name__}: {first}); leave --compile out"
        ) from error
    _require_near(compiled, plain, f"{backbone.info.name} compiled", "itself uncompiled; leave --compile out")


def _probe_images(backbone: Backbone, recipe: Recipe, device: torch.device, *, count: int) -> Tensor:
    """Smooth random images, the same ones every time: [count channels height width] in 0..1."""
    channels = len(backbone.info.mean)
    coarse = torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    size = (recipe.image_size, recipe.image_size)
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1).to(device)


def _require_near(found: Mapping[str, Tensor], exact: Mapping[str, Tensor], who: str, whom: str) -> None:
    for name, reference in exact.items():
        difference = (found[name].float() - reference.float()).square().mean().sqrt()
        deviation = float(difference / reference.float().square().mean().sqrt().clamp_min(1e-12))
        if not deviation <= MOST_DEVIATION:
            raise BackboneError(
                f"{who} gives {name} tokens that deviate by {deviation:.0%}, expected at most {MOST_DEVIATION:.0%},"
                f" from {whom}"
            )


def _compute(images: Tensor, backbone: Backbone, recipe: Recipe, precision: str) -> dict[str, Tensor]:
    token_sets = recipe.parsed_token_sets()
    dtype = AUTOCAST_DTYPES[precision]
    with torch.inference_mode():
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            output = backbone.forward_layers(images, required_layers(token_sets), attention=needs_attention(token_sets))
        return compute_token_sets(output, token_sets, backbone.info)


def _copy_out(values: Tensor) -> Tensor:
    """A copy in pinned host memory, complete once the stream has passed this point."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)

"""Owns what every backbone does to its input: checking images and layers, spreading channels, normalising."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedkit.errors import BackboneError
from embedkit.features import BackboneInfo

__all__ = ["check_layers", "normalize_images"]


def normalize_images(images: Tensor, info: BackboneInfo) -> Tensor:
    """Subtracts the mean and divides by the deviation per channel; one grey channel first stands for all of them.

    Args:
        images: [batch channels height width] in 0..1, 1 channel or as many as ``info.mean`` has.
        info: The backbone's mean, deviation and image size.

    Returns:
        [batch channels height width] with the backbone's channel count.

    Raises:
        BackboneError: images of another shape.
    """
    channels, side = len(info.mean), info.image_size
    if images.ndim != 4 or images.shape[1] not in {1, channels} or images.shape[2:] != (side, side):
        counts = "1" if channels == 1 else f"1 or {channels}"
        raise BackboneError(
            f"backbone {info.name} got images of shape {list(images.shape)},"
            f" expected [batch, {counts} channels, {side}, {side}]"
        )
    mean = torch.tensor(info.mean, device=images.device, dtype=images.dtype).view(1, -1, 1, 1)
    scale = 1 / torch.tensor(info.std, device=images.device, dtype=images.dtype).view(1, -1, 1, 1)
    return images * scale - mean * scale


def check_layers(layers: Sequence[int], info: BackboneInfo) -> None:
    """Raises BackboneError unless every layer is one that the backbone has."""
    wrong = sorted({layer for layer in layers if not 1 <= layer <= info.depth})
    if wrong:
        raise BackboneError(f"backbone {info.name} has no layer {wrong[0]}; its layers are 1 to {info.depth}")

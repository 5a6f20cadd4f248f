"""Owns running timm networks that give feature maps (convolutional and hierarchical ones); knows no weights file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from embedkit.errors import BackboneError
from embedkit.features import BackboneInfo, BackboneOutput, LayerTokens
from embedkit.images import check_layers, normalize_images

__all__ = ["FeatureMapBackbone"]


class FeatureMapBackbone:
    """A frozen timm network whose feature maps become patch tokens; see `embedkit.features.Backbone`.

    Layers are the network's stages in timm's order (for ResNet the stem is the first of five). Every place of a map
    is one patch token, ``cls`` is the mean over the map, and no final norm is applied.

    Attributes:
        info: What it is.
        model: The timm module, in evaluation mode, without gradients.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        weights: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.model = model
        device = next(model.parameters()).device
        with torch.inference_mode():
            maps = self._run_stages(torch.zeros(1, 3, image_size, image_size, device=device), None)
        self.info = BackboneInfo(
            name=name,
            weights=weights,
            image_size=image_size,
            mean=tuple(mean),
            std=tuple(std),
            depth=len(maps),
            dims=tuple(item.shape[1] for item in maps),
            grids=tuple((item.shape[2], item.shape[3]) for item in maps),
            summary_layers=tuple(range(1, len(maps) + 1)),
        )

    def forward_layers(self, images: Tensor, layers: Sequence[int], *, attention: bool = False) -> BackboneOutput:
        """See `embedkit.features.Backbone.forward_layers`."""
        check_layers(layers, self.info)
        if attention:
            raise BackboneError(
                f"backbone {self.info.name} gives no attention: it has no class token;"
                " leave attention out of the tokens"
            )
        wanted = sorted(set(layers))
        if not wanted:
            return BackboneOutput()
        maps = self._run_stages(normalize_images(images, self.info), [layer - 1 for layer in wanted])
        tokens = [item.flatten(2).transpose(1, 2) for item in maps]
        return BackboneOutput(
            {layer: LayerTokens(item.mean(1), item) for layer, item in zip(wanted, tokens, strict=True)}
        )

    def run_tail(self, sequence: Tensor, layer: int) -> LayerTokens:
        """Always raises BackboneError: feature maps are no token sequence."""
        raise BackboneError(
            f"backbone {self.info.name} has no tail for {list(sequence.shape)} tokens of layer {layer}: its layers are"
            " feature maps, not one token sequence; choose a vision transformer for cut tokens"
        )

    def _run_stages(self, images: Tensor, stages: Sequence[int] | None) -> list[Tensor]:
        """[batch dim height width] of each stage asked for (all for None); stages past the last one do not run."""
        maps: list[Tensor] = self.model.forward_intermediates(
            images, indices=stages, norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return maps

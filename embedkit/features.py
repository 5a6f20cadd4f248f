"""Owns the plain types through which a backbone speaks (what it is, what it gives); knows no model and loads none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

__all__ = ["DEFAULT_BACKBONE", "Backbone", "BackboneInfo", "BackboneOutput", "LayerTokens"]

DEFAULT_BACKBONE = "vit_small_patch14_reg4_dinov2.lvd142m"
"""Its weights are open and no hub asks for an account to fetch them."""


@dataclass(frozen=True)
class BackboneInfo:
    """What a loaded backbone is and what shapes it gives. Layers are counted from 1.

    Attributes:
        name: As given to ``load_backbone``.
        weights: ``sha256:...`` over the loaded state dict, or ``builtin:N`` for fixed filters.
        image_size: Side in pixels of the square image it reads.
        mean: Per channel, subtracted from images in 0..1.
        std: Per channel, divides after the subtraction.
        depth: Number of layers: blocks of a transformer, stages of a convolutional network, orders of the scattering.
        dims: Width of the patch tokens of each layer.
        grids: Patches of each layer as (height, width).
        class_tokens: 1 where the sequence opens with a class token, else 0.
        register_tokens: Further tokens between the class token and the patches.
        attention_heads: Heads of the last block's attention; 0 where the class token's attention cannot be had.
        summary: What ``cls`` is, in words: ``class token``, ``attention pool``, ``average pool``.
        summary_layers: Layers that have a ``cls``; an attention pool, for one, reads the last layer alone.
        has_tail: Whether ``cut`` and ``run_tail`` work, that is, whether one token sequence runs through the blocks.
    """

    name: str
    weights: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    depth: int
    dims: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    class_tokens: int = 0
    register_tokens: int = 0
    attention_heads: int = 0
    summary: str = "average pool"
    summary_layers: tuple[int, ...] = ()
    has_tail: bool = False


@dataclass(frozen=True)
class LayerTokens:
    """Tokens of one layer.

    Attributes:
        summary: ``cls``, [batch dim]; None where this layer has none (see ``BackboneInfo.summary_layers``).
        patches: [batch patches dim], row by row from the top left of the image.
        sequence: [batch tokens dim], class, register and patch tokens as they leave the block, before any final norm;
            None where the backbone has no such sequence.
    """

    summary: Tensor | None
    patches: Tensor
    sequence: Tensor | None = None


@dataclass(frozen=True)
class BackboneOutput:
    """Everything one forward pass was asked for.

    Attributes:
        layers: By layer, counted from 1.
        attention: [batch heads patches], the class token's attention in the last block: the softmax runs over all
            tokens, so a row sums to 1 minus what falls on the class and register tokens. None unless asked for.
    """

    layers: dict[int, LayerTokens] = field(default_factory=dict)
    attention: Tensor | None = None


class Backbone(Protocol):
    """A frozen 2D network that turns images into tokens."""

    @property
    def info(self) -> BackboneInfo:
        """What it is."""

    def forward_layers(self, images: Tensor, layers: Sequence[int], *, attention: bool = False) -> BackboneOutput:
        """Gives the tokens of the layers asked for; what lies past the last of them is not computed.

        Args:
            images: [batch channels height width] in 0..1, height and width equal to ``info.image_size``. One channel
                stands for all channels that the network reads. Normalised inside.
            layers: Counted from 1. The last layer is taken after the final norm, every other one is raw.
            attention: Whether to give the class token's attention in the last block as well.

        Raises:
            BackboneError: images of another size or channel count, no such layer, or no class token to attend.
        """

    def run_tail(self, sequence: Tensor, layer: int) -> LayerTokens:
        """Runs the blocks after ``layer`` and the final norm on tokens that left block ``layer``.

        Args:
            sequence: [batch tokens dim], as in ``LayerTokens.sequence``.
            layer: The block that the tokens left, from 1 to depth - 1.

        Raises:
            BackboneError: the backbone has no token sequence, or ``layer`` or ``sequence`` does not fit.
        """

"""Owns running timm vision transformers (VisionTransformer and Eva families) layer by layer; knows no weights file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn
from torch.nn import functional as F

from embedkit.errors import BackboneError
from embedkit.features import BackboneInfo, BackboneOutput, LayerTokens
from embedkit.images import check_layers, normalize_images

__all__ = ["VitBackbone", "attend_from_class"]


class VitBackbone:
    """A frozen timm vision transformer; see `embedkit.features.Backbone` for what its methods give.

    Attributes:
        info: What it is.
        model: The timm module (VisionTransformer or Eva), in evaluation mode, without gradients.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        weights: str,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.model = model
        depth, prefix = len(model.blocks), int(model.num_prefix_tokens)
        class_tokens = int(model.cls_token is not None)
        self._pool = _name_pool(model)
        grid = (int(model.patch_embed.grid_size[0]), int(model.patch_embed.grid_size[1]))
        self.info = BackboneInfo(
            name=name,
            weights=weights,
            image_size=int(model.patch_embed.img_size[0]),
            mean=tuple(mean),
            std=tuple(std),
            depth=depth,
            dims=(int(model.embed_dim),) * depth,
            grids=(grid,) * depth,
            class_tokens=class_tokens,
            register_tokens=prefix - class_tokens,
            attention_heads=int(model.blocks[-1].attn.num_heads) if class_tokens and _can_attend(model) else 0,
            summary=self._pool,
            summary_layers=(depth,) if self._pool == "attention pool" else tuple(range(1, depth + 1)),
            has_tail=True,
        )

    def forward_layers(self, images: Tensor, layers: Sequence[int], *, attention: bool = False) -> BackboneOutput:
        """See `embedkit.features.Backbone.forward_layers`."""
        depth = self.info.depth
        check_layers(layers, self.info)
        if attention and not self.info.attention_heads:
            raise BackboneError(
                f"backbone {self.info.name} gives no attention: {self._why_no_attention()};"
                " leave attention out of the tokens"
            )
        wanted = sorted({*layers, *((depth - 1,) if attention else ())})
        if not wanted:
            return BackboneOutput()
        sequences = self._run_blocks(normalize_images(images, self.info), wanted)
        return BackboneOutput(
            layers={layer: self._split(sequences[layer], layer) for layer in sorted(set(layers))},
            attention=self._attend(sequences[depth - 1]) if attention else None,
        )

    def run_tail(self, sequence: Tensor, layer: int) -> LayerTokens:
        """See `embedkit.features.Backbone.run_tail`."""
        info, tokens = self.info, self.info.class_tokens + self.info.register_tokens
        tokens += info.grids[-1][0] * info.grids[-1][1]
        if not 1 <= layer < info.depth:
            raise BackboneError(f"no tail after layer {layer} of {info.name}; give a layer from 1 to {info.depth - 1}")
        if sequence.ndim != 3 or sequence.shape[1:] != (tokens, info.dims[-1]):
            raise BackboneError(
                f"tail of {info.name} got tokens of shape {list(sequence.shape)},"
                f" expected [batch, {tokens}, {info.dims[-1]}]"
            )
        parameter = next(self.model.parameters())
        x = sequence.to(parameter.device, parameter.dtype)
        for number in range(layer, info.depth):
            rope = self._rope(number)
            x = self.model.blocks[number](x) if rope is None else self.model.blocks[number](x, rope=rope)
        return self._split(x, info.depth)

    def _run_blocks(self, images: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """[batch tokens dim] leaving each of ``layers``, raw; blocks past the last one do not run."""
        prefix = int(self.model.num_prefix_tokens)
        given = self.model.forward_intermediates(
            images,
            indices=[layer - 1 for layer in layers],
            return_prefix_tokens=prefix > 0,
            norm=False,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        sequences = [torch.cat((item[1], item[0]), dim=1) for item in given] if prefix else given
        return dict(zip(layers, sequences, strict=True))

    def _split(self, sequence: Tensor, layer: int) -> LayerTokens:
        """``sequence`` as it leaves block ``layer``, taken apart; normed for the last layer alone."""
        prefix = int(self.model.num_prefix_tokens)
        last = layer == self.info.depth
        tokens = self.model.norm(sequence) if last else sequence
        return LayerTokens(self._summarize(tokens, last=last), tokens[:, prefix:], sequence)

    def _summarize(self, tokens: Tensor, *, last: bool) -> Tensor | None:
        if self._pool == "class token":
            return tokens[:, 0]
        if last:
            pooled: Tensor = self.model.fc_norm(self.model.pool(tokens))
            return pooled
        return None if self._pool == "attention pool" else tokens[:, int(self.model.num_prefix_tokens) :].mean(1)

    def _attend(self, sequence: Tensor) -> Tensor:
        """[batch heads patches] from the tokens that enter the last block."""
        block = self.model.blocks[-1]
        entering = sequence if isinstance(block, ResPostBlock | EvaBlockPostNorm) else block.norm1(sequence)
        return attend_from_class(
            block.attn, entering, prefix=int(self.model.num_prefix_tokens), rope=self._rope(self.info.depth - 1)
        )

    def _rope(self, number: int) -> Tensor | None:
        """Rotary position embedding for block ``number`` (from 0), None where the model has none."""
        rope = getattr(self.model, "rope", None)
        if rope is None:
            return None
        fixed = not self.model.dynamic_img_size and hasattr(rope, "feat_shape")
        embedding: Tensor = rope.get_embed() if fixed else rope.get_embed(shape=self.info.grids[-1])
        return embedding[number] if getattr(self.model, "rope_mixed", False) else embedding

    def _why_no_attention(self) -> str:
        if not self.info.class_tokens:
            return f"it has no class token (its summary is an {self.info.summary})"
        return f"its blocks ({type(self.model.blocks[-1]).__name__}) do not show queries and keys"


def attend_from_class(attention: Any, entering: Tensor, *, prefix: int, rope: Tensor | None) -> Tensor:
    """Recomputes the class token's attention over the patches, which fused attention never shows.

    Softmax over all tokens of q_class . k / sqrt(head dim), with the module's own projections, query and key norms
    and rotary embedding; computed in float32 from the projections on.

    Args:
        attention: timm's Attention, AttentionRope or EvaAttention.
        entering: [batch tokens dim] as they enter it, class token first.
        prefix: Tokens before the patches.
        rope: Rotary embedding of the patches, or None.

    Returns:
        [batch heads patches], each row summing to 1 minus the attention on the prefix tokens.
    """
    query, key = _project(attention, entering[:, :1], entering)
    query, key = attention.q_norm(query), attention.k_norm(key)
    if rope is not None:  # the class token itself is not rotated
        half = bool(getattr(attention, "rotate_half", False))
        rotated = apply_rot_embed_cat(key[:, :, prefix:], rope, half=half)
        key = torch.cat((key[:, :, :prefix], rotated.type_as(key)), dim=2)
    if query.shape[1] != key.shape[1]:  # grouped-query attention
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    with torch.autocast(query.device.type, enabled=False):
        logits: Tensor = (query.float() * float(attention.scale)) @ key.float().transpose(-2, -1)
        return logits.softmax(dim=-1)[:, :, 0, prefix:]


def _project(attention: Any, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [batch heads 1 width] and keys [batch heads tokens width] by fused or separate projections."""
    if attention.qkv is None:
        query, key = attention.q_proj(queries), attention.k_proj(keys)
    else:
        width = attention.qkv.weight.shape[0] // 3
        bias_q, bias_k = getattr(attention, "q_bias", None), getattr(attention, "k_bias", None)
        if attention.qkv.bias is not None:
            bias_q, bias_k, _ = attention.qkv.bias.split(width)
        query = F.linear(queries, attention.qkv.weight[:width], bias_q)
        key = F.linear(keys, attention.qkv.weight[width : 2 * width], bias_k)
    heads = int(attention.num_heads)
    head_dim = query.shape[-1] // heads
    return (
        query.unflatten(-1, (heads, head_dim)).transpose(1, 2),
        key.unflatten(-1, (key.shape[-1] // head_dim, head_dim)).transpose(1, 2),
    )


def _can_attend(model: Any) -> bool:
    """Whether the last block shows the input, queries and keys of its attention, and another block comes before it."""
    block = model.blocks[-1]
    plain = isinstance(block, Block | ResPostBlock | EvaBlock | EvaBlockPostNorm)
    shown = plain and all(hasattr(block.attn, name) for name in ("qkv", "q_norm", "k_norm", "num_heads", "scale"))
    return shown and len(model.blocks) > 1


def _name_pool(model: Any) -> str:
    """What ``cls`` is: the class token, unless the model was trained to read something else in its place.

    A model that has a class token but norms only after average pooling (``fc_norm``) never trained the class token's
    last layer, so its average pool stands for it.
    """
    if model.attn_pool is not None:
        return "attention pool"
    pooled_first = isinstance(model.norm, nn.Identity) and not isinstance(model.fc_norm, nn.Identity)
    return "class token" if model.cls_token is not None and not pooled_first else "average pool"

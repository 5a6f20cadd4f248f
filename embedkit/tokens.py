"""Owns token sets: which ones an option asks for, how they are computed from a backbone's output, and their shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.nn import functional as F

from embedkit.errors import OptionError
from embedkit.features import BackboneInfo, BackboneOutput
from embedkit.recipe import TokenKind, TokenSet

__all__ = [
    "compute_token_sets",
    "default_layer",
    "needs_attention",
    "required_layers",
    "resolve_token_sets",
    "token_shape",
]

_KINDS: dict[str, TokenKind] = {"cls": "cls", "patch": "patch", "attention": "attention", "cut": "cut"}
_REQUEST = re.compile(r"(?P<kind>[a-z]+)(?:@(?P<grid>\d+))?(?::(?P<layer>-?\d+))?")


def resolve_token_sets(
    tokens: Sequence[str], *, layers: Sequence[int] | None = None, cut: int | None = None, info: BackboneInfo
) -> tuple[TokenSet, ...]:
    """Gives the token sets that the options ask for, sorted and each once, all within what the backbone has.

    Args:
        tokens: ``cls``, ``patch``, ``patch@GRID`` or ``attention``, each optionally with its own ``:LAYER``.
        layers: Layers for the entries that name none, counted from 1, or from the end when negative (-1 is the last).
            None means `default_layer`. Attention is always the last block's.
        cut: Adds the tokens that enter the last ``cut`` blocks; None or 0 adds none.
        info: The backbone.

    Raises:
        OptionError: an entry that cannot be read, or that this backbone does not have; says what it has.
    """
    found: set[TokenSet] = set()
    for text in tokens:
        found.update(_read_request(text.strip(), layers, info))
    if cut:
        if not 1 <= cut < info.depth:
            raise OptionError(
                f"cut {cut} asks for the tokens that enter the last {cut} of {info.depth} layers of {info.name};"
                f" give 1 to {info.depth - 1}"
            )
        found.add(TokenSet("cut", info.depth - cut))
    if not found:
        raise OptionError("no token set asked for; give at least one of cls, patch, patch@GRID, attention, or a cut")
    for token_set in found:
        _check(token_set, info)
    return tuple(sorted(found, key=lambda item: (item.kind, item.layer, item.grid or 0)))


def default_layer(kind: TokenKind, info: BackboneInfo) -> int:
    """The layer of a token set named without one: the last, but two thirds of the depth for a transformer's patches.

    Tokens before the last blocks still know their place; no layer is best for every task (figures are in
    docs/measures.md), and two thirds of the depth is a compromise.
    """
    if kind == "patch" and info.has_tail:
        return max(1, round(2 * info.depth / 3))
    return info.depth


def required_layers(token_sets: Iterable[TokenSet]) -> tuple[int, ...]:
    """Layers that `Backbone.forward_layers` must be asked for; attention needs none (see `needs_attention`)."""
    return tuple(sorted({item.layer for item in token_sets if item.kind != "attention"}))


def needs_attention(token_sets: Iterable[TokenSet]) -> bool:
    """Whether `Backbone.forward_layers` must be asked for attention."""
    return any(item.kind == "attention" for item in token_sets)


def token_shape(token_set: TokenSet, info: BackboneInfo) -> tuple[int, ...]:
    """Shape of a token set per slice: (dim,), (patches, dim), (heads, patches) or (tokens, dim) for a cut."""
    height, width = info.grids[token_set.layer - 1]
    dim = info.dims[token_set.layer - 1]
    if token_set.kind == "cls":
        return (dim,)
    if token_set.kind == "attention":
        return (info.attention_heads, height * width)
    if token_set.kind == "cut":
        return (info.class_tokens + info.register_tokens + height * width, dim)
    return (height * width if token_set.grid is None else token_set.grid**2, dim)


def compute_token_sets(output: BackboneOutput, token_sets: Iterable[TokenSet], info: BackboneInfo) -> dict[str, Tensor]:
    """Picks and pools what each token set holds.

    Args:
        output: Of `Backbone.forward_layers`, with the layers of `required_layers`.
        token_sets: As resolved for this backbone.
        info: The backbone.

    Returns:
        By the token set's name, [batch ...] with the shape of `token_shape`. Pooled patches are float32 means over
        equal shares of the grid (overlapping by a patch where GRID does not divide it), row by row.

    Raises:
        OptionError: ``output`` lacks a layer or the attention.
    """
    return {str(token_set): _compute(output, token_set, info) for token_set in token_sets}


def _read_request(text: str, layers: Sequence[int] | None, info: BackboneInfo) -> list[TokenSet]:
    """Token sets of one entry such as ``patch@4`` or ``cls:-2``."""
    match = _REQUEST.fullmatch(text)
    kind = _KINDS.get(match["kind"]) if match else None
    if match is None or kind is None:
        raise OptionError(
            f"token set {text!r} is unknown; give cls, patch, patch@GRID or attention, optionally with :LAYER,"
            " for example cls,patch@4:8"
        )
    grid = None if match["grid"] is None else int(match["grid"])
    if grid == 0:
        raise OptionError(f"token set {text!r} pools to a grid of 0; give a grid of 1 or more, or plain patch")
    if match["layer"] is not None:
        chosen: Sequence[int] = (int(match["layer"]),)
    else:
        chosen = (default_layer(kind, info),) if layers is None or kind == "attention" else layers
    return [TokenSet(kind, _from_start(layer, info), grid) for layer in chosen]


def _from_start(layer: int, info: BackboneInfo) -> int:
    """``layer`` counted from 1, where a negative one counts from the end."""
    counted = info.depth + 1 + layer if layer < 0 else layer
    if not 1 <= counted <= info.depth:
        raise OptionError(
            f"{info.name} has no layer {layer}; its layers are 1 to {info.depth}, or -{info.depth} to -1 from the end"
        )
    return counted


def _check(token_set: TokenSet, info: BackboneInfo) -> None:
    """Raises OptionError where the backbone cannot give the token set."""
    layer, kind = token_set.layer, token_set.kind
    if kind == "cls" and layer not in info.summary_layers:
        have = ", ".join(str(item) for item in info.summary_layers) or "none"
        raise OptionError(
            f"{info.name} has no cls at layer {layer}: its cls is an {info.summary}, which only layer {have} has;"
            " ask for patch there"
        )
    if kind == "attention" and not info.attention_heads:
        raise OptionError(f"{info.name} gives no attention: it has no class token; leave attention out of the tokens")
    if kind == "attention" and layer != info.depth:
        raise OptionError(f"{token_set} asks for attention of layer {layer}; only the last block, {info.depth}, has it")
    if kind == "cut" and not info.has_tail:
        raise OptionError(
            f"{info.name} has no cut tokens: no token sequence runs through its layers; choose a vision transformer"
        )
    if kind == "cut" and layer == info.depth:
        raise OptionError(f"{token_set} leaves no block after it; give a layer from 1 to {info.depth - 1}")
    if token_set.grid is not None and token_set.grid > min(info.grids[layer - 1]):
        height, width = info.grids[layer - 1]
        raise OptionError(
            f"{token_set} pools to {token_set.grid} x {token_set.grid}, but {info.name} at image size"
            f" {info.image_size} has only {height} x {width} patches there; give a smaller grid or a larger image size"
        )


def _compute(output: BackboneOutput, token_set: TokenSet, info: BackboneInfo) -> Tensor:
    if token_set.kind == "attention":
        return _present(output.attention, token_set)
    layer = output.layers.get(token_set.layer)
    if layer is None:
        raise OptionError(f"{token_set} needs layer {token_set.layer}, which the forward pass was not asked for")
    if token_set.kind == "cls":
        return _present(layer.summary, token_set)
    if token_set.kind == "cut":
        return _present(layer.sequence, token_set)
    if token_set.grid is None:
        return layer.patches
    patches = layer.patches.float().transpose(1, 2)
    places = patches.reshape(*patches.shape[:2], *info.grids[token_set.layer - 1])
    return F.adaptive_avg_pool2d(places, token_set.grid).flatten(2).transpose(1, 2)


def _present(value: Tensor | None, token_set: TokenSet) -> Tensor:
    if value is None:
        raise OptionError(f"{token_set} is not among what the forward pass gave; ask for it there, or leave it out")
    return value

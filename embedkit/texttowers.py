"""Owns texts as vectors by the text tower of an open_clip model whose image tower is the backbone; searches nothing.

Both towers come from the same weights. That the image tower is the one which made a cache is not taken on trust: its
weights, under timm's names, must have the digest that the recipe tells. CLIP compares a text's vector t with W v, of a
class token v and the projection W that follows it (Radford et al. 2021, arXiv 2103.00020); a cache holds v, so that the
text is given as W transposed times t, for (W v) . t = v . (W^T t).
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embedkit.backbones import digest_weights
from embedkit.errors import SearchError
from embedkit.recipe import Recipe

__all__ = ["embed_paired_texts"]

_FAILURES = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)


def embed_paired_texts(
    texts: Sequence[str], model: str, weights: str | Path, *, recipe: Recipe, embedding: str
) -> NDArray[np.float32]:
    """Vectors of texts in the space of a backbone's class tokens of the last layer, [texts dim].

    Args:
        texts: One or more.
        model: As open_clip names it: ``ViT-B-16``.
        weights: Of both towers: a file (safetensors or a torch state dict), or the tag of weights that open_clip
            fetches from the hub: ``openai``.
        recipe: Of the cache; its backbone must be the model's image tower, with these weights.
        embedding: Of the index; must be the mean class token of the last layer, which the towers were trained on.

    Raises:
        SearchError: open_clip is not installed, does not know the model, or cannot load the weights; its image tower is
            another than the backbone, or does not end in a projection of the class token; another ``embedding``.
        BackboneError: the image tower's tensors do not fit the backbone.
    """
    clip = _import_open_clip()
    towers = _load_towers(clip, model, str(weights))
    digest = digest_weights(recipe.backbone, towers.state_dict(), source=f"{model} ({weights})")
    if digest != recipe.weights:
        raise SearchError(
            f"the image tower of {model} ({weights}) has weights {digest[:15]}, but the index was made by"
            f" {recipe.backbone} with weights {recipe.weights[:15]}, so that texts and cases share no space; give the"
            " weights that the backbone came from"
        )
    projection, depth = _read_projection(towers, model)
    if embedding != f"mean:cls:{depth}":
        raise SearchError(
            f"the index holds {embedding}, but {model} learned to match texts with the class token of layer {depth};"
            f" build one of that (embedkit index --embedding mean:cls:{depth} --whiten 0)"
        )
    try:
        with torch.inference_mode():
            found = towers.encode_text(clip.get_tokenizer(model)(list(texts)), normalize=True)
    except _FAILURES as error:
        raise SearchError(f"the text tower of {model} cannot read texts: {_first_line(error)}") from error
    vectors: NDArray[np.float32] = (found.float() @ projection.float()).numpy()
    return vectors


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise SearchError(
            f"a text tower needs open_clip, which cannot be imported ({error}); pip install 'embedkit[clip]', or give"
            " the vectors of the texts as a file (--text-vectors)"
        ) from error
    return open_clip


def _load_towers(clip: Any, model: str, weights: str) -> Any:
    """Both towers, on the CPU in float32; a torch file that would run code is refused."""
    known = clip.list_models()
    if model not in known:
        near = difflib.get_close_matches(model, known, n=4, cutoff=0.3)
        raise SearchError(f"open_clip has no model {model!r}; nearest: {', '.join(near) or ', '.join(known[:4])}")
    tags = clip.list_pretrained_tags_by_model(model)
    if not Path(weights).is_file() and weights not in tags:
        raise SearchError(
            f"{weights} is no file and no tag of {model}'s weights; give a file, or one of {', '.join(tags) or 'none'}"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "QuickGELU mismatch")  # the model's activation is not that of its weights
            return clip.create_model(model, pretrained=weights, weights_only=True, pretrained_text=False).eval()
    except Exception as error:  # the hub's client and torch.load have exception classes of their own
        raise SearchError(
            f"weights {weights} of {model} cannot be loaded: {_first_line(error)}; give a local file of them"
            " (--text-weights FILE), safetensors or a torch state dict"
        ) from error


def _read_projection(towers: Any, model: str) -> tuple[torch.Tensor, int]:
    """What follows the class token in the image tower, [out dim], and the tower's depth in layers."""
    visual = towers.visual
    trunk = getattr(visual, "trunk", None)
    if trunk is None and getattr(visual, "pool_type", "") == "tok" and isinstance(visual.proj, torch.Tensor):
        return visual.proj.detach().T, len(visual.transformer.resblocks)
    head = getattr(getattr(visual, "head", None), "proj", None)
    if trunk is not None and trunk.global_pool == "token" and isinstance(head, torch.nn.Linear) and head.bias is None:
        return head.weight.detach(), len(trunk.blocks)
    raise SearchError(
        f"the image tower of {model} does not end in a projection of its class token, so that no token of a cache lies"
        " in the space of its texts; take a model of the CLIP kind, such as ViT-B-16"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

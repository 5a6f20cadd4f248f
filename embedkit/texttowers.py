"""Owns texts as vectors by the text tower of an open_clip model whose image tower is the backbone; searches nothing.

Both towers come from the same weights. That the image tower is the one which made a cache is not taken on trust: its
weights, under timm's names, must have the digest that the recipe tells. CLIP compares a text's vector t with W v, of a
class token v and the projection W that follows it, by their cosine (Radford et al. 2021, arXiv 2103.00020); a cache
holds v, so that W is given beside t.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embedkit.backbones import digest_weights
from embedkit.errors import BackboneError, SearchError
from embedkit.recipe import Recipe
from embedkit.scattering import SCATTERING
from embedkit.weights import UNSAFE, UnsafeWeights, fetch_hub_file, is_safetensors

__all__ = ["PairedTexts", "embed_paired_texts", "require_learned"]

_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_SHOWN = 200
_FAILURES = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True, eq=False)
class PairedTexts:
    """Texts in the space that both towers share.

    Attributes:
        vectors: float32 [texts out], of length 1.
        projection: float32 [out dim], of the backbone's class tokens into that space.
    """

    vectors: NDArray[np.float32]
    projection: NDArray[np.float32]


def embed_paired_texts(
    texts: Sequence[str], model: str, weights: str | Path, *, recipe: Recipe, embedding: str
) -> PairedTexts:
    """Vectors of texts, and the projection by which a backbone's class tokens of the last layer come to their space.

    Args:
        texts: One or more.
        model: As open_clip names it: ``ViT-B-16``.
        weights: Of both towers: a file (safetensors or a torch state dict), or the tag of weights that open_clip
            fetches from the hub: ``laion2b_s34b_b88k``.
        recipe: Of the cache; its backbone must be the model's image tower, with these weights.
        embedding: Of the index; must be the mean class token of the last layer, which the towers were trained on.

    Raises:
        SearchError: open_clip is not installed, does not know the model, or cannot load the weights; its image tower is
            another than the backbone, or does not end in a projection of the class token; another ``embedding``; a
            text that is blank or longer than the model reads.
        BackboneError: the image tower's tensors do not fit the backbone.
    """
    require_learned(recipe)
    clip = _import_open_clip()
    _require_model(clip, model)
    tokens = _read_tokens(clip, model, texts)
    _require_activation(clip, model, "quickgelu" in recipe.backbone, f"backbone {recipe.backbone} made the index")
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
            found = towers.encode_text(tokens, normalize=True)
    except _FAILURES as error:
        raise SearchError(f"the text tower of {model} cannot read texts: {_shorten(error)}") from error
    return PairedTexts(found.float().numpy(), projection.float().numpy())


def require_learned(recipe: Recipe) -> None:
    """Stops where a cache is of a backbone that no text tower was trained with.

    Raises:
        SearchError: its backbone is the built-in one.
    """
    if recipe.backbone == SCATTERING:
        raise SearchError(
            f"the index was made by {SCATTERING}, which learned nothing and so shares no space with texts; build one"
            " from a cache of an image tower of the CLIP kind (embedkit extract --backbone"
            " vit_base_patch16_clip_224.laion2b)"
        )


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise SearchError(
            f"a text tower needs open_clip, which cannot be imported ({error}); pip install 'embedkit[clip]', or give"
            " the vectors of the texts as a file (--text-vectors)"
        ) from error
    return open_clip


def _require_model(clip: Any, model: str) -> None:
    known = clip.list_models()
    if model not in known:
        near = difflib.get_close_matches(model, known, n=4, cutoff=0.3) or known[:4]
        raise SearchError(f"open_clip has no model {model!r}; nearest: {', '.join(near)}")
    reads = clip.get_model_config(model).get("text_cfg", {})
    if foreign := reads.get("hf_tokenizer_name") or reads.get("hf_model_name"):
        raise SearchError(
            f"{model} reads texts by {foreign} of Hugging Face, which embedkit does not load; take a model with"
            " open_clip's own tokenizer, such as ViT-B-16, or give the vectors of the texts as a file (--text-vectors)"
        )


def _read_tokens(clip: Any, model: str, texts: Sequence[str]) -> torch.Tensor:
    """Tokens of the texts, int64 [texts context]; a text that open_clip would cut is refused."""
    if blank := [text for text in texts if not text.strip()]:
        raise SearchError(f"a text is blank ({blank[0]!r}), which says nothing to look for; leave it out")
    tokenizer = clip.get_tokenizer(model)
    context = int(tokenizer.context_length)
    tokens: torch.Tensor = tokenizer(list(texts), context_length=context + 1)
    for text, last in zip(texts, tokens[:, -1].tolist(), strict=True):
        if last:  # what a shorter text leaves is 0
            raise SearchError(
                f"text {text[:_SHOWN]!r} is longer than the {context} tokens that {model} reads, start and end among"
                " them; shorten it"
            )
    return tokens[:, :context]


def _load_towers(clip: Any, model: str, weights: str) -> Any:
    """Both towers, on the CPU in float32; a torch file that would run code is refused."""
    file = Path(weights) if Path(weights).is_file() else _fetch_weights(clip, model, weights)
    if file.suffix != ".safetensors" and is_safetensors(file):
        raise SearchError(f"weights file {file} is safetensors, which open_clip tells by name; end it in .safetensors")
    place = str(file.absolute())  # open_clip would take the bare name of a file for a tag
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'torch.load' received a zip file", UserWarning)  # TorchScript is refused
            return clip.create_model(model, pretrained=place, weights_only=True, pretrained_text=False).eval()
    except UnsafeWeights as error:
        raise SearchError(f"weights file {file} {UNSAFE}") from error
    except Exception as error:  # open_clip and torch.load raise classes of their own
        if "TorchScript" in str(error):
            raise SearchError(f"weights file {file} holds a program (TorchScript): it {UNSAFE}") from error
        raise SearchError(
            f"weights {weights} of {model} cannot be loaded: {_shorten(error)}; give those of both towers of {model}"
            " (--text-weights FILE), safetensors or a torch state dict"
        ) from error


def _fetch_weights(clip: Any, model: str, tag: str) -> Path:
    """The file of published weights, from the local cache of the hub or from the hub."""
    tags = clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        raise SearchError(
            f"{tag} is no file and no tag of {model}'s weights; give a file{', or one of ' * bool(tags)}"
            f"{', '.join(tags)}"
        )
    published = clip.get_pretrained_cfg(model, tag)
    _require_activation(clip, model, published.get("quick_gelu", False), f"weights {tag} were trained")
    owner, _, rest = published.get("hf_hub", "").partition("/")
    name, _, file = rest.partition("/")
    try:
        return fetch_hub_file(f"{owner}/{name}", (file,) if file else _FILES)
    except BackboneError as error:
        reason = _shorten(error.__cause__ or error)
        raise SearchError(
            f"weights {tag} of {model} are not in the local Hugging Face cache and cannot be fetched ({reason}); give a"
            " local copy (--text-weights FILE), or set HF_HOME to a cache that holds them"
        ) from error


def _require_activation(clip: Any, model: str, quick: bool, whose: str) -> None:
    """Both activations run with any weights, but one gives what the weights were not trained for."""
    if quick != clip.get_model_config(model).get("quick_gelu", False):
        raise SearchError(
            f"{whose} with{'' if quick else 'out'} QuickGELU, unlike {model}; name the open_clip model that"
            f" {'has it (-quickgelu)' if quick else 'lacks it (without -quickgelu)'}"
        )


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


def _shorten(error: BaseException) -> str:
    return " ".join(str(error).split())[:_SHOWN] or type(error).__name__

"""Owns loading a backbone by name, with weights from the hub, a file or none; knows neither slices nor caches."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from embedkit.errors import BackboneError
from embedkit.featuremaps import FeatureMapBackbone
from embedkit.features import DEFAULT_BACKBONE, Backbone, BackboneInfo, BackboneOutput, LayerTokens
from embedkit.scattering import SCATTERING, ScatteringBackbone
from embedkit.vit import VitBackbone
from embedkit.weights import digest_state, fetch_hub_file, fit_weights, read_weights

__all__ = [
    "Backbone",
    "BackboneInfo",
    "BackboneNote",
    "BackboneOutput",
    "LayerTokens",
    "compile_backbone",
    "digest_weights",
    "list_backbones",
    "load_backbone",
    "require_backbone",
    "suggest_backbones",
]

_HUB = "hf-hub:"

_MOST_PIXELS = 4096


@dataclass(frozen=True)
class BackboneNote:
    """One recommended backbone.

    Attributes:
        name: For `load_backbone`.
        what: What it is, in a few words.
        licence: Of the weights.
        download: Whether the weights come from the hub (or a local file).
        image_size: Side in pixels that is used unless another is asked for.
    """

    name: str
    what: str
    licence: str
    download: bool
    image_size: int


_NOTES = (
    BackboneNote(SCATTERING, "fixed two-order wavelet scattering, nothing learned, quick on a CPU", "none", False, 128),
    BackboneNote(DEFAULT_BACKBONE, "DINOv2 ViT-S/14 with registers, the default", "Apache-2.0", True, 224),
    BackboneNote("vit_base_patch14_reg4_dinov2.lvd142m", "DINOv2 ViT-B/14 with registers", "Apache-2.0", True, 224),
    BackboneNote("vit_large_patch14_reg4_dinov2.lvd142m", "DINOv2 ViT-L/14 with registers", "Apache-2.0", True, 224),
    BackboneNote("vit_small_patch16_dinov3.lvd1689m", "DINOv3 ViT-S/16", "DINOv3 licence (Meta's terms)", True, 224),
    BackboneNote("vit_base_patch16_dinov3.lvd1689m", "DINOv3 ViT-B/16", "DINOv3 licence (Meta's terms)", True, 224),
    BackboneNote("vit_base_patch16_siglip_224.webli", "SigLIP ViT-B/16, no class token", "Apache-2.0", True, 224),
    BackboneNote("deit_tiny_patch16_224.fb_in1k", "DeiT-tiny on ImageNet, for trials", "Apache-2.0", True, 224),
    BackboneNote("convnext_tiny.dinov3_lvd1689m", "DINOv3 ConvNeXt-T", "DINOv3 licence (Meta's terms)", True, 224),
    BackboneNote("resnet50.a1_in1k", "ResNet-50 on ImageNet", "Apache-2.0", True, 224),
)


def list_backbones() -> tuple[BackboneNote, ...]:
    """Gives the recommended backbones, the built-in one first; any other timm model that gives tokens works too."""
    return _NOTES


def load_backbone(
    name: str,
    *,
    weights: Path | None = None,
    image_size: int | None = None,
    channels: int = 1,
    device: str | torch.device = "cpu",
) -> Backbone:
    """Gives a frozen backbone, ready to run. Weights are never replaced by others without a word.

    Args:
        name: ``embedkit/scattering``, a timm model with or without its weight tag, or ``hf-hub:OWNER/NAME``.
        weights: Local safetensors or torch state dict; None takes timm's published weights, from the local Hugging
            Face cache or the hub.
        image_size: Side of the images in pixels. None takes the one of `list_backbones`, else the model's own.
            Position embeddings are interpolated where it differs from the model's own.
        channels: Channels of the images, 1 or 3. Learned backbones read three and spread one over them; the
            scattering bank treats each on its own.
        device: Where the backbone runs.

    Raises:
        BackboneError: unknown name (lists the nearest), weights missing or not fitting, hub out of reach, an image
            size that the model cannot take, or a model that gives no tokens.
    """
    if channels not in {1, 3}:
        raise BackboneError(f"backbone {name} was asked for {channels} channels; images have 1 or 3")
    noted = next((note for note in _NOTES if name in {note.name, note.name.split(".")[0]}), None)
    size = image_size if image_size is not None else (noted.image_size if noted else None)
    if size is not None and size > _MOST_PIXELS:
        raise BackboneError(
            f"image size {size} is beyond {_MOST_PIXELS} px, the most that is taken; give a smaller one"
        )
    if name == SCATTERING:
        if weights is not None:
            raise BackboneError(f"{SCATTERING} has no learned weights, but {weights} was given; leave --weights out")
        return ScatteringBackbone(image_size=128 if size is None else size, channels=channels, device=device)
    require_backbone(name)
    source, file = (f"file {weights}", weights) if weights else (f"hub {name}", _fetch(name))
    state = read_weights(file)
    model = _create(name)
    fit_weights(model, state, ignore=_classifiers(model), source=source)
    digest = digest_state(model)  # before any resize, which may round differently from machine to machine
    size = int(model.pretrained_cfg["input_size"][-1]) if size is None else size
    _resize(model, size, name)
    model.eval().requires_grad_(False).to(device)
    return _wrap(model, name=name, weights=digest, image_size=size)


def require_backbone(name: str) -> None:
    """Raises BackboneError for an architecture or a weight tag that timm does not have; reaches for no weights."""
    if name == SCATTERING or name.startswith(_HUB):
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = suggest_backbones(name)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise BackboneError(f"unknown backbone {name!r}{hint}; `embedkit backbones` lists the recommended ones")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise BackboneError(
            f"backbone {architecture} has no weight tag {tag!r}; timm publishes: {', '.join(tags) or 'none'}"
        )


def build_frame(name: str, *, image_size: int) -> VitBackbone:
    """An untrained transformer of the shape that `load_backbone` gives, for weights that the caller has.

    Raises:
        BackboneError: unknown name, no transformer, or an image size that it cannot take.
    """
    require_backbone(name)
    model = _create(name)
    _resize(model, image_size, name)
    model.eval().requires_grad_(False)
    backbone = _wrap(model, name=name, weights="", image_size=image_size)
    if not isinstance(backbone, VitBackbone):
        raise BackboneError(f"{name} is no vision transformer; choose one")
    return backbone


def digest_weights(name: str, state: Mapping[str, torch.Tensor], *, source: str) -> str:
    """The digest that `load_backbone` would tell of a backbone with these weights; `Recipe.weights` keeps it.

    Args:
        name: A timm model.
        state: Tensors by name, timm's or those of a checkpoint that timm knows to convert; classifiers are left out.
        source: Where ``state`` comes from, for messages.

    Raises:
        BackboneError: unknown name, or tensors that do not fit.
    """
    require_backbone(name)
    if name == SCATTERING:
        raise BackboneError(f"{SCATTERING} has no learned weights, so those of {source} are not its own")
    model = _create(name)
    fit_weights(model, state, ignore=_classifiers(model), source=source)
    return digest_state(model)


def compile_backbone(backbone: Backbone) -> None:
    """Compiles the blocks of a transformer in place, at the first batch; its tokens change by rounding alone.

    One compilation serves all blocks of a backbone, so that it takes seconds and not minutes.

    Raises:
        BackboneError: the backbone has no transformer blocks.
    """
    if not isinstance(backbone, VitBackbone):
        raise BackboneError(f"{backbone.info.name} has no transformer blocks to compile; leave --compile out")
    for block in backbone.model.blocks:
        block.compile(dynamic=False)


def suggest_backbones(name: str, count: int = 4) -> list[str]:
    """Gives known names near to ``name``: first those that hold all its parts, then those spelt alike."""
    known = list(dict.fromkeys([*(note.name for note in _NOTES), *timm.list_models(), *timm.list_pretrained()]))
    parts = [part for part in re.split(r"[^a-z0-9]+", name.lower()) if part]
    holding = sorted((item for item in known if parts and all(part in item for part in parts)), key=len)
    alike = difflib.get_close_matches(name, known, n=count, cutoff=0.6)
    return list(dict.fromkeys([*holding[: count // 2], *alike, *holding]))[:count]


def _fetch(name: str) -> Path:
    """Local path of the published weights."""
    if name.startswith(_HUB):
        return fetch_hub_file(name.removeprefix(_HUB))
    published = timm.get_pretrained_cfg(name)
    if published is None or not published.hf_hub_id or published.custom_load:
        where = f" as a file ready to load (only {published.url})" if published and published.url else ""
        raise BackboneError(f"timm publishes no weights for {name}{where}; pass --weights FILE with a state dict of it")
    if published.hf_hub_filename:
        return fetch_hub_file(published.hf_hub_id, (published.hf_hub_filename,))
    return fetch_hub_file(published.hf_hub_id)


def _create(name: str) -> Any:
    """The untrained timm model in the size of its published weights, without a classifier."""
    if name.startswith(_HUB):
        folder = fetch_hub_file(name.removeprefix(_HUB), ("config.json",)).parent
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=0)
    else:
        model = timm.create_model(name, pretrained=False, num_classes=0)
    if not hasattr(model, "forward_intermediates"):
        raise BackboneError(
            f"backbone {name} ({type(model).__name__}) gives no tokens: timm has no forward_intermediates for it;"
            " choose a vision transformer, ConvNeXt or ResNet"
        )
    return model


def _classifiers(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _resize(model: Any, size: int, name: str) -> None:
    """Sets the image size, interpolating position embeddings where the model has them."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    side = int(patch if isinstance(patch, int) else patch[0]) if patch else 1
    if size < 1 or size % side:
        nearest = max(side, round(size / side) * side)
        raise BackboneError(f"image size {size} does not fit the {side} px patches of {name}; nearest: {nearest}")
    if not hasattr(model, "set_input_size"):
        return
    try:
        model.set_input_size(img_size=(size, size))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise BackboneError(f"backbone {name} cannot take image size {size}: {error}") from error


def _wrap(model: Any, *, name: str, weights: str, image_size: int) -> Backbone:
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    if isinstance(model, VisionTransformer | Eva):
        return VitBackbone(model, name=name, weights=weights, mean=mean, std=std)
    return FeatureMapBackbone(model, name=name, weights=weights, image_size=image_size, mean=mean, std=std)

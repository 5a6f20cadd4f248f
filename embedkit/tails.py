"""Owns the tail: the last blocks of a transformer, kept beside the cut tokens that enter them; knows no head or task.

``tail.safetensors`` in the folder of a cache (beside a packed file: ``NAME.tail.safetensors``) holds the weights of the
blocks after the cut and of the final norm, so that adapting them needs no model hub and no weights file.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.func import functional_call

from embedkit.errors import CacheError
from embedkit.features import Backbone
from embedkit.files import explain_os_error, write_new_file
from embedkit.recipe import Recipe, TokenKind

__all__ = ["Tail", "TailShape", "check_tail", "copy_tail", "keep_tail", "load_tail", "read_tail_shape", "tail_path"]

_FILE = "tail.safetensors"
_FORMAT = "embedkit-tail"
_VERSION = 1
_KIND: TokenKind = "cut"


@dataclass(frozen=True)
class TailShape:
    """What a head must know of a tail before it sees one.

    Attributes:
        layer: The block that the cut tokens left, counted from 1.
        depth: Blocks of the backbone; the tail has ``depth - layer``.
        dim: Width of a token.
        class_tokens: 1 where the sequence opens with a class token, else 0.
        prefix: Tokens before the patches, class token included.
        grid: Patches as (height, width).
        linears: (name, outputs, inputs) of every weight matrix of a block.
    """

    layer: int
    depth: int
    dim: int
    class_tokens: int
    prefix: int
    grid: tuple[int, int]
    linears: tuple[tuple[str, int, int], ...]

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Reads what `dataclasses.asdict` gave, after a way through JSON.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        numbers = {name: int(fields[name]) for name in ("layer", "depth", "dim", "class_tokens", "prefix")}
        height, width = fields["grid"]
        linears = tuple((str(name), int(outputs), int(inputs)) for name, outputs, inputs in fields["linears"])
        return cls(**numbers, grid=(int(height), int(width)), linears=linears)

    @property
    def blocks(self) -> int:
        """How many blocks the tail has."""
        return self.depth - self.layer


class Tail:
    """The frozen last blocks of a backbone, ready to run."""

    def __init__(self, shape: TailShape, backbone: Any) -> None:
        """Takes a `VitBackbone` of which only the blocks after ``shape.layer`` and the final norm need be there."""
        self.shape = shape
        self._backbone = backbone
        self._moved: dict[torch.device, Any] = {}

    def run(self, sequence: Tensor, updates: Sequence[Mapping[str, Tensor]] = ()) -> tuple[Tensor, Tensor]:
        """Runs the blocks on tokens that entered them.

        Args:
            sequence: [batch tokens dim], as the token set ``cut`` has them.
            updates: For each of the last ``len(updates)`` blocks: name of a weight matrix to what is added to it.

        Returns:
            The summary (the class token, or what the backbone has in its place) [batch dim] and the patch tokens
            [batch patches dim], both after the final norm and of the dtype of ``sequence``.
        """
        backbone = self._on(sequence.device)
        _choose_attention(backbone.model, sequence.device)
        tokens = sequence.to(next(backbone.model.parameters()).dtype)
        plain = self.shape.depth - len(updates)
        for number in range(self.shape.layer, self.shape.depth):
            block, rope = backbone.model.blocks[number], backbone._rope(number)
            changed = _add(block, updates[number - plain]) if number >= plain else {}
            tokens = functional_call(block, changed, (tokens,), {} if rope is None else {"rope": rope})
        last = backbone._split(tokens, self.shape.depth)
        return last.summary.to(sequence.dtype), last.patches.to(sequence.dtype)

    def _on(self, device: torch.device) -> Any:
        if next(self._backbone.model.parameters()).device == device:
            return self._backbone
        if device not in self._moved:
            moved = copy.copy(self._backbone)
            moved.model = copy.deepcopy(self._backbone.model).to(device)
            self._moved[device] = moved
        return self._moved[device]


def _choose_attention(model: Any, device: torch.device) -> None:
    """Fused attention, but not on the way back in half precision on a CPU, where torch 2.14 is ten times slower."""
    slow = device.type == "cpu" and torch.is_grad_enabled() and torch.is_autocast_enabled(device.type)
    for block in model.blocks:
        if hasattr(getattr(block, "attn", None), "fused_attn"):
            block.attn.fused_attn = not slow


def _add(block: nn.Module, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: block.get_parameter(name) + change for name, change in update.items()}


def tail_path(cache: Path) -> Path:
    """Where the tail of a cache, folder or packed file, lies."""
    return cache / _FILE if cache.is_dir() else cache.with_name(f"{cache.name}.{_FILE}")


def keep_tail(cache: Path, backbone: Backbone, recipe: Recipe) -> None:
    """Writes the tail of a cache that keeps cut tokens, unless it is there; other caches have none.

    Raises:
        CacheError: the file system refuses, or the tail that is there is of another recipe.
    """
    layers = [found.layer for found in recipe.parsed_token_sets() if found.kind == _KIND]
    if not layers:
        return
    path = tail_path(cache)
    if path.exists():
        _read_header(path, recipe.fingerprint)
        return
    layer, model = min(layers), getattr(backbone, "model")  # noqa: B009 - of the protocol, only transformers have one
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in _own_state(model, layer).items()}
    header = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "fingerprint": recipe.fingerprint,
        "backbone": recipe.backbone,
        "image_size": recipe.image_size,
        "sha256": _digest(tensors),
        "shape": asdict(_shape_of(backbone, layer)),
    }
    try:
        write_new_file(path, safetensors.torch.save(tensors, {_FORMAT: json.dumps(header)}))
    except FileExistsError:
        _read_header(path, recipe.fingerprint)  # another writer was first
    except OSError as error:
        raise CacheError(f"cannot keep the tail: {explain_os_error(error, path)}") from error


def copy_tail(cache: Path, out: Path) -> None:
    """Puts the tail of a cache, where it has one, beside its copy ``out``.

    Raises:
        CacheError: something else lies there, or the file system refuses.
    """
    source, target = tail_path(cache), tail_path(out)
    try:
        if not source.exists():
            return
        data = source.read_bytes()
        if not (target.exists() and target.read_bytes() == data):  # else left there by a packing that was killed
            write_new_file(target, data)
    except OSError as error:
        raise CacheError(f"cannot copy the tail: {explain_os_error(error, target)}") from error


def check_tail(cache: Path, fingerprint: str) -> None:
    """Checks every byte of the tail of a cache, where it has one.

    Raises:
        CacheError: it is damaged or of another recipe.
    """
    if (path := tail_path(cache)).exists():
        _read(path, fingerprint)


def read_tail_shape(cache: Path, fingerprint: str) -> TailShape:
    """The shape of a cache's tail, from its header alone.

    Raises:
        CacheError: no tail there, one of another recipe, or damaged.
    """
    return TailShape.from_fields(_read_header(tail_path(cache), fingerprint)["shape"])


def load_tail(cache: Path, fingerprint: str) -> Tail:
    """The tail of a cache, loaded once per process.

    Raises:
        CacheError: no tail there, one of another recipe, or damaged.
    """
    path = tail_path(cache)
    _read_header(path, fingerprint)
    return _load(path.resolve(), fingerprint, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _load(path: Path, fingerprint: str, _changed_ns: int) -> Tail:
    from embedkit.backbones import build_frame

    header, tensors = _read(path, fingerprint)
    shape = TailShape.from_fields(header["shape"])
    backbone = build_frame(str(header["backbone"]), image_size=int(header["image_size"]))
    model = backbone.model
    for number in range(shape.layer):
        model.blocks[number] = nn.Identity()
    expected = _own_state(model, shape.layer)
    sizes = {name: value.shape for name, value in tensors.items()}
    if sizes != {name: value.shape for name, value in expected.items()}:
        raise CacheError(
            f"{path} does not fit {header['backbone']} as this timm builds it; install the timm that made it"
        )
    model.load_state_dict(tensors, strict=False)
    return Tail(shape, backbone)


def _read(path: Path, fingerprint: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and weights, checked against their checksum."""
    header = _read_header(path, fingerprint)
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path} is damaged: {str(error).splitlines()[0]}; {_WAY_OUT}") from error
    if _digest(tensors) != header["sha256"]:
        raise CacheError(f"{path} is damaged: its weights are not what was written; {_WAY_OUT}")
    return header, tensors


_WAY_OUT = "delete it and run the same embedkit extract again, which repeats no finished case"


def _read_header(path: Path, fingerprint: str) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})[_FORMAT])
        if header["format"] != _FORMAT:
            raise ValueError(f"its format is {header['format']!r}")
        newer = header["format_version"] > _VERSION
        TailShape.from_fields(header["shape"])
        found = header["fingerprint"], header["sha256"], header["backbone"], header["image_size"]
    except FileNotFoundError as error:
        raise CacheError(
            f"cut tokens are there, but not the blocks that they enter: {path} is missing; run the same embedkit"
            " extract again, which adds it and repeats no finished case, or copy it from the cache that was packed"
        ) from error
    except OSError as error:
        raise CacheError(f"cannot read the tail: {explain_os_error(error, path)}") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is damaged ({error}); {_WAY_OUT}") from error
    if newer:
        raise CacheError(
            f"{path} has format version {header['format_version']}, newer than {_VERSION}: upgrade embedkit"
        )
    if found[0] != fingerprint:
        raise CacheError(f"{path} is of recipe {found[0]}, this cache has {fingerprint}; {_WAY_OUT}")
    return header


def _shape_of(backbone: Backbone, layer: int) -> TailShape:
    info, block = backbone.info, getattr(backbone, "model").blocks[layer]  # noqa: B009
    return TailShape(
        layer=layer,
        depth=info.depth,
        dim=info.dims[-1],
        class_tokens=info.class_tokens,
        prefix=info.class_tokens + info.register_tokens,
        grid=info.grids[-1],
        linears=tuple((name, *map(int, value.shape)) for name, value in block.named_parameters() if value.ndim == 2),
    )


def _own_state(model: nn.Module, layer: int) -> dict[str, Tensor]:
    """Of a model's state dict, what runs after block ``layer``; position embeddings come before all blocks."""
    prefixes = ("norm.", "fc_norm.", "attn_pool.", "rope.")
    found = {}
    for name, value in model.state_dict().items():
        number = name.split(".")[1] if name.startswith("blocks.") else ""
        if (number.isdigit() and int(number) >= layer) or name.startswith(prefixes):
            found[name] = value
    return found


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

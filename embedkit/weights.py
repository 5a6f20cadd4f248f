"""Owns learned weights: fetching from the hub, reading from a file, fitting into a model, and their digest; knows no
architecture."""

from __future__ import annotations

import hashlib
import pickle
import struct
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from embedkit.errors import BackboneError

__all__ = ["digest_state", "fetch_hub_file", "fit_weights", "is_safetensors", "read_weights"]

HUB_TIMEOUT_S = 10.0
UNSAFE = (
    "is no plain table of tensors, and reading more could run code, so it is refused; save model.state_dict() with"
    " torch.save or as safetensors"
)
UnsafeWeights = pickle.UnpicklingError
"""What torch raises instead of running the code of a weights file; all that is used of pickle."""
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_WRAPPERS = ("state_dict", "model", "model_state_dict", "teacher", "module")
_PREFIXES = ("_orig_mod.", "module.", "_orig_mod.", "model.", "backbone.")
_UNUSED = ".num_batches_tracked"  # a counter of batch norm that only training reads
_PATCH_KERNEL = "patch_embed.proj.weight"
_SHOWN = 5


def fetch_hub_file(repository: str, file_names: tuple[str, ...] = HUB_WEIGHTS) -> Path:
    """Gives the first of ``file_names`` that a Hugging Face repository holds, from the local cache where it is there.

    Args:
        repository: ``owner/name``, optionally followed by ``@revision``.
        file_names: In order of preference.

    Raises:
        BackboneError: not in the cache, and the hub cannot be reached or refuses.
    """
    name, _, revision = repository.partition("@")
    for file_name in file_names:
        try:
            return Path(hf_hub_download(name, file_name, revision=revision or None, local_files_only=True))
        except FileNotFoundError:
            continue
    try:
        # One request first: hf_hub_download alone tries for most of a minute before it says that there is no network.
        offered = HfApi().model_info(name, revision=revision or None, timeout=HUB_TIMEOUT_S).siblings or []
        present = [file_name for file_name in file_names if file_name in {item.rfilename for item in offered}]
        if present:
            return Path(hf_hub_download(name, present[0], revision=revision or None))
    except Exception as error:  # the hub's client changed its exception classes between versions (requests, httpx)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BackboneError(
            f"weights of {repository} are not in the local Hugging Face cache and the hub gave no answer"
            f" ({reason[0]}); pass --weights FILE with a local copy, set HF_HOME to a cache that holds it, or use"
            " --backbone embedkit/scattering, which needs no download"
        ) from error
    raise BackboneError(
        f"hub repository {repository} holds none of {', '.join(file_names)}; download its weights yourself and pass"
        " --weights FILE"
    )


def read_weights(file: Path) -> dict[str, Tensor]:
    """Reads a state dict from safetensors or from a torch file, the latter with tensors and plain values alone.

    Wrappers of training scripts (``state_dict``, ``model``, ``teacher``) and prefixes that every name shares
    (``module.``, ``backbone.``) are taken off.

    Raises:
        BackboneError: missing, damaged, or not a table of tensors; a torch file that would run code is refused.
    """
    if not file.is_file():
        raise BackboneError(f"weights file {file} does not exist; check --weights")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)  # refused or read, as it may be
            state: Any = load_file(file) if is_safetensors(file) else torch.load(file, "cpu", weights_only=True)
    except UnsafeWeights as error:
        raise BackboneError(f"weights file {file} {UNSAFE}") from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise BackboneError(
            f"weights file {file} cannot be read ({_first_line(error)}); expected safetensors or a torch state dict"
        ) from error
    while wrapper := next((name for name in _WRAPPERS if isinstance(state, dict) and _is_table(state.get(name))), None):
        state = state[wrapper]
    if not _is_table(state):
        raise BackboneError(f"weights file {file} holds no tensors by name; expected a state dict")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def fit_weights(model: nn.Module, state: Mapping[str, Tensor], *, ignore: tuple[str, ...], source: str) -> None:
    """Loads ``state`` into ``model``, which must be an exact fit but for a classifier head.

    Args:
        model: A timm model; the conversion that timm has for its published checkpoints is applied first.
        state: Tensors by name.
        ignore: Classifiers, such as ``head.fc``: what the state has of ``head`` beyond the model's own is left out.
        source: Where ``state`` comes from, for messages.

    Raises:
        BackboneError: names missing from ``state`` or unknown to the model, or tensors of another shape; lists some.
    """
    state = _convert(model, dict(state), source)
    wanted = {name: value for name, value in model.state_dict().items() if not name.endswith(_UNUSED)}
    heads = tuple(f"{name.split('.')[0]}." for name in ignore)
    state = {
        name: value
        for name, value in state.items()
        if name in wanted or not (name.startswith(heads) or name.endswith(_UNUSED))
    }
    problems = []
    if missing := sorted(wanted.keys() - state.keys()):
        problems.append(f"{len(missing)} of {len(wanted)} missing ({_some(missing)})")
    if unexpected := sorted(state.keys() - wanted.keys()):
        problems.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    shapes = [
        f"{name} {list(state[name].shape)} for {list(wanted[name].shape)}"
        for name in sorted(wanted.keys() & state.keys())
        if state[name].shape != wanted[name].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({_some(shapes)})")
    if problems:
        raise BackboneError(
            f"weights of {source} do not fit {type(model).__name__}: tensors {'; '.join(problems)};"
            " give the backbone name that the weights were made for"
        )
    model.load_state_dict(state, strict=False)


def digest_state(model: nn.Module) -> str:
    """``sha256:`` and 64 hex digits over the names, types, shapes and bytes of a model's state dict, in name order."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name.endswith(_UNUSED):
            continue
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()}"


def is_safetensors(file: Path) -> bool:
    """Whether a file is safetensors, by its name or its content: eight bytes of header length, then a JSON object."""
    if file.suffix == ".safetensors":
        return True
    with file.open("rb") as stream:
        head = stream.read(9)
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] < file.stat().st_size


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, Tensor) for item in value.values())


def _convert(model: nn.Module, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """``state`` under timm's own names, by the function that timm keeps beside the architecture for it."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        converted: dict[str, Tensor] = convert(state, model)
    except (KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        raise BackboneError(
            f"weights of {source} do not fit {type(model).__name__} ({_first_line(error)});"
            " give the backbone name that the weights were made for"
        ) from error
    kernel = state.get(_PATCH_KERNEL)
    if kernel is not None and kernel.ndim == 4:  # timm would resample it to another patch size without a word
        converted[_PATCH_KERNEL] = kernel
    return converted


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

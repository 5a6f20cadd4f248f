"""Owns the ladder of settings that advice tries, cheapest first, and what a cache lacks for more; fits nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from embedkit.bags import bag_shape
from embedkit.cache import Cache
from embedkit.plugins import choose_token_set
from embedkit.recipe import TokenSet
from embedkit.targets import TaskKind

__all__ = ["Setting", "list_settings", "list_wanting"]

_BLOCKS = (1, 2, 4)


@dataclass(frozen=True)
class Setting:
    """A head, what it reads, and those of its options that are not at their defaults."""

    head: str
    token_sets: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.head}{f' ({options})' if options else ''} on {','.join(self.token_sets)}"

    def count_numbers(self, cache: Cache) -> int:
        """Numbers per slice that it reads, which tells settings of one head apart by what they take."""
        return sum(patches * dim for patches, dim in bag_shape(cache, self.token_sets).token_sets.values())

    def list_flags(self) -> list[str]:
        """The arguments of `embedkit train` that ask for it."""
        flags = ["--head", self.head, "--tokens", ",".join(self.token_sets)]
        for name, value in self.options.items():
            flags += ["--head-option", f"{self.head}.{name}={value}"]
        return flags


def list_settings(cache: Cache, kind: TaskKind) -> tuple[Setting, ...]:
    """The settings that a cache offers for a kind of task, cheapest first.

    Both baselines on every token set; query pooling of the deepest class tokens; the grid head on every set of patch
    tokens, of one grid first the layer nearest to the depth that the head prefers, then on all layers of one grid
    together; LoRA in the last 1, 2 and 4 blocks where there are cut tokens. Of survival the heads are trunks of
    ``cox``, and there is no LoRA.
    """
    found = _group(cache)
    settings = [Setting("logistic", (name,)) for name in (*found["cls"], *found["patch"])]
    settings += [Setting("raptor", (name,)) for name in found["patch"]]
    settings += [_trunk("query", kind, found["cls"][-1:])] if found["cls"] else []
    settings += [_trunk("grid", kind, (name,)) for name in _order_layers(cache, found["patch"])]
    together: dict[int, list[str]] = {}
    for name in found["patch"]:
        together.setdefault(bag_shape(cache, [name]).token_sets[name][0], []).append(name)
    settings += [_trunk("grid", kind, names) for _, names in sorted(together.items()) if len(names) > 1]
    if found["cut"] and kind != "survival":
        tail = cache.tail_shape()
        settings += [
            Setting("tail", (found["cut"][0],), {"blocks": blocks}) for blocks in _BLOCKS if blocks <= tail.blocks
        ]
    return tuple(settings)


def list_wanting(cache: Cache, kind: TaskKind) -> tuple[str, ...]:
    """What could not be tried for want of token sets, and which extraction would give them."""
    found = _group(cache)
    said = []
    if not found["patch"]:
        said.append("heads that keep the place of a patch: no patch tokens; extract with --tokens cls,patch@4")
    elif len({TokenSet.parse(name).layer for name in found["patch"]}) < 2:
        deepest = max(2, *(TokenSet.parse(name).layer for name in cache.token_sets))
        layers = sorted({max(1, round(deepest * third / 3)) for third in (1, 2, 3)})
        said.append(
            f"other layers: patch tokens of one alone ({', '.join(found['patch'])}); extract with several, as"
            f" --tokens {','.join(['cls', *(f'patch@4:{layer}' for layer in layers)])}"
        )
    if kind == "survival":
        said.append("LoRA in the last blocks (head tail): it learns no survival")
    elif not found["cut"]:
        said.append(
            "LoRA in the last blocks (head tail): no cut tokens; extract with --cut 4, of a transformer such as"
            " vit_small_patch14_reg4_dinov2.lvd142m"
        )
    return tuple(said)


def _group(cache: Cache) -> dict[str, list[str]]:
    """Token sets by kind: the shallower layer first, of one layer the fewer numbers per slice."""
    sets = [TokenSet.parse(name) for name in cache.token_sets]
    sizes = {str(each): bag_shape(cache, [str(each)]).token_sets[str(each)][0] for each in sets}
    ordered = sorted(sets, key=lambda each: (sizes[str(each)], each.layer))
    return {kind: [str(each) for each in ordered if each.kind == kind] for kind in ("cls", "patch", "cut")}


def _order_layers(cache: Cache, patch: Sequence[str]) -> list[str]:
    """Patch sets by size, of one size the layer first that is nearest to the one that the grid head prefers."""
    if not patch:
        return []
    sizes = {name: bag_shape(cache, [name]).token_sets[name] for name in patch}
    preferred = choose_token_set("grid", [TokenSet.parse(name) for name in cache.token_sets]).layer
    return sorted(patch, key=lambda name: (sizes[name], abs(TokenSet.parse(name).layer - preferred)))


def _trunk(head: str, kind: TaskKind, token_sets: Sequence[str]) -> Setting:
    """A head by gradient, of survival as the trunk of ``cox``."""
    sets = tuple(token_sets)
    return Setting("cox", sets, {"trunk": head}) if kind == "survival" else Setting(head, sets)

"""Owns the recipe (all that determines the cached numbers) and the names of token sets; knows no image and no model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

from embedkit.errors import OptionError, RecipeError

__all__ = ["Recipe", "TokenKind", "TokenSet", "require_same_recipe"]

TokenKind = Literal["cls", "patch", "attention", "cut"]

_AUGMENT = re.compile(r"(?P<copies>[1-9]\d?)(?P<flip>:flip)?")
_TOKEN_SET = re.compile(r"(?P<kind>cls|patch|attention|cut)(?:@(?P<grid>[1-9]\d{0,2}))?:(?P<layer>\d{1,3})")


@dataclass(frozen=True, order=True)
class TokenSet:
    """Names one token set of a cache, for example ``patch@4:8``.

    Attributes:
        kind: ``cls`` (class token or the backbone's summary), ``patch``, ``attention`` (class token to patches) or
            ``cut`` (every token that leaves block ``layer`` and enters the blocks after it).
        layer: Counted from 1; the tokens are those that leave block ``layer``. The last layer is taken after the
            backbone's final norm, every other one is the raw residual stream.
        grid: Only for ``patch``: patches average-pooled to ``grid x grid`` places; None keeps the full grid.
    """

    kind: TokenKind
    layer: int
    grid: int | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and self.kind != "patch":
            raise OptionError(
                f"token set {self} has a grid, but only patch tokens are pooled to one; write {self.kind}"
            )

    def __str__(self) -> str:
        grid = "" if self.grid is None else f"@{self.grid}"
        return f"{self.kind}{grid}:{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads ``KIND[@GRID]:LAYER``.

        Raises:
            OptionError: ``text`` does not have that form.
        """
        match = _TOKEN_SET.fullmatch(text)
        if match is None:
            raise OptionError(
                f"token set {text!r} is not of the form KIND[@GRID]:LAYER with KIND one of cls, patch, attention, cut;"
                " for example cls:12 or patch@4:8"
            )
        grid = match["grid"]
        return cls(cast(TokenKind, match["kind"]), int(match["layer"]), None if grid is None else int(grid))


@dataclass(frozen=True)
class Recipe:
    """All that determines the numbers of a cache; two caches with equal recipes are interchangeable.

    Attributes:
        backbone: Name as given to ``load_backbone``.
        weights: ``sha256:...`` over the loaded state dict, or ``builtin:N`` for a backbone without learned weights.
        token_sets: Names of the token sets (see `TokenSet`), sorted and unique.
        image_size: Side in pixels of the square image that enters the backbone.
        mean: Per channel, subtracted from images in 0..1.
        std: Per channel, divides after the subtraction.
        planes: Some of axial, coronal, sagittal.
        slices: ``all``, ``every:MM`` or ``count:N``.
        windows: One grey window for all channels or one per channel, in the form that `embedkit.slices` reads.
        channels: Views that become the channels of one image; empty means one stack per view.
        fill: View that stands for an absent channel; empty means none.
        crop: ``none`` or ``foreground``.
        resize: ``pad`` (physical aspect kept) or ``stretch``.
        dtype: How tokens are stored: ``float16`` or ``int8`` (half the bytes, a scale per token and channel).
        precision: How the backbone computes: ``fp32``, ``bf16`` or ``fp16``, with ``+compile`` behind it if compiled.
        preview: Side in pixels of the grey preview kept per slice; 0 keeps none.
        augment: ``N``, or ``N:flip`` where half of them are mirrored: in the place of each case so many altered copies
            of it are kept, for training alone; empty for the cases themselves.
        version: Raised when the code changes what the numbers are.
    """

    backbone: str
    weights: str
    token_sets: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    planes: tuple[str, ...] = ("axial",)
    slices: str = "all"
    windows: tuple[str, ...] = ("percentile:0.5:99.5",)
    channels: tuple[str, ...] = ()
    fill: str = ""
    crop: str = "none"
    resize: str = "pad"
    dtype: str = "float16"
    precision: str = "fp32"
    preview: int = 64
    augment: str = ""
    version: int = 1

    def to_fields(self) -> dict[str, Any]:
        """The fields as JSON holds them; ``augment`` only where there are copies, as older recipes lack it."""
        fields = dataclasses.asdict(self)
        if not self.augment:
            del fields["augment"]
        return fields

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, ASCII. Equal recipes give equal text."""
        return json.dumps(self.to_fields(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            RecipeError: not JSON, a field missing, a field this version does not know, or a field of another type.
        """
        try:
            fields: Any = json.loads(text)
        except ValueError as error:
            raise RecipeError(f"recipe is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise RecipeError(f"recipe is a JSON {type(fields).__name__}, expected an object")
        known = {field.name: field for field in dataclasses.fields(cls)}
        if missing := sorted(known.keys() - fields.keys() - {"augment"}):
            raise RecipeError(f"recipe lacks {', '.join(missing)}; it was written by another version of embedkit")
        if unknown := sorted(fields.keys() - known.keys()):
            raise RecipeError(f"recipe has unknown {', '.join(unknown)}; a newer embedkit wrote it: upgrade embedkit")
        if fields.get("augment") and _AUGMENT.fullmatch(str(fields["augment"])) is None:
            raise RecipeError(
                f"recipe field augment is {fields['augment']!r}, expected N or N:flip with N from 1 to 99"
            )
        return cls(**{name: _checked(name, str(known[name].type), value) for name, value in fields.items()})

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def copies(self) -> int:
        """How many altered copies a cache holds of each case; 0 where it holds the case itself."""
        match = _AUGMENT.fullmatch(self.augment)
        return int(match["copies"]) if match else 0

    @property
    def flips(self) -> bool:
        """Whether half of the copies are mirrored."""
        return self.augment.endswith(":flip")

    def stored_ids(self, case_id: str) -> tuple[str, ...]:
        """Under which ids a cache holds a case: its own, or ``CASE#1``, ``CASE#2``, ... of its copies."""
        return tuple(f"{case_id}#{number + 1}" for number in range(self.copies)) or (case_id,)

    def parsed_token_sets(self) -> tuple[TokenSet, ...]:
        """The token sets as values, in the order of ``token_sets``."""
        return tuple(TokenSet.parse(text) for text in self.token_sets)

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Maps each field that differs to (value here, value in ``other``)."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


_ITEM_TYPES: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float)}


def _checked(name: str, declared: str, value: Any) -> Any:
    """``value`` as the field's declared type, lists as tuples; a value of another type raises RecipeError."""
    if declared.startswith("tuple["):
        item = _ITEM_TYPES[declared.removeprefix("tuple[").split(",")[0]]
        if isinstance(value, list) and all(isinstance(part, item) and not isinstance(part, bool) for part in value):
            return tuple(value)
    elif isinstance(value, _ITEM_TYPES[declared]) and not isinstance(value, bool):
        return value
    raise RecipeError(f"recipe field {name} is {value!r}, expected {declared}")


def require_same_recipe(found: Recipe, wanted: Recipe, *, where: str, ways_out: str) -> None:
    """Stops where the recipe found in ``where`` is not the wanted one.

    Args:
        found: The recipe of the cache, run or index at hand.
        wanted: The recipe that this call asks for.
        where: What holds ``found``, for the message: ``cache /data/lung``.
        ways_out: What the user can do, for the message.

    Raises:
        RecipeError: names every differing field and both values.
    """
    differing = found.differences(wanted)
    if differing:
        fields = "; ".join(
            f"{name} is {ours!r} there and {theirs!r} here" for name, (ours, theirs) in differing.items()
        )
        raise RecipeError(
            f"{where} has recipe {found.fingerprint} but this call asks for {wanted.fingerprint}: {fields}. {ways_out}"
        )

"""Owns the tables of a shard (stacks and slices) and what a writer hands over for one stack; knows no file.

The names of the columns are those of docs/cache-format.md. Nothing here comes from a DICOM header but geometry.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from embedkit.errors import CacheError
from embedkit.recipe import Recipe
from embedkit.spill import release_pages

__all__ = [
    "SLICE_DTYPE",
    "TEXT_COLUMNS",
    "StackTokens",
    "check_stack",
    "check_tables",
    "require_columns",
    "slice_table",
    "stack_dtype",
    "stack_table",
]

Table = NDArray[np.void]

TEXT_COLUMNS = ("case_id", "patient_id", "view", "plane", "sources", "source_digest")
_LONGEST_TEXT = 1024
_BLOCK = 1 << 18
"""About so many values are checked at a time, so that a huge stack mapped from a file is not copied into memory."""
_NUMBERS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("first_row", "<i8", ()),
    ("count", "<i4", ()),
    ("source_affine", "<f8", (4, 4)),
    ("source_shape", "<i4", (3,)),
    ("box", "<i4", (4,)),
    ("plane_shape", "<i4", (2,)),
    ("source_bytes", "<i8", ()),
    ("source_modified_ns", "<i8", ()),
)
SLICE_DTYPE = np.dtype([("index", "<i4"), ("position_mm", "<f4"), ("blank", "u1")])


@dataclass(frozen=True)
class StackTokens:
    """One stack, computed: what a writer puts into a shard.

    Attributes:
        case_id: From the manifest.
        patient_id: From the manifest.
        view: From the manifest, or the joined names of the channels.
        plane: axial, coronal or sagittal.
        sources: The views that fed the channels.
        indices: int32 [slices], index along the plane's axis of the canonical volume.
        positions_mm: float32 [slices], along that axis.
        blank: bool [slices], True where the slice shows nothing.
        plane_shape: (height, width) in voxels of the plane's image.
        box: (top, left, height, width) in voxels of the part that was resampled.
        source_shape: Shape of the source file's own array.
        source_affine: float64 [4 4], from indices of that array to RAS+ world in mm.
        source_bytes: Size of the source file or files.
        source_digest: SHA-256 over their bytes.
        tokens: Token set to float16 [slices ...]; exactly the recipe's token sets.
        preview: uint8 [slices preview preview], or None where the recipe keeps none.
        source_modified_ns: Latest change of the source files or their status, in ns since the epoch; 0 where unknown.
    """

    case_id: str
    patient_id: str
    view: str
    plane: str
    sources: tuple[str, ...]
    indices: NDArray[np.int32]
    positions_mm: NDArray[np.float32]
    blank: NDArray[np.bool_]
    plane_shape: tuple[int, int]
    box: tuple[int, int, int, int]
    source_shape: tuple[int, int, int]
    source_affine: NDArray[np.float64]
    source_bytes: int
    source_digest: str
    tokens: dict[str, NDArray[np.float16]]
    preview: NDArray[np.uint8] | None = None
    source_modified_ns: int = 0


def stack_dtype(lengths: dict[str, int]) -> np.dtype[np.void]:
    """The row type of the stack table with texts of these lengths in bytes."""
    texts = [(name, h5py.string_dtype("utf-8", max(1, lengths[name]))) for name in TEXT_COLUMNS]
    return np.dtype([*texts, *_NUMBERS])


def stack_table(stacks: Sequence[StackTokens]) -> Table:
    """The stack table of a shard that holds ``stacks`` in this order."""
    texts = {name: [_text_of(stack, name) for stack in stacks] for name in TEXT_COLUMNS}
    table = np.zeros(len(stacks), stack_dtype({name: max(map(len, column)) for name, column in texts.items()}))
    for name, column in texts.items():
        table[name] = column
    table["count"] = [len(stack.indices) for stack in stacks]
    table["first_row"] = np.cumsum(table["count"], dtype=np.int64) - table["count"]
    for name in ("source_affine", "source_shape", "box", "plane_shape", "source_bytes", "source_modified_ns"):
        table[name] = [getattr(stack, name) for stack in stacks]
    return table


def slice_table(stacks: Sequence[StackTokens]) -> Table:
    """The slice table of a shard that holds ``stacks`` in this order."""
    table = np.zeros(sum(len(stack.indices) for stack in stacks), SLICE_DTYPE)
    table["index"] = np.concatenate([stack.indices for stack in stacks])
    table["position_mm"] = np.concatenate([stack.positions_mm for stack in stacks])
    table["blank"] = np.concatenate([stack.blank for stack in stacks])
    return table


def _text_of(stack: StackTokens, name: str) -> bytes:
    value = getattr(stack, name)
    return (json.dumps(list(value), ensure_ascii=False) if name == "sources" else value).encode()


def check_stack(stack: StackTokens, recipe: Recipe) -> None:
    """Checks that a stack is one of this recipe's and can be stored as it is.

    Raises:
        CacheError: names the stack and what is wrong: token sets, lengths, types, text, or a token that is no number.
    """
    name = f"stack {stack.case_id}/{stack.view}/{stack.plane}"
    for column in TEXT_COLUMNS:
        text = _text_of(stack, column)
        if not 0 < len(text) <= _LONGEST_TEXT or b"\0" in text:
            raise CacheError(
                f"{name}: {column} has {len(text)} bytes or a NUL, expected 1 to {_LONGEST_TEXT} bytes of plain text"
            )
    count = len(stack.indices)
    if count == 0:
        raise CacheError(f"{name} has no slices; record it as failed instead of storing it")
    arrays: dict[str, tuple[Any, str]] = {name: (array, "float16") for name, array in stack.tokens.items()}
    arrays |= {"indices": (stack.indices, "int32"), "positions_mm": (stack.positions_mm, "float32")}
    arrays |= {"blank": (stack.blank, "bool")}
    if sorted(stack.tokens) != sorted(recipe.token_sets):
        raise CacheError(
            f"{name} has token sets {', '.join(sorted(stack.tokens)) or 'none'},"
            f" its recipe asks for {', '.join(sorted(recipe.token_sets))}"
        )
    if (stack.preview is not None) != (recipe.preview > 0):
        raise CacheError(f"{name} and its recipe (preview {recipe.preview}) disagree on whether to keep previews")
    if stack.preview is not None:
        arrays["preview"] = (stack.preview, "uint8")
        if stack.preview.shape[1:] != (recipe.preview, recipe.preview):
            raise CacheError(f"{name}: previews have shape {stack.preview.shape[1:]}, expected side {recipe.preview}")
    for part, (array, dtype) in arrays.items():
        if array.dtype != dtype or len(array) != count or 0 in array.shape:
            raise CacheError(
                f"{name}: {part} is {array.dtype} {list(array.shape)}, expected {dtype} with {count} slices"
            )
    for part, tokens in stack.tokens.items():
        if not _is_finite(tokens):
            raise CacheError(
                f"{name}: {part} holds NaN or a value beyond float16 (65504); compute in --precision fp32,"
                " choose another layer, or leave the case out"
            )
    check_tables(stack_table([stack]), slice_table([stack]), what=name)


def _is_finite(tokens: NDArray[np.float16]) -> bool:
    """No NaN and no infinity: no exponent of all ones (tested on the bits, which is faster than on float16)."""
    step = max(1, _BLOCK // math.prod(tokens.shape[1:]))
    for start in range(0, len(tokens), step):
        bits = np.ascontiguousarray(tokens[start : start + step]).view(np.uint16)
        release_pages(tokens)
        if ((bits & 0x7C00) == 0x7C00).any():
            return False
    return True


def require_columns(found: np.dtype[np.void], wanted: np.dtype[np.void], *, what: str) -> None:
    """Checks the row type of a table from a file; columns beyond the wanted ones are allowed.

    Raises:
        CacheError: a column is missing or of another type (texts may have any length).
    """
    for name in wanted.names or ():
        if name not in (found.names or ()):
            raise CacheError(f"{what} lacks the column {name}")
        has, wants = found[name], wanted[name]
        if not (has.kind == "S" and has.itemsize > 0 if wants.kind == "S" else has == wants):
            raise CacheError(f"{what} has {name} of type {has}, expected {wants}")


def check_tables(stacks: Table, slices: Table, *, what: str) -> None:
    """Checks that the tables of a shard make sense together: stacks tile the slices, texts are texts.

    Raises:
        CacheError: they do not.
    """
    for name in TEXT_COLUMNS:
        texts = stacks[name].tolist()
        try:
            b"\n".join(texts).decode()
        except UnicodeDecodeError as error:
            raise CacheError(f"{what}: {name} is not UTF-8") from error
        if b"" in texts:
            raise CacheError(f"{what}: a stack has no {name}")
    counts = stacks["count"].astype(np.int64)
    if len(counts) == 0 or counts.min() < 1 or counts.sum() != len(slices):
        raise CacheError(f"{what}: its stacks do not add up to its {len(slices)} slices")
    if not np.array_equal(stacks["first_row"], np.cumsum(counts) - counts):
        raise CacheError(f"{what}: its stacks are not one after the other")
    numbers_are_good = (
        np.isfinite(stacks["source_affine"]).all()
        and np.isfinite(slices["position_mm"]).all()
        and (slices["blank"] <= 1).all()
        and all((stacks[name] > 0).all() for name in ("source_shape", "plane_shape", "source_bytes"))
        and (stacks["box"][:, 2:] > 0).all()
    )
    if not numbers_are_good:
        raise CacheError(f"{what}: a geometry, position, size or blank flag in its tables is out of range")

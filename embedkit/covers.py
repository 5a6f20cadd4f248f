"""Owns masks of images on the token grid: which share of each patch of each slice a case's mask covers.

Masks are no part of a cache: they are read from a manifest when a head is trained, resampled once to the geometry that
the cache keeps of every stack, and handed out beside the tokens. Knows no head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedkit.alteration import draw_copies, move_slices
from embedkit.bags import Bag, BagShape, list_views
from embedkit.cache import Cache, StackRecord
from embedkit.errors import ManifestError, VolumeError
from embedkit.manifest import read_manifest
from embedkit.orientation import measure_spacing, to_canonical
from embedkit.patches import measure_patch_cover
from embedkit.recipe import Recipe
from embedkit.storage import TokenStore
from embedkit.targets import list_some
from embedkit.volumes import Volume, read_mask

__all__ = ["CoveredStore", "Covers", "Masks", "read_stack_mask"]

Grid = tuple[int, int]

_PARTS = 8
"""Of a patch's side, in which a mask is moved for a copy."""


class Masks:
    """The masks that a manifest names, for the cases of a cache.

    Attributes:
        paths: By case and view, the file.
        strangers: Cases that have a mask but are not in the cache, sorted.
    """

    def __init__(self, cache: Cache, manifest: pl.DataFrame | Path | str) -> None:
        """Takes a manifest as `read_manifest` takes it; opens no mask.

        Raises:
            ManifestError: the manifest cannot be read, no row has a mask, or none of the cases is in the cache.
        """
        table = read_manifest(manifest)
        where = "the manifest" if isinstance(manifest, pl.DataFrame) else str(manifest)
        masked = table.drop_nulls("mask")
        if masked.is_empty():
            raise ManifestError(
                f"{where}: no row has a mask, expected the file of one in the column mask; fill it in for the cases"
                " that have one, or leave --masks away"
            )
        known = set(cache.stacks["case_id"])
        self.cache = cache
        self.paths = {(case, view): Path(path) for case, view, path in masked["case_id", "view", "mask"].iter_rows()}
        self.strangers = tuple(sorted({case for case, _ in self.paths} - known))
        if not known & {case for case, _ in self.paths}:
            raise ManifestError(
                f"{where}: {len(self.strangers)} cases have a mask{list_some(self.strangers)}, but cache {cache.path}"
                f" has none of them (its cases:{list_some(sorted(known))}); give the manifest that made it"
            )

    def find(self, record: StackRecord) -> Path | None:
        """The mask of a stack: that of its view, or of the first of its channels that has one."""
        found = (self.paths.get((record.case_id, view)) for view in record.sources)
        return next((path for path in found if path is not None), None)

    def stacks(self, case_ids: Sequence[str]) -> Iterator[tuple[StackRecord, int, Path]]:
        """Record, number and mask of every stack of these cases that has a mask."""
        wanted = self.cache.stacks.filter(pl.col("case_id").is_in(list(case_ids)))
        for stack in wanted["stack"]:
            record = self.cache.record(stack)
            if (path := self.find(record)) is not None:
                yield record, stack, path

    def measure_ml(self, case_ids: Sequence[str]) -> pl.DataFrame:
        """``case_id`` and ``mask_ml``, the volume of each case's mask in millilitres, that of its first stack."""
        found: dict[str, float] = {}
        for record, _, path in self.stacks(case_ids):
            if record.case_id not in found:
                voxel_mm3 = abs(float(np.linalg.det(record.source_affine[:3, :3])))
                found[record.case_id] = float((read_stack_mask(path, record) > 0).sum()) * voxel_mm3 / 1000
        return pl.DataFrame({"case_id": list(found), "mask_ml": list(found.values())})

    def measure(
        self, case_ids: Sequence[str], grids: Sequence[Grid], *, copies: Recipe | None = None
    ) -> dict[Grid, Covers]:
        """Reads the masks of some cases once and measures them on these grids.

        Args:
            case_ids: Of the cases.
            grids: In patches.
            copies: Recipe of altered copies of the cases, whose masks are those of the cases moved as they are.

        Raises:
            VolumeError: a mask cannot be read, or does not belong to its image.
        """
        views = list_views(self.cache)
        parts: dict[Grid, dict[tuple[str, int], Tensor]] = {grid: {} for grid in grids}
        for record, stack, path in self.stacks(case_ids):
            mask = read_stack_mask(path, record) > 0
            table = self.cache.slices(stack)
            for grid in grids:
                place = views.index(f"{record.view}/{record.plane}")
                for case_id, cover in _measure_covers(mask, table.indices, record, grid, copies):
                    flat = cover.reshape(len(cover), -1)
                    flat[table.blank] = np.nan
                    parts[grid][case_id, place] = torch.from_numpy(flat).half()
        return {grid: Covers(grid, views, found) for grid, found in parts.items()}


def _measure_covers(
    mask: NDArray[np.bool_], indices: NDArray[np.int32], record: StackRecord, grid: Grid, copies: Recipe | None
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The share of each patch [slices height width] that a mask covers: of a stack, and of its copies if any."""
    measure = partial(measure_patch_cover, mask, indices=indices, box=record.box, plane=record.plane)
    yield record.case_id, measure(grid=grid)
    if copies is None:
        return
    height, width = grid
    fine = measure(grid=(_PARTS * height, _PARTS * width))
    for case_id, alteration in draw_copies(record.case_id, plane=record.plane, sources=record.sources, recipe=copies):
        moved = move_slices(torch.from_numpy(fine)[:, None], alteration)
        yield case_id, moved.view(len(fine), height, _PARTS, width, _PARTS).mean((2, 4)).numpy()


@dataclass(frozen=True, eq=False)
class Covers:
    """Masks of some cases on one grid.

    Attributes:
        grid: (height, width) in patches.
        views: ``view/plane`` names in the order of a bag's views.
        parts: By case and place of the view, float16 [slices patches], NaN for blank slices.
    """

    grid: Grid
    views: tuple[str, ...]
    parts: Mapping[tuple[str, int], Tensor]

    @property
    def case_ids(self) -> frozenset[str]:
        """Cases with a mask in any view."""
        return frozenset(case for case, _ in self.parts)

    def batch(self, case_ids: Sequence[str], slices: int) -> Tensor:
        """float32 [batch views slices patches] for a bag of these cases; NaN where nothing is known."""
        cover = torch.full((len(case_ids), len(self.views), slices, self.grid[0] * self.grid[1]), torch.nan)
        for row, case in enumerate(case_ids):
            for place in range(len(self.views)):
                if (part := self.parts.get((case, place))) is not None:
                    cover[row, place, : len(part)] = part[:slices]
        return cover


class CoveredStore:
    """A token store whose bags come with the masks of their cases."""

    def __init__(self, store: TokenStore, covers: Covers) -> None:
        self._store = store
        self._covers = covers

    @property
    def shape(self) -> BagShape:
        return self._store.shape

    @property
    def device(self) -> torch.device:
        return self._store.device

    def batch(self, places: NDArray[np.int64], token_sets: Sequence[str], *, slices: int | None = None) -> Bag:
        """As `TokenStore.batch`, with ``cover``."""
        bag = self._store.batch(places, token_sets, slices=slices)
        cover = self._covers.batch(bag.case_ids, bag.mask.shape[2])
        return dataclasses.replace(bag, cover=cover.to(self.device))

    def visit(self, parts: Sequence[NDArray[np.int64]], token_sets: Sequence[str], /) -> Iterator[None]:
        """As `TokenStore.visit`."""
        return self._store.visit(parts, token_sets)


def read_stack_mask(path: Path, record: StackRecord) -> NDArray[np.int32]:
    """A mask on the canonical grid of the image that a stack was cut from, as `embedkit.volumes.read_mask`.

    Raises:
        VolumeError: as `read_mask`; the message names the case.
    """
    nothing = np.broadcast_to(np.uint8(0), record.source_shape)
    empty, affine = to_canonical(nothing, record.source_affine)
    image = Volume(
        array=empty,
        spacing_mm=measure_spacing(affine),
        affine=affine,
        source_shape=record.source_shape,
        source_affine=record.source_affine,
        source_bytes=record.source_bytes,
        source_digest=record.source_digest,
    )
    try:
        mask: NDArray[np.int32] = read_mask(path, image)
    except VolumeError as error:
        raise VolumeError(f"mask of case {record.case_id}, view {record.view}: {error}") from error
    return mask

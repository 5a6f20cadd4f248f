"""Owns one case on its way through extraction: the token arrays of its stacks, filled batch by batch, then handed over.

The tokens of a stack that would take much memory are kept in a nameless temporary file instead, so that one huge scan
takes no more memory than many small ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedkit.alteration import Alteration, draw_copies
from embedkit.cache import StackTokens, check_stack
from embedkit.errors import BackboneError, VolumeError
from embedkit.features import BackboneInfo
from embedkit.formats import format_by_name
from embedkit.recipe import Recipe
from embedkit.slices import Stack, plan_stacks
from embedkit.sources import Case, CaseImages, combine_digests, combine_stats
from embedkit.spill import allocate
from embedkit.tokens import token_shape
from embedkit.volumes import Volume

__all__ = ["SPILL_BYTES", "CaseWork", "FailedCase", "SameCase", "list_kept"]

SPILL_BYTES = 256 << 20
"""Bytes of tokens of one case that are kept in memory; each of its arrays may take its share, or goes to a file."""


@dataclass(frozen=True)
class FailedCase:
    """A case that gives no tokens.

    Attributes:
        case: Which.
        problem: Why, in one line, without names of files and without what they say; see `embedkit.errors.VolumeError`.
        view: Where a single one of its images is to blame.
        file: Where a single file or folder is.
        found: What its files say, or a library quotes of them.
    """

    case: Case
    problem: str
    view: str = ""
    file: Path | None = None
    found: str = ""

    @property
    def told(self) -> str:
        """The reason for who runs the program."""
        return str(VolumeError(self.problem, file=self.file, view=self.view, found=self.found))

    @property
    def kept(self) -> str:
        """The reason as it may be put on record: a file is named only where the manifest names it.

        The name of a folder, and of a file of a DICOM series, can be a patient's.
        """
        images = self.case.images.values()
        if self.file is None:
            name = ""
        elif self.file in images and not _is_folder(self.file):
            name = self.file.name
        elif self.file in {each for path in images for each in (path, path.parent)}:
            name = "its folder"
        else:
            name = "one of its files"
        return VolumeError(self.problem, file=Path(name) if name else None, view=self.view).reason

    @property
    def path(self) -> str:
        """Name of the manifest's file to blame; empty for a folder."""
        path = self.case.images.get(self.view)
        return "" if path is None or _is_folder(path) else path.name


def _is_folder(path: Path) -> bool:
    """Whether a path of a manifest is that of a folder; of what is gone, whether its name shows no format."""
    return path.is_dir() or not (path.exists() or format_by_name(path)[0])


@dataclass(frozen=True)
class SameCase:
    """A case whose files were touched since they were cached, but hold the same bytes."""

    case: Case


@dataclass(frozen=True, eq=False)
class StackWork:
    """One stack in progress: what is known before it is rendered, and the arrays that rendering and backbone fill.

    ``case_id`` is that of the copy where it is one, and ``alteration`` what makes it differ from its case.
    """

    case_id: str
    alteration: Alteration | None
    stack: Stack
    facts: Mapping[str, Any]
    blank: NDArray[np.bool_]
    tokens: dict[str, NDArray[np.float16]]
    preview: NDArray[np.uint8] | None


def list_kept(case_id: str, stack: Stack, recipe: Recipe) -> Sequence[tuple[str, Alteration | None]]:
    """Of a planned stack of a case, the id of each that a recipe keeps and what alters it: itself, or its copies."""
    return draw_copies(case_id, plane=stack.plane, sources=stack.sources, recipe=recipe) or [(case_id, None)]


class CaseWork:
    """One case in progress: complete once the backbone has seen every slice of every stack that is not blank.

    Attributes:
        case: Whose tokens these are.
        volumes: Its views, until `release_volumes`.
        stacks: One per view and plane; where copies are kept, one per copy of each, those of a view and plane together.
        slices: In all stacks.
        problem: Why its tokens cannot be kept; empty where they can.
    """

    def __init__(self, case: Case, images: CaseImages, recipe: Recipe, info: BackboneInfo, *, spill: Path) -> None:
        """Plans the stacks of a case.

        Args:
            case: The case.
            images: What was read for it.
            recipe: Of the cache.
            info: Of the backbone.
            spill: Folder for the temporary files of large stacks.

        Raises:
            VolumeError: the views do not give what the recipe asks for.
            CacheError: there is no room for a temporary file.
        """
        shapes = {str(kept): token_shape(kept, info) for kept in recipe.parsed_token_sets()}
        self.case = case
        self.volumes: Mapping[str, Volume] = images.volumes
        self._recipe = recipe
        planned = plan_stacks(images.volumes, recipe)
        kept = [(own, each) for each in planned for own in list_kept(case.case_id, each, recipe)]
        most_bytes = SPILL_BYTES // max(1, len(kept) * len(shapes))
        self.stacks = [
            _start_stack(own, stack, images, recipe, shapes, spill=spill, most_bytes=most_bytes) for own, stack in kept
        ]
        self.slices = sum(len(work.blank) for work in self.stacks)
        self.problem = ""
        self._remaining = self.slices

    @property
    def blank_slices(self) -> int:
        """Slices found blank so far."""
        return sum(int(work.blank.sum()) for work in self.stacks)

    def list_renderings(self, recipe: Recipe) -> list[range]:
        """Numbers of the stacks that the same slices are rendered for, once: one stack, or that of every copy."""
        step = max(1, recipe.copies)
        return [range(first, first + step) for first in range(0, len(self.stacks), step)]

    def release_volumes(self) -> None:
        """Lets go of the images, once all slices are rendered."""
        self.volumes = {}

    def count_down(self, slices: int) -> bool:
        """Marks ``slices`` as computed; True once none is left."""
        self._remaining -= slices
        return self._remaining == 0

    def finish(self) -> list[StackTokens]:
        """The stacks as the cache takes them.

        Raises:
            VolumeError: every slice of a view is blank.
            CacheError: a stack cannot be stored as it is; see `embedkit.cache.check_stack`.
            BackboneError: a token is outside float16's range.
        """
        if self.problem:
            raise BackboneError(self.problem)
        stacks = [self._stack_tokens(work) for work in self.stacks]
        for stack in stacks:
            check_stack(stack, self._recipe)
        return stacks

    def _stack_tokens(self, work: StackWork) -> StackTokens:
        stack = work.stack
        if work.blank.all():
            raise VolumeError(
                f"has no content: all {len(work.blank)} {stack.plane} slices are constant after the"
                " grey window; check the image and the window",
                view=stack.view,
            )
        return StackTokens(
            case_id=work.case_id,
            patient_id=self.case.patient_id,
            view=stack.view,
            plane=stack.plane,
            sources=stack.sources,
            indices=stack.indices,
            positions_mm=stack.positions_mm,
            blank=work.blank,
            plane_shape=stack.plane_shape,
            box=stack.box,
            tokens=work.tokens,
            preview=work.preview,
            **work.facts,
        )


def _start_stack(
    kept: tuple[str, Alteration | None],
    stack: Stack,
    images: CaseImages,
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    spill: Path,
    most_bytes: int,
) -> StackWork:
    count, views = len(stack.indices), list(dict.fromkeys(stack.sources))
    sources = [images.volumes[view] for view in views]
    source_bytes, source_modified_ns = combine_stats([images.stats[view] for view in views])
    case_id, alteration = kept
    return StackWork(
        case_id=case_id,
        alteration=alteration,
        stack=stack,
        facts={
            "source_shape": sources[0].source_shape,
            "source_affine": sources[0].source_affine,
            "source_bytes": source_bytes,
            "source_modified_ns": source_modified_ns,
            "source_digest": combine_digests(sources),
        },
        blank=np.zeros(count, bool),
        tokens={
            name: allocate((count, *shape), np.float16, folder=spill, most_bytes=most_bytes)
            for name, shape in shapes.items()
        },
        preview=np.zeros((count, recipe.preview, recipe.preview), np.uint8) if recipe.preview else None,
    )

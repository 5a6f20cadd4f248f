"""Owns what a training learns from masks: of which cases, on which grids, and what its records tell; fits nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from embedkit.bags import bag_shape
from embedkit.cache import Cache
from embedkit.covers import Covers, Masks
from embedkit.crossfitting import CrossFit
from embedkit.errors import HeadError, OptionError
from embedkit.foldjobs import FoldedTask
from embedkit.headplans import HeadPlan
from embedkit.maskscores import mean_interval, score_masks
from embedkit.members import Member
from embedkit.plugins import MASK_OPTION, learns_masks, list_heads, list_options
from embedkit.pooling import joined_grid
from embedkit.recipe import Recipe
from embedkit.runfolder import RunRecord
from embedkit.targets import count_noun
from embedkit.tasks import Task

__all__ = ["Supervision"]

_VOLUME = "mask_ml"
_Labels = pl.DataFrame | Path | str


class Supervision:
    """The masks of a training, none where none were given.

    Attributes:
        covers: The masks by grid, once `measure` has read them.
    """

    def __init__(self, source: Cache, masks: pl.DataFrame | Path | str | None) -> None:
        """Takes the manifest that names them; opens no mask.

        Raises:
            ManifestError: as `Masks`.
        """
        self.source = source
        self.covers: dict[tuple[int, int], Covers] = {}
        self._masks = None if masks is None else Masks(source, masks)

    def stand_in(
        self, labels: _Labels | None, targets: Sequence[str] | str, heads: Sequence[str] | None
    ) -> tuple[_Labels, Sequence[str] | str, Sequence[str] | None]:
        """Labels, targets and heads of a training; where it has masks alone, the volume of these stands for a label.

        Raises:
            OptionError: no label table, and no masks or a target beside them.
        """
        if labels is not None:
            return labels, targets, heads
        if targets or self._masks is None:
            named = ", ".join([targets] if isinstance(targets, str) else targets)
            raise OptionError(
                f"no label table was given{f' for the target {named}' if named else ''}, expected one; or masks alone,"
                " without a target, to learn masks without labels"
            )
        return self._masks.measure_ml(sorted(set(self.source.stacks["case_id"]))), [_VOLUME], heads or ("segment",)

    def ask(self, heads: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """The options of heads, with which those that build a decoder only where there are masks are told of them.

        Raises:
            HeadError: unknown head, or options that say so themselves.
        """
        asked = dict(options)
        for name in heads:
            if MASK_OPTION not in list_options(name):
                continue
            if MASK_OPTION in asked.get(name, {}):
                raise HeadError(
                    f"option {MASK_OPTION} of head {name!r} follows from whether masks are given; leave it out, and"
                    " give the manifest that names them as masks"
                )
            asked[name] = {**asked.get(name, {}), MASK_OPTION: self._masks is not None}
        return asked

    def measure(self, plans: Sequence[HeadPlan], case_ids: Sequence[str], *, copies: Recipe | None = None) -> None:
        """Reads the masks of some cases, for every grid that a head which learns masks reads.

        Those of altered copies, if their recipe is given, are the masks of the cases moved alike.

        Raises:
            OptionError: masks were given that no head learns, of none of the cases, or that are all empty.
            VolumeError: a mask cannot be read, or does not belong to its image.
        """
        if self._masks is None:
            return
        readings = {each.token_sets for plan in plans if learns_masks(plan.head) for each in plan.candidates}
        if not readings:
            able = [name for name in list_heads() if learns_masks(name)]
            raise OptionError(
                f"masks were given, but none of the heads {', '.join(plan.head for plan in plans)} learns any; add one"
                f" that does ({', '.join(able)}), or leave the masks away"
            )
        grids = {joined_grid(bag_shape(self.source, token_sets), token_sets) for token_sets in readings}
        self.covers = self._masks.measure(case_ids, sorted(grids), copies=copies)
        if not any(covers.case_ids for covers in self.covers.values()):
            raise OptionError(
                "masks were given, but of none of the labelled cases; give those of some that have a label, or leave"
                " the label table away to learn masks alone"
            )
        if not any((part > 0).any() for covers in self.covers.values() for part in covers.parts.values()):
            raise OptionError(
                f"the masks of {count_noun(self._count(case_ids), 'labelled case')} were read,"
                " but none covers anything of what the backbone saw: they are empty, or lie outside the crop; give"
                " masks that mark something (voxels above 0), or leave them away"
            )

    def count(self, plan: HeadPlan, task: Task) -> int:
        """Cases of a task whose mask a head learns from."""
        return self._count(task.case_ids) if self.covers and learns_masks(plan.head) else 0

    def _count(self, case_ids: Sequence[str]) -> int:
        """How many of some cases have a mask."""
        return len(next(iter(self.covers.values())).case_ids & set(case_ids))

    def tell(
        self,
        record: RunRecord,
        plan: HeadPlan,
        target: FoldedTask,
        fitted: CrossFit,
        *,
        resamples: int,
    ) -> RunRecord:
        """The record with how many masks were learned from, how well, and which belong to no case of the cache."""
        if self._masks is None or not learns_masks(plan.head):
            return record
        by_fold: dict[int, list[Member]] = {}
        for fold, member in zip(fitted.folds, fitted.members, strict=True):
            by_fold.setdefault(fold, []).append(member)
        scores = score_masks(self.source, target, by_fold, self.covers).mean(0)
        dice = mean_interval(scores, target.task.patient_ids, resamples=resamples, seed=record.seed)
        strangers = {"with_masks_but_not_cached": list(self._masks.strangers)} if self._masks.strangers else {}
        found = np.isfinite(dice.value)
        note = (
            f"Dice of {plan.head} is unknown: none of its masks covers half of a patch on the grid of"
            f" {', '.join(plan.candidates[0].token_sets)}; a finer one (extract --tokens patch) would tell"
        )
        return dataclasses.replace(
            record,
            masks=self.count(plan, target.task),
            metrics=record.metrics | ({"dice": dice} if found else {}),
            cases=record.cases | strangers,
            notes=record.notes + (() if found else (note,)),
        )

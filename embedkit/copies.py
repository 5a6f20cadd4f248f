"""Owns the altered copies that heads are trained on beside the cases of a cache: whose they are, and where tokens lie.

Copies have a cache of their own, which `embedkit.extract` makes with ``augment`` from the manifest of the cases. They
are shown to heads in training and are nothing else: knows no split and fits nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from embedkit.cache import Cache, SliceTable, TokenSetInfo, open_cache
from embedkit.errors import CacheError, HeadError, ManifestError, OptionError
from embedkit.fitting import FitOptions
from embedkit.headplans import HeadPlan
from embedkit.recipe import require_same_recipe
from embedkit.runfolder import RunRecord
from embedkit.tails import Tail, TailShape
from embedkit.targets import count_noun, list_some
from embedkit.tasks import Task

__all__ = ["Copies"]


class Copies:
    """The altered copies of the cases of a cache.

    Attributes:
        cache: Of the copies.
        source: Cases and copies together, the stacks of the copies numbered after those of the cases.
        by_case: Case -> the ids of its copies; no entry for a case without any.
        strangers: Cases that there are copies of but that are not in the cache of cases, sorted.
    """

    def __init__(self, cases: Cache, copies: Cache | Path | str) -> None:
        """Opens the copies of the cases of a cache.

        Raises:
            CacheError: as `open_cache`.
            OptionError: what is given holds no copies, or copies of none of the cases.
            RecipeError: it was made by another recipe, but for the token sets, which may be fewer, and the previews.
            ManifestError: copies are of another patient or other files than their case, or lack a view of it, or a
                case bears the name of a copy.
        """
        self.cache = copies if isinstance(copies, Cache) else open_cache(copies)
        _require_copies(self.cache, cases)
        table = self.cache.stacks.with_columns(case=pl.col("case_id").str.replace(r"#\d+$", ""))
        known = cases.stacks.select("view", "plane", "patient_id", "source_digest", case="case_id")
        self.strangers = tuple(sorted(set(table["case"]) - set(known["case"])))
        matched = table.join(known, on=("case", "view", "plane"), suffix="_of_case", maintain_order="left")
        if matched.is_empty():
            raise OptionError(
                f"cache {self.cache.path} holds copies of {count_noun(len(self.strangers), 'case')}"
                f"{list_some(self.strangers)}, none of which is in cache {cases.path}; give the copies of its cases"
            )
        _require_same_origin(matched, cases, self.cache)
        _require_same_views(matched, known, self.cache)
        named = matched.select("case", "case_id").unique(maintain_order=True).group_by("case", maintain_order=True)
        self.by_case: Mapping[str, tuple[str, ...]] = {case: tuple(ids) for case, ids in named.agg("case_id").rows()}
        self.source = _JoinedSource(cases, self.cache, matched.select(self.cache.stacks.columns))

    def plan(self, plans: Sequence[HeadPlan], case_ids: Collection[str]) -> tuple[HeadPlan, ...]:
        """The plans for cases and copies: an epoch is longer, so that as many fewer of them make as many steps.

        Args:
            plans: For cases alone.
            case_ids: Those that have a label of any target.

        Raises:
            HeadError: none of them is trained by gradient, as only such are shown copies.
            CacheError: one of them reads a token set that is not kept of the copies.
        """
        if not any(plan.by_gradient for plan in plans):
            raise HeadError(
                f"copies were given, but all of the heads {', '.join(plan.head for plan in plans)} are fitted in closed"
                " form, on cases alone; add a head that is trained by gradient, as tail, or leave the copies away"
            )
        return tuple(self._plan(plan, case_ids) if plan.by_gradient else plan for plan in plans)

    def describe(self, plan: HeadPlan, task: Task) -> dict[str, Any] | None:
        """What a run's record keeps of the copies that a head was shown; None for a head that is shown none."""
        if not plan.by_gradient:
            return None
        recipe = self.cache.recipe
        shown = sorted(copy for case in task.case_ids for copy in self.by_case.get(case, ()))
        digest = hashlib.sha256("\n".join(shown).encode()).hexdigest()[:16]
        return {"fingerprint": recipe.fingerprint, "augment": recipe.augment, "shown": len(shown), "names": digest}

    def tell(self, record: RunRecord, plan: HeadPlan, task: Task) -> RunRecord:
        """The record of a run with the copies that its head was shown, and the cases that have none."""
        if not plan.by_gradient:
            return record
        aside = {
            "without_copies": [case for case in task.case_ids if case not in self.by_case],
            "with_copies_but_not_cached": list(self.strangers),
        }
        told = {why: ids for why, ids in aside.items() if ids}
        shown = sum(len(self.by_case.get(case, ())) for case in task.case_ids)
        beside = f"{shown} altered copies beside {len(task.case_ids)} cases"
        cases = record.cases | told
        notes = (f"{task.name}: heads trained by gradient were shown {beside}", *record.notes)
        return dataclasses.replace(record, copies=self.describe(plan, task), cases=cases, notes=notes)

    def _plan(self, plan: HeadPlan, case_ids: Collection[str]) -> HeadPlan:
        """The plan of a head by gradient."""
        read = dict.fromkeys(name for each in plan.candidates for name in each.token_sets)
        if lacking := [name for name in read if name not in self.cache.recipe.token_sets]:
            raise CacheError(
                f"head {plan.head!r} reads {', '.join(lacking)}, but the copies in {self.cache.path} hold"
                f" {', '.join(self.cache.recipe.token_sets)}; extract copies with these tokens too, or name others with"
                " --tokens"
            )
        candidates = (
            dataclasses.replace(each, fit=each.fit.replace(epochs=self._count_epochs(each.fit, case_ids)))
            for each in plan.candidates
        )
        return dataclasses.replace(plan, candidates=tuple(candidates))

    def _count_epochs(self, fit: FitOptions, case_ids: Collection[str]) -> int:
        """How many epochs over all cases and copies take as many steps as those asked for take over the cases alone."""
        copies = sum(len(self.by_case.get(case, ())) for case in case_ids)
        alone, together = (math.ceil(count / fit.batch_size) for count in (len(case_ids), len(case_ids) + copies))
        return math.ceil(fit.epochs * alone / together)


class _JoinedSource:
    """The stacks of a cache and of the copies of its cases, as bags are loaded from them."""

    def __init__(self, cases: Cache, copies: Cache, stacks: pl.DataFrame) -> None:
        """Takes both caches, and those stacks of the copies that count."""
        self._cases, self._copies, self._first = cases, copies, len(cases)
        numbered = stacks.with_columns(stack=pl.col("stack") + self._first)
        columns = ("stack", "case_id", "view", "plane", "count")
        self.stacks = pl.concat([each.select(columns) for each in (cases.stacks, numbered)], how="vertical_relaxed")

    @property
    def token_sets(self) -> Mapping[str, TokenSetInfo]:
        """Those of the cases."""
        return self._cases.token_sets

    def read(self, stack: int, token_set: str, /) -> np.ndarray[Any, Any]:
        """As `Cache.read`."""
        cache, number = self._find(stack)
        return cache.read(number, token_set)

    def slices(self, stack: int, /) -> SliceTable:
        """As `Cache.slices`."""
        cache, number = self._find(stack)
        return cache.slices(number)

    def tail_shape(self) -> TailShape:
        """That of the cases."""
        return self._cases.tail_shape()

    def tail(self) -> Tail:
        """That of the cases."""
        return self._cases.tail()

    def _find(self, stack: int) -> tuple[Cache, int]:
        return (self._cases, stack) if stack < self._first else (self._copies, stack - self._first)


def _require_copies(copies: Cache, cases: Cache) -> None:
    """Stops where a cache holds no copies, or such as were not made as the cases were."""
    if not copies.recipe.copies:
        raise OptionError(
            f"cache {copies.path} holds cases and no altered copies; make those from the manifest of the cases with"
            f" embedkit extract --augment 4 and the options of cache {cases.path}"
        )
    wanted = cases.recipe
    require_same_recipe(
        dataclasses.replace(copies.recipe, augment="", preview=wanted.preview, token_sets=wanted.token_sets),
        wanted,
        where=f"cache {copies.path}, its copies aside,",
        ways_out=f"Extract the copies with the options of cache {cases.path}",
    )


def _require_same_origin(matched: pl.DataFrame, cases: Cache, copies: Cache) -> None:
    """Stops where copies are of another patient or other files than the case of their name, or cannot be told apart."""
    clashing = sorted(set(matched["case_id"]) & set(cases.stacks["case_id"]))
    if clashing:
        raise ManifestError(
            f"cache {cases.path} has a case {clashing[0]}, which is what a copy of case"
            f" {clashing[0].rpartition('#')[0]} is called in {copies.path}; give one of them another case_id"
        )
    for column, what in (("patient_id", "another patient"), ("source_digest", "other files")):
        differing = matched.filter(pl.col(column) != pl.col(f"{column}_of_case"))["case"].unique().sort().to_list()
        if differing:
            raise ManifestError(
                f"the copies of {count_noun(len(differing), 'case')}{list_some(differing)} in {copies.path} were made"
                f" of {what} than in {cases.path}; run both extract commands again, from one manifest"
            )


def _require_same_views(matched: pl.DataFrame, known: pl.DataFrame, copies: Cache) -> None:
    """Stops where copies lack a view or plane of their case: half of what heads see would then be without it."""
    wanted = matched.select("case", "case_id").unique().join(known.select("case", "view", "plane"), on="case")
    lacking = wanted.join(matched, on=("case_id", "view", "plane"), how="anti")
    if not lacking.is_empty():
        cases = lacking["case"].unique().sort().to_list()
        views = lacking.select(pl.concat_str("view", "plane", separator="/")).to_series().unique().sort()
        raise ManifestError(
            f"the copies of {count_noun(len(cases), 'case')}{list_some(cases)} in {copies.path} lack"
            f" {', '.join(views)}, which the cases have; extract the copies from the manifest of the cases, or train on"
            " the --views that both have"
        )

"""Owns runs: a trained ensemble as a value, opened from its folder, that predicts, embeds and says why; trains nothing.

The folder's format is owned by `embedkit.runfolder`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedkit.answers import choose_class, name_classes, score_array, word_answer
from embedkit.attribution import SIGNED, Method, mean_scores, require_method, score_tokens
from embedkit.bags import Bag, list_views, stream_bags
from embedkit.cache import Cache, open_originals
from embedkit.calibration import CalibrationMethod, Calibrator, fit_calibrator
from embedkit.errors import RunError
from embedkit.members import Member
from embedkit.metrics import Interval
from embedkit.outcomes import encode_truth
from embedkit.planning import choose_device
from embedkit.recipe import TokenSet, require_same_recipe
from embedkit.runfolder import RunRecord, read_run

__all__ = ["Evidence", "Run", "open_run", "predict"]

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What speaks for one class in one case, averaged over members.

    Attributes:
        answer: The prediction in words.
        class_name: The class explained; None of a task without classes.
        scores: ``view/plane`` -> float32 [slices grid_height grid_width] (1 x 1 for class tokens): how much each token
            speaks for the class explained, by the method asked for; negative speaks against it, blank slices have 0.
        slice_attention: ``view/plane`` -> float32 [slices], the head's own weights, which sum to 1; None where the
            head has no attention.
    """

    answer: str
    class_name: str | None
    scores: dict[str, FloatArray]
    slice_attention: dict[str, FloatArray] | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """A trained run, one head on one target: an ensemble of one member per fold. Made by `open_run`.

    Attributes:
        path: Its folder.
        record: Everything of ``run.json``.
        predictions: Out of fold, of the cases that a fold tested: case_id, patient_id, fold, target (class name,
            labels between ``;``, or value) and the score columns.
        inner: What choices were made by: training cases of each fold, held out once per inner split: fold, split,
            case_id, patient_id, target and the score columns. No case of the fold's test part is among them.
        members: The fitted heads.
        calibrators: What maps the scores of each member; none unless `calibrated`.
    """

    path: Path
    record: RunRecord
    predictions: pl.DataFrame
    inner: pl.DataFrame
    members: tuple[Member, ...]
    calibrators: tuple[Calibrator, ...] = ()

    @property
    def name(self) -> str:
        """``TARGET.HEAD``."""
        return self.record.name

    @property
    def head(self) -> str:
        return self.record.head

    @property
    def digest(self) -> str:
        """SHA-256 of its weights file in hex, which tells it from any other fit; checked when it was opened."""
        return self.record.sha256["weights.safetensors"]

    @property
    def training_patients(self) -> frozenset[str]:
        """Patients that any member was trained on, those that no fold tested among them."""
        return frozenset(self.predictions["patient_id"]) | frozenset(self.record.cases.get("untested_patients", ()))

    @property
    def views(self) -> tuple[str, ...]:
        """``view/plane`` names that the run was trained on."""
        return self.record.shape.views

    @property
    def metrics(self) -> dict[str, Interval]:
        """Out-of-fold metrics of the training."""
        return self.record.metrics

    def predict_bag(self, bag: Bag) -> FloatArray:
        """Scores [batch outputs] of a bag with this run's token sets and views: the mean over members."""
        return _mean_scores(self.members, bag, self.calibrators)

    def calibrated(self, method: CalibrationMethod) -> Run:
        """This run with calibrated scores, out of fold, of inner splits and of new cases alike.

        Each fold has a map of its own, fitted on the held-out scores of its inner splits, which no test case of the
        fold is among; a new case gets the mean of the members' mapped scores. `metrics` stay those of the training.

        Raises:
            OptionError: unknown method, or a run that gives no probabilities.
        """
        record = self.record
        maps = {
            int(cast(int, fold)): _fit_map(record, part, method)
            for (fold,), part in self.inner.partition_by("fold", as_dict=True, maintain_order=True).items()
        }
        return dataclasses.replace(
            self,
            predictions=_map_scores(record, self.predictions, maps),
            inner=_map_scores(record, self.inner, maps),
            calibrators=tuple(maps[member["fold"]] for member in record.members),
        )

    def embed(self, cache: Cache, *, device: str = "cpu") -> tuple[tuple[str, ...], FloatArray]:
        """Pooled vectors for search: those of the members side by side, each scaled to length 1.

        Returns:
            Case ids, and float32 [cases dim] in their order; a case without a usable slice is left out.

        Raises:
            RunError: the head gives no pooled vector, or the cache lacks what the run reads.
            RecipeError: the cache has another recipe.
        """
        ids: list[str] = []
        vectors: list[FloatArray] = []
        for bag in _read_bags(self, cache, _all_cases(cache), device):
            usable = bag.mask.any(2).any(1)
            ids += [case for case, good in zip(bag.case_ids, usable.tolist(), strict=True) if good]
            with torch.no_grad():
                parts = [member(bag).embedding for member in self.members]
            if any(part is None for part in parts):
                raise RunError(f"head {self.head!r} of run {self.name} gives no pooled vector; use another run")
            scaled = [torch.nn.functional.normalize(cast(Tensor, part).float().cpu()[usable], dim=1) for part in parts]
            vectors.append(torch.cat(scaled, 1).numpy())
        if not ids:
            raise RunError(f"no case of cache {cache.path} has a usable slice; there is nothing to embed")
        return tuple(ids), np.concatenate(vectors)

    def find_evidence(
        self,
        cache: Cache,
        case_id: str,
        *,
        method: Method = "contribution",
        class_name: str | None = None,
        held_out: bool = False,
    ) -> Evidence:
        """How much each token of a case speaks for a class.

        Args:
            cache: Holds the case.
            case_id: The case.
            method: By which tokens are scored, see `embedkit.attribution.score_tokens`; ``attention`` and ``backbone``
                are of the case whatever the class. ``backbone`` needs the token set ``attention`` in the cache.
            class_name: None is the positive class of a binary task, the most probable one of others. For the negative
                class of a binary task the signs are turned.
            held_out: Ask only the member that was trained without the case.

        Raises:
            RunError: the cache lacks the case or what the run reads, the run has no such class, or the case was not
                in the training and ``held_out`` is set.
            RecipeError: the cache has another recipe.
            HeadError: ``attention`` of a head that has none.
            OptionError: no such method.
        """
        require_method(method)
        if case_id not in _all_cases(cache):
            raise RunError(f"cache {cache.path} has no case {case_id!r}; `embedkit info` tells what it holds")
        members = _held_out_members(self, case_id) if held_out else self.members
        bag = next(_read_bags(self, cache, [case_id], "cpu"))
        prediction = _mean_scores(members, bag)[0]
        record = self.record
        if class_name is not None and class_name not in record.classes:
            raise RunError(
                f"run {self.name} has no class {class_name!r}; it has"
                f" {', '.join(record.classes) or f'none, being a {record.kind} task: leave it away'}"
            )
        place = choose_class(record.kind, record.classes, prediction, class_name)
        output, sign = (0, 2.0 * place - 1) if record.kind == "binary" else (place, 1.0)
        rows = _read_rows(cache, case_id, self.views) if method == "backbone" else None
        found = [score_tokens(member, bag, output, method=method, rows=rows) for member in members]
        added = (sign if method in SIGNED else 1.0) * mean_scores(found)[0].cpu().numpy()
        stacks = cache.stacks.filter(pl.col("case_id") == case_id).select("view", "plane", "count").iter_rows()
        counts = {f"{view}/{plane}": count for view, plane, count in stacks if f"{view}/{plane}" in self.views}
        grid = _grid(self.record, added.shape[-1])
        scores = {
            view: _fit_slices(added[self.views.index(view)], count).reshape(count, *grid)
            for view, count in counts.items()
        }
        answer = word_answer(record.kind, record.classes, record.target, prediction, place, times=record.times)
        explained = record.classes[place] if record.classes else None
        return Evidence(answer, explained, scores, self._slice_attention(members, bag, counts))

    def held_out_members(self, case_id: str) -> tuple[Member, ...]:
        """The members that were trained without a case.

        Raises:
            RunError: no fold tested the case.
        """
        return _held_out_members(self, case_id)

    def _slice_attention(
        self, members: Sequence[Member], bag: Bag, counts: Mapping[str, int]
    ) -> dict[str, FloatArray] | None:
        """The mean over members of the weights that they give the slices of a bag of one case."""
        with torch.no_grad():
            given = [member(bag).slice_attention for member in members]
        if any(weights is None for weights in given):
            return None
        mean = torch.stack([cast(Tensor, weights)[0].float() for weights in given]).mean(0)[..., None].numpy()
        return {view: _fit_slices(mean[self.views.index(view)], count)[:, 0] for view, count in counts.items()}


def open_run(path: Path | str) -> Run:
    """Opens the folder that `train` wrote.

    Raises:
        RunError: not a run, damaged, incomplete, or of a newer format.
        HeadError: its head is not installed.
    """
    path = Path(path)
    found = read_run(path)
    return Run(path, found.record, found.predictions, found.inner, found.members)


def predict(
    run: Run | Path | str,
    cache: Cache | Path | str,
    *,
    case_ids: Sequence[str] | None = None,
    calibrate: CalibrationMethod | None = None,
    device: str = "auto",
) -> pl.DataFrame:
    """Predicts cases with the mean of a run's members.

    Args:
        run: A run or its folder.
        cache: Cache of the run's recipe; it may hold more token sets, planes and views, and lack some of the run's
            views, which then count as missing in every case.
        case_ids: Which cases, in this order; None for all of the cache, sorted.
        calibrate: Map the scores as `Run.calibrated` does; None gives them as they are.
        device: Where the heads run.

    Returns:
        ``case_id``, ``patient_id``, score columns (``score``: probability of the positive class, or the value; else
        ``score_CLASS`` each; of survival ``score``, the risk, and ``survival_TIME`` each) and ``predicted`` (class;
        labels between ``;`` for multilabel; absent for a regression and for survival).
        All null for a case without a usable slice in the run's views.

    Raises:
        RunError: the cache lacks a token set, all of the run's views, or a case that is asked for; or as `open_run`.
        RecipeError: the cache has another recipe.
        OptionError: as `Run.calibrated`.
    """
    opened = run if isinstance(run, Run) else open_run(run)
    opened = opened if calibrate is None else opened.calibrated(calibrate)
    source = open_originals(cache)
    patients = dict(source.stacks.select("case_id", "patient_id").unique().iter_rows())
    wanted = _all_cases(source) if case_ids is None else list(case_ids)
    if unknown := [case for case in wanted if case not in patients]:
        raise RunError(f"cache {source.path} lacks {len(unknown)} of the cases asked for: {', '.join(unknown[:5])}")
    names = opened.record.score_columns
    scores = [np.zeros((0, len(names)), np.float32)]
    usable: list[bool] = []
    for bag in _read_bags(opened, source, wanted, device):
        usable += bag.mask.any(2).any(1).tolist()
        scores.append(opened.predict_bag(bag))
    values = np.concatenate(scores)
    table = pl.DataFrame(
        {"case_id": wanted, "patient_id": [patients[case] for case in wanted]},
        schema={"case_id": pl.String, "patient_id": pl.String},
    ).with_columns(pl.Series(name, values[:, place]) for place, name in enumerate(names))
    if opened.record.classes:
        table = table.with_columns(
            pl.Series("predicted", name_classes(opened.record.kind, opened.record.classes, values), dtype=pl.String)
        )
    good = pl.Series(usable, dtype=pl.Boolean)
    return table.with_columns(pl.when(good).then(pl.col(name)).alias(name) for name in table.columns[2:])


def check_cache(record: RunRecord, cache: Cache) -> None:
    """Stops where a cache does not hold what a run reads; a view may be absent, as it may in any case.

    Raises:
        RecipeError: a field of the recipe that determines the tokens differs.
        RunError: the cache lacks one of the run's token sets, or all of its views.
    """
    wanted = record.recipe
    found = dataclasses.replace(
        cache.recipe, token_sets=wanted.token_sets, preview=wanted.preview, planes=wanted.planes
    )
    require_same_recipe(
        found,
        wanted,
        where=f"cache {cache.path}",
        ways_out=f"Extract the new cases with the options of the cache that run {record.name} was trained on",
    )
    held = cache.recipe.token_sets
    if absent := [name for name in record.token_sets if name not in held]:
        raise RunError(
            f"run {record.name} needs the token sets {', '.join(record.token_sets)}, but cache {cache.path} lacks"
            f" {', '.join(absent)} (it holds {', '.join(held)}); extract again with the same options"
        )
    views = list_views(cache)
    if not set(record.shape.views) & set(views):
        raise RunError(
            f"run {record.name} needs one or more of the views {', '.join(record.shape.views)}, but cache"
            f" {cache.path} holds {', '.join(views) or 'none'}; extract again with the same planes and view names"
        )


def _read_bags(run: Run, cache: Cache, case_ids: Sequence[str], device: str) -> Iterator[Bag]:
    check_cache(run.record, cache)
    chosen = choose_device(device)
    for member in run.members:
        member.to(chosen)
    return stream_bags(cache, case_ids, run.record.token_sets, views=run.views)


def _mean_scores(members: Sequence[Member], bag: Bag, calibrators: Sequence[Calibrator] = ()) -> FloatArray:
    with torch.no_grad():
        each = [member.scores(member(bag).logits).reshape(len(bag), -1) for member in members]
    if calibrators:
        mapped = [
            calibrator.apply(score_array(member.kind, scores.cpu().numpy())).reshape(len(bag), -1)
            for member, scores, calibrator in zip(members, each, calibrators, strict=True)
        ]
        return np.asarray(np.mean(mapped, axis=0), np.float32)
    mean: FloatArray = torch.stack(each).mean(0).cpu().numpy()
    return mean


def _fit_map(record: RunRecord, inner: pl.DataFrame, method: CalibrationMethod) -> Calibrator:
    """The map of one fold, from its inner splits; a case that several of them held out counts once."""
    return fit_calibrator(
        record.kind,
        encode_truth(record.kind, record.classes, inner),
        record.score_array(inner.select(record.score_columns).to_numpy()),
        method=method,
        weights=1 / inner.select(pl.len().over("case_id")).to_series().to_numpy(),
    )


def _map_scores(record: RunRecord, table: pl.DataFrame, maps: Mapping[int, Calibrator]) -> pl.DataFrame:
    """A table with ``fold`` and score columns, each score mapped by its fold's map."""
    names, folds = record.score_columns, table["fold"].to_numpy()
    scores = table.select(names).to_numpy().astype(np.float64)
    for fold, calibrator in maps.items():
        rows = folds == fold
        scores[rows] = calibrator.apply(record.score_array(scores[rows])).reshape(-1, len(names))
    return table.with_columns(pl.Series(name, column) for name, column in zip(names, scores.T, strict=True))


def _all_cases(cache: Cache) -> list[str]:
    return sorted(set(cache.stacks["case_id"].to_list()))


def _held_out_members(run: Run, case_id: str) -> tuple[Member, ...]:
    found = run.predictions.filter(pl.col("case_id") == case_id)
    if found.is_empty():
        raise RunError(f"case {case_id!r} was not tested in the training of run {run.name}, so no member holds it out")
    folds = found["fold"].to_list()
    described = zip(run.record.members, run.members, strict=True)
    return tuple(member for each, member in described if each["fold"] in folds)


def _read_rows(cache: Cache, case_id: str, views: Sequence[str]) -> Tensor:
    """The class token's attention over the patches, mean over the backbone's heads [1 views slices patches]."""
    names = [name for name in cache.recipe.token_sets if TokenSet.parse(name).kind == "attention"]
    if not names:
        raise RunError(
            f"method backbone needs the token set attention, but cache {cache.path} holds"
            f" {', '.join(cache.recipe.token_sets)}; extract again with --tokens"
            f" {','.join(each for each in cache.recipe.token_sets if TokenSet.parse(each).kind != 'cut')},attention"
        )
    (bag,) = stream_bags(cache, [case_id], names[:1], views=views)
    return bag.tokens[names[0]].float().mean(3)


def _grid(record: RunRecord, patches: int) -> tuple[int, int]:
    """(height, width) of evidence with this many patches."""
    grids = [*record.shape.grids.values(), *([] if record.shape.tail is None else [record.shape.tail.grid])]
    side = math.isqrt(patches)
    square = (side, side) if side * side == patches else (1, patches)
    return next((grid for grid in grids if grid[0] * grid[1] == patches), square)


def _fit_slices(scores: FloatArray, slices: int) -> FloatArray:
    """Scores of ``slices`` slices: the bag's padding cut off, blank slices at the end, which it does not hold, as 0."""
    return np.pad(scores[:slices], ((0, max(0, slices - len(scores))), (0, 0)))

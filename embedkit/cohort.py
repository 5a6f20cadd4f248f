"""Owns a cohort as one looks at it: cases with their columns, stacks, predictions and neighbours as plain values.

It reads a cache, an index and runs, and knows nothing of web pages. A case of the cohort and a new image are both a
`Subject`; what can be asked of one can be asked of the other. No patient and no path is among the values given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.answers import choose_class, stated_times, word_answer
from embedkit.cache import Cache, open_originals
from embedkit.errors import OptionError, RecipeError, RequestError, RunError, SearchError
from embedkit.index import Index, open_index
from embedkit.indexlabels import join_labels
from embedkit.manifest import read_labels
from embedkit.patches import frame_image
from embedkit.queries import Query, open_slices
from embedkit.retrieval import search
from embedkit.runs import Run, check_cache, open_run, predict

__all__ = ["Cohort", "Subject", "column_kind", "open_cohort", "query_views"]

FloatArray = NDArray[np.float32]

_HIDDEN = ("case_id", "patient_id")
_MOST_NAMES = 40
_FEW_NUMBERS = 8


@dataclass(frozen=True, eq=False)
class Subject:
    """A case that is looked at: one of the cohort, or a new image.

    Attributes:
        cache: Holds it.
        case_id: Its id in ``cache``.
        name: What it is called on a page.
        vector: float32 [dim], its query vector; None for a case of the index.
        patient: Whose image it is; None where nobody told. Never among the values given.
    """

    cache: Cache
    case_id: str
    name: str
    vector: FloatArray | None = None
    patient: str | None = None

    @property
    def stacks(self) -> dict[str, int]:
        """Its stacks in ``cache`` by ``view/plane``."""
        rows = self.cache.stacks.filter(pl.col("case_id") == self.case_id).select("view", "plane", "stack")
        return {f"{view}/{plane}": stack for view, plane, stack in rows.iter_rows()}

    def stack(self, view: str) -> int:
        """The stack of a ``view/plane``.

        Raises:
            RequestError: the case lacks it.
        """
        stacks = self.stacks
        if view not in stacks:
            raise RequestError(f"{self.name} has no view {view!r}; it has {', '.join(stacks)}")
        return stacks[view]


class Cohort:
    """Cases of an index with all that is known of them; made by `open_cohort`.

    Attributes:
        cache: Holds every case of the index.
        index: Its case table has the columns to colour, show and filter by.
        runs: By name, of the cache's recipe.
    """

    def __init__(self, cache: Cache, index: Index, runs: Mapping[str, Run]) -> None:
        self.cache = cache
        self.index = index
        self.runs = dict(runs)
        self.case_ids: list[str] = index.cases["case_id"].to_list()
        self._rows = {case_id: row for row, case_id in enumerate(self.case_ids)}
        self._columns = {name: index.cases[name] for name in index.cases.columns if name not in _HIDDEN}
        for name, run in self.runs.items():
            self._columns[f"{name} (out of fold)"] = self._held_out_column(run)

    def describe(self) -> dict[str, Any]:
        """What the cohort is: counts, embedding, columns with their kinds, runs with their classes."""
        return {
            "cases": self.case_ids,
            "unindexed": self.cache.stacks["case_id"].n_unique() - len(self.case_ids),
            "embedding": self.index.embedding,
            "backbone": self.index.recipe.backbone,
            "query_views": query_views(self.index),
            "columns": [
                {
                    "name": name,
                    "kind": column_kind(values),
                    "label": name in self.index.cases.columns,
                    "example": _plain(values.drop_nulls().first()) if values.drop_nulls().len() else None,
                }
                for name, values in self._columns.items()
            ],
            "runs": [
                {
                    "name": name,
                    "target": run.record.target,
                    "head": run.head,
                    "kind": run.record.kind,
                    "classes": run.record.classes,
                }
                for name, run in self.runs.items()
            ],
        }

    def column(self, name: str) -> dict[str, Any]:
        """The values of a column, in the order of the cases; null where unknown.

        Raises:
            RequestError: no such column.
        """
        if name not in self._columns:
            raise RequestError(f"there is no column {name!r}; there are {', '.join(self._columns) or 'none'}")
        values = self._columns[name]
        return {"name": name, "kind": column_kind(values), "values": [_plain(value) for value in values]}

    def subject(self, case_id: str) -> Subject:
        """A case of the cohort.

        Raises:
            RequestError: no such case.
        """
        if case_id not in self._rows:
            raise RequestError(f"there is no case {case_id!r} in index {self.index.path}; it holds {len(self._rows)}")
        return Subject(self.cache, case_id, case_id, patient=self.index.cases["patient_id"][self._rows[case_id]])

    def labels(self, case_id: str) -> dict[str, Any]:
        """What the columns say of a case of the cohort; runs' columns are left out."""
        row = self._rows[case_id]
        return {name: _plain(self.index.cases[name][row]) for name in self.index.cases.columns if name not in _HIDDEN}

    def stacks(self, subject: Subject) -> list[dict[str, Any]]:
        """The stacks of a case: their slices, and the side of their previews (null where the cache keeps none)."""
        return [_describe_stack(subject.cache, view, stack) for view, stack in subject.stacks.items()]

    def predictions(self, subject: Subject) -> list[dict[str, Any]]:
        """What each run says of a case, with ``source``: how far the run knew it.

        ``out_of_fold``: by the model that never saw its patient; ``ensemble``: by all models, none of which saw its
        patient; ``seen``: by all models, some of which were trained on its patient; ``new_image``: by all models, and
        nobody knows whose image it is, so that they may have been trained on its patient. A run that cannot judge the
        case says why in its ``answer``.
        """
        return [self._predict(name, run, subject) for name, run in self.runs.items()]

    def neighbours(
        self, subject: Subject, *, k: int = 10, where: str | None = None, exclude_same_patient: bool = False
    ) -> list[dict[str, Any]]:
        """The most similar cases: rank, id, similarity, labels, whether of the query's patient, and a slice to show.

        Raises:
            RequestError: other patients are asked for, but nobody told whose image the query is.
            SearchError: as `embedkit.retrieval.search`.
        """
        exclude = "patient_id" if exclude_same_patient else None
        if subject.vector is None:
            found = search(self.index, case_id=subject.case_id, k=k, where=where, exclude_same=exclude)
        else:
            if exclude_same_patient and subject.patient is None:
                raise RequestError(
                    "nobody told whose scan this is, so its patient cannot be left out; send it again"
                    " with the patient's id"
                )
            slices = open_slices(self.index, subject.cache).read(subject.case_id)
            known = {"patient_id": subject.patient}
            query = Query(subject.name, None, subject.vector, slices, None, known)
            found = search(self.index, query=query, k=k, where=where, exclude_same=exclude, cache=self.cache)
        columns = ("rank", "case_id", "patient_id", "similarity")
        return [
            {
                "rank": rank,
                "case_id": case_id,
                "similarity": similarity,
                "same_patient": other == subject.patient,
                "labels": self.labels(case_id),
                "thumbnail": _describe_thumbnail(self.subject(case_id)),
            }
            for rank, case_id, other, similarity in found.select(columns).iter_rows()
        ]

    def holds_out(self, run: Run, subject: Subject) -> bool:
        """True where a fold of the run tested the case, so that one of its models never saw its patient."""
        return subject.vector is None and bool((run.predictions["case_id"] == subject.case_id).any())

    def run(self, name: str) -> Run:
        """A run by its name.

        Raises:
            RequestError: no such run.
        """
        if name not in self.runs:
            raise RequestError(f"there is no run {name!r}; there are {', '.join(self.runs) or 'none'}")
        return self.runs[name]

    def _predict(self, name: str, run: Run, subject: Subject) -> dict[str, Any]:
        record = run.record
        columns = list(record.score_columns)
        tested = run.predictions.filter(pl.col("case_id") == subject.case_id)
        if self.holds_out(run, subject):
            source, answers = "out_of_fold", tested
        else:
            source = self._source(run, subject)
            answers = None
        said: dict[str, Any] = {
            "run": name,
            "target": record.target,
            "head": run.head,
            "source": source,
            "folds": tested["fold"].to_list() if source == "out_of_fold" else [],
            "truth": None if subject.vector is not None else self.labels(subject.case_id).get(record.target),
        }
        nothing: dict[str, Any] = {"answer": "no usable slice in the run's views", "probability": None, "scores": []}
        try:
            answers = (
                predict(run, subject.cache, case_ids=[subject.case_id], device="cpu") if answers is None else answers
            )
        except RunError as error:  # a view that the run does not know: the other runs still have their say
            return said | nothing | {"answer": str(error)}
        if answers[columns[0]].null_count():
            return said | nothing
        scores = answers.select(columns).to_numpy().mean(0, dtype=np.float64)
        times = stated_times(record.kind, columns)
        place = choose_class(record.kind, record.classes, scores, None)
        if record.kind == "binary":
            place = int(scores[0] >= 0.5)
        likely = scores[place] if record.kind != "binary" else max(scores[0], 1 - scores[0])
        return said | {
            "answer": word_answer(record.kind, record.classes, record.target, scores, place, times=times),
            "probability": _plain(likely) if record.classes else None,
            "scores": [
                {"name": column.removeprefix("score_"), "value": _plain(score)}
                for column, score in zip(columns, scores, strict=True)
            ],
        }

    def _source(self, run: Run, subject: Subject) -> str:
        """How far all models of a run together knew a case; see `predictions`."""
        if subject.patient is None:
            return "new_image"
        return "seen" if subject.patient in run.training_patients else "ensemble"

    def _held_out_column(self, run: Run) -> pl.Series:
        """What a run said of each case that it was not trained on: a score where there is one, else a class."""
        columns = list(run.record.score_columns)
        table = run.predictions.group_by("case_id", maintain_order=True).agg(pl.col(columns).mean())
        if columns[0] == "score":
            said = table["score"]
        else:
            best = table.select(columns).to_numpy().argmax(1)
            said = pl.Series([columns[place].removeprefix("score_") for place in best], dtype=pl.String)
        pairs = table.select("case_id", said=said)
        return self.index.cases.select("case_id").join(pairs, on="case_id", how="left", maintain_order="left")["said"]


def open_cohort(
    cache: str | Path, index: str | Path, runs: Sequence[str | Path] = (), *, labels: str | Path | None = None
) -> Cohort:
    """Opens what a page shows, and checks that it belongs together.

    Args:
        cache: Folder or packed file.
        index: Of that cache.
        runs: Folders of runs, of that cache's recipe.
        labels: A table by case_id whose columns are added to those of the index, or take their places.

    Raises:
        CacheError, SearchError, RunError, ManifestError: one of them cannot be read.
        SearchError: the index is one of slices.
        RecipeError: they are not of one recipe.
        OptionError: a run is given twice.
    """
    source, opened = open_originals(cache), open_index(index)
    if opened.level != "case":
        raise SearchError(
            f"index {opened.path} holds vectors of each {opened.level}, but a page shows cases; build one of level case"
        )
    if source.fingerprint != opened.fingerprint:
        raise RecipeError(
            f"index {opened.path} was made from a cache of recipe {opened.fingerprint}, but {source.path} is of"
            f" {source.fingerprint}; give the cache that was indexed, or index this one"
        )
    held = set(source.stacks["case_id"])
    if missing := [case for case in opened.cases["case_id"] if case not in held]:
        raise SearchError(
            f"index {opened.path} holds {len(missing)} cases that {source.path} lacks ({', '.join(missing[:3])});"
            " give the cache that was indexed, or index this one"
        )
    if labels is not None:
        table = read_labels(labels)
        kept = [name for name in opened.cases.columns if name in _HIDDEN or name not in table.columns]
        opened.relabel(join_labels(opened.cases.select(kept), table))
    return Cohort(source, opened, dict(_open_runs(runs, source)))


def query_views(index: Index) -> list[str]:
    """The views that a new image may be; none where the backbone reads several views as channels of one image."""
    if index.recipe.channels:
        return []
    return sorted({name.rpartition("/")[0] for name in index.details["views"]})


def column_kind(values: pl.Series) -> str:
    """``number`` for many numbers, ``category`` for few values, ``text`` for what has too many names to tell apart."""
    distinct = values.drop_nulls().n_unique()
    if values.dtype.is_numeric() and (values.dtype.is_float() or distinct > _FEW_NUMBERS):
        return "number"
    return "category" if distinct <= _MOST_NAMES else "text"


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it: no NaN, nothing but text, numbers, booleans and null."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _open_runs(paths: Sequence[str | Path], cache: Cache) -> Iterator[tuple[str, Run]]:
    opened = [open_run(path) for path in paths]
    names = [run.name for run in opened]
    taken: set[str] = set()
    for run in opened:
        check_cache(run.record, cache)
        name = run.name if names.count(run.name) == 1 else f"{run.path.resolve().parent.name}/{run.name}"
        if name in taken:
            raise OptionError(f"run {name} is given twice; name each run once")
        taken.add(name)
        yield name, run


def _describe_stack(cache: Cache, view: str, stack: int) -> dict[str, Any]:
    table, record = cache.slices(stack), cache.record(stack)
    preview = cache.preview(stack)
    return {
        "view": view,
        "slices": len(table.indices),
        "indices": table.indices.tolist(),
        "positions_mm": [round(float(value), 2) for value in table.positions_mm],
        "blank": table.blank.tolist(),
        "preview": None if preview is None else int(preview.shape[1]),
        "image": frame_image(record.plane_shape, record.box),
    }


def _describe_thumbnail(subject: Subject) -> dict[str, Any] | None:
    """The middle slice of a case's first stack: its view, row and side; None where the cache keeps no previews."""
    view, stack = next(iter(subject.stacks.items()))
    preview = subject.cache.preview(stack)
    if preview is None:
        return None
    rows = np.flatnonzero(~subject.cache.slices(stack).blank)
    return {"view": view, "row": int(rows[len(rows) // 2]), "side": int(preview.shape[1])}

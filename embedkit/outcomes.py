"""Owns outcomes: what a run said of each case beside what was true, as arrays; computes no metric and reads no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.answers import score_array, score_columns, stated_times
from embedkit.bootstrap import Floats
from embedkit.targets import TaskKind

__all__ = ["Outcomes", "encode_truth", "read_outcomes"]


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Truth and scores of the same cases.

    Attributes:
        kind: Of the task.
        classes: As `Task.classes`.
        case_ids, patient_ids: Of each case.
        targets: As `Task.targets`, one per case.
        scores: As `compute_metrics` takes them, with the repeats in front: [repeats cases] or [repeats cases classes].
        folds: int64 [repeats cases], which member gave each score; -1 where all members gave it together.
        times: As `Task.times`.
    """

    kind: TaskKind
    classes: tuple[str, ...]
    case_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    targets: NDArray[Any]
    scores: Floats
    folds: NDArray[np.int64]
    times: tuple[float, ...] = ()

    def select(self, chosen: NDArray[np.bool_]) -> Outcomes:
        """Those of some of the cases, bool [cases]."""
        places = np.flatnonzero(chosen)
        return replace(
            self,
            case_ids=tuple(self.case_ids[place] for place in places),
            patient_ids=tuple(self.patient_ids[place] for place in places),
            targets=self.targets[places],
            scores=self.scores[:, places],
            folds=self.folds[:, places],
        )


def read_outcomes(kind: TaskKind, classes: Sequence[str], table: pl.DataFrame) -> Outcomes:
    """Outcomes from a table of predictions in the form of ``predictions.parquet``, sorted by case.

    Args:
        kind, classes: Of the run.
        table: ``case_id``, ``patient_id``, ``fold``, ``target`` (for survival ``event`` too) and the score columns; a
            case has as many rows as there are repeats.
    """
    numbered = table.sort("case_id", "fold").with_columns(_repeat=pl.int_range(pl.len()).over("case_id"))
    repeats = numbered.partition_by("_repeat", maintain_order=True)
    first = repeats[0]
    times = stated_times(kind, first.columns)
    columns = score_columns(kind, classes, times)
    return Outcomes(
        kind,
        tuple(classes),
        tuple(first["case_id"]),
        tuple(first["patient_id"]),
        encode_truth(kind, classes, first),
        np.stack([score_array(kind, part.select(columns).to_numpy()) for part in repeats]),
        np.stack([part["fold"].to_numpy() for part in repeats]).astype(np.int64),
        times,
    )


def encode_truth(kind: TaskKind, classes: Sequence[str], table: pl.DataFrame) -> NDArray[Any]:
    """`Task.targets` from the column ``target`` (and ``event`` of a survival task) of a table of predictions."""
    if kind == "regression":
        return table["target"].cast(pl.Float64).to_numpy()
    if kind == "survival":
        return table.select(pl.col("target", "event").cast(pl.Float64)).to_numpy()
    names = table["target"].cast(pl.String).to_list()
    if kind == "multilabel":
        return np.array([[int(name in cell.split(";")) for name in classes] for cell in names], dtype=np.int64)
    codes = {name: code for code, name in enumerate(classes)}
    return np.array([codes[name] for name in names], dtype=np.int64)

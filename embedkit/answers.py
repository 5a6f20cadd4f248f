"""Owns how the scores of a task are named, laid out and put in words; knows no head and no file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedkit.targets import TaskKind

__all__ = ["choose_class", "name_classes", "score_array", "score_columns", "stated_times", "word_answer"]

_SURVIVAL = "survival_"


def score_columns(kind: TaskKind, classes: Sequence[str], times: Sequence[float] = ()) -> tuple[str, ...]:
    """Columns of predictions: ``score`` for binary and regression, else ``score_CLASS`` for each class.

    Survival: ``score``, the risk, then ``survival_TIME`` for each stated time: the chance to be without the event then.
    """
    if kind == "survival":
        return ("score", *(f"{_SURVIVAL}{time:.12g}" for time in times))
    return ("score",) if kind in ("binary", "regression") else tuple(f"score_{name}" for name in classes)


def stated_times(kind: TaskKind, columns: Sequence[str]) -> tuple[float, ...]:
    """The times of a survival task from the columns of its predictions, () for other kinds."""
    if kind != "survival":
        return ()
    return tuple(float(name.removeprefix(_SURVIVAL)) for name in columns if name.startswith(_SURVIVAL))


def score_array(kind: TaskKind, scores: NDArray[Any]) -> NDArray[np.float64]:
    """Scores [cases columns] as `compute_metrics` takes them: one column flat, multiclass rows summing to 1."""
    values: NDArray[np.float64] = scores.astype(np.float64)
    if kind == "multiclass":
        values /= values.sum(1, keepdims=True)
    return values[:, 0] if kind in ("binary", "regression") else values


def name_classes(kind: TaskKind, classes: Sequence[str], scores: NDArray[Any]) -> list[str]:
    """The predicted class of each row of scores [cases outputs]; for multilabel the labels between ``;``."""
    if kind == "binary":
        return [classes[int(score >= 0.5)] for score in scores[:, 0]]
    if kind == "multiclass":
        return [classes[code] for code in scores.argmax(1)]
    return [";".join(name for name, score in zip(classes, row, strict=True) if score >= 0.5) for row in scores]


def choose_class(kind: TaskKind, classes: Sequence[str], scores: NDArray[Any], class_name: str | None) -> int:
    """The place in ``classes`` of the class to explain: the one named, else the positive or the most probable one.

    0 for a regression and for survival.
    """
    if class_name is not None:
        return classes.index(class_name)
    return {"binary": 1, "regression": 0, "survival": 0}.get(kind, int(scores.argmax()))


def word_answer(
    kind: TaskKind,
    classes: Sequence[str],
    target: str,
    scores: NDArray[Any],
    place: int,
    *,
    times: Sequence[float] = (),
) -> str:
    """What scores [columns] say of the class at ``place``, in words; of survival, the chances at some stated times."""
    if kind == "survival":
        shown = range(len(times)) if len(times) <= 4 else (len(times) // 4, len(times) // 2, 3 * len(times) // 4)
        chances = ", ".join(f"{times[place]:g}: {scores[1 + place]:.2f}" for place in shown)
        return f"{target}: risk {scores[0]:.2f}, chance to be without the event at {chances}"
    if kind == "regression":
        return f"{target} = {scores[0]:.4g}"
    probability = float(scores[place]) if kind != "binary" else float(scores[0] if place else 1 - scores[0])
    return f"{target} = {classes[place]} with probability {probability:.2f}"

"""Owns mistakes: which cases a run got wrong, and most confidently so; draws nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embedkit.answers import name_classes
from embedkit.bootstrap import Floats
from embedkit.outcomes import Outcomes

__all__ = ["Mistake", "find_mistakes", "is_wrong"]


@dataclass(frozen=True)
class Mistake:
    """A case that a run got wrong.

    Attributes:
        case_id, patient_id: Which.
        truth, answer: In words.
        score: How much the run made of its answer: its probability, or the distance from the truth of a regression.
        class_name: The class that it spoke for wrongly; None for a regression.
    """

    case_id: str
    patient_id: str
    truth: str
    answer: str
    score: float
    class_name: str | None


def find_mistakes(outcomes: Outcomes, *, most: int = 8) -> list[Mistake]:
    """The worst cases first: by the probability of the wrong answer, or by the error of a regression.

    Scores of repeated folds are averaged per case. A survival task has no wrong answers.
    """
    if outcomes.kind == "survival":
        return []
    scores = outcomes.scores.mean(axis=0)
    weight = _weigh(outcomes, scores)
    order = [int(case) for case in np.argsort(-weight, kind="stable")[:most] if weight[case] > 0]
    return [_describe(outcomes, scores, case, float(weight[case])) for case in order]


def is_wrong(outcomes: Outcomes) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """bool [cases]: whose answer is not the truth; never of a regression."""
    if not outcomes.classes:
        return np.zeros(len(outcomes.case_ids), dtype=np.bool_)
    return np.asarray(_weigh(outcomes, outcomes.scores.mean(axis=0)) > 0)


def _weigh(outcomes: Outcomes, scores: Floats) -> Floats:
    """float64 [cases]: how wrong each is; 0 where the answer is right."""
    targets = outcomes.targets
    if outcomes.kind == "regression":
        return np.asarray(np.abs(scores - targets))
    if outcomes.kind == "multiclass":
        return np.asarray(np.where(scores.argmax(axis=1) == targets, 0.0, scores.max(axis=1)))
    wrong = np.where((scores >= 0.5) == (targets == 1), 0.0, np.maximum(scores, 1 - scores))
    return np.asarray(wrong.max(axis=1) if outcomes.kind == "multilabel" else wrong)


def _describe(outcomes: Outcomes, scores: Floats, case: int, weight: float) -> Mistake:
    classes, truth = outcomes.classes, outcomes.targets[case]
    row = np.atleast_2d(scores[case])
    ids = outcomes.case_ids[case], outcomes.patient_ids[case]
    if outcomes.kind == "regression":
        return Mistake(*ids, f"{truth:.4g}", f"{scores[case]:.4g}", weight, None)
    answer = name_classes(outcomes.kind, classes, row)[0]
    if outcomes.kind == "multilabel":
        given = ";".join(name for name, has in zip(classes, truth, strict=True) if has)
        wrong = np.where((row[0] >= 0.5) == (truth == 1), 0.0, np.abs(row[0] - truth))
        return Mistake(*ids, given or "none", answer or "none", weight, classes[int(wrong.argmax())])
    return Mistake(*ids, classes[int(truth)], answer, weight, answer)

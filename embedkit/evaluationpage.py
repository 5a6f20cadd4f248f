"""Owns the report of an evaluation: what stands in it, in which order; judges nothing itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, precision_recall_curve

from embedkit.bootstrap import Floats, Interval
from embedkit.cache import Cache
from embedkit.canvas import describe_interval
from embedkit.casemap import choose_embedding, map_cases
from embedkit.charts import PrecisionLine, plot_agreement, plot_confusion, plot_map, plot_precision, plot_reliability
from embedkit.evaluation import Evaluation
from embedkit.explanation import draw_evidence
from embedkit.metrics import METRICS, compute_metrics
from embedkit.mistakes import Mistake, find_mistakes, is_wrong
from embedkit.outcomes import Outcomes
from embedkit.plots import RocLine, Score, plot_roc, plot_scores
from embedkit.report import Cell, Figure, Report, Section, Table, metric_title, write_report
from embedkit.roc import compute_roc
from embedkit.runs import check_cache
from embedkit.subgroups import shown_metrics
from embedkit.survivalsection import survival_section

__all__ = ["roc_line", "write_evaluation"]

_MOST_LINES = 6
_MOST_PICTURES = 6
_SHOWN_SLICES = 4


def write_evaluation(
    path: str | os.PathLike[str], evaluation: Evaluation, *, cache: Cache | None = None, seed: int = 0
) -> Path:
    """Writes the report of an evaluation as one HTML file.

    Args:
        path: Of the file.
        evaluation: What is told.
        cache: Holds the cases that were judged; None leaves the map and the slices of the mistakes out, and says so.
        seed: Of the map and of the curves' bands.

    Returns:
        The path.

    Raises:
        RunError: the file cannot be written, or the cache lacks a case or what the run reads.
        RecipeError: the cache has another recipe.
    """
    outcomes, record = evaluation.outcomes, evaluation.run.record
    if cache is not None:
        check_cache(record, cache)
    sections = (
        _score_section(evaluation),
        *_curve_section(evaluation, seed),
        *_calibration_section(evaluation),
        *_answer_section(outcomes, record.target),
        *((survival_section(outcomes, record.target, seed=seed),) if outcomes.kind == "survival" else ()),
        *_point_section(evaluation),
        *_subgroup_section(evaluation),
        *(() if cache is None else (_map_section(evaluation, cache, seed),)),
        *_mistake_section(evaluation, cache),
    )
    facts = (
        ("target", record.target),
        ("head", record.head),
        ("backbone", record.recipe.backbone),
        ("tokens", ", ".join(record.token_sets)),
        ("cases", f"{len(outcomes.case_ids):,} of {len(set(outcomes.patient_ids)):,} patients"),
        ("recipe", record.recipe.fingerprint),
    )
    page = Report(
        title=f"{evaluation.run.name}, {'out of fold' if evaluation.held_out else 'on new cases'}",
        lead=_word_lead(evaluation),
        sections=sections,
        facts=facts,
        footer="Intervals are of 95%, over patients. They do not tell how another training would turn out.",
    )
    return write_report(path, page)


def roc_line(outcomes: Outcomes, label: str, auroc: Interval | None, *, seed: int, baseline: bool = False) -> RocLine:
    """The ROC curve of a binary task; of repeated folds, that of the first."""
    curve = compute_roc(outcomes.targets, outcomes.scores[0], outcomes.patient_ids, seed=seed)
    return RocLine(label, curve, auroc, baseline=baseline)


def _word_lead(evaluation: Evaluation) -> str:
    name = METRICS[evaluation.outcomes.kind][0]
    text = f"{metric_title(name).rstrip(' ↓')} {describe_interval(evaluation.metrics[name])}"
    if evaluation.delong is not None:
        text += f"; DeLong's interval over patients [{evaluation.delong.low:.3f}, {evaluation.delong.high:.3f}]"
    source = (
        "each case scored by the head that was trained without its patient"
        if evaluation.held_out
        else "cases of patients that no head was trained on, scored by all heads together"
    )
    return f"{text}: {source}."


def _score_section(evaluation: Evaluation) -> Section:
    rows: list[tuple[Cell, ...]] = [(metric_title(name), each) for name, each in evaluation.metrics.items()]
    if evaluation.delong is not None:
        rows.insert(1, ("AUROC (DeLong)", evaluation.delong))
    method = "" if evaluation.method is None else f" Scores are calibrated ({evaluation.method}, from inner splits)."
    repeats = len(evaluation.outcomes.scores)
    repeated = f" Means over {repeats} deals of the folds; curves show the first." if repeats > 1 else ""
    return Section(
        "Scores",
        f"Intervals by bootstrap over patients.{method}{repeated}",
        table=Table(("Metric", "Value"), tuple(rows)),
    )


def _one_against_rest(outcomes: Outcomes) -> list[tuple[str, Outcomes]]:
    """A binary task per class: the positive one, each against the rest, or each label; those with both answers."""
    if outcomes.kind == "binary":
        parts = [(outcomes.classes[-1], outcomes.targets, outcomes.scores)]
    else:
        wide = outcomes.kind == "multilabel"
        parts = [
            (name, outcomes.targets[:, place] if wide else outcomes.targets == place, outcomes.scores[:, :, place])
            for place, name in enumerate(outcomes.classes)
        ]
    return [(name, _as_binary(outcomes, targets, scores)) for name, targets, scores in parts if 0 < targets.mean() < 1]


def _as_binary(outcomes: Outcomes, targets: NDArray[np.generic], scores: Floats) -> Outcomes:
    codes = np.asarray(targets).astype(np.int64)
    return Outcomes("binary", ("rest", "class"), outcomes.case_ids, outcomes.patient_ids, codes, scores, outcomes.folds)


def _curve_section(evaluation: Evaluation, seed: int) -> tuple[Section, ...]:
    outcomes = evaluation.outcomes
    parts = _one_against_rest(outcomes)[:_MOST_LINES] if outcomes.classes else []
    if not parts:
        return ()
    roc, precision = [], []
    for name, part in parts:
        own = evaluation.metrics
        if outcomes.kind != "binary":
            own = compute_metrics(
                "binary", part.targets, part.scores, part.patient_ids, repeated=True, resamples=1000, seed=seed
            )
        roc.append(roc_line(part, name, own["auroc"], seed=seed))
        found, recall, _ = precision_recall_curve(part.targets, part.scores[0])
        precision.append(PrecisionLine(name, recall[::-1], found[::-1], own["auprc"], float(part.targets.mean())))
    more = len(outcomes.classes) - len(parts) if outcomes.kind != "binary" else 0
    note = f" {more} more classes are not drawn." if more else ""
    against = "" if outcomes.kind == "binary" else " Each class against the rest."
    return (
        Section(
            "ROC and precision-recall",
            f"Band: 95% of the bootstrap's curves at each false positive rate. Dotted: guessing.{against}{note}",
            (
                Figure(plot_roc(roc), "AUROC with its interval.", "ROC curves"),
                Figure(plot_precision(precision), "Average precision with its interval.", "Precision-recall curves"),
            ),
        ),
    )


def _calibration_section(evaluation: Evaluation) -> tuple[Section, ...]:
    if not evaluation.calibration:
        return ()
    names = ("as the run gives them", f"calibrated: {evaluation.method}")[: len(evaluation.calibration)]
    curves = {name: each.reliability for name, each in zip(names, evaluation.calibration, strict=True)}
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (name, each.metrics["ece"], each.metrics["ece_adaptive"], each.debiased, each.metrics["brier"])
        for name, each in zip(names, evaluation.calibration, strict=True)
    )
    what = {"multiclass": "the most probable class", "multilabel": "every label"}.get(
        evaluation.outcomes.kind, f"class {evaluation.outcomes.classes[-1]}"
    )
    return (
        Section(
            "Calibration",
            f"How often {what} came true, over the probability given, in bins of like size. The usual ECE is too high"
            " with few cases, and its interval with it (bins of equal width; the adaptive one has bins of equally many"
            " cases); the debiased error takes off what chance adds.",
            (Figure(plot_reliability(curves), "Bars: 95% intervals over patients.", "Reliability"),),
            Table(("Scores", "ECE ↓", "Adaptive ECE ↓", "Debiased error ↓", "Brier ↓"), rows),
        ),
    )


def _answer_section(outcomes: Outcomes, target: str) -> tuple[Section, ...]:
    """Confusion matrix, or predictions over truth."""
    scores = outcomes.scores[0]
    if outcomes.kind == "regression":
        picture = plot_agreement(outcomes.targets, scores, name=target)
        figure = Figure(picture, "On the dotted line they agree.", "Predictions over truth")
        return (Section("Predictions and truth", "", (figure,)),)
    if outcomes.kind not in ("binary", "multiclass"):
        return ()
    answers = (scores >= 0.5).astype(np.int64) if outcomes.kind == "binary" else scores.argmax(axis=1)
    counts = confusion_matrix(outcomes.targets, answers, labels=range(len(outcomes.classes)))
    at = "at probability 0.5" if outcomes.kind == "binary" else "by the most probable class"
    figure = Figure(plot_confusion(counts, outcomes.classes), "Shade: share of the true class.", "Confusion matrix")
    return (Section("Confusion matrix", f"Cases by true class and answer, {at}.", (figure,)),)


def _point_section(evaluation: Evaluation) -> tuple[Section, ...]:
    if not evaluation.operating_points:
        return ()
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            str(point.goal),
            float(np.mean(point.thresholds)),
            point.sensitivity,
            point.specificity,
            point.ppv,
            point.npv,
            point.called,
        )
        for point in evaluation.operating_points
    )
    columns = ("Goal", "Mean threshold", "Sensitivity", "Specificity", "PPV", "NPV", "Called positive")
    return (
        Section(
            "Operating points",
            "Thresholds were chosen on the inner splits of each fold and are held against cases that they have not"
            " seen, so what is achieved may fall short of the goal. PPV and NPV are for the share of positives here.",
            table=Table(columns, rows, caption="Wilson's intervals at the effective number of cases of the patients."),
        ),
    )


def _subgroup_section(evaluation: Evaluation) -> tuple[Section, ...]:
    groups = evaluation.subgroups
    if not groups:
        return ()
    names = shown_metrics(evaluation.outcomes.kind)
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            f"{each.column}: {each.value}{' (small)' if each.small else ''}",
            each.cases,
            each.patients,
            *(each.metrics[name] for name in names),
        )
        for each in groups
    )
    panels: dict[str, Sequence[Score]] = {
        column: [Score(each.value, each.metrics[names[0]], each.small) for each in groups if each.column == column]
        for column in dict.fromkeys(each.column for each in groups)
    }
    title = metric_title(names[0])
    picture = plot_scores(
        panels, metric=title, chance=0.5 if names[0] in ("auroc", "c_index") else None, hollow="small"
    )
    return (
        Section(
            "Subgroups",
            "Hollow and grey: fewer than 20 patients, or fewer than 5 of a class, too few to conclude from. Many"
            " groups were looked at: one that stands apart may do so by chance.",
            (Figure(picture, f"{title} with its interval.", "Scores by subgroup"),),
            Table(
                ("Subgroup", "Cases", "Patients", *(metric_title(name) for name in names)),
                rows,
                quiet=tuple(row for row, each in enumerate(groups) if each.small),
            ),
        ),
    )


def _map_section(evaluation: Evaluation, cache: Cache, seed: int) -> Section:
    outcomes = evaluation.outcomes
    places, how = map_cases(cache, outcomes.case_ids, choose_embedding(evaluation.run.record.token_sets), seed=seed)
    groups: Sequence[str] | Floats
    if outcomes.kind in ("binary", "multiclass"):
        groups = [outcomes.classes[code] for code in outcomes.targets]
    elif outcomes.kind == "multilabel":
        groups = [";".join(np.array(outcomes.classes)[row == 1]) or "none" for row in outcomes.targets]
    else:
        groups = outcomes.targets.reshape(len(outcomes.case_ids), -1)[:, 0].astype(np.float64)
    picture = plot_map(places, groups, ringed=is_wrong(outcomes))
    return Section(
        "Map of the cases",
        f"Each dot is a case, coloured by its truth; like cases lie near each other ({how}). Rings: wrong answers. The"
        " tokens are those of the frozen backbone, averaged: no head has shaped this map.",
        (Figure(picture, "Only neighbourhoods mean something; axes have no unit.", "Map of the cases"),),
    )


def _mistake_section(evaluation: Evaluation, cache: Cache | None) -> tuple[Section, ...]:
    mistakes = find_mistakes(evaluation.outcomes)
    if not mistakes:
        return ()
    unit = "Error" if evaluation.outcomes.kind == "regression" else "Probability of the answer"
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (each.case_id, each.patient_id, each.truth, each.answer, each.score) for each in mistakes
    )
    figures: tuple[Figure, ...] = ()
    if cache is None:
        text = "Name the cache that the cases came from to see their slices."
    elif not cache.recipe.preview:
        text = "The cache keeps no previews, so there are no slices to show."
    else:
        text = "Slices of most evidence for the wrong answer, with what each patch adds to it."
        figures = tuple(_picture(evaluation, cache, each) for each in mistakes[:_MOST_PICTURES])
    table = Table(("Case", "Patient", "Truth", "Answer", unit), rows)
    return (Section("Worst mistakes", text, figures, table),)


def _picture(evaluation: Evaluation, cache: Cache, mistake: Mistake) -> Figure:
    png = draw_evidence(
        evaluation.run,
        cache,
        mistake.case_id,
        class_name=mistake.class_name,
        held_out=evaluation.held_out,
        slices=_SHOWN_SLICES,
    )
    caption = f"{mistake.case_id}: {mistake.truth}, taken for {mistake.answer} ({mistake.score:.3g})."
    return Figure(png, caption, f"Slices of {mistake.case_id}")

"""Owns the comparison of runs on the same cases: paired differences, p-values, correction for many; draws nothing.

Every run is judged by its out-of-fold scores on the same patients, so what makes a patient hard for both cancels. The
p-values ask whether the heads as they were trained differ on patients like these; that another training would give
other heads is not in them, as it is in no test on the scores of one cross-validation (Bengio and Grandvalet 2004).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from scipy.stats import false_discovery_control

from embedkit.bootstrap import Floats, Interval, Statistic, bootstrap_values, form_interval, two_sided_p
from embedkit.delong import compare_aurocs, estimate_aurocs
from embedkit.errors import OptionError, RunError
from embedkit.metrics import METRICS, metric_statistics, require_metric
from embedkit.outcomes import Outcomes, read_outcomes
from embedkit.runs import Run, open_run
from embedkit.targets import count_noun, list_some

__all__ = ["Comparison", "Contrast", "adjust_p_values", "compare_runs"]


@dataclass(frozen=True)
class Contrast:
    """Two runs on one metric.

    Attributes:
        first, second: Names of the runs.
        difference: First less second, with the interval of the paired bootstrap over patients.
        p_bootstrap: Two-sided, from the same resamples (`two_sided_p`).
        delong: The same difference with DeLong's interval; None but for the AUROC of a binary task.
        p_delong: Its p-value; None with it.
        p_holm, p_bh: ``p_value`` over all contrasts of the comparison, so that the chance of any false finding (Holm
            1979), or the expected share of false ones among the findings (Benjamini and Hochberg 1995), stays below it.
    """

    first: str
    second: str
    difference: Interval
    p_bootstrap: float
    delong: Interval | None = None
    p_delong: float | None = None
    p_holm: float = math.nan
    p_bh: float = math.nan

    @property
    def p_value(self) -> float:
        """DeLong's where there is one, else the bootstrap's."""
        return self.p_bootstrap if self.p_delong is None else self.p_delong


@dataclass(frozen=True, eq=False)
class _Entry:
    """A run in a comparison, under the name that tells it from the others."""

    name: str
    run: Run
    outcomes: Outcomes


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare_runs` found.

    Attributes:
        metric: That was compared.
        names: One per run, in the order given.
        runs: As opened.
        scores: The metric of each run by name, with the interval of the same resamples as the differences.
        contrasts: Of every pair, or of every run with the reference.
        cases, patients: How many are in common, which is all of each run.
        notes: What the reader should know, in sentences.
    """

    metric: str
    names: tuple[str, ...]
    runs: tuple[Run, ...]
    scores: dict[str, Interval]
    contrasts: tuple[Contrast, ...]
    cases: int
    patients: int
    notes: tuple[str, ...] = ()

    @property
    def table(self) -> pl.DataFrame:
        """One row per contrast: first, second, difference, low, high, p_bootstrap, p_delong, p_holm, p_bh."""
        rows = [
            {
                "first": each.first,
                "second": each.second,
                "difference": each.difference.value,
                "low": each.difference.low,
                "high": each.difference.high,
                "p_bootstrap": each.p_bootstrap,
                "p_delong": each.p_delong,
                "p_holm": each.p_holm,
                "p_bh": each.p_bh,
            }
            for each in self.contrasts
        ]
        return pl.DataFrame(rows, schema_overrides={"p_delong": pl.Float64})

    def __str__(self) -> str:
        return str(self.table)


def compare_runs(
    runs: Sequence[Run | Path | str],
    *,
    metric: str | None = None,
    reference: Run | Path | str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compares runs of one target on the cases that all of them were tested on.

    Args:
        runs: Two or more runs or their folders.
        metric: One of the kind's; None is the first of `METRICS`, ``auroc`` or, of a regression, ``mae``.
        reference: One of ``runs``, with which each of the others is compared; None compares every pair.
        resamples: Of the bootstrap over patients.
        seed: Of the bootstrap.

    Raises:
        RunError: a folder is no run, or the runs have other targets, classes, cases, patients or labels.
        OptionError: fewer than two runs, the same one twice, a reference that is none of them, a metric that the kind
            does not have, or fewer than 1 resample.
    """
    entries = _enter([run if isinstance(run, Run) else open_run(run) for run in runs])
    if resamples < 1:
        raise OptionError(f"{resamples} resamples were asked for, expected 1 or more")
    for entry in entries[1:]:
        _check_same(entries[0], entry)
    first = entries[0].outcomes
    metric = metric or METRICS[first.kind][0]
    require_metric(first.kind, metric)
    pairs = _pair_runs(entries, reference)
    groups = first.patient_ids
    values, resampled = _score_all(entries, metric, resamples=resamples, seed=seed)
    delong = _delong(entries, pairs) if metric == "auroc" and first.kind == "binary" else {}
    contrasts = [
        Contrast(
            one,
            other,
            form_interval(values[one] - values[other], resampled[one] - resampled[other], groups),
            two_sided_p(resampled[one] - resampled[other]),
            *delong.get((one, other), (None, None)),
        )
        for one, other in pairs
    ]
    return Comparison(
        metric,
        tuple(entry.name for entry in entries),
        tuple(entry.run for entry in entries),
        {name: form_interval(values[name], resampled[name], groups) for name in values},
        _correct(contrasts),
        len(first.case_ids),
        len(set(groups)),
        _notes(entries),
    )


def adjust_p_values(p_values: Sequence[float], *, method: str) -> Floats:
    """P-values that allow for their number.

    Args:
        p_values: NaN is passed over: it stays NaN and does not count.
        method: ``holm`` (Holm, "A simple sequentially rejective multiple test procedure" 1979) or ``bh`` (Benjamini
            and Hochberg 1995).

    Raises:
        OptionError: another method.
    """
    values = np.asarray(p_values, dtype=np.float64)
    tested = np.flatnonzero(~np.isnan(values))
    adjusted = np.full(len(values), np.nan)
    if method not in ("holm", "bh"):
        raise OptionError(f"no correction is called {method!r}; expected holm or bh")
    if not len(tested):
        return adjusted
    if method == "bh":
        adjusted[tested] = false_discovery_control(values[tested])
        return adjusted
    order = tested[np.argsort(values[tested], kind="stable")]
    adjusted[order] = np.minimum(1, np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)))
    return adjusted


def _correct(contrasts: Sequence[Contrast]) -> tuple[Contrast, ...]:
    p_values = [each.p_value for each in contrasts]
    holm, bh = (adjust_p_values(p_values, method=method).tolist() for method in ("holm", "bh"))
    return tuple(
        dataclasses.replace(each, p_holm=one, p_bh=two) for each, one, two in zip(contrasts, holm, bh, strict=True)
    )


def _enter(runs: Sequence[Run]) -> list[_Entry]:
    """The runs as ``TARGET.HEAD``, or by their folder where that is not unique."""
    if len(runs) < 2:
        raise OptionError(f"{count_noun(len(runs), 'run')} given to compare, expected two or more")
    names = [run.name for run in runs]
    named = [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise OptionError(f"run {twice[0]} was given twice, expected each once")
    return [
        _Entry(name, run, read_outcomes(run.record.kind, run.record.classes, run.predictions))
        for name, run in zip(named, runs, strict=True)
    ]


def _pair_runs(entries: Sequence[_Entry], reference: Run | Path | str | None) -> list[tuple[str, str]]:
    names = [entry.name for entry in entries]
    if reference is None:
        return list(itertools.combinations(names, 2))
    path = (reference.path if isinstance(reference, Run) else Path(reference)).resolve()
    chosen = [entry.name for entry in entries if entry.run.path.resolve() == path]
    if not chosen:
        raise OptionError(f"the reference {path} is none of the runs compared ({', '.join(names)}); name one of them")
    return [(name, chosen[0]) for name in names if name != chosen[0]]


def _check_same(one: _Entry, other: _Entry) -> None:
    """Stops where two runs are not about the same labels of the same cases."""
    first, second = one.run.record, other.run.record
    if (first.target, first.kind) != (second.target, second.kind):
        raise RunError(
            f"run {one.name} learned {first.target} ({first.kind}) and run {other.name} {second.target}"
            f" ({second.kind}), expected one target; compare runs of the same"
        )
    if first.classes != second.classes:
        raise RunError(
            f"run {one.name} has the classes {', '.join(first.classes)} and run {other.name}"
            f" {', '.join(second.classes)}, expected the same in the same order; train them alike"
        )
    for more, fewer in ((one, other), (other, one)):
        if extra := sorted(set(more.outcomes.case_ids) - set(fewer.outcomes.case_ids)):
            raise RunError(
                f"run {more.name} was tested on {count_noun(len(extra), 'case')}{list_some(extra)} that run"
                f" {fewer.name} was not, expected the same cases; train both with the same labels and split"
            )
    left, right = one.outcomes, other.outcomes
    pairs = zip(left.case_ids, left.patient_ids, right.patient_ids, strict=True)
    if moved := [case for case, before, after in pairs if before != after]:
        raise RunError(
            f"runs {one.name} and {other.name} name other patients for {count_noun(len(moved), 'case')}"
            f"{list_some(moved)}, expected the same; train both again"
        )
    unlike = (left.targets != right.targets).reshape(len(left.case_ids), -1).any(axis=1).tolist()
    if relabelled := [case for case, differs in zip(left.case_ids, unlike, strict=True) if differs]:
        raise RunError(
            f"runs {one.name} and {other.name} were trained with other labels for"
            f" {count_noun(len(relabelled), 'case')}{list_some(relabelled)}, expected the same; train both with the"
            " same label table"
        )


def _score_all(
    entries: Sequence[_Entry], metric: str, *, resamples: int, seed: int
) -> tuple[dict[str, float], dict[str, Floats]]:
    """The metric of every run, and in every resample, the same ones for all."""
    groups = entries[0].outcomes.patient_ids
    statistics = {entry.name: _statistics(entry.outcomes)[metric] for entry in entries}
    plain = np.ones((1, len(groups)))
    values = {name: float(statistic(plain)[0]) for name, statistic in statistics.items()}
    return values, bootstrap_values(statistics, groups, resamples=resamples, seed=seed)


def _statistics(found: Outcomes) -> dict[str, Statistic]:
    return metric_statistics(
        found.kind, found.targets, found.scores, found.patient_ids, repeated=True, times=found.times
    )


def _delong(
    entries: Sequence[_Entry], pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], tuple[Interval, float]]:
    first = entries[0].outcomes
    scores = [entry.outcomes.scores for entry in entries]
    aurocs = estimate_aurocs(first.targets, np.concatenate(scores), first.patient_ids).average(list(map(len, scores)))
    places = {entry.name: place for place, entry in enumerate(entries)}
    return {(one, other): compare_aurocs(aurocs, places[one], places[other]) for one, other in pairs}


def _notes(entries: Sequence[_Entry]) -> tuple[str, ...]:
    first = entries[0]
    others = [entry.name for entry in entries[1:] if not np.array_equal(entry.outcomes.folds, first.outcomes.folds)]
    if not others:
        return ()
    return (
        f"The folds of {', '.join(others)} differ from those of {first.name}: the heads learned from other cases, which"
        " is part of what is compared.",
    )

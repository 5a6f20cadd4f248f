"""Owns the splits of a task's cases: folds and inner splits that never part a patient's cases; knows no head.

A split is deterministic in its seed and in the order of the cases. What it must keep on both sides are the task's
``states``: its classes, and for multilabel each label and its absence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.model_selection import StratifiedGroupKFold

from embedkit.errors import OptionError, TaskError
from embedkit.targets import count_noun, list_some

if TYPE_CHECKING:
    from embedkit.tasks import Task

__all__ = ["folds_from_column", "folds_from_groups", "inner_split", "make_folds", "repeat_folds"]

_Ints = NDArray[np.int64]
_Bools = NDArray[np.bool_]

_ATTEMPTS = 32
_QUANTILE_BINS = 10
_TIME_BINS = 5
_TRAINING_NAMES = frozenset({"train", "training", "val", "valid", "validation", "dev"})


def make_folds(task: Task, n: int, *, seed: int) -> _Ints:
    """Deals the cases into folds that keep each patient whole and are alike in their targets.

    Stratified by class; by the rarest of a case's labels or absences for multilabel; by ten quantile bins for
    regression; for survival by event or none and five quantile bins of the time of each. Every class (or an event) is
    in every fold, so it is in the test part and in the training part of each.

    Args:
        task: Labelled cases.
        n: Number of folds, 2 or more.
        seed: Another seed deals otherwise.

    Returns:
        int64 [cases], the fold of each case in 0..n-1.

    Raises:
        OptionError: ``n`` is below 2.
        TaskError: fewer patients than folds, a class in fewer patients than folds, or no deal was found with every
            class in every fold (patients with cases of several classes can rule it out).
    """
    if n < 2:
        raise OptionError(f"{count_noun(n, 'fold')} asked for, expected 2 or more")
    patients = len(set(task.patient_ids))
    if patients < n:
        raise TaskError(
            f"target {task.name}: {count_noun(patients, 'labelled patient')} cannot fill {n} folds; ask for fewer"
            " folds, or label more cases"
        )
    for state, count in zip(task.states, task.patients_per_state, strict=True):
        if count < n:
            fewer = f"ask for at most {count} folds, " if count > 1 else ""
            way_out = "leave it out by naming the classes to learn, merge it with another class in the label table, or "
            raise TaskError(
                f"target {task.name}: {task.word_state(state)} occurs in {count_noun(count, 'patient')}, fewer than the"
                f" {n} folds, so a fold would lack it; {fewer}{way_out if task.classes else 'or '}add cases"
            )
    for folds in _deal(task, np.arange(len(task.case_ids)), n, seed):
        lacks = [_first_absent(task, folds == fold) for fold in range(n)]
        if all(lack is None for lack in lacks):
            return folds
    fold, lack = next((fold, lack) for fold, lack in enumerate(lacks) if lack is not None)
    raise TaskError(
        f"target {task.name}: no deal of {patients} patients into {n} folds was found with every class in every fold"
        f" (fold {fold} lacked {lack}); ask for fewer folds, or leave a rare class out by naming the classes to learn"
    )


def repeat_folds(task: Task, n: int, *, repeats: int, seed: int) -> _Ints:
    """Deals the cases several times over, each time anew: repeated cross-validation.

    The first deal is that of `make_folds`. A score averaged over deals no longer hangs on the luck of one.

    Args:
        task, n, seed: As in `make_folds`.
        repeats: Number of deals, 1 or more.

    Returns:
        int64 [repeats cases]; the folds of the second deal are numbered from ``n`` on, and so forth.

    Raises:
        OptionError: ``repeats`` is below 1; or as `make_folds`.
        TaskError: as `make_folds`.
    """
    if repeats < 1:
        raise OptionError(f"{count_noun(repeats, 'repeat')} of the folds asked for, expected 1 or more")
    later = np.random.SeedSequence([seed, n]).generate_state(repeats - 1).tolist()
    deals = [make_folds(task, n, seed=each) for each in (seed, *later)]
    return np.stack(deals) + n * np.arange(repeats)[:, None]


def folds_from_groups(task: Task, table: pl.DataFrame, column: str) -> _Ints:
    """One fold per value of a column: leave one site out, or one scanner, or one year.

    Each site's cases are tested by a head that saw no case of that site, which tells how a head fares at a site that
    is new to it. A site may lack a class; pooled scores need none in every fold.

    Args:
        task: Labelled cases.
        table: ``case_id`` and ``column``, as in `folds_from_column`; here the names of the values mean nothing.
        column: Holds text or whole numbers.

    Returns:
        int64 [cases], the fold of each case, in the sorted order of the values.

    Raises:
        TaskError: as `folds_from_column`.
    """
    values = _split_values(task, table, column)
    return _fold_cases(task, values, {name: code for code, name in enumerate(_sort_values(values, column))}, column)


def folds_from_column(task: Task, table: pl.DataFrame, column: str) -> _Ints:
    """Takes the folds from a column: a published split.

    Where the values are ``test`` and names of a training part (train, training, val, valid, validation, dev; in any
    case), the test cases are fold 0 and the others -1: always in training, never tested. Else each value is one fold,
    in sorted order.

    Args:
        task: Labelled cases.
        table: ``case_id`` and ``column``; several rows of a case must agree, cases without label are passed over.
        column: Holds text or whole numbers.

    Returns:
        int64 [cases], the fold of each case, -1 where a case is in no test part.

    Raises:
        TaskError: no such column, a case without a value or with two, a patient in two folds, a single value, or a
            class that is absent from the training part of a fold.
    """
    values = _split_values(task, table, column)
    names = _sort_values(values, column)
    codes = {name: code for code, name in enumerate(names)}
    if "test" in {name.lower() for name in names} and {name.lower() for name in names} <= _TRAINING_NAMES | {"test"}:
        codes = {name: 0 if name.lower() == "test" else -1 for name in names}
    return _fold_cases(task, values, codes, column)


def inner_split(task: Task, training_cases: _Bools, *, fraction: float, seed: int) -> _Bools:
    """Holds out a part of the training cases to stop or select by, patients whole and alike in their targets.

    Every class stays in training, and every class that two or more of the patients have is held out too unless that
    would take another from training.

    Args:
        task: Labelled cases.
        training_cases: bool [cases], the cases that may be used.
        fraction: Part to hold out, above 0 and at most 0.5; rounded to one k-th.
        seed: Another seed holds out others.

    Returns:
        bool [cases], True where held out; within ``training_cases``.

    Raises:
        OptionError: ``fraction`` is out of range.
        TaskError: fewer than two patients in training, or no split that keeps every class in training.
    """
    if not 0 < fraction <= 0.5:
        raise OptionError(f"an inner split of {fraction:g} was asked for, expected above 0 and at most 0.5")
    cases = np.flatnonzero(training_cases)
    names, owner = np.unique(np.asarray(task.patient_ids)[cases], return_inverse=True)
    if len(names) < 2:
        raise TaskError(f"target {task.name}: {count_noun(len(names), 'patient')} in training, expected 2 or more")
    folds = next(_deal(task, cases, min(round(1 / fraction), len(names)), seed))
    states = np.zeros((len(names), len(task.states)), dtype=bool)
    np.logical_or.at(states, owner, task.membership[cases])
    held = np.zeros(len(names), dtype=bool)
    held[owner[folds == folds.max()]] = True
    _share_states(held, states, np.random.default_rng(seed))
    if not held.any():
        raise TaskError(
            f"target {task.name}: no inner split of {len(names)} training patients keeps every class in training; add"
            " cases, or leave rare classes out by naming the classes to learn"
        )
    held_out = np.zeros(len(task.case_ids), dtype=bool)
    held_out[cases] = held[owner]
    return held_out


def _share_states(held: _Bools, states: _Bools, rng: np.random.Generator) -> None:
    """Moves patients until training has every state, then until the held out part has all that training can spare.

    Args:
        held: bool [patients], changed in place.
        states: bool [patients states].
        rng: Picks among a state's patients.
    """
    owners = [rng.permutation(np.flatnonzero(column)) for column in states.T]
    for patients in owners:
        if held[patients].all():
            held[patients[:1]] = False
    for patients in owners:
        for patient in patients if not held[patients].any() else ():
            training = ~held
            training[patient] = False
            if (states[training].any(axis=0) | ~states.any(axis=0)).all():
                held[patient] = True
                break


def _deal(task: Task, cases: _Ints, parts: int, seed: int) -> Iterator[_Ints]:
    """Grouped, stratified deals of ``cases`` into parts, each int64 [cases]; the same sequence for the same seed."""
    strata = _merge_rare(_stratify(task, cases, parts), parts)
    patients = np.unique(np.asarray(task.patient_ids)[cases], return_inverse=True)[1]
    for attempt in range(_ATTEMPTS):
        state = int(np.random.SeedSequence([seed, attempt]).generate_state(1)[0])
        splitter = _Dealer(parts, shuffle=True, random_state=state)
        folds = np.zeros(len(cases), dtype=np.int64)
        for part, (_, tested) in enumerate(splitter.split(strata, strata, patients)):
            folds[tested] = part
        yield folds


class _Dealer(StratifiedGroupKFold):  # type: ignore[misc]  # scikit-learn has no types
    """scikit-learn's deal, with all folds that a patient may join weighed at once: the same in a fifth of the time.

    The method is a private one of scikit-learn's; were it to go, deals would be as they are now and take longer.
    """

    def _find_best_fold(
        self, y_counts_per_fold: NDArray[np.float64], y_cnt: _Ints, group_y_counts: NDArray[np.float64]
    ) -> int:
        """The fold whose gain of a patient spreads the classes [folds classes] best; the smallest of equals."""
        joined = np.eye(self.n_splits)[..., None] * group_y_counts + y_counts_per_fold
        spread = (joined / y_cnt).std(1).mean(1).tolist()
        sizes = y_counts_per_fold.sum(1).tolist()
        best = 0
        for fold in range(1, self.n_splits):
            alike = abs(spread[fold] - spread[best]) <= 1e-8 + 1e-5 * spread[best]  # as numpy.isclose has it
            if spread[fold] < spread[best] or (alike and sizes[fold] < sizes[best]):
                best = fold
        return best


def _stratify(task: Task, cases: _Ints, parts: int) -> _Ints:
    """int64 [cases]: the rarest state of each case, or the quantile bin of its target; of a time, ``parts`` or more."""
    if task.kind == "regression":
        ranks = rankdata(task.targets[cases]) - 0.5
        return np.asarray(ranks * _QUANTILE_BINS / len(cases)).astype(np.int64)
    if task.kind == "survival":
        return _stratify_followup(task.targets[cases, 0], task.targets[cases, 1], parts)
    membership = task.membership[cases]
    rarity = np.where(membership, membership.sum(axis=0), len(cases) + 1)
    return np.asarray(rarity.argmin(axis=1), dtype=np.int64)


def _stratify_followup(times: NDArray[np.float64], events: NDArray[np.float64], parts: int) -> _Ints:
    """int64 [cases]: event or none, and among those the quantile bin of the time, with ``parts`` cases or more each."""
    strata = np.zeros(len(times), dtype=np.int64)
    for happened in (0, 1):
        inside = events == happened
        size = int(inside.sum())
        bins = min(_TIME_BINS, max(1, size // parts))
        ranks = rankdata(times[inside], method="ordinal") - 1
        strata[inside] = happened * _TIME_BINS + ranks * bins // max(1, size)
    return strata


def _merge_rare(strata: _Ints, parts: int) -> _Ints:
    """Strata with fewer cases than parts become one; the commonest takes them in if that is still too small."""
    values, counts = np.unique(strata, return_counts=True)
    rare = np.isin(strata, values[counts < parts])
    merged = -1 if rare.sum() >= parts else int(values[counts.argmax()])
    return np.where(rare, merged, strata)


def _first_absent(task: Task, inside: _Bools) -> str | None:
    """What a part of the cases lacks, in words: the first class that is not in it, or any case."""
    if not inside.any():
        return "any case"
    columns = task.membership[inside].T
    return next(
        (task.word_state(state) for state, column in zip(task.states, columns, strict=True) if not column.any()), None
    )


def _sort_values(values: Sequence[str], column: str) -> list[str]:
    """The distinct values, numbers first; two or more."""
    names = sorted(set(values), key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    if len(names) < 2:
        raise TaskError(f"split column {column} is {names[0]} for all labelled cases, expected two or more values")
    return names


def _fold_cases(task: Task, values: Sequence[str], codes: dict[str, int], column: str) -> _Ints:
    """int64 [cases]: the code of each case's value, once patients are whole and every training part has every class."""
    _check_patients_whole(task, values, codes, column)
    folds = np.array([codes[value] for value in values], dtype=np.int64)
    for name, code in codes.items():
        lack = _first_absent(task, folds != code) if code >= 0 else None
        if lack is not None:
            raise TaskError(
                f"split column {column}: without {name} the training part lacks {lack} of target {task.name}; merge"
                " folds, or leave that class out by naming the classes to learn"
            )
    return folds


def _check_patients_whole(task: Task, values: Sequence[str], codes: dict[str, int], column: str) -> None:
    seen: dict[str, str] = {}
    for patient, value in zip(task.patient_ids, values, strict=True):
        first = seen.setdefault(patient, value)
        if codes[first] != codes[value]:
            raise TaskError(
                f"split column {column} puts cases of patient {patient} into {first} and {value}, expected all in one;"
                " correct the column"
            )


def _split_values(task: Task, table: pl.DataFrame, column: str) -> list[str]:
    """The split column's value of each case of the task, as text."""
    for name in ("case_id", column):
        if name not in table.columns:
            raise TaskError(f"no column {name} to split by; the table has {', '.join(table.columns)}")
    found: dict[str, str] = {}
    for case, value in table.select(pl.col("case_id", column).cast(pl.String).str.strip_chars()).iter_rows():
        if value and found.setdefault(case, value) != value:
            raise TaskError(f"split column {column} gives case {case} both {found[case]} and {value}, expected one")
    absent = [case for case in task.case_ids if case not in found]
    if absent:
        raise TaskError(
            f"split column {column} has no value for {count_noun(len(absent), 'labelled case')}{list_some(absent)};"
            " fill it in, or leave their label empty"
        )
    return [found[case] for case in task.case_ids]

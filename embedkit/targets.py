"""Owns how a column of labels becomes numbers: the kind of task it asks for, its classes and their codes.

Knows no case table, no patient and no split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.errors import TaskError

__all__ = [
    "KINDS",
    "TaskKind",
    "constant_target",
    "count_noun",
    "encode_classes",
    "encode_numbers",
    "encode_sets",
    "infer_kind",
    "is_multilabel",
    "list_some",
]

TaskKind = Literal["binary", "multiclass", "multilabel", "regression", "survival"]
KINDS: tuple[TaskKind, ...] = get_args(TaskKind)

_MOST_CLASSES = 20
_LARGEST_CODE = 99
_SEPARATORS = (";", "|")


def infer_kind(values: pl.Series, target: str) -> TaskKind:
    """The kind of task that a column of labels asks for.

    A list, or text with ``;`` or ``|`` in it, is multilabel. Any two values are binary. Text is multiclass with at
    most 20 values; text that is all numbers counts as numbers beyond that. Whole numbers within -99..99 are multiclass
    with at most 5 values, or with at most 20 values and 5 or more cases per value. Other numbers are regression. A
    survival task takes a second column and is never inferred from one.

    Args:
        values: Labels; null is unknown.
        target: Name of the column, for the message.

    Raises:
        TaskError: text with more than 20 values, or a column that is neither text, number, truth value nor list.
    """
    values = values.drop_nulls()
    if is_multilabel(values):
        return "multilabel"
    distinct = values.n_unique()
    if values.dtype == pl.Boolean or distinct <= 2:
        return "binary"
    if values.dtype == pl.String:
        return _infer_kind_of_text(values, target, distinct)
    if not values.dtype.is_numeric():
        raise TaskError(f"target {target} holds {values.dtype}, expected text, numbers, truth values or lists of text")
    numbers = values.cast(pl.Float64)
    codes = bool((numbers == numbers.round()).all() and (numbers.abs() <= _LARGEST_CODE).all())
    few = distinct <= 5 or (distinct <= _MOST_CLASSES and len(values) >= 5 * distinct)
    return "multiclass" if codes and few else "regression"


def is_multilabel(values: pl.Series) -> bool:
    """Whether cells are lists, or text with a separator in it."""
    return _is_list(values) or (values.dtype == pl.String and _separator(values.drop_nulls().to_list()) is not None)


def _infer_kind_of_text(values: pl.Series, target: str, distinct: int) -> TaskKind:
    if distinct <= _MOST_CLASSES:
        return "multiclass"
    if values.cast(pl.Float64, strict=False).null_count() == 0:
        return "regression"
    raise TaskError(
        f"target {target} has {distinct} different texts in {count_noun(len(values), 'case')}"
        f"{list_some(values.unique(maintain_order=True).to_list())}, expected at most {_MOST_CLASSES} classes; choose"
        " another column, or say the kind of task if each text is a class"
    )


def encode_numbers(target: str, values: pl.Series, case_ids: Sequence[str]) -> NDArray[np.float64]:
    """float64 [cases] for a regression.

    Raises:
        TaskError: a value is not a finite number, or the column cannot hold numbers.
    """
    if _is_list(values) or values.dtype.is_temporal():
        raise TaskError(f"target {target} holds {values.dtype}, expected numbers for a regression; choose another kind")
    numbers = values.cast(pl.Float64, strict=False)
    fine = numbers.is_finite().fill_null(False).to_list()
    bad = [f"{case}: {value!r}" for case, value, ok in zip(case_ids, values.to_list(), fine, strict=True) if not ok]
    if bad:
        raise TaskError(
            f"target {target} has {count_noun(len(bad), 'label')} that {'is' if len(bad) == 1 else 'are'} no finite"
            f" number{list_some(bad)}, expected numbers for a regression; correct the label table, leave the cell empty"
            " where the label is unknown, or choose another kind"
        )
    return numbers.to_numpy().astype(np.float64)


def encode_classes(
    target: str, values: pl.Series, kind: TaskKind, classes: Sequence[str] | None
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names, and int64 [cases]: each case's place among them, -1 for a value that is none of them.

    Raises:
        TaskError: lists, fewer than two classes, or not two for binary.
    """
    if _is_list(values):
        raise TaskError(f"target {target} holds lists, expected one value per case for a {kind} task; use multilabel")
    found = _names(values)
    names = tuple(classes) if classes is not None else _sorted_names(set(found))
    if len(names) < 2:
        raise constant_target(target, names[0], len(found))
    if kind == "binary" and len(names) > 2:
        raise TaskError(
            f"target {target} has {len(names)} values{list_some(names)}, expected 2 for a binary task; name the two"
            " classes to learn, or choose multiclass"
        )
    codes = {name: code for code, name in enumerate(names)}
    return names, np.array([codes.get(name, -1) for name in found], dtype=np.int64)


def encode_sets(
    target: str, values: pl.Series, classes: Sequence[str] | None
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Label names, and int64 [cases classes]: 1 where the case has the label.

    Raises:
        TaskError: no case has any label.
    """
    if _is_list(values):
        found = [{str(item) for item in row if item is not None} for row in values.to_list()]
    else:
        texts = _names(values)
        mark = _separator(texts)
        found = [{part.strip() for part in (text.split(mark) if mark else [text])} - {""} for text in texts]
    names = tuple(classes) if classes is not None else _sorted_names({name for row in found for name in row})
    if not names:
        raise constant_target(target, "empty", len(found))
    return names, np.array([[name in row for name in names] for row in found], dtype=np.int64)


def constant_target(target: str, value: str, cases: int) -> TaskError:
    """The error for a target that is the same in all cases."""
    return TaskError(
        f"target {target} is {value} in all {count_noun(cases, 'labelled case')}, expected at least two values; choose"
        " another column, or add cases with another value"
    )


def count_noun(number: int, noun: str) -> str:
    """``1 case``, ``2 cases``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def list_some(items: Sequence[str]) -> str:
    """The first five in brackets, with a blank before; nothing where there are none."""
    return f" ({', '.join(items[:5])}{', ...' if len(items) > 5 else ''})" if items else ""


def _is_list(values: pl.Series) -> bool:
    return isinstance(values.dtype, pl.List | pl.Array)


def _separator(texts: Sequence[str]) -> str | None:
    """The mark that parts the labels of a cell: ``;`` if any cell has it, else ``|`` if any has it."""
    return next((mark for mark in _SEPARATORS if any(mark in text for text in texts)), None)


def _names(values: pl.Series) -> list[str]:
    """Each value as the name of its class."""
    if values.dtype == pl.Boolean:
        return ["true" if value else "false" for value in values.to_list()]
    if values.dtype.is_float():
        return [str(int(value)) if value == int(value) else str(value) for value in values.to_list()]
    return [str(value) for value in values.to_list()]


def _sorted_names(names: set[str]) -> tuple[str, ...]:
    """As numbers where all are numbers, else as text."""
    try:
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    except ValueError:
        return tuple(sorted(names))

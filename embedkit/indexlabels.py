"""Owns what a label table adds to the cases of an index, and what it must not lack; knows no vector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from embedkit.errors import SearchError
from embedkit.manifest import read_labels

__all__ = ["append_cases", "join_labels", "list_unlabelled"]

_NAMES = ("case_id", "patient_id")


def join_labels(table: pl.DataFrame, labels: str | Path | pl.DataFrame | None) -> pl.DataFrame:
    """The case table with the columns of a label table, null where that lacks the case.

    Raises:
        SearchError: no case of the table is labelled.
        ManifestError: the labels cannot be read.
    """
    if labels is None:
        return table
    frame = read_labels(labels)
    if not set(frame["case_id"]) & set(table["case_id"]):
        raise SearchError(
            f"no case_id of the labels ({', '.join(frame['case_id'].head(3))} ...) is a case of the cache"
            f" ({', '.join(table['case_id'].head(3))} ...); spell them alike"
        )
    return table.join(frame.drop("patient_id", strict=False), on="case_id", how="left", maintain_order="left")


def list_unlabelled(cases: pl.DataFrame) -> list[str]:
    """The cases without a value in any column of the labels; none where there is no such column."""
    if not (columns := _list_columns(cases)):
        return []
    lacking = cases.filter(pl.all_horizontal(pl.col(columns).is_null()))
    found: list[str] = lacking["case_id"].to_list()
    return found


def append_cases(
    cases: pl.DataFrame, new: pl.DataFrame, labels: str | Path | pl.DataFrame | None, *, unlabelled: bool
) -> pl.DataFrame:
    """The case table of an index with new cases below, and their labels.

    Args:
        cases: Of the index, with the columns of its labels.
        new: case_id and patient_id.
        labels: A table by case_id.
        unlabelled: New cases may lack labels, or have no table.

    Raises:
        SearchError: the labels have other columns than the index or values of another type; or lack new cases, and
            ``unlabelled`` does not allow that.
    """
    columns = _list_columns(cases)
    if labels is None and columns and not unlabelled:
        raise SearchError(
            f"the index has {', '.join(columns)} of its cases, and {_name_some(new['case_id'].to_list())} would have"
            " none of it; give their labels (--labels), or say that they have none (--unlabelled)"
        )
    joined = new if labels is None else _join_like(cases, new, read_labels(labels), columns)
    if labels is not None and not unlabelled and (lacking := list_unlabelled(joined)):
        raise SearchError(
            f"the labels have nothing of {_name_some(lacking)}; add them to the table, or say that they have none"
            " (--unlabelled)"
        )
    return pl.concat([cases, joined], how="diagonal_relaxed")


def _join_like(cases: pl.DataFrame, new: pl.DataFrame, labels: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """New cases with the labels of a table that has the columns of the index, and its types."""
    given = _list_columns(labels)
    if set(given) != set(columns):
        raise SearchError(
            f"the labels have columns {', '.join(given) or 'none'}, but the index has {', '.join(columns) or 'none'}:"
            " a filter would know only some cases; give a table with those, or build the index anew"
        )
    joined = new.join(labels.select("case_id", *columns), on="case_id", how="left", maintain_order="left")
    for name in columns:
        had, has = cases[name].dtype, joined[name].dtype
        if joined[name].null_count() == len(joined) or cases[name].null_count() == len(cases):
            continue
        if had.is_numeric() != has.is_numeric():
            raise SearchError(
                f"{name} is {has} in the labels and {had} in the index, so that no filter fits both; write it as it was"
            )
    empty = [name for name in columns if joined[name].null_count() == len(joined)]
    return joined.with_columns(pl.col(name).cast(cases[name].dtype) for name in empty)


def _list_columns(cases: pl.DataFrame) -> list[str]:
    return [name for name in cases.columns if name not in _NAMES]


def _name_some(cases: Sequence[str]) -> str:
    more = "" if len(cases) <= 3 else " ..."
    return f"{len(cases)} new case{'s' if len(cases) > 1 else ''} ({', '.join(cases[:3])}{more})"

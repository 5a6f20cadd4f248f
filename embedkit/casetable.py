"""Owns what is asked of a case table: rows of named cases, SQL filters, groups of equal values; knows no vector."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.errors import SearchError

__all__ = ["CaseTable"]

RowArray = NDArray[np.int64]

_SHOWN = 300
_MOST_WORDS = 2000  # polars walks a chain of operators by recursion, and one of some 6,000 words overflows its stack
_TEXT, _LISTED, _WORD = re.compile(r"'[^']*'|\"[^\"]*\""), re.compile(r",\s*[-+]?[\w.]+"), re.compile(r"\w+|[^\w\s]")


class CaseTable:
    """The cases of an index.

    Attributes:
        frame: case_id, patient_id and metadata, a row per case.
    """

    def __init__(self, frame: pl.DataFrame, path: Path) -> None:
        """Takes the table, and the index's folder for its errors to name."""
        self.frame = frame
        self._path = path

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {case_id: row for row, case_id in enumerate(self.frame["case_id"].to_list())}

    def find_rows(self, case_ids: Sequence[str]) -> RowArray:
        """The row of each of these cases, int64 [cases].

        Raises:
            SearchError: the table lacks one.
        """
        if unknown := [case_id for case_id in case_ids if case_id not in self._rows]:
            near = ", ".join(self.frame["case_id"].head(3))
            raise SearchError(
                f"index {self._path} has no case {', '.join(unknown[:5])}; it holds {len(self.frame)} cases such as"
                f" {near}"
            )
        return np.array([self._rows[case_id] for case_id in case_ids], np.int64)

    def group(self, column: str | None) -> RowArray:
        """A number per case, int64 [cases], equal for equal values of ``column``, -1 for none.

        Raises:
            SearchError: no such column, or one whose values cannot be compared.
        """
        if column is None:
            return np.full(len(self.frame), -1, np.int64)
        if column not in self.frame.columns:
            raise SearchError(f"exclude_same names {column!r}, but the cases have {', '.join(self.frame.columns)}")
        try:
            ranks = self.frame[column].rank("dense")
        except pl.exceptions.PolarsError as error:
            raise SearchError(
                f"exclude_same cannot compare column {column!r} of type {self.frame[column].dtype}"
            ) from error
        return ranks.cast(pl.Int64).fill_null(0).to_numpy() - 1

    def select(self, where: str) -> NDArray[np.bool_]:
        """Which cases an SQL condition allows, bool [cases]; a case for which it is null is not.

        Raises:
            SearchError: the filter does not work; the message tells the columns.
        """
        if (words := _count_words(where)) > _MOST_WORDS:
            raise SearchError(
                f"filter {_shorten(repr(where))} has {words:,} words and signs, more than the {_MOST_WORDS:,} that are"
                " taken, items of lists apart; write a list as COLUMN IN (...), or make a column of the condition"
                " (--labels)"
            )
        numbers = pl.select(pl.int_range(len(self.frame)).alias("#row"))
        try:
            rows = numbers.hstack(self.frame).filter(pl.sql_expr(where))["#row"]
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            reason = str(error).splitlines()[0].replace('"#row", ', "")
            raise SearchError(
                f"filter {_shorten(repr(where))} does not work ({_shorten(reason)}); write an SQL condition over"
                f" {', '.join(self.frame.columns)}, for example \"patient_id = 'p1'\""
            ) from error
        allowed = np.zeros(len(self.frame), bool)
        allowed[rows.to_numpy()] = True
        return allowed


def _count_words(where: str) -> int:
    """Words and signs of an SQL condition; a text is one, and the items of a list are none but the first."""
    return len(_WORD.findall(_LISTED.sub("", _TEXT.sub("t", where))))


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

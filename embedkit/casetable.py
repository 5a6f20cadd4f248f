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
_MOST_WORDS = 500  # polars walks a chain of operators by recursion: one of `||` with 1,440 words overflowed its stack
_QUOTED = re.compile(r"('(?:[^']|'')*')|\"(?:[^\"]|\"\")*\"")
_LISTED = re.compile(r",\s*(?:'|[-+]?\d+(?:\.\d+)?\b)")
_WORD = re.compile(r"\w+|[^\w\s]")
_UNTAKEN = re.compile(r"--|/\*|[$`]|\b(?:[benqrx]|nq|u&)'", re.IGNORECASE)


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
        plain = _blank_texts(where)
        if untaken := _UNTAKEN.search(plain):
            raise SearchError(
                f"filter {_shorten(repr(where))} has {untaken[0]} outside of texts; comments, $, backticks and a letter"
                " right before a text are not taken: write texts in single quotes and names in double ones"
            )
        if (words := _count_words(plain)) > _MOST_WORDS:
            raise SearchError(
                f"filter {_shorten(repr(where))} has {words:,} words and signs, more than the {_MOST_WORDS:,} that are"
                " taken, numbers and texts in lists apart; write a list as COLUMN IN (...), or make a column of the"
                " condition (--labels)"
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


def _blank_texts(where: str) -> str:
    """An SQL condition with a lone ' in the place of each text and n in that of each quoted name.

    Quotes are read as polars reads them up to the first of `_UNTAKEN`, which may hide others from either.
    """
    return _QUOTED.sub(lambda quoted: "'" if quoted[1] else " n ", where)


def _count_words(plain: str) -> int:
    """Words and signs of what `_blank_texts` gives; numbers and texts in a list are none but the first."""
    return len(_WORD.findall(_LISTED.sub("", plain)))


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

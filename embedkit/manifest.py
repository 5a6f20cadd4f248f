"""Owns the tables that users write: the manifest (one row per image) and the labels (one row per case).

Refuses to open an image: it never knows whether a path leads anywhere.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from embedkit.errors import ManifestError

__all__ = ["MANIFEST_COLUMNS", "list_columns", "read_labels", "read_manifest", "write_manifest", "write_table"]

MANIFEST_COLUMNS = ("case_id", "patient_id", "view", "path", "mask")

_UNKNOWN = ("", "NA", "N/A", "NaN", "nan", "null")


def read_manifest(manifest: Path | str | pl.DataFrame) -> pl.DataFrame:
    """Reads a table with one row per image.

    Args:
        manifest: CSV, TSV (.tsv, .tab) or Parquet, in UTF-8, with the columns ``case_id`` and ``path`` and optionally
            ``patient_id``, ``view``, ``mask`` and any others; or such a table as a frame, such as this returns.

    Returns:
        Columns ``case_id``, ``patient_id`` (the case where none is given), ``view`` (``image`` where not given),
        ``path`` and ``mask`` (absolute; null where there is none), then the others as they are; all text, in the
        order of the file. Relative paths start at the manifest's folder, those of a frame at the current one; spaces
        around the five are dropped.

    Raises:
        ManifestError: the file cannot be read; a column is missing or doubled; no row; an empty case or path; a line
            break or other control character in a name, or a slash or comma in a view; the same view of a case twice;
            a case with two patients.
    """
    path, frame = _open_table(manifest, "manifest")
    _require_columns(path, frame, ("case_id", "path"))
    frame = _as_text(path, frame, [name for name in MANIFEST_COLUMNS if name in frame.columns])
    frame = frame.with_columns(pl.lit(None, pl.String).alias(name) for name in MANIFEST_COLUMNS if name not in frame)
    others = [name for name in frame.columns if name not in MANIFEST_COLUMNS]
    frame = frame.select(*MANIFEST_COLUMNS, *(_cast_text(path, frame, name) for name in others)).with_columns(
        pl.col("patient_id")
        .fill_null(pl.col("patient_id").drop_nulls().first().over("case_id"))
        .fill_null(pl.col("case_id")),
        pl.col("view").fill_null("image"),
    )
    for name in ("case_id", "path"):
        _refuse_rows(path, frame, pl.col(name).is_null(), f"{name} is empty", "fill it in")
    for name in MANIFEST_COLUMNS:
        _refuse_rows(
            path, frame, pl.col(name).str.contains(r"\p{Cc}"), f"{name} holds a control character", "remove it"
        )
    _refuse_rows(path, frame, pl.col("view").str.contains("[/,]"), "view holds a slash or a comma", "rename the view")
    _refuse_repeats(path, frame, ("case_id", "view"), "give each image of a case a view of its own")
    _refuse_split_patients(path, frame)
    folder = Path.cwd() if isinstance(manifest, pl.DataFrame) else Path(manifest).absolute().parent

    def absolute(text: str) -> str:
        return os.path.normpath(folder / text)

    return frame.with_columns(pl.col("path", "mask").map_elements(absolute, pl.String, skip_nulls=True))


def list_columns(manifest: Path | str | pl.DataFrame) -> list[str]:
    """The columns that a manifest names itself, before `read_manifest` fills in others.

    Raises:
        ManifestError: the file cannot be read, or has no row.
    """
    return _open_table(manifest, "manifest")[1].columns


def read_labels(labels: Path | str | pl.DataFrame) -> pl.DataFrame:
    """Reads a table with one row per case, any column of which can be a target.

    Args:
        labels: CSV, TSV (.tsv, .tab) or Parquet, in UTF-8, with the column ``case_id``; or such a table as a frame.

    Returns:
        ``case_id`` (and ``patient_id``, where given) as text. Of the other columns, those whose values are all numbers
        as Int64 or Float64, else as text; empty, NA, N/A, NaN and null mean unknown and become null.

    Raises:
        ManifestError: the file cannot be read; no column ``case_id``, a column twice, no row; an empty case; a case
            twice; an infinite number.
    """
    path, frame = _open_table(labels, "labels")
    _require_columns(path, frame, ("case_id",))
    frame = _as_text(path, frame, [name for name in ("case_id", "patient_id") if name in frame.columns])
    _refuse_rows(path, frame, pl.col("case_id").is_null(), "case_id is empty", "fill it in")
    _refuse_repeats(path, frame, ("case_id",), "keep one row per case")
    frame = frame.with_columns(_as_values(frame[name]) for name in frame.columns if name not in MANIFEST_COLUMNS)
    for name, dtype in frame.schema.items():
        if dtype.is_float():
            _refuse_rows(path, frame, pl.col(name).is_infinite(), f"{name} is infinite", "give a finite number")
    return frame


def write_manifest(frame: pl.DataFrame, path: Path | str) -> None:
    """Writes a manifest that `read_manifest` reads back; the file is either whole or not there.

    Args:
        frame: Columns as from `read_manifest`; others are kept.
        path: Ends in .csv, .tsv, .tab or .parquet. Paths below its folder are written relative to it, all others in
            full, so that the folder can move as a whole.

    Raises:
        ManifestError: a column is missing, another ending, or the file cannot be written.
    """
    path = Path(path)
    _require_columns(path, frame, ("case_id", "path"))
    folder = path.absolute().parent

    def relative(text: str) -> str:
        target = Path(os.path.normpath(Path(text).absolute()))
        return target.relative_to(folder).as_posix() if target.is_relative_to(folder) else str(target)

    paths = [name for name in ("path", "mask") if name in frame.columns]
    frame = frame.with_columns(pl.col(paths).map_elements(relative, pl.String, skip_nulls=True))
    write_table(frame, path)


def write_table(frame: pl.DataFrame, path: Path | str) -> None:
    """Writes any table by the ending of its name; the file is either whole or not there.

    Args:
        frame: To write.
        path: Ends in .csv, .tsv, .tab or .parquet.

    Raises:
        ManifestError: another ending, or the file cannot be written.
    """
    path = Path(path)
    kind = _table_kind(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".writing-") as scratch:
            temporary = Path(scratch) / path.name
            if kind == "parquet":
                frame.write_parquet(temporary)
            else:
                frame.write_csv(temporary, separator="\t" if kind == "tsv" else ",")
            temporary.replace(path)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be written ({error.strerror}); check the folder and its rights") from error


def _table_kind(path: Path) -> str:
    kinds = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet"}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise ManifestError(
            f"{path}: a table ends in .csv, .tsv or .parquet, not {path.suffix or 'nothing'}; rename it"
        )
    return kind


def _open_table(table: Path | str | pl.DataFrame, what: str) -> tuple[str, pl.DataFrame]:
    """How messages call a table, and the table as it stands."""
    if not isinstance(table, pl.DataFrame):
        return str(Path(table)), _read_table(Path(table))
    if table.is_empty():
        raise ManifestError(f"the {what}: has no rows, expected one per image or case; fill the table")
    return f"the {what}", table


def _read_table(path: Path) -> pl.DataFrame:
    """A table as it stands, its column names stripped; the cells of a text table are all text."""
    kind = _table_kind(path)
    try:
        content = path.read_bytes()
        if kind == "parquet":
            frame = pl.read_parquet(content)
        else:
            separator = "\t" if kind == "tsv" else ","
            frame = pl.read_csv(content, separator=separator, infer_schema=False, has_header=False)
    except FileNotFoundError as error:
        raise ManifestError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from error
    except pl.exceptions.NoDataError as error:
        raise ManifestError(f"{path}: is empty, expected a line of column names and one line per row") from error
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0][:200]
        raise ManifestError(f"{path}: cannot be read as {kind} ({reason}); save it again as {kind} in UTF-8") from error
    if kind != "parquet":
        frame = _take_names(path, frame)
    if frame.is_empty():
        raise ManifestError(f"{path}: has no rows, expected one per image or case; fill the table")
    return frame


def _take_names(path: Path, frame: pl.DataFrame) -> pl.DataFrame:
    """Column names from the first row (polars would silently rename a repeated one)."""
    names = [str(name or "").strip().lstrip("\ufeff") for name in frame.row(0)]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ManifestError(f"{path}: column {repeated[0]!r} appears more than once; rename or remove one")
    blank = pl.all_horizontal(pl.all().fill_null("").str.strip_chars() == "")
    return frame[1:].filter(~blank).rename(dict(zip(frame.columns, names, strict=True)))


def _require_columns(path: Path | str, frame: pl.DataFrame, wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in frame.columns]
    if missing:
        hint = "; the columns must be separated by commas" if any(";" in name for name in frame.columns) else ""
        raise ManifestError(
            f"{path}: lacks the column {', '.join(missing)}; found {', '.join(frame.columns)}; add or rename it{hint}"
        )


def _as_text(path: Path | str, frame: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """The named columns as text without surrounding spaces, empty cells as null."""
    for name in names:
        dtype = frame.schema[name]
        if not (dtype.is_integer() or dtype in (pl.String, pl.Categorical, pl.Null) or isinstance(dtype, pl.Enum)):
            raise ManifestError(f"{path}: column {name} is of type {dtype}, expected text; save it as text")
    text = [pl.col(name).cast(pl.String).str.strip_chars() for name in names]
    frame = frame.with_columns(text)
    return frame.with_columns(pl.when(pl.col(name) != "").then(pl.col(name)).alias(name) for name in names)


def _cast_text(path: Path | str, frame: pl.DataFrame, name: str) -> pl.Series:
    """A column that nobody here reads, as text."""
    if frame.schema[name].is_nested() or frame.schema[name] in (pl.Binary, pl.Object):
        raise ManifestError(f"{path}: column {name} is of type {frame.schema[name]}, expected text; leave it out")
    return frame[name].cast(pl.String)


def _as_values(column: pl.Series) -> pl.Series:
    """A text column as numbers where all its values are; unknown values as null."""
    if column.dtype.is_float():
        return column.fill_nan(None)
    if column.dtype != pl.String:
        return column
    column = column.str.strip_chars()
    column = column.set(column.is_in(_UNKNOWN), None)
    known = column.drop_nulls()
    for dtype in (pl.Int64, pl.Float64):
        if len(known) and known.cast(dtype, strict=False).is_not_null().all():
            return column.cast(dtype)
    return column


def _refuse_rows(path: Path | str, frame: pl.DataFrame, wrong: pl.Expr, problem: str, remedy: str) -> None:
    """Rows are counted from 1 below the column names."""
    rows = (frame.select(wrong.fill_null(value=False)).to_series().arg_true() + 1).to_list()
    if rows:
        raise ManifestError(f"{path}: {problem} in {_name_rows(rows)}; {remedy}")


def _refuse_repeats(path: Path | str, frame: pl.DataFrame, keys: Sequence[str], remedy: str) -> None:
    numbered = frame.with_row_index("row", offset=1).group_by(keys, maintain_order=True).agg("row")
    repeated = numbered.filter(pl.col("row").list.len() > 1)
    if not repeated.is_empty():
        first = repeated.row(0, named=True)
        name = ", ".join(f"{key} {first[key]}" for key in keys)
        more = f" (and {len(repeated) - 1} more repeats)" if len(repeated) > 1 else ""
        raise ManifestError(f"{path}: {name} appears in {_name_rows(first['row'])}{more}; {remedy}")


def _refuse_split_patients(path: Path | str, frame: pl.DataFrame) -> None:
    patients = frame.group_by("case_id", maintain_order=True).agg(pl.col("patient_id").unique(maintain_order=True))
    split = patients.filter(pl.col("patient_id").list.len() > 1)
    if not split.is_empty():
        case, found = split.row(0)
        raise ManifestError(f"{path}: case {case} has the patients {', '.join(found)}; give all its rows the same one")


def _name_rows(rows: Sequence[int]) -> str:
    shown = ", ".join(str(row) for row in rows[:5]) + (" ..." if len(rows) > 5 else "")
    return f"row {shown}" if len(rows) == 1 else f"rows {shown}"

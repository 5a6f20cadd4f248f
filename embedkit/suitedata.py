"""Owns the tables of a suite's data set: its images, and its labels with derived columns; extracts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from embedkit.errors import SuiteError
from embedkit.manifest import read_labels, read_manifest
from embedkit.medmnistfiles import unpack_medmnist
from embedkit.scanning import scan_folder
from embedkit.suiteentries import SuiteDataset, SuiteTask
from embedkit.suitereader import choose_nearest

__all__ = ["SuiteTables", "read_tables", "require_columns"]

_OF_IMAGES = ("case_id", "patient_id", "view")


@dataclass(frozen=True, eq=False)
class SuiteTables:
    """``manifest`` as `read_manifest` gives it, ``labels`` as `read_labels`; ``skipped`` says what a scan left out."""

    manifest: pl.DataFrame
    labels: pl.DataFrame
    skipped: tuple[str, ...] = ()


def read_tables(dataset: SuiteDataset, folder: Path) -> SuiteTables:
    """The tables of a data set.

    Args:
        dataset: Of the suite.
        folder: Where volumes that have to be unpacked go.

    Raises:
        SuiteError: a file is absent or of another form, or a derived column cannot be computed.
        ManifestError: a table is unreadable or contradicts itself.
    """
    for path in dataset.files:
        if not path.exists():
            raise SuiteError(f"data set {dataset.name}: {path} is not there; check the suite and where its data are")
    labels: pl.DataFrame | None = None
    skipped: tuple[str, ...] = ()
    if dataset.medmnist is not None:
        manifest_file, labels_file = unpack_medmnist(dataset.medmnist, folder / dataset.name)
        manifest, labels = read_manifest(manifest_file), read_labels(labels_file)
    else:
        if dataset.scan is not None:
            scanned = scan_folder(dataset.scan)
            manifest, skipped = scanned.rows, tuple(f"{path}: {reason}" for path, reason in scanned.skipped)
        elif dataset.manifest is not None:
            manifest = read_manifest(dataset.manifest)
        labels = None if dataset.labels is None else read_labels(dataset.labels)
    if labels is None:
        labels = manifest.select("case_id").unique(maintain_order=True)
    if dataset.images_apart:
        manifest, labels = _part_images(manifest, labels)
    return SuiteTables(manifest, _derive_columns(dataset, labels), skipped)


def require_columns(task: SuiteTask, tables: SuiteTables) -> None:
    """Stops where a task names a column that its data set lacks.

    Raises:
        SuiteError: it does; the message names the nearest.
    """
    known = set(tables.labels.columns) | {"patient_id"}
    for key in ("target", "event", "split", "exclude_same"):
        column = getattr(task, key)
        if column is not None and column not in known:
            raise SuiteError(
                f"task {task.name}: {key} is {column!r}, but data set {task.dataset} has no such"
                f" column{choose_nearest(column, known)}"
            )


def _part_images(manifest: pl.DataFrame, labels: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Every image as a case ``CASE.VIEW`` of one view, labelled as its case is, with its view as ``view_name``."""
    apart = pl.concat_str("case_id", pl.lit("."), "view")
    parted = manifest.select(*_OF_IMAGES).join(
        labels.drop("patient_id", "view_name", strict=False), on="case_id", how="left", maintain_order="left"
    )
    return (
        manifest.with_columns(case_id=apart, view=pl.lit("image")),
        parted.with_columns(case_id=apart).drop("patient_id").rename({"view": "view_name"}),
    )


def _derive_columns(dataset: SuiteDataset, labels: pl.DataFrame) -> pl.DataFrame:
    for name, formula in dataset.columns.items():
        if name in labels.columns:
            raise SuiteError(f"data set {dataset.name}: its labels have a column {name} already; name it otherwise")
        try:
            column = labels.select(pl.sql_expr(formula).alias(name)).to_series()
            labels = labels.with_columns(column.cast(pl.Float64) if column.dtype.is_decimal() else column)
        except pl.exceptions.PolarsError as error:
            reason = str(error).splitlines()[0]
            raise SuiteError(
                f"data set {dataset.name}: column {name} = {formula!r} cannot be computed ({reason}); the labels have"
                f" {', '.join(labels.columns)}"
            ) from error
    return labels

"""Owns MedMNIST3D's files: one .npz becomes images, a manifest and labels; scores nothing.

Such a file (of the package medmnist, v2 and v3) holds ``train_images``, ``val_images``, ``test_images``, uint8
[cases slices height width], and ``train_labels`` and so on, [cases 1]. It is read with ``allow_pickle=False``.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.errors import SuiteError
from embedkit.files import explain_os_error, publish_folder, temporary_path
from embedkit.manifest import write_table

__all__ = ["unpack_medmnist"]

_PARTS = ("train", "val", "test")


def unpack_medmnist(file: Path, out: Path) -> tuple[Path, Path]:
    """Writes the volumes of a file as .npy files with their tables, unless they are there.

    Args:
        file: The .npz file.
        out: The folder to make; complete or absent. It takes as many bytes as the volumes.

    Returns:
        The manifest, and the labels: ``case_id``, ``label`` (the class as a number) and ``split``: train, val or test.

    Raises:
        SuiteError: the file cannot be read or is of another form, or the folder cannot be written.
    """
    manifest, labels = out / "manifest.csv", out / "labels.csv"
    if out.is_dir():
        return manifest, labels
    scratch = temporary_path(out)
    try:
        scratch.mkdir(parents=True)
        rows = [row for part in _PARTS for row in _write_part(file, part, scratch)]
        table = pl.DataFrame(rows, orient="row", schema=["case_id", "path", "label", "split"])
        write_table(table.select("case_id", "path"), scratch / manifest.name)
        write_table(table.select("case_id", "label", "split"), scratch / labels.name)
        publish_folder(scratch, out)
    except OSError as error:
        raise SuiteError(f"{file} is not unpacked: {explain_os_error(error, out)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest, labels


def _write_part(file: Path, part: str, folder: Path) -> list[tuple[str, str, int, str]]:
    """Case, path, label and split of one part, whose volumes are written."""
    images, labels = _read_array(file, f"{part}_images"), _read_array(file, f"{part}_labels")
    if (
        images.ndim != 4
        or images.dtype != np.uint8
        or labels.shape != (len(images), 1)
        or labels.dtype.kind not in "ui"
    ):
        raise SuiteError(
            f"{file}: {part} has images {images.dtype} {list(images.shape)} and labels {labels.dtype}"
            f" {list(labels.shape)}; expected uint8 [cases slices height width] and whole numbers [cases 1], as"
            " MedMNIST3D has them"
        )
    rows = []
    for place, (image, label) in enumerate(zip(images, labels[:, 0], strict=True)):
        name = f"{part}_{place:04}"
        np.save(folder / f"{name}.npy", image, allow_pickle=False)
        rows.append((name, f"{name}.npy", int(label), part))
    return rows


def _read_array(file: Path, name: str) -> NDArray[Any]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            if name not in archive:
                raise SuiteError(
                    f"{file}: has no {name}, but {', '.join(archive.files)}; give a file of MedMNIST3D, such as"
                    " organmnist3d_64.npz"
                )
            found: NDArray[Any] = archive[name]
            return found
    except (ValueError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise SuiteError(f"{file}: is no .npz file of arrays ({error}); load it again") from error

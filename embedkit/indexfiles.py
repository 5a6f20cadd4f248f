"""Owns the folder of a search index: whole or absent, every file checked before it is parsed; searches nothing.

``index.json``
    What made the vectors, how the index is searched, the seal of every other file, and a SHA-256 of itself.
``index.faiss``
    The vectors, centred and whitened if asked for and of length 1, as a FAISS index.
``vectors.npy``
    The vectors as they were given, float32 or float16 [vectors dim]: queries, exact comparison, and what another
    index is made of.
``cases.parquet``
    ``case_id``, ``patient_id`` and metadata; row i describes vector i, or is what ``rows.parquet`` points at.
``rows.parquet``
    Where a vector is a slice: ``case`` (row of ``cases.parquet``), ``view``, ``plane``, ``row`` in the stack and
    ``slice``, the index along the plane's axis; row i describes vector i.
``mean.npy``, ``whitening.npy``
    Where the vectors were centred: what was subtracted, float32 [dim]; where they were whitened: the matrix that they
    were then multiplied with, float32 [dim kept].
``extra-NAME.npy``
    Further arrays, kept for whoever makes the query vectors.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.errors import OptionError, RecipeError, SearchError
from embedkit.faisssearching import FaissSearcher, measure_payload
from embedkit.files import explain_os_error, publish_folder, remove_stale, replace_folder, temporary_path
from embedkit.indexseals import check_file, identify, read_fields, seal_fields, seal_file
from embedkit.indextypes import IndexOptions, faiss
from embedkit.recipe import Recipe
from embedkit.tuning import Tuning

__all__ = [
    "IndexContent",
    "check_table",
    "measure_beside",
    "read_faiss_whole",
    "read_index_files",
    "read_vectors",
    "require_free",
    "write_index_files",
]

_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, OptionError)
_PLACES = ("cache", "run")  # details that are folders: given and read in full, kept relative to the index
_RESERVED = ("query", "rank", "similarity", "recall_rank", "vectors_similarity", "view", "plane", "slice")
_MAPPED_FROM_BYTES = 1 << 28


@dataclass(frozen=True)
class IndexContent:
    """All that an index folder holds but the vectors as they were given.

    Attributes:
        embedding: How the vectors were made, in words.
        recipe: Of the cache that they were made from.
        cases: case_id, patient_id and metadata.
        rows: Where a vector is a slice: case, view, plane, row, slice of each; None where it is a case.
        vectors: The unit vectors in FAISS; None before they are built.
        options: What was asked of the index.
        tuning: How it is searched.
        mean: float32 [dim] or None.
        whitening: float32 [dim kept] or None.
        details: Plain JSON values; ``cache`` and ``run`` are folders, absolute here and relative to the index on disk.
        extras: Arrays by name.
        built_on: ``GPU``, or ``CPU: `` and why.
        identity: Of what was read; empty before it is written.
    """

    embedding: str
    recipe: Recipe
    cases: pl.DataFrame
    rows: pl.DataFrame | None
    vectors: FaissSearcher | None
    options: IndexOptions
    tuning: Tuning
    mean: NDArray[np.float32] | None
    whitening: NDArray[np.float32] | None
    details: dict[str, Any]
    extras: dict[str, NDArray[Any]]
    built_on: str = ""
    identity: str = ""


def check_table(vectors: NDArray[Any], table: pl.DataFrame, rows: pl.DataFrame | None) -> None:
    """Checks that vectors and case table fit together.

    Raises:
        SearchError: they do not, or a column is missing, has gaps, is double or has a name that a result needs.
    """
    described = table if rows is None else rows
    if vectors.ndim != 2 or 0 in vectors.shape or len(vectors) != len(described):
        raise SearchError(
            f"vectors have shape {list(vectors.shape)} and the table {len(described)} rows; expected [cases dim] and a"
            " row per case, at least one"
        )
    for column in ("case_id", "patient_id"):
        if column not in table.columns:
            raise SearchError(f"the table has columns {', '.join(table.columns)}, but an index needs {column}")
        if table[column].dtype != pl.String or table[column].null_count():
            raise SearchError(f"{column} of the table is {table[column].dtype} or has gaps, expected text in every row")
    if taken := sorted(set(_RESERVED) & set(table.columns)):
        raise SearchError(f"the table has a column {', '.join(taken)}, which a search result needs; rename it")
    if double := table["case_id"].filter(table["case_id"].is_duplicated()).unique().sort().to_list():
        raise SearchError(f"the table has case {', '.join(double[:5])} more than once; give one vector per case")


def require_free(out: Path) -> None:
    """Stops where an index cannot be written without replacing something.

    Raises:
        SearchError: ``out`` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SearchError(f"{out} exists; choose another folder for the index or delete it first")


def write_index_files(out: Path, content: IndexContent, vectors: NDArray[Any], *, replaces: str | None = None) -> None:
    """Writes an index folder, durably and under its name only when whole.

    Args:
        out: The folder.
        content: All but the vectors as they were given.
        vectors: These, [vectors dim]; may be a memory map, and is copied in batches.
        replaces: Identity of the index at ``out`` that gives way to this one.

    Raises:
        SearchError: ``out`` exists and is not an empty folder, without ``replaces``, or is another index by now; disk
            full; read-only folder.
    """
    if replaces is None:
        require_free(out)
    temporary = temporary_path(out.absolute())
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(temporary.parent)
        temporary.mkdir()
        _write_files(temporary, content, vectors)
        if replaces is None:
            publish_folder(temporary, out.absolute())
        else:
            _require_unchanged(out, replaces)
            replace_folder(temporary, out.absolute())
    except OSError as error:
        raise SearchError(f"cannot write the index: {explain_os_error(error, out)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _require_unchanged(out: Path, identity: str) -> None:
    if identify(read_fields(out)) != identity:
        raise SearchError(f"index {out} was changed by another since it was opened; open it and change it again")


def _write_files(folder: Path, content: IndexContent, vectors: NDArray[np.float32]) -> None:
    arrays = {f"extra-{name}.npy": array for name, array in content.extras.items()} | {"vectors.npy": vectors}
    arrays |= {
        f"{name}.npy": array
        for name, array in (("mean", content.mean), ("whitening", content.whitening))
        if array is not None
    }
    for name, array in arrays.items():
        with (folder / name).open("xb") as file:
            np.lib.format.write_array(file, array, allow_pickle=False)
    content.cases.write_parquet(folder / "cases.parquet")
    if content.rows is not None:
        content.rows.write_parquet(folder / "rows.parquet")
    index = cast(FaissSearcher, content.vectors).index
    with (folder / "index.faiss").open("xb") as file:  # serialize_index fails where SimpleITK was loaded after faiss
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    payloads = {name: array.nbytes for name, array in arrays.items() if array.dtype.kind == "f"}
    payloads["index.faiss"] = measure_payload(index)
    fields = {
        "embedding": content.embedding,
        "recipe": content.recipe.to_json(),
        "options": asdict(content.options),
        "tuning": asdict(content.tuning),
        "built_on": content.built_on,
        "details": _map_places(content.details, lambda place: os.path.relpath(place, folder.resolve())),
        "files": {path.name: seal_file(path, payloads.get(path.name, 0)) for path in sorted(folder.iterdir())},
    }
    sealed = seal_fields(fields)
    (folder / "index.json").write_text(json.dumps(sealed, indent=1, sort_keys=True, ensure_ascii=True) + "\n")


def measure_beside(content: IndexContent) -> int:
    """Bytes of memory that an open index takes beside its FAISS index: tables, and arrays that are not mapped."""
    arrays = [array for array in (content.mean, content.whitening, *content.extras.values()) if array is not None]
    tables = [table for table in (content.cases, content.rows) if table is not None]
    held = [array.nbytes for array in arrays if array.nbytes < _MAPPED_FROM_BYTES]
    return sum(held) + sum(int(table.estimated_size()) for table in tables)


def _map_places(details: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The details, the folders among them changed: kept relative to the index, so that it tells no more of the machine.

    An index and its cache can so be moved together.
    """
    return {name: change(value) if name in _PLACES else value for name, value in details.items()}


def read_index_files(path: Path) -> IndexContent:
    """Reads an index folder; of no file is anything parsed that was not found right before.

    Of files beyond 64 MiB what is parsed is checked, not the numbers, which can be wrong but break nothing:
    `embedkit.verify_index` checks these too.

    Raises:
        SearchError: no index, damaged, or of a newer format; names the file.
    """
    fields = read_fields(path)
    try:
        return _parse_files(path, fields)
    except (*_UNREADABLE, RecipeError, pl.exceptions.PolarsError) as error:
        raise SearchError(f"index {path} cannot be read: {error}; build it again") from error


def _parse_files(path: Path, fields: dict[str, Any]) -> IndexContent:
    names = [name for name in fields["files"] if name != "vectors.npy"]
    for name in names:
        check_file(path, name, fields["files"][name])
    arrays = {name: _read_array(path / name) for name in names if name.endswith(".npy")}
    cases, vectors = pl.read_parquet(path / "cases.parquet"), _read_faiss(path / "index.faiss")
    rows = pl.read_parquet(path / "rows.parquet") if "rows.parquet" in names else None
    described = len(cases) if rows is None else len(rows)
    if len(vectors) != described:
        raise SearchError(f"index {path} holds {len(vectors)} vectors and {described} cases; build it again")
    return IndexContent(
        embedding=str(fields["embedding"]),
        recipe=Recipe.from_json(fields["recipe"]),
        cases=cases,
        rows=rows,
        vectors=vectors,
        options=IndexOptions(**fields["options"]),
        tuning=Tuning(**fields["tuning"]),
        mean=arrays.get("mean.npy"),
        whitening=arrays.get("whitening.npy"),
        built_on=str(fields["built_on"]),
        identity=identify(fields),
        details=_map_places(fields["details"], lambda place: os.path.normpath(path.resolve() / place)),
        extras={
            name.removeprefix("extra-").removesuffix(".npy"): array
            for name, array in arrays.items()
            if name.startswith("extra-")
        },
    )


def _read_array(file: Path) -> NDArray[Any]:
    """An array; a large one stays on disk and is mapped."""
    mapped = file.stat().st_size >= _MAPPED_FROM_BYTES
    array: NDArray[Any] = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    return array


def _read_faiss(file: Path) -> FaissSearcher:
    """An index of a known type; a large one stays on disk and is mapped, so that it may exceed the memory."""
    mapped = file.stat().st_size >= _MAPPED_FROM_BYTES
    return FaissSearcher(faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC if mapped else 0))


def read_faiss_whole(path: Path, identity: str) -> Any:
    """The FAISS index of the index of that identity, in memory and apart from any that is open: to be changed.

    Raises:
        SearchError: it is damaged, or was changed by another.
    """
    _require_unchanged(path, identity)
    check_file(path, "index.faiss", read_fields(path)["files"]["index.faiss"], whole=True)
    return faiss.read_index(str(path / "index.faiss"))


def read_vectors(path: Path) -> NDArray[Any]:
    """The vectors as they were given: read-only float32 or float16 [vectors dim], memory-mapped.

    Raises:
        SearchError: the index or their file is damaged.
    """
    check_file(path, "vectors.npy", read_fields(path)["files"]["vectors.npy"])
    vectors: NDArray[Any] = np.load(path / "vectors.npy", mmap_mode="r", allow_pickle=False)
    return vectors

"""Owns the folder of a search index: whole or absent, every file checked before it is parsed; searches nothing.

``index.json``
    What made the vectors, a SHA-256 of every other file, and one of itself.
``index.faiss``
    The vectors, centred if asked for and of length 1, as a FAISS index.
``vectors.npy``
    The vectors as they were given, float32 [cases dim], so that another kind of index can be made of them.
``cases.parquet``
    ``case_id``, ``patient_id`` and metadata; row i describes vector i.
``mean.npy``
    Where the vectors were centred: what was subtracted, float32 [dim].
``extra-NAME.npy``
    Further arrays, kept for whoever makes the query vectors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.errors import RecipeError, SearchError
from embedkit.files import explain_os_error, publish_folder, remove_stale, temporary_path
from embedkit.recipe import Recipe

with warnings.catch_warnings():
    # The types that SWIG generates for faiss lack __module__, which some Python versions deprecate.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import faiss as _faiss

faiss: Any = _faiss
"""The library; typed as Any because its stubs know the C++ signatures and not the Python ones over them."""

__all__ = ["IndexContent", "check_table", "faiss", "read_index_files", "read_vectors", "write_index_files"]

_FORMAT = "embedkit-index"
_FORMAT_VERSION = 1
_CHUNK_BYTES = 1 << 23
_MOST_JSON_BYTES = 1 << 26
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)
_PLACES = ("cache", "run")  # details that are folders: given and read in full, kept relative to the index
_RESERVED = ("query", "rank", "similarity")


@dataclass(frozen=True)
class IndexContent:
    """All that an index folder holds but the vectors as they were given.

    Attributes:
        embedding: How the vectors were made, in words.
        recipe: Of the cache that they were made from.
        cases: case_id, patient_id and metadata.
        vectors: FAISS index of unit vectors.
        mean: float32 [dim] or None.
        details: Plain JSON values; ``cache`` and ``run`` are folders, absolute here and relative to the index on disk.
        extras: Arrays by name.
    """

    embedding: str
    recipe: Recipe
    cases: pl.DataFrame
    vectors: Any
    mean: NDArray[np.float32] | None
    details: dict[str, Any]
    extras: dict[str, NDArray[Any]]


def check_table(vectors: NDArray[np.float32], table: pl.DataFrame) -> None:
    """Checks that vectors and case table fit together.

    Raises:
        SearchError: they do not, or a column is missing, has gaps, is double or has a name that a result needs.
    """
    if vectors.ndim != 2 or 0 in vectors.shape or len(vectors) != len(table):
        raise SearchError(
            f"vectors have shape {list(vectors.shape)} and the table {len(table)} rows; expected [cases dim] and a row"
            " per case, at least one"
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


def write_index_files(out: Path, content: IndexContent, vectors: NDArray[np.float32]) -> None:
    """Writes an index folder, durably and under its name only when whole.

    Raises:
        SearchError: ``out`` exists and is not an empty folder; disk full; read-only folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SearchError(f"{out} exists; choose another folder for the index or delete it first")
    temporary = temporary_path(out.absolute())
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(temporary.parent)
        temporary.mkdir()
        _write_files(temporary, content, vectors)
        publish_folder(temporary, out.absolute())
    except OSError as error:
        raise SearchError(f"cannot write the index: {explain_os_error(error, out)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(folder: Path, content: IndexContent, vectors: NDArray[np.float32]) -> None:
    arrays = {f"extra-{name}.npy": array for name, array in content.extras.items()} | {"vectors.npy": vectors}
    if content.mean is not None:
        arrays["mean.npy"] = content.mean
    for name, array in arrays.items():
        with (folder / name).open("xb") as file:
            np.save(file, array, allow_pickle=False)
    content.cases.write_parquet(folder / "cases.parquet")
    with (folder / "index.faiss").open("xb") as file:  # serialize_index fails where SimpleITK was loaded after faiss
        faiss.write_index(content.vectors, faiss.PyCallbackIOWriter(file.write))
    fields = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "embedding": content.embedding,
        "recipe": content.recipe.to_json(),
        "details": _map_places(content.details, lambda place: os.path.relpath(place, folder.resolve())),
        "files": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
    }
    fields = json.loads(json.dumps(fields))
    fields["sha256"] = _sha256_of_fields(fields)
    (folder / "index.json").write_text(json.dumps(fields, indent=1, sort_keys=True, ensure_ascii=True) + "\n")


def _map_places(details: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The details, the folders among them changed: kept relative to the index, so that it tells no more of the machine.

    An index and its cache can so be moved together.
    """
    return {name: change(value) if name in _PLACES else value for name, value in details.items()}


def read_index_files(path: Path) -> IndexContent:
    """Reads an index folder; no file is parsed before its checksum was found right.

    Raises:
        SearchError: no index, damaged, or of a newer format; names the file.
    """
    fields = _read_fields(path)
    try:
        return _parse_files(path, fields)
    except (*_UNREADABLE, RecipeError, pl.exceptions.PolarsError) as error:
        raise SearchError(f"index {path} cannot be read: {error}; build it again") from error


def _parse_files(path: Path, fields: dict[str, Any]) -> IndexContent:
    names: dict[str, str] = {name: sha256 for name, sha256 in fields["files"].items() if name != "vectors.npy"}
    for name, sha256 in names.items():
        if Path(name).name != name:
            raise SearchError(f"index {path} names a file outside of it, {name}: refused")
        _require_sha256(path / name, sha256)
    arrays = {name: np.load(path / name, allow_pickle=False) for name in names if name.endswith(".npy")}
    cases, vectors = pl.read_parquet(path / "cases.parquet"), faiss.read_index(str(path / "index.faiss"))
    if not isinstance(vectors, faiss.IndexFlatIP) or vectors.ntotal != len(cases):
        raise SearchError(f"index {path} holds {vectors.ntotal} vectors and {len(cases)} cases; build it again")
    return IndexContent(
        embedding=str(fields["embedding"]),
        recipe=Recipe.from_json(fields["recipe"]),
        cases=cases,
        vectors=vectors,
        mean=arrays.get("mean.npy"),
        details=_map_places(fields["details"], lambda place: os.path.normpath(path.resolve() / place)),
        extras={
            name.removeprefix("extra-").removesuffix(".npy"): array
            for name, array in arrays.items()
            if name.startswith("extra-")
        },
    )


def read_vectors(path: Path) -> NDArray[np.float32]:
    """The vectors as they were given: read-only float32 [cases dim], memory-mapped.

    Raises:
        SearchError: the index or their file is damaged.
    """
    _require_sha256(path / "vectors.npy", _read_fields(path)["files"].get("vectors.npy", ""))
    vectors: NDArray[np.float32] = np.load(path / "vectors.npy", mmap_mode="r", allow_pickle=False)
    return vectors


def _read_fields(path: Path) -> dict[str, Any]:
    file = path / "index.json"
    try:
        if file.stat().st_size > _MOST_JSON_BYTES:
            raise SearchError(f"{file} is too large to be an index description; give the folder of an index")
        fields = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SearchError(
            f"{path} is no index: it has no index.json; give the folder that embedkit index wrote"
        ) from error
    except OSError as error:
        raise SearchError(f"cannot open index: {explain_os_error(error, file)}") from error
    except (ValueError, RecursionError) as error:
        raise SearchError(f"{file} is damaged: it is not JSON; build the index again") from error
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        raise SearchError(f"{file} describes no embedkit index; give the folder that embedkit index wrote")
    version = fields.get("format_version")
    if isinstance(version, int) and version > _FORMAT_VERSION:
        raise SearchError(f"{path} has index format {version}, this embedkit reads {_FORMAT_VERSION}; upgrade embedkit")
    if fields.pop("sha256", None) != _sha256_of_fields(fields):
        raise SearchError(f"{file} is damaged: it is not what was written; build the index again")
    return fields


def _sha256_of_fields(fields: dict[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while data := stream.read(_CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _require_sha256(file: Path, sha256: str) -> None:
    try:
        found = _sha256(file)
    except OSError as error:
        raise SearchError(f"cannot read index: {explain_os_error(error, file)}") from error
    if found != sha256:
        raise SearchError(f"{file} is damaged: it is not what was written; build the index again")

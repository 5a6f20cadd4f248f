"""Owns what an index promises of its files: size and checksums, in an index.json that vouches for itself; parses none.

Of a large file two checksums are kept. That of its head, which is all that tells a reader where numbers lie and how
many, is checked at every opening. That of the whole is for who asks whether every byte is what was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedkit.errors import SearchError
from embedkit.files import explain_os_error

__all__ = ["check_file", "identify", "list_damage", "read_fields", "seal_fields", "seal_file"]

_FORMAT = "embedkit-index"
_FORMAT_VERSION = 3
_CHUNK_BYTES = 1 << 23
_MOST_JSON_BYTES = 1 << 26
_CHECKED_WHOLE_BYTES = 1 << 26


def seal_file(file: Path, payload_bytes: int) -> dict[str, Any]:
    """The seal of a file: its ``bytes`` and ``sha256``, and how many of them its head has, with their checksum.

    Args:
        file: To seal.
        payload_bytes: Numbers at its end, whatever whose value a reader comes to no harm; 0 where all is parsed.
    """
    size = file.stat().st_size
    head = size - payload_bytes
    return {"bytes": size, "sha256": _sha256(file), "head_bytes": head, "head_sha256": _sha256(file, head)}


def check_file(folder: Path, name: str, seal: dict[str, Any], *, whole: bool = False) -> None:
    """Checks a file of an index against its seal: a small one whole, of a large one size and head unless ``whole``.

    Raises:
        SearchError: it is not what was written, cannot be read, or lies outside of the folder.
    """
    if Path(name).name != name:
        raise SearchError(f"index {folder} names a file outside of it, {name}: refused")
    whole = whole or seal["bytes"] <= _CHECKED_WHOLE_BYTES
    if problem := _find_problem(folder / name, seal, whole=whole):
        raise SearchError(f"{folder / name} is damaged: {problem}; build the index again")


def list_damage(folder: Path, *, progress: Callable[[int, int], None] | None = None) -> dict[str, str]:
    """Checks every byte of an index: by file what is wrong; empty for a sound one.

    Args:
        folder: Of the index.
        progress: Called with (bytes done, bytes in all).

    Raises:
        SearchError: no index, or its index.json is damaged or of another format.
    """
    seals: dict[str, dict[str, Any]] = read_fields(folder)["files"]
    total, done, found = sum(seal["bytes"] for seal in seals.values()), 0, {}
    for name, seal in sorted(seals.items()):
        if problem := _find_problem(folder / Path(name).name, seal, whole=True):
            found[name] = problem
        done += seal["bytes"]
        if progress is not None:
            progress(done, total)
    return found


def _find_problem(file: Path, seal: dict[str, Any], *, whole: bool) -> str | None:
    try:
        right = file.stat().st_size == seal["bytes"]
        if right and whole:
            right = _sha256(file) == seal["sha256"]
        elif right:
            right = _sha256(file, seal["head_bytes"]) == seal["head_sha256"]
    except OSError as error:
        return f"it cannot be read: {explain_os_error(error, file)}"
    return None if right else "it is not what was written"


def seal_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of an index.json with its format and its own checksum, as `read_fields` takes them."""
    described = {"format": _FORMAT, "format_version": _FORMAT_VERSION} | fields
    plain: dict[str, Any] = json.loads(json.dumps(described))
    return plain | {"sha256": identify(plain)}


def read_fields(folder: Path) -> dict[str, Any]:
    """The fields of an index.json, without its checksum, which was found right.

    Raises:
        SearchError: no index, damaged, or of another format.
    """
    file = folder / "index.json"
    try:
        if file.stat().st_size > _MOST_JSON_BYTES:
            raise SearchError(f"{file} is too large to be an index description; give the folder of an index")
        fields = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SearchError(
            f"{folder} is no index: it has no index.json; give the folder that embedkit index wrote"
        ) from error
    except OSError as error:
        raise SearchError(f"cannot open index: {explain_os_error(error, file)}") from error
    except (ValueError, RecursionError) as error:
        raise SearchError(f"{file} is damaged: it is not JSON; build the index again") from error
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        raise SearchError(f"{file} describes no embedkit index; give the folder that embedkit index wrote")
    version = fields.get("format_version")
    if isinstance(version, int) and version > _FORMAT_VERSION:
        raise SearchError(
            f"{folder} has index format {version}, this embedkit reads {_FORMAT_VERSION}; upgrade embedkit"
        )
    if fields.pop("sha256", None) != identify(fields):
        raise SearchError(f"{file} is damaged: it is not what was written; build the index again")
    if version != _FORMAT_VERSION:
        raise SearchError(f"{folder} has index format {version}, this embedkit reads {_FORMAT_VERSION}; build it again")
    return fields


def identify(fields: dict[str, Any]) -> str:
    """The checksum of the fields of an index.json, without itself."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(file: Path, most: int | None = None) -> str:
    """Over a file, or over no more than its first bytes."""
    digest, left = hashlib.sha256(), file.stat().st_size if most is None else most
    with file.open("rb") as stream:
        while left > 0 and (data := stream.read(min(_CHUNK_BYTES, left))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()

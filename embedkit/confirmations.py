"""Owns ``confirmed.jsonl``, the record of source files that were touched since they were cached, but not changed.

Knows nothing of images. Like the record of failures the file is only ever appended to, one line per event, so that many
writers need no lock; without it every extraction would read such files again to find that nothing is new.
"""

from __future__ import annotations

import json
from pathlib import Path

from embedkit.errors import CacheError
from embedkit.files import append_lines, explain_os_error

__all__ = ["CONFIRMED_FILE", "Confirmation", "read_confirmations", "record_confirmation"]

CONFIRMED_FILE = "confirmed.jsonl"

Confirmation = tuple[int, int, str]
"""Bytes of the files behind a stack, their latest change in ns since the epoch, and the digest found then."""


def record_confirmation(cache_path: Path, case_id: str, view: str, confirmation: Confirmation) -> None:
    """Appends what was found of the files behind the stacks of one case and view.

    Raises:
        CacheError: the record cannot be written.
    """
    size, changed_ns, digest = confirmation
    line = {"case_id": case_id, "view": view, "bytes": size, "changed_ns": changed_ns, "digest": digest}
    file = cache_path / CONFIRMED_FILE
    try:
        append_lines(file, [json.dumps(line, ensure_ascii=True)])
    except OSError as error:
        raise CacheError(f"cannot record that files are unchanged: {explain_os_error(error, file)}") from error


def read_confirmations(cache_path: Path) -> dict[tuple[str, str], Confirmation]:
    """By case and view, what was found last; lines that are no record are passed over: their files are read again.

    Raises:
        CacheError: the record cannot be read.
    """
    file = cache_path / CONFIRMED_FILE
    try:
        lines = file.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise CacheError(f"cannot read which files are unchanged: {explain_os_error(error, file)}") from error
    found: dict[tuple[str, str], Confirmation] = {}
    for line in lines:
        try:
            fields = json.loads(line)
            key = str(fields["case_id"]), str(fields["view"])
            found[key] = int(fields["bytes"]), int(fields["changed_ns"]), str(fields["digest"])
        except (ValueError, KeyError, TypeError, RecursionError):  # of a writer that was killed, or no record at all
            continue
    return found

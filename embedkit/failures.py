"""Owns ``failures.jsonl``, the record of what an extraction could not do; knows nothing of why.

That is cases that failed, and strays: damaged files that lie beside the series of cases. The file is only ever appended
to, one line per event, so that many writers need no lock: a failure, a stray, or the news that one of them was made
good. What is open is the outcome of reading it to the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedkit.errors import CacheError
from embedkit.files import append_lines, explain_os_error

__all__ = [
    "FAILURES_FILE",
    "Failure",
    "FailureLog",
    "Stray",
    "clear_failures",
    "read_failures",
    "record_failure",
    "record_strays",
    "settle_cases",
    "settle_strays",
]

FAILURES_FILE = "failures.jsonl"
_LONGEST_REASON = 2000


@dataclass(frozen=True)
class Failure:
    """One image of one case that could not be extracted.

    Attributes:
        case_id: From the manifest.
        reason: One line for the user; cut at 2,000 characters when recorded.
        view: The view that failed; empty where the whole case did, or where no single view is to blame.
        path: The file's name alone, for a folder can carry a patient's; empty where the image is a folder.
    """

    case_id: str
    reason: str
    view: str = ""
    path: str = ""


@dataclass(frozen=True)
class Stray:
    """A damaged DICOM file of which no series can be told, so that it may be a lost slice of any series in its folder.

    Attributes:
        stray: Tells it from others; another one once its size or its time of change is another.
        reason: What is wrong with it, in one line for the user.
        beside: Ids of the cases whose series lie in its folder, sorted.
        path: Where it is; never recorded, for its name can be a patient's.
    """

    stray: str
    reason: str
    beside: tuple[str, ...] = ()
    path: str = ""


@dataclass(frozen=True)
class FailureLog:
    """What is not yet made good, latest reason each, in the order it first occurred.

    Attributes:
        failures: Of cases.
        unreadable_lines: Numbers, from 1, of lines that are no record (a writer was killed half way through one).
        strays: Damaged files beside the series of cases.
    """

    failures: tuple[Failure, ...]
    unreadable_lines: tuple[int, ...]
    strays: tuple[Stray, ...] = ()


def record_failure(cache_path: Path | str, failure: Failure) -> None:
    """Appends one failure to the cache's record, durably.

    Raises:
        CacheError: the record cannot be written (disk full, read-only folder).
    """
    fields = asdict(failure) | {"reason": failure.reason[:_LONGEST_REASON]}
    _append(cache_path, [json.dumps(fields, ensure_ascii=True)])


def clear_failures(cache_path: Path | str, done: Iterable[tuple[str, str]] | None = None) -> None:
    """Marks failures as made good; naming what never failed is fine.

    Args:
        cache_path: Folder of the cache.
        done: (case_id, view) as recorded; None clears all.

    Raises:
        CacheError: the record cannot be read or written.
    """
    wanted = None if done is None else set(done)
    keys = [(failure.case_id, failure.view) for failure in read_failures(cache_path).failures]
    events = [{"case_id": key[0], "view": key[1], "settled": True} for key in keys if wanted is None or key in wanted]
    if events:
        _append(cache_path, [json.dumps(event, ensure_ascii=True) for event in events])


def settle_cases(cache_path: Path | str, done: Iterable[str], failed: Iterable[Failure] = ()) -> None:
    """Marks as made good what is on record of cases that are done, and of failed ones what failed no longer.

    Args:
        cache_path: Folder of the cache.
        done: Ids of cases that are in the cache.
        failed: What is wrong with the others now, as recorded.

    Raises:
        CacheError: the record cannot be read or written.
    """
    now = {failure.case_id: failure.view for failure in failed}
    cases = {*done, *now}
    known = read_failures(cache_path).failures
    clear_failures(
        cache_path,
        [(each.case_id, each.view) for each in known if each.case_id in cases and now.get(each.case_id) != each.view],
    )


def record_strays(cache_path: Path | str, strays: Iterable[Stray]) -> None:
    """Appends strays to the cache's record, durably, without their paths.

    Raises:
        CacheError: the record cannot be written.
    """
    lines = [
        json.dumps({"stray": each.stray, "reason": each.reason[:_LONGEST_REASON], "beside": each.beside})
        for each in strays
    ]
    if lines:
        _append(cache_path, lines)


def settle_strays(cache_path: Path | str, gone: Iterable[Stray]) -> None:
    """Marks strays as made good: each was mended, or is there no more.

    Raises:
        CacheError: the record cannot be written.
    """
    lines = [json.dumps({"stray": each.stray, "settled": True}) for each in gone]
    if lines:
        _append(cache_path, lines)


def read_failures(cache_path: Path | str) -> FailureLog:
    """What is not yet made good; empty where nothing was ever recorded.

    Raises:
        CacheError: the record cannot be read.
    """
    file = Path(cache_path) / FAILURES_FILE
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return FailureLog((), ())
    except OSError as error:
        raise CacheError(f"cannot read the failure record: {explain_os_error(error, file)}") from error
    open_failures: dict[tuple[str, str], Failure] = {}
    open_strays: dict[str, Stray] = {}
    unreadable = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        match _parse(line):
            case None:
                unreadable.append(number)
            case Failure() as failure:
                open_failures[failure.case_id, failure.view] = failure
            case Stray() as stray:
                open_strays[stray.stray] = stray
            case str(made_good):
                open_strays.pop(made_good, None)
            case made_good:
                open_failures.pop(made_good, None)
    return FailureLog(tuple(open_failures.values()), tuple(unreadable), tuple(open_strays.values()))


def _parse(line: bytes) -> Failure | Stray | tuple[str, str] | str | None:
    """A failure, a stray, the (case_id, view) or stray made good, or None for a line that is none of these."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    return _parse_stray(fields) if "stray" in fields else _parse_failure(fields)


def _parse_failure(fields: dict[str, Any]) -> Failure | tuple[str, str] | None:
    case_id, view = fields.get("case_id"), fields.get("view")
    reason, path = fields.get("reason"), fields.get("path", "")
    if not isinstance(case_id, str) or not isinstance(view, str):
        return None
    if fields.get("settled") is True:
        return case_id, view
    if not isinstance(reason, str) or not isinstance(path, str):
        return None
    return Failure(case_id, reason, view, path)


def _parse_stray(fields: dict[str, Any]) -> Stray | str | None:
    stray, reason, beside = fields.get("stray"), fields.get("reason"), fields.get("beside")
    if not isinstance(stray, str):
        return None
    if fields.get("settled") is True:
        return stray
    if not isinstance(reason, str) or not isinstance(beside, list) or not all(isinstance(each, str) for each in beside):
        return None
    return Stray(stray, reason, tuple(beside))


def _append(cache_path: Path | str, lines: list[str]) -> None:
    file = Path(cache_path) / FAILURES_FILE
    try:
        append_lines(file, lines)
    except OSError as error:
        raise CacheError(f"cannot record a failure: {explain_os_error(error, file)}") from error

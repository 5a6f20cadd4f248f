"""Owns durable, atomic writing of files and folders, and the cleaning up after killed writers; knows no content.

A file or folder is first written under a temporary name beside its final one, ``.NAME.HOST.PID.TOKEN.tmp``, then made
durable (fsync), then given its final name, which it never takes from an existing file. HOST is the host name and its
process-id namespace, TOKEN names one process, so that a later run can tell a killed writer from a live one. What a
writer is about to replace it sets aside under the same name with ``.old`` in the place of ``.tmp``.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

__all__ = [
    "STALE_AFTER_S",
    "append_lines",
    "changed_ns",
    "explain_os_error",
    "publish_file",
    "publish_folder",
    "remove_stale",
    "replace_folder",
    "safe_name",
    "sync_folder",
    "temporary_path",
    "write_new_file",
]

STALE_AFTER_S = 24 * 3600.0
"""Age in seconds after which a temporary file that another host wrote, and writes no more, counts as abandoned."""

_TEMPORARY = re.compile(
    r"\.(?P<final>.+)\.(?P<host>[A-Za-z0-9_-]+)\.(?P<pid>\d+)\.(?P<token>[0-9a-f]{8})(?:-\d+)?\.(?P<role>tmp|old)"
)
_SERIAL = itertools.count()
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EXDEV}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM}


def changed_ns(found: os.stat_result) -> int:
    """The latest change that no program can set back; of content alone where st_ctime is the time of creation."""
    return found.st_mtime_ns if os.name == "nt" else found.st_ctime_ns


def safe_name(text: str) -> str:
    """``text`` as a file's name that cannot leave its folder; where it had to change, a digest keeps it unique."""
    safe = re.sub(r"[^\w.-]", "_", text).lstrip(".")
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@cache
def _host() -> str:
    """This host and its process-id namespace: two containers of one name never take each other's files for dead."""
    try:
        namespace = re.sub(r"\D", "", str(Path("/proc/self/ns/pid").readlink()))
    except OSError:
        namespace = "0"
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', platform.node()) or 'host'}-{namespace}"


@cache
def _token(pid: int) -> str:
    """Names the process beyond its id, which a container restarted under the same name uses again."""
    return f"{pid & 0xFFFF:04x}{secrets.token_hex(2)}"


def temporary_path(final: Path) -> Path:
    """A hidden name beside ``final`` under which to write it; no two calls give the same, in threads neither."""
    pid = os.getpid()
    return final.with_name(f".{final.name}.{_host()}.{pid}.{_token(pid)}-{next(_SERIAL)}.tmp")


def publish_file(temporary: Path, final: Path) -> None:
    """Gives a closed file its final name, durably, in one step.

    Raises:
        FileExistsError: ``final`` exists; it is left as it is.
        OSError: the file system refuses.
    """
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if final.exists():
            raise FileExistsError(errno.EEXIST, "file exists", str(final)) from None
        temporary.rename(final)  # a file system without hard links: as good as atomic, names being random or checked
    else:
        temporary.unlink()
    sync_folder(final.parent)


def publish_folder(temporary: Path, final: Path) -> None:
    """Gives a folder of closed files its final name, durably, in one step.

    Raises:
        OSError: ``final`` is a file or a folder that is not empty, or the file system refuses.
    """
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(temporary)
    temporary.rename(final)
    sync_folder(final.parent)


def replace_folder(temporary: Path, path: Path) -> None:
    """Puts ``temporary`` in the place of the folder at ``path``, which is set aside and comes back if that fails.

    No rename exchanges two folders, so for a moment there is none at ``path``; of a writer killed in it the folder set
    aside is put back by the next `remove_stale`.

    Raises:
        OSError: the file system refuses.
    """
    old = temporary.with_suffix(".old")
    os.utime(path)  # its age is counted from here
    path.rename(old)
    try:
        publish_folder(temporary, path)
    except BaseException:
        if not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_lines(file: Path, lines: Iterable[str]) -> None:
    """Appends lines in one write, durably, so that those of several writers do not mix; makes the file.

    Raises:
        OSError: the file system refuses, or is full.
    """
    data = "".join(f"{line}\n" for line in lines).encode()
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data  # a killed writer left half a line: it stays alone
        if os.write(descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new_file(final: Path, data: bytes) -> None:
    """Writes ``data`` to a file that must not exist yet, atomically and durably.

    Raises:
        FileExistsError: ``final`` exists; it is left as it is.
        OSError: the file system refuses; no temporary file is left.
    """
    temporary = temporary_path(final)
    try:
        temporary.write_bytes(data)
        publish_file(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale(folder: Path, *, now_s: float | None = None) -> list[Path]:
    """Removes what killed writers left in ``folder`` and returns it, sorted; a live writer's files are never touched.

    What a killed writer had set aside (``.old``) and not replaced gets its name back; it is not among those returned.
    A temporary file or folder is stale if a process of this host wrote it that has ended, or if another host wrote
    it and it has not changed for `STALE_AFTER_S`.

    Args:
        folder: Searched itself, not its sub-folders.
        now_s: The time in seconds since the epoch; the clock's by default.
    """
    now_s = time.time() if now_s is None else now_s
    removed = []
    for path in sorted(folder.iterdir()):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or not _is_stale(path, match, now_s):
            continue
        final = path.with_name(match["final"])
        if match["role"] == "old" and not final.exists():
            path.rename(final)
            sync_folder(folder)
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path)
    return removed


def _is_stale(path: Path, name: re.Match[str], now_s: float) -> bool:
    pid = int(name["pid"])
    if name["host"] == _host():
        return name["token"] != _token(pid) if pid == os.getpid() else not _is_alive(pid)
    try:
        return now_s - path.lstat().st_mtime > STALE_AFTER_S
    except FileNotFoundError:
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def explain_os_error(error: OSError, path: Path) -> str:
    """What happened to ``path`` and what to do, in words."""
    if error.errno in _FULL:
        return f"the disk or quota that holds {path} is full; free some space or choose another place"
    if error.errno in _DENIED:
        return f"{path} is read-only or not permitted to this user; choose another place or change its permissions"
    return f"{path}: {error.strerror or error}"

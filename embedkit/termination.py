"""Owns what SIGTERM does to a program: it leaves by way of every clean-up, as Ctrl-C does; knows no command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["end_on_terminate"]


@contextmanager
def end_on_terminate() -> Iterator[None]:
    """Makes SIGTERM raise SystemExit with code 143, so that no temporary folder is left; in the main thread alone."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

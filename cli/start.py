"""Owns the first moments of the program: from its first import on, Ctrl-C ends it with one line; knows no command."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Runs `embedkit.cli.main`; interrupted before a command sees to it, ends with exit code 130."""
    try:
        from embedkit.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("embedkit: interrupted\n")
        sys.stderr.flush()
        os._exit(130)  # half imported libraries do not end in good order

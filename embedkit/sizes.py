"""Owns how a number of bytes is told to people; knows not what takes them."""

from __future__ import annotations

__all__ = ["format_bytes"]


def format_bytes(count: float) -> str:
    """A size for people, in powers of ten: ``834 B``, ``13.3 kB``, ``1.25 GB``."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 999.5 else f"{count / 1000:,.3g} TB"

"""Owns heatmaps of runs as a page lays them over previews: computed when first asked for, kept within a bound."""

from __future__ import annotations

import base64
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from embedkit.cohort import Cohort, Subject
from embedkit.runs import Evidence

__all__ = ["BoundedStore", "Overlays", "encode_heat"]


class BoundedStore:
    """Keeps what was made last, as many bytes of it as fit; safe across threads, which make one thing at a time."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """What ``make`` gave for this key; made anew where it was never made or has been let go."""
        with self._lock:
            if key not in self._kept:
                value = make()
                self._kept[key] = value, size(value)
            self._kept.move_to_end(key)
            value = self._kept[key][0]
            while self.bytes > self.most_bytes and len(self._kept) > 1:
                self._kept.popitem(last=False)
            return value

    @property
    def bytes(self) -> int:
        """Held now."""
        return sum(size for _, size in self._kept.values())


class Overlays:
    """The heatmaps of a cohort's runs."""

    def __init__(self, cohort: Cohort, *, most_bytes: int = 64 << 20) -> None:
        self._cohort = cohort
        self._store = BoundedStore(most_bytes)

    def find(self, run_name: str, subject: Subject, *, class_name: str | None = None) -> dict[str, Any]:
        """What speaks for a class in a case, by ``view/plane``.

        Where a fold of the run tested the case, only the model of that fold is asked (``held_out``).

        Returns:
            ``answer`` in words, ``held_out``, and ``views``: each with ``grid`` (height and width in patches), ``heat``
            (base64 of uint8 [slices height width], 255 for the patch of most evidence in the case), ``weights`` (each
            slice's share of all evidence) and ``attention`` (the head's own slice weights, or null).

        Raises:
            RequestError: no such run.
            RunError: no such class.
        """
        run = self._cohort.run(run_name)
        held_out = self._cohort.holds_out(run, subject)
        key = (run_name, str(subject.cache.path), subject.case_id, class_name)

        def make() -> dict[str, Any]:
            found = run.find_evidence(subject.cache, subject.case_id, class_name=class_name, held_out=held_out)
            return {"run": run_name, "held_out": held_out, "answer": found.answer, "views": _encode_views(found)}

        found: dict[str, Any] = self._store.get(key, make, _measure)
        return found


def encode_heat(values: np.ndarray[Any, Any], highest: float) -> str:
    """Base64 of ``values`` in 0..``highest`` as uint8 0..255."""
    scaled = np.clip(values / (highest or 1.0), 0, 1) * 255
    return base64.b64encode(np.round(scaled).astype(np.uint8).tobytes()).decode("ascii")


def _encode_views(evidence: Evidence) -> dict[str, Any]:
    positive = {view: np.maximum(scores, 0) for view, scores in evidence.scores.items()}
    highest = max((float(scores.max(initial=0)) for scores in positive.values()), default=0.0)
    total = sum(float(scores.sum()) for scores in positive.values()) or 1.0
    attention = evidence.slice_attention
    return {
        view: {
            "grid": list(scores.shape[1:]),
            "heat": encode_heat(scores, highest),
            "weights": [round(float(share), 5) for share in scores.sum((1, 2)) / total],
            "attention": None if attention is None else [round(float(weight), 5) for weight in attention[view]],
        }
        for view, scores in positive.items()
    }


def _measure(found: dict[str, Any]) -> int:
    return sum(len(view["heat"]) + 32 * len(view["weights"]) for view in found["views"].values())

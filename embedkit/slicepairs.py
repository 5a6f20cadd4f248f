"""Owns how a query and a neighbour are compared slice by slice as plain values; knows no page and draws nothing."""

from __future__ import annotations

import threading
from typing import Any

from embedkit.cohort import Cohort, Subject
from embedkit.embeddings import Embedding
from embedkit.errors import RequestError, SearchError
from embedkit.matching import Match, SlicePair, SliceReader, match_slices, measure_centres
from embedkit.overlays import BoundedStore, encode_heat

__all__ = ["Comparer"]

_TOP_PAIRS = 6
_PAIR_BYTES = 200


class Comparer:
    """Matches slices of a subject with those of a case of the cohort; the mean tokens are measured once, when asked."""

    def __init__(self, cohort: Cohort, *, most_bytes: int = 128 << 20) -> None:
        self._cohort = cohort
        self._store = BoundedStore(most_bytes)
        self._lock = threading.Lock()
        self._centres: Any = None
        self.embedding = slice_embedding(cohort)

    def compare(self, subject: Subject, case_id: str) -> dict[str, Any]:
        """Which slice of a case each slice of the subject is most like.

        Returns:
            ``embedding`` compared by, ``similarity`` (mean over pairs), ``views``: by ``view/plane`` the
            ``rows`` of the subject's slices, the ``matches`` (rows of the case) and ``similarities``; ``top``: the
            best pairs, no slice twice; ``patches``: whether `heat` can tell patches apart.

        Raises:
            SearchError: the two have no view in common.
        """
        match = self._match(subject, case_id)
        views: dict[str, dict[str, list[Any]]] = {}
        for pair in match.pairs:
            view = views.setdefault(pair.view, {"rows": [], "matches": [], "similarities": []})
            view["rows"].append(pair.query_row)
            view["matches"].append(pair.other_row)
            view["similarities"].append(round(pair.similarity, 4))
        first = next(iter(match.query.values()))
        return {
            "embedding": str(self.embedding),
            "similarity": match.similarity,
            "views": views,
            "top": [_describe(pair) for pair in match.top(_TOP_PAIRS)],
            "patches": first.patches.shape[1] > 1,
        }

    def heat(self, subject: Subject, case_id: str, view: str, row: int) -> dict[str, Any]:
        """How well each patch of a slice and of its match is found in the other, as heat over both.

        Returns:
            ``grid`` (height, width), ``query`` and ``other``: base64 of uint8 [height width], 0 for the cosine ``low``
            and 255 for ``high``, the extremes of both slices; and the ``row`` and ``match``.

        Raises:
            RequestError: the slice is blank or not there.
        """
        match = self._match(subject, case_id)
        found = [pair for pair in match.pairs if pair.view == view and pair.query_row == row]
        if not found:
            raise RequestError(f"{subject.name} has no slice {row} of view {view!r} that could be matched")
        query, other = match.heat(found[0])
        low, high = (float(each([query.min(), query.max(), other.min(), other.max()])) for each in (min, max))
        return {
            "grid": list(query.shape),
            "row": row,
            "match": found[0].other_row,
            "low": low,
            "high": high,
            "query": encode_heat(query - low, high - low),
            "other": encode_heat(other - low, high - low),
        }

    def _match(self, subject: Subject, case_id: str) -> Match:
        other = self._cohort.subject(case_id)
        key = (str(subject.cache.path), subject.case_id, case_id)

        def make() -> Match:
            query = self._reader(subject).read(subject.case_id)
            return match_slices(query, self._reader(other).read(case_id))

        found: Match = self._store.get(key, make, _measure)
        return found

    def _reader(self, subject: Subject) -> SliceReader:
        """Reads the slices of a subject, centred as those of the cohort."""
        cache = self._cohort.cache
        rows = cache.stacks.select("view", "plane").unique().sort("view", "plane").iter_rows()
        views = [f"{view}/{plane}" for view, plane in rows]
        with self._lock:
            if self._centres is None:
                self._centres = measure_centres(cache, self.embedding, views)
        return SliceReader(subject.cache, self.embedding, views, self._centres)


def slice_embedding(cohort: Cohort) -> Embedding:
    """By what slices are compared: patches in their places where the cache holds them, else class tokens."""
    kinds = {kept.kind: str(kept) for kept in cohort.cache.recipe.parsed_token_sets()}
    if "patch" in kinds:
        return Embedding("grid", kinds["patch"])
    if "cls" in kinds:
        return Embedding("mean", kinds["cls"])
    raise SearchError(f"cache {cohort.cache.path} holds neither class nor patch tokens to match slices by")


def _describe(pair: SlicePair) -> dict[str, Any]:
    return {
        "view": pair.view,
        "row": pair.query_row,
        "match": pair.other_row,
        "query_slice": pair.query_slice,
        "other_slice": pair.other_slice,
        "similarity": round(pair.similarity, 4),
    }


def _measure(match: Match) -> int:
    arrays = [stack.patches.nbytes + stack.vectors.nbytes for stack in (*match.query.values(), *match.other.values())]
    return sum(arrays) + _PAIR_BYTES * len(match.pairs)

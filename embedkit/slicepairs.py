"""Owns how a query and a neighbour are compared slice by slice as plain values; knows no page and draws nothing."""

from __future__ import annotations

from typing import Any

from embedkit.cohort import Cohort, Subject
from embedkit.errors import RequestError
from embedkit.matching import Match, SlicePair, match_slices
from embedkit.overlays import BoundedStore, encode_heat
from embedkit.queries import open_slices

__all__ = ["Comparer"]

_TOP_PAIRS = 6
_PAIR_BYTES = 200


class Comparer:
    """Matches slices of a subject with those of a case of the cohort, as `embedkit.search` compares them."""

    def __init__(self, cohort: Cohort, *, most_bytes: int = 128 << 20) -> None:
        self._cohort = cohort
        self._store = BoundedStore(most_bytes)

    def compare(self, subject: Subject, case_id: str) -> dict[str, Any]:
        """Which slice of a case each slice of the subject goes with, places never running backwards.

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
            "embedding": self._cohort.index.details["slices"],
            "similarity": match.similarity,
            "views": views,
            "top": [_describe(pair) for pair in match.top(_TOP_PAIRS)],
            "patches": first.patches.shape[1] > 1,
        }

    def heat(self, subject: Subject, case_id: str, view: str, row: int) -> dict[str, Any]:
        """What each patch of a slice and of its match adds to the similarity of the two, as heat over both.

        Returns:
            ``grid`` (height, width), ``query`` and ``other``: base64 of uint8 [height width], 0 for ``low`` or less and
            255 for ``high``, the most of both; ``row``, ``match`` and ``similarity`` of the pair.

        Raises:
            RequestError: the slice is blank or not there.
        """
        match = self._match(subject, case_id)
        found = [pair for pair in match.pairs if pair.view == view and pair.query_row == row]
        if not found:
            raise RequestError(f"{subject.name} has no slice {row} of view {view!r} that could be matched")
        query, other = match.heat(found[0])
        high = float(max(query.max(), other.max(), 0))
        return {
            "grid": list(query.shape),
            "row": row,
            "match": found[0].other_row,
            "similarity": found[0].similarity,
            "low": 0.0,
            "high": high,
            "query": encode_heat(query, high),
            "other": encode_heat(other, high),
        }

    def _match(self, subject: Subject, case_id: str) -> Match:
        other = self._cohort.subject(case_id)
        key = (str(subject.cache.path), subject.case_id, case_id)

        def make() -> Match:
            index = self._cohort.index
            query, theirs = (open_slices(index, each.cache).read(each.case_id) for each in (subject, other))
            return match_slices(query, theirs, order="ordered")

        found: Match = self._store.get(key, make, _measure)
        return found


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

"""Texts as queries: found by vectors of the tokens' space, and refused wherever nobody vouches for that space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from embedkit.errors import HeadError, SearchError
from embedkit.index import Index
from embedkit.indexwriting import write_index
from embedkit.recipe import Recipe
from embedkit.retrieval import search_texts

RECIPE = Recipe("a clip", "builtin:0", ("cls:2",), 32, (0.0,), (1.0,), preview=0)
TABLE = pl.DataFrame({"case_id": ["a", "b", "c"], "patient_id": ["p", "q", "r"], "age": [30, 40, 50]})
VECTORS = np.float32([[1, 0, 0.1], [0, 1, 0], [-1, 0, 0]])


def make_index(path: Path, *, embedding: str = "mean:cls:2", **options: Any) -> Index:
    return write_index(VECTORS, TABLE, embedding=embedding, recipe=RECIPE, out=path, **options)


def test_each_text_finds_the_cases_that_its_vector_points_at(tmp_path: Path) -> None:
    index = make_index(tmp_path / "index")
    np.save(tmp_path / "texts.npy", np.float32([[0, 3, 0], [-2, 0.1, 0]]))
    found = search_texts(index, ["up", "left"], tmp_path / "texts.npy", shared_space=True, k=1)
    assert found["query"].to_list() == ["up", "left"] and found["case_id"].to_list() == ["b", "c"]
    assert found["similarity"][0] == pytest.approx(1)
    young = search_texts(index, ["left"], np.float32([[-2, 0.1, 0]]), shared_space=True, k=1, where="age < 50")
    assert young["case_id"].to_list() == ["b"]


def test_nothing_is_pretended_of_a_space_that_nobody_vouches_for(tmp_path: Path) -> None:
    index = make_index(tmp_path / "index")
    with pytest.raises(SearchError, match=r"nothing tells whether tokens of a clip .* say so \(--shared-space\)"):
        search_texts(index, ["up"], np.float32([[0, 3, 0]]))
    with pytest.raises(SearchError, match=r"image tower is a clip .*\(--text-model, --text-w.*\(--text-vectors\)"):
        search_texts(index, ["up"], None, shared_space=True)


@pytest.mark.parametrize("vectors", [np.ones((1, 2), np.float32), np.ones((2, 3), np.float32), np.ones(3, np.float32)])
def test_a_row_per_text_of_the_length_of_the_vectors_is_expected(tmp_path: Path, vectors: np.ndarray) -> None:
    index = make_index(tmp_path / "index")
    with pytest.raises(SearchError, match=r"expected \[1, 3\]: a row per text, as long as the mean:cls:2"):
        search_texts(index, ["up"], vectors, shared_space=True)
    with pytest.raises(HeadError, match="text vectors cannot be read from"):
        search_texts(index, ["up"], tmp_path / "none.npy", shared_space=True)


@pytest.mark.parametrize(
    ("embedding", "options", "named"),
    [
        ("aligned:cls:2", {}, "holds aligned:cls:2 of each case, a space"),
        ("mean:cls:2+mean:cls:1", {}, r"holds mean:cls:2\+mean:cls:1 of each case"),
        ("mean:cls:2", {"whiten": 2}, "holds mean:cls:2 of each case, whitened"),
        ("mean:cls:2", {"centre": True}, "holds mean:cls:2 of each case, centred"),
    ],
)
def test_an_index_in_a_space_of_its_own_is_refused(
    tmp_path: Path, embedding: str, options: dict[str, Any], named: str
) -> None:
    index = make_index(tmp_path / "index", embedding=embedding, **options)
    with pytest.raises(SearchError, match=f"{named}.* --embedding mean:cls --whiten 0"):
        search_texts(index, ["up"], np.ones((1, 3), np.float32), shared_space=True)

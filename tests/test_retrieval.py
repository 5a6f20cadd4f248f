"""Case vectors and search: values by hand, missing views, files as queries, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from embedkit.cache import StackTokens, create_cache, open_cache, write_shard
from embedkit.embeddings import Embedding, embed_cases
from embedkit.errors import OptionError, SearchError
from embedkit.indexbuilding import build_index
from embedkit.recipe import Recipe
from embedkit.retrieval import search

RECIPE = Recipe(
    backbone="made up",
    weights="builtin:0",
    token_sets=("cls:2", "patch@2:1"),
    image_size=32,
    mean=(0.0,),
    std=(1.0,),
    preview=0,
)


def stack(case: str, view: str, cls: list[list[float]], *, blank: tuple[int, ...] = ()) -> StackTokens:
    """Patch tokens are the class token times the number of the place, from 1 to 4."""
    tokens = np.array(cls, np.float16)
    flags = np.zeros(len(tokens), bool)
    flags[list(blank)] = True
    return StackTokens(
        case_id=case,
        patient_id=case[0],
        view=view,
        plane="axial",
        sources=(view,),
        indices=np.arange(len(tokens), dtype=np.int32),
        positions_mm=np.arange(len(tokens), dtype=np.float32),
        blank=flags,
        plane_shape=(4, 4),
        box=(0, 0, 4, 4),
        source_shape=(len(tokens), 4, 4),
        source_affine=np.eye(4),
        source_bytes=1,
        source_digest="0",
        tokens={"cls:2": tokens, "patch@2:1": tokens[:, None] * np.arange(1, 5, dtype=np.float16)[:, None]},
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Three cases; a1 has both views, a2 lacks ``t2``, b1 has a blank slice."""
    create_cache(tmp_path / "cache", RECIPE)
    stacks = [
        stack("a1", "t1", [[1, 0], [3, 0]]),
        stack("a1", "t2", [[10, 4]]),
        stack("a2", "t1", [[0, 2]]),
        stack("b1", "t1", [[5, 5], [2, 6]], blank=(0,)),
        stack("b1", "t2", [[12, 8]]),
    ]
    write_shard(tmp_path / "cache", RECIPE, stacks)
    return tmp_path / "cache"


def test_a_case_vector_is_the_mean_over_its_slices_that_are_not_blank(cache: Path) -> None:
    found = embed_cases(open_cache(cache), Embedding.parse("mean:cls:2"))
    assert found.cases["case_id"].to_list() == ["a1", "a2", "b1"]
    assert found.views == ("t1/axial", "t2/axial")
    np.testing.assert_allclose(found.vectors[:, 0], [[2, 0], [0, 2], [2, 6]])
    np.testing.assert_allclose(found.vectors[:, 1], [[10, 4], [0, 0], [12, 8]])
    assert found.present.tolist() == [[True, True], [True, False], [True, True]]


def test_views_are_centred_before_they_are_averaged_so_that_a_missing_one_pulls_nowhere(cache: Path) -> None:
    found = embed_cases(open_cache(cache), Embedding.parse("mean:cls:2"))
    means = found.view_means()
    np.testing.assert_allclose(means, [[4 / 3, 8 / 3], [11, 6]], rtol=1e-6)
    fused = found.fuse(means)
    np.testing.assert_allclose(fused[1], np.array([0, 2]) - means[0], rtol=1e-6)
    np.testing.assert_allclose(
        fused[0], ((np.array([2, 0]) - means[0]) + (np.array([10, 4]) - means[1])) / 2, rtol=1e-6
    )


def test_mean_of_patches_forgets_places_and_grid_keeps_them(cache: Path) -> None:
    opened = open_cache(cache)
    mean = embed_cases(opened, Embedding.parse("mean:patch@2:1")).vectors[0, 0]
    grid = embed_cases(opened, Embedding.parse("grid:patch@2:1")).vectors[0, 0]
    np.testing.assert_allclose(mean, [5, 0])
    np.testing.assert_allclose(grid, [2, 0, 4, 0, 6, 0, 8, 0])


def test_an_index_is_searched_by_case_by_vector_and_with_a_filter(cache: Path, tmp_path: Path) -> None:
    labels = pl.DataFrame({"case_id": ["a1", "a2", "b1"], "grade": [1, 2, 2]})
    index = build_index(cache, tmp_path / "index", labels=labels)
    assert (index.embedding, index.details["slices"]) == ("aligned:patch@2:1", "grid:patch@2:1")
    found = search(index, case_id="a1", k=5)
    assert sorted(found["case_id"]) == ["a2", "b1"] and found["rank"].to_list() == [1, 2]
    assert search(index, case_id="a1", k=5, exclude_same="patient_id")["case_id"].to_list() == ["b1"]
    assert search(index, case_id="b1", k=5, where="grade = 2")["case_id"].to_list() == ["a2"]
    own = index.read_vectors()[2]
    assert search(index, vector=own, k=1)["case_id"].to_list() == ["b1"]
    assert search(index, vector=own, k=1)["similarity"][0] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("text", ["cls:12", "median:cls:12", "grid:cls:12", "mean:attention:12", "mean:cut:8"])
def test_an_embedding_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"mean|grid"):
        Embedding.parse(text)


def test_a_token_set_that_the_cache_lacks_is_answered_with_those_it_holds(cache: Path, tmp_path: Path) -> None:
    for embedding in ("mean:cls:7", "mean:patch@7"):
        with pytest.raises(SearchError, match=r"cls:2, patch@2:1"):
            build_index(cache, tmp_path / "index", embedding=embedding)


def test_a_query_must_be_exactly_one_thing(cache: Path, tmp_path: Path) -> None:
    index = build_index(cache, tmp_path / "index")
    with pytest.raises(SearchError, match="no query, expected exactly one"):
        search(index)
    with pytest.raises(SearchError, match="case and volume, expected exactly one"):
        search(index, case_id="a1", volume="x.nii")
    with pytest.raises(SearchError, match="the query is no case of the index; say its value"):
        search(index, vector=np.ones(2, np.float32), exclude_same="patient_id")


def test_an_empty_cache_gives_no_index(tmp_path: Path) -> None:
    create_cache(tmp_path / "cache", RECIPE)
    with pytest.raises(SearchError, match="holds no stack yet"):
        build_index(tmp_path / "cache", tmp_path / "index")


def test_a_view_of_one_case_is_compared_with_the_mean_of_all_views(tmp_path: Path) -> None:
    create_cache(tmp_path / "cache", RECIPE)
    stacks = [stack("a1", "ct", [[4, 0]]), stack("b1", "image", [[1, 0]]), stack("c1", "image", [[1, 3]])]
    write_shard(tmp_path / "cache", RECIPE, stacks)
    means = embed_cases(open_cache(tmp_path / "cache"), Embedding.parse("mean:cls:2")).view_means()
    np.testing.assert_allclose(means, [[2, 1], [1, 1.5]])
    assert len(build_index(tmp_path / "cache", tmp_path / "index")) == 3

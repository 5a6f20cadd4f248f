"""Matching of slices: values by hand, the best ordered choice against every choice, and many cases as one by one."""

from __future__ import annotations

from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedkit.cache import StackTokens, create_cache, open_cache, write_shard
from embedkit.embeddings import Embedding
from embedkit.errors import OptionError, RecipeError, SearchError
from embedkit.indexbuilding import build_index
from embedkit.matching import (
    CaseSlices,
    Order,
    StackSlices,
    match_slices,
)
from embedkit.recipe import Recipe
from embedkit.retrieval import match_cases
from embedkit.slicereading import SliceReader, measure_centres
from embedkit.slicescores import score_slices
from embedkit.slicestore import SliceStore

RECIPE = Recipe("made up", "builtin:0", ("cls:2", "patch@2:1"), 32, (0.0,), (1.0,), preview=0)


def unit(values: Any) -> Any:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def slices_of(vectors: Any, *, votes: Any = None) -> StackSlices:
    """One patch per slice; slice i is row i and index 2 i + 1."""
    vectors = unit(np.float32(vectors))
    rows = np.arange(len(vectors))
    return StackSlices(rows, (2 * rows + 1).astype(np.int32), vectors, vectors[:, None], votes)


def random_slices(seed: int, slices: int, *, patches: int = 4, dim: int = 3) -> StackSlices:
    tokens = np.random.default_rng(seed).standard_normal((slices, patches, dim)).astype(np.float32)
    rows = np.arange(slices)
    return StackSlices(rows, rows.astype(np.int32), unit(tokens.reshape(slices, -1)), unit(tokens))


UP, RIGHT, DOWN = [0, 1], [1, 0], [0, -1]


def test_every_slice_of_the_query_takes_the_slice_most_like_it() -> None:
    match = match_slices({"t1/axial": slices_of([UP, RIGHT, UP])}, {"t1/axial": slices_of([RIGHT, DOWN, UP])})
    assert [(pair.query_row, pair.other_row) for pair in match.pairs] == [(0, 2), (1, 0), (2, 2)]
    assert [(pair.query_slice, pair.other_slice) for pair in match.pairs] == [(1, 5), (3, 1), (5, 5)]
    assert match.similarity == pytest.approx(1)


def test_an_ordered_match_never_runs_backwards() -> None:
    query, other = {"v": slices_of([UP, RIGHT, DOWN])}, {"v": slices_of([DOWN, RIGHT, UP])}
    assert match_slices(query, other).similarity == pytest.approx(1)
    ordered = match_slices(query, other, order="ordered")
    places = [pair.other_row for pair in ordered.pairs]
    assert places == sorted(places) and ordered.similarity == pytest.approx(1 / 3)
    assert match_slices(query, query, order="ordered").similarity == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_the_ordered_match_is_the_best_of_all_ordered_choices(seed: int, rows: int, columns: int) -> None:
    query, other = random_slices(seed, rows), random_slices(seed + 1, columns)
    cosines = query.vectors @ other.vectors.T
    best = max(
        sum(cosines[row, column] for row, column in enumerate(choice))
        for choice in combinations_with_replacement(range(columns), rows)
    )
    assert match_slices({"v": query}, {"v": other}, order="ordered").similarity == pytest.approx(best / rows, abs=1e-5)


@pytest.mark.parametrize("order", ["free", "ordered"])
@pytest.mark.parametrize("by_patch", [False, True])
def test_many_cases_score_as_they_do_one_by_one(order: Order, by_patch: bool) -> None:
    query: CaseSlices = {"a": random_slices(0, 5), "b": random_slices(1, 3)}
    others: list[CaseSlices] = [
        {"a": random_slices(2, 4), "b": random_slices(3, 1)},
        {"b": random_slices(4, 7)},
        {"a": random_slices(5, 9), "b": random_slices(6, 2), "c": random_slices(7, 2)},
    ]
    single = [match_slices(query, other, order=order, by_patch=by_patch).similarity for other in others]
    np.testing.assert_allclose(score_slices(query, others, order=order, by_patch=by_patch), single, atol=1e-6)
    none = score_slices(query, [{"c": random_slices(8, 2)}], order=order, by_patch=by_patch)
    assert none.tolist() == [-1]


def test_cases_without_a_common_view_are_not_matched() -> None:
    with pytest.raises(SearchError, match="no view in common: a and b; nothing can be matched"):
        match_slices({"a": random_slices(0, 2)}, {"b": random_slices(1, 2)})


def test_patches_match_wherever_they_are_and_slices_only_in_place() -> None:
    patches = np.float32([[UP, RIGHT, RIGHT, DOWN]])
    turned = patches[:, ::-1]
    rows, indices = np.arange(1), np.zeros(1, np.int32)
    query = {"v": StackSlices(rows, indices, unit(patches.reshape(1, -1)), patches)}
    other = {"v": StackSlices(rows, indices, unit(turned.reshape(1, -1)), turned)}
    assert match_slices(query, other).similarity == pytest.approx(0)
    match = match_slices(query, other, by_patch=True)
    assert match.similarity == pytest.approx(1)
    assert match.patch_pairs(match.pairs[0], 1) == [((0, 0), (1, 1), 1.0)]
    mine, theirs = match.heat(match.pairs[0])
    assert mine.shape == theirs.shape == (2, 2) and mine.min() == 1


def test_votes_weigh_patches_and_slices() -> None:
    query = {"v": slices_of([UP, RIGHT], votes=np.float32([[3], [1]]))}
    other: CaseSlices = {"v": slices_of([UP])}
    assert match_slices(query, other, by_patch=True).similarity == pytest.approx(3 / 4)
    assert score_slices(query, [other], by_patch=True)[0] == pytest.approx(3 / 4)


def test_only_patches_that_vote_are_looked_for_in_the_other_slice() -> None:
    rows, indices = np.arange(1), np.zeros(1, np.int32)
    mine, theirs = np.float32([[UP, RIGHT, RIGHT, DOWN]]), np.float32([[DOWN, UP, UP, RIGHT]])
    votes = np.float32([[0, 0, 0.5, 1]])
    query = {"v": StackSlices(rows, indices, unit(mine.reshape(1, -1)), mine, votes)}
    other = {"v": StackSlices(rows, indices, unit(theirs.reshape(1, -1)), theirs)}
    match = match_slices(query, other, by_patch=True)
    (pair,) = match.pairs
    assert match.by_patch and pair.votes == 1.5
    heat, found = match.heat(pair)
    assert heat.tolist() == [[-1, -1], [1, 1]]
    assert found.tolist() == [[1, 0], [0, 1]]
    assert match.locate_region(pair).tolist() == [[True, False], [False, True]]
    assert sorted(match.patch_pairs(pair, 9)) == [((1, 0), (1, 1), 1.0), ((1, 1), (0, 0), 1.0)]


def test_the_top_pairs_use_no_slice_twice() -> None:
    match = match_slices({"v": slices_of([UP, UP, RIGHT])}, {"v": slices_of([UP, [1, 0.2]])})
    assert [(pair.query_row, pair.other_row) for pair in match.top(3)] == [(0, 0), (2, 1)]


# --- from a cache ----------------------------------------------------------------------------------------------------


def stack(case: str, cls: list[list[float]], *, blank: tuple[int, ...] = (), view: str = "t1") -> StackTokens:
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
        indices=2 * np.arange(len(tokens), dtype=np.int32),
        positions_mm=np.arange(len(tokens), dtype=np.float32),
        blank=flags,
        plane_shape=(4, 4),
        box=(0, 0, 4, 4),
        source_shape=(2 * len(tokens), 4, 4),
        source_affine=np.eye(4),
        source_bytes=1,
        source_digest="0",
        tokens={"cls:2": tokens, "patch@2:1": tokens[:, None] * np.arange(1, 5, dtype=np.float16)[:, None]},
    )


def make_cache(path: Path, *stacks: StackTokens, recipe: Recipe = RECIPE) -> Path:
    create_cache(path, recipe)
    write_shard(path, recipe, stacks)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(
        tmp_path / "cache",
        stack("a1", [[2, 0], [9, 9], [0, 2]], blank=(1,)),
        stack("b1", [[0, 4], [5, 0]]),
        stack("c1", [[3, 3]]),
        stack("c1", [[7, 8]], view="t2"),
    )


def test_slices_are_read_without_the_blank_ones_and_less_the_mean_of_their_place(cache: Path) -> None:
    opened, embedding = open_cache(cache), Embedding.parse("grid:patch@2:1")
    centres = measure_centres(opened, embedding, ["t1/axial", "t2/axial"])
    np.testing.assert_allclose(centres[0], np.float32([2, 9 / 5]) * np.arange(1, 5)[:, None])
    np.testing.assert_allclose(centres[1], np.float32([17 / 6, 17 / 6]) * np.arange(1, 5)[:, None], rtol=1e-6)
    found = SliceReader(opened, embedding, ["t1/axial", "t2/axial"], centres).read("a1")["t1/axial"]
    assert found.rows.tolist() == [0, 2] and found.indices.tolist() == [0, 4]
    expected = unit(np.float32([[0, -1.8], [-2, 0.2]]))
    np.testing.assert_allclose(found.patches, np.repeat(expected[:, None], 4, 1), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("slices", ["grid:patch@2", "mean:patch@2", "mean:cls"])
@pytest.mark.parametrize("whitened", [False, True])
def test_what_the_patches_of_either_slice_add_is_their_cosine(cache: Path, slices: str, whitened: bool) -> None:
    opened, embedding = open_cache(cache), Embedding.parse(f"{slices}:{2 if 'cls' in slices else 1}")
    centres = measure_centres(opened, embedding, ["t1/axial"])
    dim = 8 if slices.startswith("grid") else 2
    whitening = np.random.default_rng(0).standard_normal((dim, 3)).astype(np.float32) if whitened else None
    reader = SliceReader(opened, embedding, ["t1/axial"], centres, whitening)
    match = match_slices(reader.read("a1"), reader.read("b1"))
    for pair in match.pairs:
        for heat in match.heat(pair):
            assert heat.shape == ((1, 1) if "cls" in slices else (2, 2))
            assert heat.sum() == pytest.approx(pair.similarity, abs=1e-5)


def test_a_patch_adds_what_it_has_in_common_with_its_place_in_the_other_slice(cache: Path) -> None:
    opened, embedding = open_cache(cache), Embedding.parse("grid:patch@2:1")
    reader = SliceReader(opened, embedding, ["t1/axial"], measure_centres(opened, embedding, ["t1/axial"]))
    match = match_slices(reader.read("a1"), reader.read("b1"))
    mine, theirs = match.heat(match.pairs[0])
    expected = match.pairs[0].similarity * np.arange(1, 5) ** 2 / 30  # the patches are multiples of the first
    np.testing.assert_allclose(mine.reshape(-1), expected, rtol=1e-4)
    np.testing.assert_allclose(theirs.reshape(-1), expected, rtol=1e-4)


def test_cases_of_an_index_are_matched(cache: Path, tmp_path: Path) -> None:
    index = build_index(cache, tmp_path / "index")
    assert index.details["slices"] == "grid:patch@2:1"
    first, second = match_cases(index, "a1", ["b1", "c1"])
    assert [(pair.query_slice, pair.other_slice) for pair in first.pairs] == [(0, 2), (4, 0)]
    assert first.similarity > second.similarity
    assert [pair.other_row for pair in match_cases(index.path, "a1", ["b1"], order="ordered")[0].pairs] == [0, 0]


def test_slices_can_be_compared_by_another_token_set(cache: Path, tmp_path: Path) -> None:
    index = build_index(cache, tmp_path / "index", slices="mean:cls")
    assert index.details["slices"] == "mean:cls:2" and index.extras["slice_centres"].shape == (2, 1, 2)
    assert match_cases(index, "a1", ["a1"])[0].similarity == pytest.approx(1)


def test_what_cannot_be_matched_is_refused(cache: Path, tmp_path: Path) -> None:
    index = build_index(cache, tmp_path / "index")
    with pytest.raises(OptionError, match="order 'any' is unknown; give free or ordered"):
        match_cases(index, "a1", ["b1"], order="any")  # type: ignore[arg-type]
    with pytest.raises(SearchError, match="has no case z9 in t1/axial, t2/axial; give the cache that was indexed"):
        match_cases(index, "a1", ["z9"])
    other = make_cache(tmp_path / "other", stack("a1", [[1, 2]]), recipe=Recipe(**{**vars(RECIPE), "crop": "none "}))
    with pytest.raises(RecipeError, match=r"crop is 'none ' there and 'none' here. Give the cache that was indexed"):
        match_cases(index, "a1", ["a1"], cache=other)
    with pytest.raises(SearchError, match=r"but .*gone is gone; say where it is"):
        match_cases(index, "a1", ["b1"], cache=tmp_path / "gone")


def test_a_store_gives_each_case_its_slices_and_nothing_where_it_has_none() -> None:
    vectors = np.arange(12, dtype=np.float16).reshape(6, 2)
    places = np.int32([[0, 0, 1, 2], [0, 0, 3, 6], [0, 1, 0, 0], [2, 1, 4, 8], [3, 0, 0, 0], [3, 0, 1, 2]])
    store = SliceStore(vectors, places, ["a", "b"])
    first, none, last = (store.read(case) for case in (3, 1, 0))
    assert none == store.read(4) == {} and list(first) == ["a"] and list(last) == ["a", "b"]
    assert first["a"].vectors.tolist() == [[8, 9], [10, 11]] and first["a"].vectors.dtype == np.float32
    assert last["a"].rows.tolist() == [1, 3] and last["a"].indices.tolist() == [2, 6]
    assert last["b"].vectors.tolist() == [[4, 5]] and store.read(2)["b"].rows.tolist() == [4]


@pytest.mark.parametrize("order", ["free", "ordered"])
def test_a_store_scores_many_cases_as_they_are_scored_one_by_one(order: Any) -> None:
    random = np.random.default_rng(3)
    counts = {(case, view): int(random.integers(0, 9)) for case in range(12) for view in range(2)}
    counts[4, 0] = counts[4, 1] = 0  # a case that the index holds without any slice
    places = np.int32([[case, view, row, row] for (case, view), count in counts.items() for row in range(count)])
    vectors = random.standard_normal((len(places), 5)).astype(np.float16)
    store = SliceStore(vectors, places, ["a", "b"])
    cases = [11, 4, 0, 7, 2, 2, 9, 30]
    some, other = (random_slices(seed, 5, patches=1, dim=5) for seed in (0, 1))
    for query in ({"a": some}, {"b": other, "a": some}, {"c": some}):
        single = [score_slices(query, [store.read(case)], order=order)[0] for case in cases]
        np.testing.assert_allclose(store.score(query, cases, order=order), single, atol=1e-6)
        assert single[1] == single[-1] == -1
    assert store.score({"a": some}, [], order=order).shape == (0,)

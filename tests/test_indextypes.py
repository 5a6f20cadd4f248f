"""Types of index: the choice by size and memory, recall as asked and measured, rare filters, memory maps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from embedkit import indexfiles, indexwriting, unitvectors
from embedkit.errors import OptionError, SearchError
from embedkit.index import Index, open_index
from embedkit.indextypes import KINDS, IndexOptions, plan_index
from embedkit.indexwriting import rewrite_index, write_index
from embedkit.recipe import Recipe
from embedkit.tuning import choose_held_out, find_exactly, measure_recalls
from embedkit.whitening import fit_whitening

RECIPE = Recipe("toy", "builtin:1", ("cls:2",), 32, (0.5,), (0.25,))
CASES, DIM = 10_000, 16


def clustered(count: int = CASES, seed: int = 0) -> Any:
    """Vectors in 100 clusters, as embeddings are."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(5).standard_normal((100, DIM))
    return (centres[random.integers(100, size=count)] + 0.5 * random.standard_normal((count, DIM))).astype(np.float32)


def table_of(count: int) -> pl.DataFrame:
    numbers = pl.int_range(count, eager=True)
    return pl.DataFrame(
        {"case_id": "c" + numbers.cast(pl.String), "patient_id": "p" + (numbers // 2).cast(pl.String), "n": numbers}
    )


def cosines(queries: Any, vectors: Any) -> Any:
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in (queries, vectors)]
    return unit[0] @ unit[1].T


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Index]:
    folder, vectors = tmp_path_factory.mktemp("indexes"), clustered()
    return {
        kind: write_index(
            vectors,
            table_of(CASES),
            embedding="mean:cls:2",
            recipe=RECIPE,
            out=folder / kind,
            options=IndexOptions(kind=kind, recall=0.9),
        )
        for kind in KINDS
    }


def recall_of(index: Index, queries: Any, vectors: Any, k: int = 10) -> float:
    found = index.search(queries, k)["case_id"].str.slice(1).cast(pl.Int64).to_numpy().reshape(len(queries), k)
    truth = np.argsort(-cosines(queries, vectors), axis=1)[:, :k]
    return float(np.mean([len(np.intersect1d(mine, true)) / k for mine, true in zip(found, truth, strict=True)]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_reaches_the_recall_asked_for_and_says_what_it_measured(
    indexes: dict[str, Index], kind: str
) -> None:
    index = indexes[kind]
    assert index.kind == kind and index.options.recall == 0.9
    assert index.tuning.reached and 0.88 <= index.tuning.recall <= 1
    assert recall_of(index, clustered(400, seed=1), clustered()) >= 0.9
    assert (index.tuning.queries, index.tuning.effort > 0) == ((0, False) if kind == "flat" else (500, True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("where", "allowed"), [("n < 25", 25), ("n % 3 = 0", 3334), ("n < 7", 7)])
def test_a_filter_leaves_k_results_whatever_the_type(
    indexes: dict[str, Index], kind: str, where: str, allowed: int
) -> None:
    index, queries = indexes[kind], clustered(20, seed=2)
    found = index.search(queries, 20, where=where)
    assert found.height == 20 * min(20, allowed)
    assert found.filter(pl.sql_expr(where)).height == found.height
    if allowed < 100:
        best = np.sort(cosines(queries, clustered()[:allowed]), axis=1)[:, ::-1][:, :20]
        if kind in ("flat", "hnsw", "ivf"):
            np.testing.assert_allclose(found["similarity"].to_numpy().reshape(20, -1), best, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_same_patient_is_left_out_whatever_the_type(indexes: dict[str, Index], kind: str) -> None:
    found = indexes[kind].search_cases(["c10", "c11", "c500"], 5, exclude_same="patient_id")
    assert found["query"].to_list() == [0] * 5 + [1] * 5 + [2] * 5
    assert not set(found["patient_id"][:10]) & {"p5"} and "p250" not in set(found["patient_id"][10:])


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "sq"])
def test_a_filter_that_takes_away_what_is_next_to_a_query_keeps_the_recall(tmp_path: Path, kind: str) -> None:
    """As where every neighbour of a query is of its own institution, and that is left out."""
    random = np.random.default_rng(0)
    centres, sites = random.standard_normal((40, 32)), random.integers(40, size=6_000)
    vectors = (centres[sites] + 0.5 * random.standard_normal((6_000, 32))).astype(np.float32)
    queries = (centres[0] + 0.5 * random.standard_normal((50, 32))).astype(np.float32)
    table = table_of(6_000).with_columns(site=pl.Series(sites))
    options = IndexOptions(kind=kind, recall=0.9)
    index = write_index(vectors, table, embedding="mean:cls:2", recipe=RECIPE, out=tmp_path / kind, options=options)
    assert index.tuning.reached
    found = index.search(queries, 10, where="site != 0")["case_id"].str.slice(1).cast(pl.Int64).to_numpy()
    truth = np.argsort(np.where(sites == 0, np.inf, -cosines(queries, vectors)), axis=1)[:, :10]
    assert measure_recalls(found.reshape(50, 10), truth).mean() >= 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_under_a_filter_finds_what_each_query_finds_alone(
    indexes: dict[str, Index], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is compared by matrix products, block by block; one query vector by vector."""
    monkeypatch.setattr(unitvectors, "_BLOCK_BYTES", 4 * DIM * 37)
    index, queries = indexes[kind], clustered(25, seed=6)
    for where in ("n % 11 = 3", "n < 60"):
        batch = index.search(queries, 9, where=where)
        alone = pl.concat([index.search(query, 9, where=where) for query in queries])
        assert batch["case_id"].to_list() == alone["case_id"].to_list()
        np.testing.assert_allclose(batch["similarity"], alone["similarity"], atol=1e-6)


def test_equal_vectors_are_told_in_one_order_in_a_batch_and_alone(tmp_path: Path) -> None:
    half = clustered(60)
    for kind in ("flat", "hnsw"):
        index = write_index(
            np.concatenate([half, half]),
            table_of(120),
            embedding="mean:cls:2",
            recipe=RECIPE,
            out=tmp_path / kind,
            options=IndexOptions(kind=kind, recall=0.5),
        )
        batch = index.search(half[:25], 2, where="n != 119")
        alone = pl.concat([index.search(query, 2, where="n != 119") for query in half[:25]])
        assert batch["case_id"].to_list() == alone["case_id"].to_list()
        assert batch["case_id"].to_list()[:2] == ["c60", "c0"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_mapped_from_disk_answers_alike(
    indexes: dict[str, Index], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, queries = indexes[kind], clustered(5, seed=3)
    monkeypatch.setattr(indexfiles, "_MAPPED_FROM_BYTES", 0)
    mapped = open_index(index.path)
    assert mapped.search(queries, 7).equals(index.search(queries, 7))
    assert mapped.search(queries, 7, where="n < 50").equals(index.search(queries, 7, where="n < 50"))


def test_codes_are_refined_by_the_vectors_as_they_were_given(indexes: dict[str, Index]) -> None:
    index = indexes["ivfpq"]
    assert index.tuning.refine > 1
    query = clustered(1, seed=4)
    found = index.search(query, 3)
    rows = found["case_id"].str.slice(1).cast(pl.Int64).to_list()
    np.testing.assert_allclose(found["similarity"], cosines(query, clustered()[rows])[0], atol=1e-5)


def test_an_index_that_is_rewritten_keeps_what_was_fitted(tmp_path: Path) -> None:
    vectors = clustered(300)
    index = write_index(vectors, table_of(300), embedding="mean:cls:2", recipe=RECIPE, out=tmp_path / "index", whiten=8)
    assert index.dim == DIM and index.whitening is not None and index.whitening.shape == (DIM, 8)
    again = rewrite_index(index, vectors[:200], table_of(200))
    assert len(again) == 200 and again.path == index.path
    np.testing.assert_array_equal(again.whitening, index.whitening)
    np.testing.assert_array_equal(again.mean, index.mean)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    with pytest.raises(SearchError, match="has case c1 more than once"):
        rewrite_index(again, vectors[:200], table_of(200).with_columns(case_id=pl.lit("c1")))
    assert len(open_index(index.path)) == 200


def test_an_index_that_another_changed_meanwhile_is_left_alone(tmp_path: Path) -> None:
    vectors = clustered(300)
    index = write_index(vectors, table_of(300), embedding="mean:cls:2", recipe=RECIPE, out=tmp_path / "index")
    late = open_index(index.path)
    rewrite_index(index, vectors[:200], table_of(200))
    with pytest.raises(SearchError, match=r"was changed by another since it was opened; open it and change it again"):
        rewrite_index(late, vectors[:100], table_of(100))
    assert len(open_index(index.path)) == 200 and [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_added_and_withdrawn_without_building_anew(
    indexes: dict[str, Index], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more, built = np.concatenate([clustered(), clustered(300, seed=8)]), []
    real = indexwriting._build
    monkeypatch.setattr(indexwriting, "_build", lambda *given: built.append(len(given[1])) or real(*given))
    shutil.copytree(indexes[kind].path, tmp_path / kind)
    index = open_index(tmp_path / kind)
    grown = rewrite_index(index, more, table_of(10_300), kept=np.arange(CASES))
    assert built == [] and (grown.count, grown.tuning.changed, grown.tuning.vectors) == (10_300, 300, CASES)
    assert grown.tuning.effort == index.tuning.effort
    assert recall_of(grown, clustered(200, seed=1), more) >= 0.9
    kept = np.flatnonzero(np.arange(10_300) % 50 != 7)
    left = rewrite_index(grown, more[kept], table_of(10_300)[kept.tolist()], kept=kept)
    assert built == ([len(kept)] if kind == "hnsw" else [])
    assert left.count == len(kept) and left.tuning.changed == (0 if kind == "hnsw" else 506)
    found = left.search(more[kept[::100]], 1, where="n % 2 = 0 OR n % 2 = 1")
    assert np.mean(found["n"].to_numpy() == kept[::100]) > (0.8 if kind == "ivfpq" else 0.97)
    assert not set(left.search(more[7::50], 5)["n"]) & set(range(7, 10_300, 50))


def test_what_changed_much_is_built_anew_and_tuned_again(tmp_path: Path) -> None:
    vectors = clustered(1_200)
    options = IndexOptions(kind="ivf", recall=0.5)
    index = write_index(
        vectors[:1_000], table_of(1_000), embedding="m", recipe=RECIPE, out=tmp_path / "index", options=options
    )
    assert (index.tuning.vectors, index.tuning.changed) == (1_000, 0)
    few = rewrite_index(index, vectors[:1_060], table_of(1_060), kept=np.arange(1_000))
    assert (few.tuning.vectors, few.tuning.changed) == (1_000, 60)
    many = rewrite_index(few, vectors[:1_120], table_of(1_120), kept=np.arange(1_060))
    assert (many.tuning.vectors, many.tuning.changed) == (1_120, 0)
    bad = np.concatenate([vectors[:1_120], np.zeros((1, DIM), np.float32)])
    with pytest.raises(SearchError, match="the vector of case c1120 is zero"):
        rewrite_index(many, bad, table_of(1_121), kept=np.arange(1_120))
    assert open_index(index.path).count == 1_120


def test_whitening_gives_every_component_about_the_same_variance() -> None:
    vectors = (clustered(4000) * np.linspace(10, 1, DIM)).astype(np.float32)
    mean = vectors.mean(0)
    white = (vectors - mean) @ fit_whitening(vectors, mean, 6)
    np.testing.assert_allclose(np.cov(white.T), np.eye(6), atol=0.02)
    with pytest.raises(OptionError, match=r"17 whitened components .*; 4000 vectors of length 16 have 1 to 16"):
        fit_whitening(vectors, mean, 17)


def test_the_type_follows_size_and_memory() -> None:
    def kind(count: int, memory_mb: float | None = None, dim: int = 384) -> str:
        memory = None if memory_mb is None else int(memory_mb * 1e6)
        return plan_index(count, dim, IndexOptions(memory_bytes=memory))[0].kind

    assert kind(20_000) == "flat" and kind(20_001) == "hnsw" and kind(200_001) == "ivf"
    assert kind(10_000, 16) == "flat" and kind(10_000, 15) == "sq" and kind(100_000, 100) == "sq"
    assert kind(1_000_000, 2000) == "ivf" and kind(1_000_000, 500) == "sq" and kind(1_000_000, 250) == "ivfpq"
    sizes = [
        plan_index(1_000_000, 384, IndexOptions(kind="ivfpq", memory_bytes=limit * 10**6))[0]
        for limit in (300, 150, 60)
    ]
    assert [plan.code_bytes for plan in sizes] == [192, 96, 24] and all(plan.bytes < 300e6 for plan in sizes)


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(OptionError, match="index type 'tree' is unknown; give one of flat, hnsw, ivf, sq, ivfpq"):
        IndexOptions(kind="tree")
    for recall in (0.0, 1.5, float("nan")):
        with pytest.raises(OptionError, match=r"recall .* means nothing; give a share above 0 and at most 1"):
            IndexOptions(recall=recall)
    with pytest.raises(OptionError, match=r"ivfpq needs 9,984 vectors or more .*; here are 500 of length 16: choose"):
        plan_index(500, 16, IndexOptions(kind="ivfpq"))
    with pytest.raises(OptionError, match=r"take 2.16 MB as sq: more than the 100 kB allowed; allow more memory"):
        plan_index(5000, 384, IndexOptions(memory_bytes=100_000))


def test_recall_is_the_share_of_true_neighbours_found() -> None:
    truth = np.array([[1, 2], [0, 2]])
    assert measure_recalls(np.array([[2, 1], [0, 5]]), truth).tolist() == [1, 0.5]


def test_exact_neighbours_are_found_in_blocks_without_what_is_left_out() -> None:
    vectors = clustered(700)
    held_out = choose_held_out(np.arange(700))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = find_exactly(unit, unit[held_out.queries], held_out.rows, 10, prepare=np.asarray)
    similar = unit[held_out.queries] @ unit.T
    similar[:, held_out.rows] = -2
    np.testing.assert_array_equal(found, np.argsort(-similar, axis=1)[:, :10])

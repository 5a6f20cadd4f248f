"""Recall as asked: patients held out, a bound for the sampling error, what is tried next, and saying where it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from embedkit import indextypes
from embedkit.errors import RecallWarning
from embedkit.index import Index
from embedkit.indextypes import IndexOptions, plan_index
from embedkit.indexwriting import write_index
from embedkit.recipe import Recipe
from embedkit.tuning import bound_recall, choose_held_out

RECIPE = Recipe("toy", "builtin:1", ("cls:2",), 32, (0.5,), (0.25,))
DIM = 24


def patients(count: int, *, each: int = 1, spread: float = 0.1, seed: int = 0) -> Any:
    """Vectors of patients, so many of each that are near doubles of each other; patients lie anywhere."""
    random = np.random.default_rng(seed)
    own = np.repeat(random.standard_normal((count, DIM)), each, axis=0)
    return (own + spread * random.standard_normal(own.shape)).astype(np.float32)


def build(out: Path, vectors: Any, *, each: int = 1, **options: Any) -> Index:
    numbers = pl.int_range(len(vectors), eager=True)
    table = pl.DataFrame({"case_id": numbers.cast(pl.String), "patient_id": (numbers // each).cast(pl.String)})
    return write_index(vectors, table, embedding="mean:cls:2", recipe=RECIPE, out=out, options=IndexOptions(**options))


def recalls_of(index: Index, vectors: Any, queries: Any) -> NDArray[np.float64]:
    found = index.search(queries, 10)["case_id"].cast(pl.Int64).to_numpy().reshape(len(queries), 10)
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (queries, vectors)]
    truth = np.argsort(-(unit[0] @ unit[1].T), axis=1)[:, :10]
    return np.array([len(np.intersect1d(mine, true)) / 10 for mine, true in zip(found, truth, strict=True)])


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "sq"])
@pytest.mark.parametrize("asked", [0.8, 0.95])
def test_new_queries_find_what_was_asked_for_and_what_was_told(tmp_path: Path, kind: str, asked: float) -> None:
    vectors = patients(6000)
    index = build(tmp_path / "index", vectors, kind=kind, recall=asked)
    found = recalls_of(index, vectors, patients(400, seed=1))
    error = found.std() / np.sqrt(len(found))
    assert index.tuning.reached and found.mean() > asked - error
    assert index.tuning.recall_low - 2 * error <= found.mean() <= index.tuning.recall_high + 2 * error
    assert index.tuning.recall_low < index.tuning.recall < index.tuning.recall_high


def test_near_doubles_of_a_patient_do_not_flatter_what_a_new_patient_gets(tmp_path: Path) -> None:
    vectors = patients(800, each=10)
    asked, new = 0.8, patients(400, seed=1)
    honest = build(tmp_path / "honest", vectors, each=10, kind="ivf", recall=asked)
    flattered = build(tmp_path / "flattered", vectors, kind="ivf", recall=asked)  # nobody said whose they are
    assert flattered.tuning.effort < honest.tuning.effort
    assert flattered.tuning.recall_low > recalls_of(flattered, vectors, new).mean() + 0.05
    found = recalls_of(honest, vectors, new)
    assert found.mean() > asked - 0.05
    assert honest.tuning.recall_low - 0.03 < found.mean() < honest.tuning.recall_high + 0.03


def test_every_row_is_found_under_its_own_number_after_some_were_held_out(tmp_path: Path) -> None:
    vectors = patients(2000)
    held_out = choose_held_out(np.arange(2000)).rows
    for kind in ("hnsw", "ivf", "sq"):
        index = build(tmp_path / kind, vectors, kind=kind, recall=0.9)
        found = index.search(vectors, 1)
        own = found.filter(pl.col("case_id") == pl.col("query").cast(pl.String))
        assert len(own) > 1800 and own["similarity"].min() > 0.9
        assert own.filter(pl.col("query").is_in(held_out.tolist())).height > 0.9 * len(held_out)
        assert index.search(vectors, 1, where="case_id = '7'")["case_id"].unique().to_list() == ["7"]


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "sq"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.filterwarnings("ignore::embedkit.errors.RecallWarning")
def test_hardly_any_vectors_are_all_found_by_any_type(tmp_path: Path, kind: str, count: int) -> None:
    vectors = patients(count)
    index = build(tmp_path / "index", vectors, kind=kind)
    assert index.search(vectors, 5).height == count * count
    assert index.search(vectors, 1)["case_id"].to_list() == [str(row) for row in range(count)]


# --- the bound -------------------------------------------------------------------------------------------------------


def test_the_bound_allows_for_the_error_of_the_sample() -> None:
    recalls, groups = np.tile([0.9, 1.0], 200), np.arange(400)
    values = np.append(recalls, 0)
    error = values.std(ddof=1) / np.sqrt(401)
    assert bound_recall(recalls, groups, 0.05) == pytest.approx(values.mean() - 1.6487 * error, abs=1e-5)
    assert bound_recall(recalls, groups, 0.975) > recalls.mean()
    assert bound_recall(np.ones(50), np.arange(50), 0.05) < 0.96  # fifty that find all are no certainty
    assert bound_recall(np.ones(5000), np.arange(5000), 0.05) > 0.999
    assert bound_recall(np.zeros(3), np.zeros(3), 0.05) == 0


def test_queries_of_one_patient_count_as_one_in_the_bound() -> None:
    recalls = np.repeat(np.tile([0.8, 1.0], 20), 10)
    apart = bound_recall(recalls, np.arange(400), 0.05)
    together = bound_recall(recalls, np.repeat(np.arange(40), 10), 0.05)
    assert recalls.mean() - together > 2.5 * (recalls.mean() - apart)


# --- held out --------------------------------------------------------------------------------------------------------


def test_patients_are_held_out_whole_and_tuned_or_told_on_but_not_both() -> None:
    groups = np.repeat(np.arange(500), 8)
    held = choose_held_out(groups)
    assert len(held.rows) == 400 and set(np.bincount(groups[held.rows])) == {0, 8}
    shown, told = held.halve()
    assert (shown ^ told).all() and not set(held.groups[shown]) & set(held.groups[told])
    assert shown.sum() == told.sum() + 8 or shown.sum() == told.sum()
    many = choose_held_out(np.arange(1_000_000) // 40)
    assert len(many.rows) == 1024 * 40 and len(many.queries) == 1024 and np.isin(many.queries, many.rows).all()


def test_single_vectors_are_held_out_where_every_patient_is_too_large() -> None:
    held = choose_held_out(np.repeat([0, 1], 1000))
    assert len(held.rows) == 256 and len(set(held.groups.tolist())) == 256
    for count in (1, 2, 3):
        few = choose_held_out(np.zeros(count, np.int64))
        assert len(few.rows) == count // 2


# --- what is tried next ----------------------------------------------------------------------------------------------


def test_what_is_tried_follows_what_was_asked_for() -> None:
    def kinds(count: int, **options: Any) -> list[str]:
        return [plan.factory for plan in plan_index(count, 384, IndexOptions(**options))]

    assert kinds(100_000) == ["HNSW32", "IVF1265,Flat"]
    assert kinds(100_000, kind="hnsw") == ["HNSW32", "HNSW48", "HNSW64"]
    assert kinds(100_000, kind="hnsw", memory_bytes=190 * 10**6) == ["HNSW32"]
    assert kinds(100_000, recall=1.0) == ["Flat"]
    assert kinds(1_000_000) == ["IVF4000,Flat"]
    assert kinds(5_000) == ["Flat"]


def test_a_graph_that_falls_short_gives_way_to_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indextypes, "_GRAPHS", ((2, 1),))
    monkeypatch.setattr(indextypes, "_FLAT_UP_TO", 1000)
    vectors = patients(5000)
    index = build(tmp_path / "index", vectors, recall=0.99)
    assert index.kind == "ivf" and index.tuning.reached
    assert recalls_of(index, vectors, patients(200, seed=1)).mean() > 0.985


def test_a_graph_asked_for_is_built_again_with_more_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indextypes, "_GRAPHS", ((2, 1), (32, 40)))
    index = build(tmp_path / "index", patients(5000), kind="hnsw", recall=0.95)
    assert index.kind == "hnsw" and index.tuning.reached
    assert int(index._vectors.index.hnsw.nb_neighbors(1)) == 32


def test_a_recall_that_cannot_be_promised_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indextypes, "_GRAPHS", ((2, 1),))
    vectors = patients(5000)
    with pytest.warns(
        RecallWarning, match=r"of the 10 nearest as hnsw; the recall of 0.99 that was asked for cannot be"
    ):
        index = build(tmp_path / "index", vectors, kind="hnsw", recall=0.99)
    assert not index.tuning.reached and index.shortfall is not None
    found = recalls_of(index, vectors, patients(400, seed=1)).mean()
    assert index.tuning.recall_low - 0.05 < found < 0.97

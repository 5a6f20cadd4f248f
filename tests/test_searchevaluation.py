"""Judging an index: measures by hand, who is a query, groups, ranking by slices, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from embedkit.cli.main import app
from typer.testing import CliRunner

from embedkit.cache import StackTokens, create_cache, write_shard
from embedkit.errors import EmbedkitError, OptionError, SearchError
from embedkit.index import Index
from embedkit.indexbuilding import build_index
from embedkit.indexwriting import write_index
from embedkit.recipe import Recipe
from embedkit.retrieval import search, search_each
from embedkit.searchevaluation import SearchScores, evaluate_search

RECIPE = Recipe("toy", "builtin:1", ("patch@2:1",), 32, (0.5,), (0.25,), preview=0)
DEGREES = (0, 10, 25, 100, 115, 200)
TABLE = pl.DataFrame(
    {
        "case_id": list("abcdef"),
        "patient_id": ["p", "p", "q", "r", "r", "s"],
        "kind": ["x", "y", "x", "y", "y", None],
        "site": ["n", "n", "m", "m", "m", "m"],
        "note": ["1", "2", "3", "4", "5", "6"],
    }
)


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Directions in the plane: the smaller the angle between two cases, the nearer they are."""
    angles = np.deg2rad(DEGREES)
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    return write_index(vectors, TABLE, embedding="mean:cls:2", recipe=RECIPE, out=tmp_path / "index")


def judge(index: Index, **options: Any) -> SearchScores:
    return evaluate_search(index, **{"relevant": "kind", "rerank": "none", "k": (1, 2), "resamples": 50} | options)


def values(scores: SearchScores, group: str | None = None) -> dict[str, float]:
    return dict(scores.table.filter(pl.col("group").eq_missing(group)).select("measure", "value").iter_rows())


def test_every_measure_is_that_of_the_ranked_lists(index: Index) -> None:
    """By angle: a finds b c d e f; b a c d e f; c b a d e f; d e c b a f; e d f c b a."""
    scores = judge(index)
    assert scores.skipped == 1 and scores.depth == 100
    assert scores.queries["case_id"].to_list() == list("abcde")
    assert scores.queries["relevant"].to_list() == [1, 2, 1, 2, 2]
    assert scores.queries["first"].to_list() == [2, 3, 2, 1, 1]
    found = values(scores)
    assert found["precision@1"] == pytest.approx(2 / 5)
    assert found["precision@2"] == pytest.approx((1 / 2 + 0 + 1 / 2 + 1 / 2 + 1 / 2) / 5)
    assert found["recall@2"] == pytest.approx((1 + 0 + 1 + 1 / 2 + 1 / 2) / 5)
    assert found["mrr"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 + 1) / 5)
    precisions = [1 / 2, (1 / 3 + 2 / 4) / 2, 1 / 2, (1 + 2 / 3) / 2, (1 + 2 / 4) / 2]
    assert found["map"] == pytest.approx(np.mean(precisions))
    assert found["chance"] == pytest.approx((1 + 2 + 1 + 2 + 2) / 5 / 5)
    assert found["knn_accuracy@1"] == pytest.approx(2 / 5)
    assert found["knn_balanced_accuracy@1"] == pytest.approx((0 + 2 / 3) / 2)


def test_intervals_are_over_the_patients_of_the_queries(index: Index) -> None:
    row = judge(index, resamples=400).table.row(0, named=True)
    assert (row["queries"], row["patients"]) == (5, 3)
    assert row["low"] == 0 and row["high"] == 1
    again = judge(index, resamples=400)
    assert again.table.equals(judge(index, resamples=400).table)
    assert math.isnan(judge(index, resamples=0).table["low"][0])


def test_queries_of_each_group_are_judged_apart(index: Index) -> None:
    scores = judge(index, by="site")
    assert scores.table["group"].unique(maintain_order=True).to_list() == [None, "m", "n"]
    assert values(scores, "m")["precision@1"] == pytest.approx(2 / 3)
    assert values(scores, "n")["precision@1"] == 0
    assert scores.queries["group"].to_list() == ["n", "n", "m", "m", "m"]


def test_excluded_cases_are_neither_found_nor_missed(index: Index) -> None:
    scores = judge(index, exclude_same="patient_id")
    assert scores.queries["case_id"].to_list() == list("abcde")
    assert scores.queries["relevant"].to_list() == [1, 2, 1, 1, 1]
    assert values(scores)["recall@1"] == pytest.approx(1 / 5)
    filtered = judge(index, where="case_id != 'c'")
    assert filtered.queries["case_id"].to_list() == ["b", "c", "d", "e"]
    assert filtered.queries["relevant"].to_list() == [2, 1, 2, 2]


def test_what_there_is_to_be_found_is_counted_as_one_would_by_hand(tmp_path: Path) -> None:
    random = np.random.default_rng(4)

    def draw(most: int) -> list[int | None]:
        return [None if value == most else int(value) for value in random.integers(0, most + 1, 40)]

    table = pl.DataFrame(
        {"case_id": [f"c{n}" for n in range(40)], "patient_id": ["p"] * 40, "kind": draw(4), "site": draw(5)}
    )
    vectors = random.standard_normal((40, 4)).astype(np.float32)
    index = write_index(vectors, table, embedding="mean:cls:2", recipe=RECIPE, out=tmp_path / "index")
    for exclude_same in (None, "site"):
        expected = {}
        for mine in table.rows(named=True):
            found = [
                other["kind"] == mine["kind"]
                for other in table.filter(pl.col("site") > 1).rows(named=True)
                if other["case_id"] != mine["case_id"] and (exclude_same is None or other["site"] != mine["site"])
            ]
            if mine["kind"] is not None and any(found):
                expected[mine["case_id"]] = (sum(found), sum(found) / len(found))
        scores = judge(index, exclude_same=exclude_same, where="site > 1")
        assert dict(scores.queries.select("case_id", "relevant").iter_rows()) == {
            name: count for name, (count, _) in expected.items()
        }
        assert values(scores)["chance"] == pytest.approx(np.mean([share for _, share in expected.values()]))


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Path]:
    """An index of 24 cases with slices, two and two alike."""
    folder = tmp_path_factory.mktemp("sliced")
    create_cache(folder / "cache", RECIPE)
    stacks = []
    for number in range(24):
        shared, own = np.random.default_rng(number // 2), np.random.default_rng(100 + number)
        patches = shared.standard_normal((6, 4, 5)) + 0.3 * own.standard_normal((6, 4, 5))
        stacks.append(
            StackTokens(
                case_id=f"c{number:02}",
                patient_id=f"p{number // 2:02}",
                view="t1",
                plane="axial",
                sources=("t1",),
                indices=np.arange(6, dtype=np.int32),
                positions_mm=np.arange(6, dtype=np.float32),
                blank=np.zeros(6, bool),
                plane_shape=(8, 8),
                box=(0, 0, 8, 8),
                source_shape=(6, 8, 8),
                source_affine=np.eye(4),
                source_bytes=1,
                source_digest="0",
                tokens={"patch@2:1": patches.astype(np.float16)},
            )
        )
    write_shard(folder / "cache", RECIPE, stacks)
    return build_index(folder / "cache", folder / "index"), folder / "cache"


@pytest.mark.parametrize("options", [{}, {"rerank": "free"}, {"by_patch": True}, {"rerank": "none"}])
def test_many_searches_at_once_find_what_each_finds(sliced: tuple[Index, Path], options: dict[str, Any]) -> None:
    index, _ = sliced
    found = search_each(index, ["c03", "c08"], k=4, **options)
    for place, case_id in enumerate(("c03", "c08")):
        alone = search(index, case_id=case_id, k=4, **options)
        assert found.filter(pl.col("query") == place).drop("query").equals(alone)


def test_ranking_again_by_slices_needs_no_cache_but_patches_do(sliced: tuple[Index, Path]) -> None:
    index, cache = sliced
    before = evaluate_search(index, relevant="patient_id", resamples=0)
    assert values(before)["recall@1"] > 0.9
    gone = cache.rename(cache.with_name("away"))
    try:
        again = evaluate_search(index, relevant="patient_id", resamples=0)
        assert again.queries.equals(before.queries)
        with pytest.raises(SearchError, match="is gone; say where it is"):
            evaluate_search(index, relevant="patient_id", by_patch=True)
    finally:
        gone.rename(cache)


def test_an_index_of_slices_ranks_by_the_slices_that_it_keeps(
    sliced: tuple[Index, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cache = sliced
    index = build_index(cache, tmp_path / "slices", level="slice", embedding="grid:patch@2")
    for rerank in ("none", "free", "ordered"):
        read = search(index, case_id="c05", k=23, rerank=rerank, cache=cache)
        kept = search(index, case_id="c05", k=23, rerank=rerank)
        assert kept["case_id"][0] == "c04" and len(kept) == 23
        assert kept["case_id"].to_list() == read["case_id"].to_list()
        np.testing.assert_allclose(kept["similarity"], read["similarity"], atol=1e-3)
    free = {row["case_id"]: row["similarity"] for row in search(index, case_id="c05", k=23, rerank="free").to_dicts()}
    monkeypatch.setattr("embedkit.ranking._HITS_PER_SLICE", 1)
    few = search(index, case_id="c05", k=23, rerank="none")
    assert len(few) == 23 and few["similarity"][0] == pytest.approx(free["c04"], abs=1e-3)
    assert len(search(index, case_id="c05", k=23, rerank="none", where="case_id > 'c20'")) == 3


def test_what_cannot_be_judged_is_refused(index: Index) -> None:
    for options, message in (
        ({"relevant": "age"}, r"relevant names 'age', but the cases of index .* have case_id, patient_id, kind"),
        ({"relevant": "note"}, "no case shares its note with another"),
        ({"relevant": "patient_id", "exclude_same": "patient_id"}, "no case shares its patient_id with another"),
        ({"by": "age"}, "by names 'age'"),
        ({"exclude_same": "age"}, "exclude_same names 'age'"),
        ({"where": "age ="}, "filter 'age =' does not work"),
    ):
        with pytest.raises(SearchError, match=message):
            judge(index, **options)
    for options in ({"k": ()}, {"k": (0, 1)}, {"resamples": -1}, {"candidates": 0}, {"seed": -1}):
        with pytest.raises(OptionError, match="expected some k and candidates of at least 1, resamples and seed of 0"):
            judge(index, **options)
    with pytest.raises(OptionError, match="rerank 'best' is unknown"):
        judge(index, rerank="best")


def test_groups_of_too_many_values_are_refused(tmp_path: Path) -> None:
    table = pl.DataFrame(
        {"case_id": [f"c{n}" for n in range(60)], "patient_id": ["p"] * 60, "age": range(60), "kind": [1] * 60}
    )
    vectors = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
    index = write_index(vectors, table, embedding="mean:cls:2", recipe=RECIPE, out=tmp_path / "index")
    with pytest.raises(SearchError, match="by names 'age', which has 60 different values, expected 50 or fewer"):
        judge(index, by="age")


def test_the_command_prints_measures_with_intervals_and_the_same_as_json(index: Index) -> None:
    asked = ["search-eval", str(index.path), "--relevant", "kind", "--rerank", "none", "-k", "1,2"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines()[1].split() == ["all", "precision@1", "0.400", "0.000..1.000", "5", "3"]
    assert "no query: 1 case whose kind is unknown" in shown.stderr
    told = json.loads(CliRunner().invoke(app, [*asked, "--by", "site", "--json"]).stdout)
    assert told["skipped"] == 1 and told["depth"] == 100
    assert told["measures"][0]["measure"] == "precision@1" and told["measures"][0]["value"] == pytest.approx(0.4)
    assert [query["case_id"] for query in told["queries"]] == list("abcde")
    apart = CliRunner().invoke(app, [*asked, "--by", "site"]).stdout  # the queries of site n are of one patient
    assert "nan" not in apart
    assert {line.split()[3] for line in apart.splitlines() if line.split()[0] == "n"} == {"undefined"}
    wrong = CliRunner().invoke(app, [*asked[:-1], "one"])
    assert isinstance(wrong.exception, EmbedkitError) and "k is 'one'" in str(wrong.exception)

"""Tests of the search index: right neighbours, filters within the search, and a folder that is whole or refused."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedkit.errors import SearchError
from embedkit.files import temporary_path
from embedkit.index import Index, open_index
from embedkit.indexseals import seal_file
from embedkit.indexwriting import write_index
from embedkit.recipe import Recipe

RECIPE = Recipe("toy", "builtin:1", ("cls:2",), 32, (0.5,), (0.25,))


def make_table(cases: int) -> pl.DataFrame:
    numbers = np.arange(cases)
    return pl.DataFrame(
        {
            "case_id": [f"c{number}" for number in numbers],
            "patient_id": [f"p{number // 2}" for number in numbers],
            "sex": numbers % 2,
            "age": numbers * 1.5,
            "site": [None if number == 0 else "ab"[number % 2] for number in numbers],
        }
    )


def make_vectors(cases: int, dim: int = 8, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((cases, dim)).astype(np.float32)


def make_index(out: Path, cases: int = 40, **options: Any) -> Index:
    vectors = options.pop("vectors", None)
    vectors = make_vectors(cases) if vectors is None else vectors
    table = options.pop("table", None)
    table = make_table(len(vectors)) if table is None else table
    return write_index(vectors, table, embedding="mean:cls:2", recipe=RECIPE, out=out, **options)


def cosines(queries: Any, vectors: Any) -> Any:
    queries, vectors = np.float64(queries), np.float64(vectors)
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(vectors, axis=1)
    return queries @ vectors.T / lengths


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return make_index(tmp_path / "index")


# --- neighbours ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(cases=st.integers(2, 60), k=st.integers(1, 70), queries=st.integers(1, 5), centre=st.booleans())
def test_a_search_finds_what_exact_cosines_find(
    tmp_path_factory: pytest.TempPathFactory, cases: int, k: int, queries: int, centre: bool
) -> None:
    vectors, asked = make_vectors(cases) + 1, make_vectors(queries, seed=1)
    index = make_index(tmp_path_factory.mktemp("x") / "index", vectors=vectors, centre=centre)
    found = index.search(asked, k)
    mean = vectors.mean(0) if centre else 0
    expected = cosines(asked - mean, vectors - mean)
    assert found.height == queries * min(k, cases)
    for query in range(queries):
        part = found.filter(pl.col("query") == query)
        order = np.argsort(-expected[query])[:k]
        assert part["rank"].to_list() == list(range(1, min(k, cases) + 1))
        assert np.allclose(part["similarity"], expected[query][order], atol=1e-5)
        assert part["case_id"].to_list() == [f"c{row}" for row in order]


def test_a_result_has_names_metadata_and_the_right_types(index: Index) -> None:
    found = index.search(make_vectors(40)[7], 1)
    assert found.columns == ["query", "rank", "case_id", "patient_id", "similarity", "sex", "age", "site"]
    row = found.row(0, named=True)
    assert row["similarity"] == pytest.approx(1.0, abs=1e-6)
    assert row | {"similarity": 1} == {
        "query": 0,
        "rank": 1,
        "case_id": "c7",
        "patient_id": "p3",
        "similarity": 1,
        "sex": 1,
        "age": 10.5,
        "site": "b",
    }


def test_a_case_of_the_index_is_not_its_own_neighbour(index: Index) -> None:
    found = index.search_cases(["c7", "c3"], 3)
    direct = index.search(make_vectors(40)[[7, 3]], 4).filter(pl.col("rank") > 1)
    assert found["query"].to_list() == [0, 0, 0, 1, 1, 1] and found["rank"].to_list() == [1, 2, 3] * 2
    assert found["case_id"].to_list() == direct["case_id"].to_list()
    assert np.allclose(found["similarity"], direct["similarity"], atol=1e-5)
    assert index.search_cases(["c7"], 1, include_self=True)["case_id"].to_list() == ["c7"]
    assert index.search_cases(["c7"], 100).height == 39
    assert index.search_cases([], 3).height == 0


def test_equal_vectors_do_not_hide_each_other(tmp_path: Path) -> None:
    vectors = np.ones((6, 4), np.float32)
    found = make_index(tmp_path / "index", vectors=vectors).search_cases(["c2"], 10)
    assert sorted(found["case_id"].to_list()) == ["c0", "c1", "c3", "c4", "c5"]
    assert found["similarity"].to_list() == pytest.approx([1.0] * 5)


def test_centring_takes_the_common_direction_away(tmp_path: Path) -> None:
    vectors = np.float32([[10, 1], [10, -1], [10, 2], [10, -2]])
    plain = make_index(tmp_path / "plain", vectors=vectors)
    centred = make_index(tmp_path / "centred", vectors=vectors, centre=True)
    assert plain.search_cases(["c0"], 3)["similarity"].min() > 0.9
    assert centred.search_cases(["c0"], 3)["similarity"].to_list() == pytest.approx([1, -1, -1])
    assert plain.mean is None and centred.mean is not None and centred.mean.tolist() == [10, 0]


# --- filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("sex == 1", {row for row in range(40) if row % 2}),
        ("sex = 1 AND age < 6", {1, 3}),
        ("case_id IN ('c5', 'c39')", {5, 39}),
        ("site IS NULL", {0}),
        ("site <> 'a'", {row for row in range(40) if row % 2}),  # null is neither
        ("patient_id LIKE 'p1%'", {2, 3, *range(20, 40)}),
        ("age > 1000", set()),
        ("1 = 1", set(range(40))),
    ],
)
def test_a_filter_is_applied_before_the_search(index: Index, where: str, expected: set[int]) -> None:
    query = make_vectors(1, seed=3)
    found = index.search(query, 40, where=where)
    assert {int(case[1:]) for case in found["case_id"]} == expected
    allowed = sorted(expected)
    best = sorted(cosines(query, make_vectors(40))[0][allowed], reverse=True)
    assert np.allclose(found["similarity"], best, atol=1e-5)
    assert found.columns == index.search(query, 1).columns


def test_a_rare_filter_still_gives_k_results(tmp_path: Path) -> None:
    vectors = make_vectors(5000, 4)
    table = make_table(5000).with_columns(rare=pl.int_range(5000) % 1000 == 999)
    found = make_index(tmp_path / "index", vectors=vectors, table=table).search(vectors[:3], 5, where="rare")
    assert found.height == 15 and found["rare"].all()


@pytest.mark.parametrize(
    "where", ["nope = 1", "sex =", "", "sex", "sex = 'f'", "age + 1", "sex = 1; select 2", "sex in (select 1)", "*"]
)
def test_a_filter_that_does_not_work_names_the_columns(index: Index, where: str) -> None:
    message = r"does not work \(.+\); write an SQL condition over case_id, patient_id, sex, age, site, for example"
    with pytest.raises(SearchError, match=message) as caught:
        index.search(make_vectors(1), 3, where=where)
    assert repr(where) in str(caught.value) and "\n" not in str(caught.value)


def test_a_chain_of_operators_that_would_overflow_the_stack_is_refused_and_a_long_list_is_not(index: Index) -> None:
    def refuse(where: str, match: str) -> None:
        with pytest.raises(SearchError, match=match):
            index.search(make_vectors(1), 3, where=where)

    refuse(" OR ".join(["age > 5"] * 6000), r"has 23,999 words and signs, more than the 500 .* write .* IN \(...\)")
    refuse("site = 'a'" + " || ''" * 480, "has 1,443 words and signs")
    refuse("age IN (1" + ", age" * 20000 + ")", "has 40,005 words and signs")
    refuse('age IN (1, "age"' + ', "age"' * 20000 + ")", "words and signs")
    refuse('"sex"OR' * 400 + '"sex"', "has 801 words and signs")
    listed = ", ".join(f"'c{row}'" for row in range(3000))
    assert index.search(make_vectors(1), 40, where=f"case_id IN ({listed})").height == 40
    numbers = ", ".join(str(age) for age in range(-3000, 3000))
    assert index.search(make_vectors(1), 40, where=f"sex IN ({numbers})").height == 40
    assert index.search(make_vectors(1), 40, where="site = '" + "a b + " * 2000 + "'").is_empty()
    assert index.search(make_vectors(1), 40, where="site IN ('O''Brien'" + ", 'O''Brien'" * 600 + ")").is_empty()


@pytest.mark.parametrize("sign", ["/* ' */", "-- '\n", "$$'$$ = ", "`'` = ", "E'\\'' = ", "q'(')' = ", "nq'(')' = "])
def test_nothing_hides_a_chain_of_operators_from_the_count(index: Index, sign: str) -> None:
    chain = " OR ".join(["age > 5"] * 6000)
    with pytest.raises(
        SearchError, match=r"outside of texts; comments, \$, backticks .* are not taken: write texts in"
    ):
        index.search(make_vectors(1), 3, where=f"{sign} {chain} {sign}")
    assert index.search(make_vectors(1), 40, where="case_id <> '/* -- $ ` */' OR site LIKE'a%'").height == 40


def test_excluded_cases_never_come_back(index: Index) -> None:
    found = index.search(make_vectors(1), 40, exclude_case_ids=["c0", "c1", "unheard of"], where="age < 6")
    assert set(found["case_id"]) == {"c2", "c3"}


@pytest.mark.parametrize("cases", [40, 400])  # few and many excluded take different ways
@pytest.mark.parametrize("column", ["patient_id", "sex", "site"])
def test_cases_that_share_a_value_can_be_left_out(tmp_path: Path, cases: int, column: str) -> None:
    index, queries = make_index(tmp_path / "index", cases), [0, 1, 2, 17]
    found = index.search_cases([f"c{query}" for query in queries], 5, exclude_same=column, where="age >= 3")
    values, similar = make_table(cases)[column].to_list(), cosines(make_vectors(cases), make_vectors(cases))
    for place, query in enumerate(queries):
        others = [
            row
            for row in range(2, cases)
            if row != query and (values[query] is None or values[row] is None or values[row] != values[query])
        ]
        best = sorted(others, key=lambda row: -similar[query][row])[:5]
        part = found.filter(pl.col("query") == place)
        assert part["case_id"].to_list() == [f"c{row}" for row in best]
        assert part["rank"].to_list() == list(range(1, len(best) + 1))


def test_questions_that_mean_nothing_are_answered_with_what_would(index: Index) -> None:
    with pytest.raises(SearchError, match=r"has no case x9; it holds 40 cases such as c0, c1, c2"):
        index.search_cases(["c1", "x9"], 3)
    with pytest.raises(SearchError, match="k is 0, expected at least 1"):
        index.search(make_vectors(1), 0)
    with pytest.raises(SearchError, match="k is -2, expected at least 1"):
        index.search_cases(["c1"], -2)
    with pytest.raises(SearchError, match="exclude_same names 'nope', but the cases have case_id, patient_id, sex"):
        index.search_cases(["c1"], 3, exclude_same="nope")
    with pytest.raises(SearchError, match="leaves out the query itself"):
        index.search_cases(["c1"], 3, exclude_same="sex", include_self=True)
    with pytest.raises(SearchError, match=r"have shape \[1, 9\], index .* holds vectors of length 8.*mean:cls:2"):
        index.search(make_vectors(1, 9), 3)
    with pytest.raises(SearchError, match=r"have shape \[1, 1, 8\]"):
        index.search(np.ones((1, 1, 8), np.float32), 3)
    with pytest.raises(SearchError, match="vector of query 1 is not finite"):
        index.search(np.float32([[1] * 8, [np.nan] * 8]), 3)
    with pytest.raises(SearchError, match="vector of query 0 is zero"):
        index.search(np.zeros(8, np.float32), 3)


# --- building --------------------------------------------------------------------------------------------------------


def test_vectors_and_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    out, vectors, table = tmp_path / "index", make_vectors(4), make_table(4)
    bad = vectors.copy()
    bad[2] = 0
    cases: list[tuple[dict[str, Any], str]] = [
        ({"vectors": vectors, "table": make_table(3)}, r"shape \[4, 8\] and the table 3 rows"),
        ({"vectors": vectors[:0], "table": table[:0]}, "at least one"),
        ({"vectors": vectors[0], "table": table}, r"shape \[8\]"),
        ({"vectors": vectors, "table": table.drop("patient_id")}, "needs patient_id"),
        ({"vectors": vectors, "table": table.with_columns(case_id=pl.int_range(4))}, "case_id of the table is Int64"),
        ({"vectors": vectors, "table": table.with_columns(patient_id=pl.lit(None, pl.String))}, "has gaps"),
        ({"vectors": vectors, "table": table.with_columns(rank=1)}, "has a column rank, which .* rename it"),
        ({"vectors": vectors, "table": table.with_columns(case_id=pl.lit("a"))}, "has case a more than once"),
        ({"vectors": bad}, "vector of case c2 is zero"),
        ({"vectors": bad * np.nan}, "vector of case c0 is not finite"),
        ({"vectors": np.ones((4, 8), np.float32), "centre": True}, "vector of case c0 is zero after centring"),
    ]
    for options, message in cases:
        with pytest.raises(SearchError, match=message):
            make_index(out, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_index_replaces_nothing_but_an_empty_folder(tmp_path: Path) -> None:
    out = tmp_path / "index"
    out.mkdir()
    assert len(make_index(out, 4)) == 4
    with pytest.raises(SearchError, match=r"index exists; choose another folder for the index or delete it first"):
        make_index(out, 4)
    (tmp_path / "file").touch()
    with pytest.raises(SearchError, match="file exists"):
        make_index(tmp_path / "file", 4)
    assert len(open_index(out)) == 4 and sorted(path.name for path in tmp_path.iterdir()) == ["file", "index"]


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "is full"), (errno.EROFS, "is read-only")])
def test_a_disk_that_is_full_or_read_only_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SearchError, match=f"cannot write the index: .*{message}"):
        make_index(tmp_path / "index", 4)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_builder_left_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        pass
    left = Path(str(temporary_path(tmp_path / "index")).replace(f".{os.getpid()}.", f".{ended.pid}."))
    left.mkdir()
    (left / "index.faiss").write_bytes(b"half")
    make_index(tmp_path / "index", 4)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


# --- the folder ------------------------------------------------------------------------------------------------------


def test_an_opened_index_is_the_one_that_was_built(tmp_path: Path) -> None:
    vectors = make_vectors(9)
    options: dict[str, Any] = {
        "details": {"views": ["flair/axial"], "scale": 0.1, "nested": {"b": 1, "a": None}},
        "extras": {"view_means": np.arange(6, dtype=np.float32).reshape(2, 3)},
    }
    built = make_index(tmp_path / "index", vectors=vectors, centre=True, **options)
    shutil.move(tmp_path / "index", tmp_path / "moved")
    opened = open_index(tmp_path / "moved")
    assert opened.embedding == "mean:cls:2" and opened.recipe == RECIPE and opened.fingerprint == RECIPE.fingerprint
    assert opened.dim == 8 and len(opened) == 9 and opened.cases.equals(make_table(9))
    assert opened.details == options["details"]
    assert list(opened.extras) == ["view_means"]
    assert np.array_equal(opened.extras["view_means"], options["extras"]["view_means"])
    assert np.array_equal(opened.read_vectors(), vectors)
    assert opened.search_cases(["c4"], 8).equals(built.search_cases(["c4"], 8))


@pytest.mark.parametrize("name", ["index.json", "index.faiss", "cases.parquet", "mean.npy", "extra-note.npy"])
def test_damage_in_any_file_is_found_before_it_is_parsed(tmp_path: Path, name: str) -> None:
    make_index(tmp_path / "index", 20, centre=True, extras={"note": np.ones(3)})
    file = tmp_path / "index" / name
    data, random = file.read_bytes(), np.random.default_rng(3)
    for place in random.integers(0, len(data), 20):
        changed = bytearray(data)
        changed[place] ^= 1 << int(random.integers(8))
        file.write_bytes(changed)
        with pytest.raises(SearchError, match=f"{name}|is no embedkit index"):
            open_index(tmp_path / "index")
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(SearchError, match=f"{name} is damaged"):
        open_index(tmp_path / "index")
    file.unlink()
    with pytest.raises(SearchError, match=name):
        open_index(tmp_path / "index")


def test_damaged_vectors_are_found_when_they_are_read(index: Index) -> None:
    file = index.path / "vectors.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert len(open_index(index.path)) == 40
    with pytest.raises(SearchError, match=r"vectors.npy is damaged: it is not what was written; build the index again"):
        index.read_vectors()


def rewrite(index: Index, change: dict[str, Any]) -> None:
    """Changes fields of index.json and makes its checksum right again."""
    import hashlib
    import json

    file = index.path / "index.json"
    fields = json.loads(file.read_text()) | change
    fields.pop("sha256")
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    file.write_text(json.dumps(fields | {"sha256": hashlib.sha256(text.encode()).hexdigest()}))


def test_what_is_no_index_or_a_newer_one_is_refused(index: Index, tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"is no index: it has no index.json; give the folder that embedkit index"):
        open_index(tmp_path)
    with pytest.raises(SearchError, match="is no index"):
        open_index(tmp_path / "absent")
    (tmp_path / "index.json").write_text("[" * 100_000)
    with pytest.raises(SearchError, match="is damaged: it is not JSON"):
        open_index(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "other"}')
    with pytest.raises(SearchError, match="describes no embedkit index"):
        open_index(tmp_path)
    rewrite(index, {"format_version": 4})
    with pytest.raises(SearchError, match="has index format 4, this embedkit reads 3; upgrade embedkit"):
        open_index(index.path)
    rewrite(index, {"format_version": 2})
    with pytest.raises(SearchError, match="has index format 2, this embedkit reads 3; build it again"):
        open_index(index.path)


def test_an_index_that_names_files_elsewhere_or_contradicts_itself_is_refused(index: Index) -> None:
    files = {path.name: seal_file(path, 0) for path in index.path.iterdir() if path.name != "index.json"}
    rewrite(index, {"files": files | {"../../secret": files["cases.parquet"]}})
    with pytest.raises(SearchError, match=r"names a file outside of it, ../../secret: refused"):
        open_index(index.path)
    other = replace(RECIPE, image_size=64).to_json().replace('"image_size"', '"image_scale"')
    rewrite(index, {"files": files, "recipe": other})
    with pytest.raises(SearchError, match=r"cannot be read: recipe lacks image_size.*build it again"):
        open_index(index.path)
    rewrite(index, {"files": None})
    with pytest.raises(SearchError, match="cannot be read"):
        open_index(index.path)
    index.cases[:5].write_parquet(index.path / "cases.parquet")
    files["cases.parquet"] = seal_file(index.path / "cases.parquet", 0)
    rewrite(index, {"files": files, "recipe": RECIPE.to_json()})
    with pytest.raises(SearchError, match="holds 40 vectors and 5 cases; build it again"):
        open_index(index.path)


def test_faiss_is_imported_without_a_warning() -> None:
    code = "import embedkit.index"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_index_is_written_where_faiss_was_loaded_before_simpleitk(tmp_path: Path) -> None:
    code = f"""
import faiss, SimpleITK, numpy as np, polars as pl
from embedkit.index import open_index
from embedkit.indexwriting import write_index
from embedkit.recipe import Recipe
recipe = Recipe("toy", "builtin:1", ("cls:2",), 32, (0.5,), (0.25,))
table = pl.DataFrame({{"case_id": ["a", "b"], "patient_id": ["a", "b"]}})
write_index(np.eye(2, dtype=np.float32), table, embedding="mean:cls:2", recipe=recipe, out={str(tmp_path / "i")!r})
print(len(open_index({str(tmp_path / "i")!r})))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2"], done.stderr

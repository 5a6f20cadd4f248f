"""`embedkit index` as a user types it: what it tells, what it warns of, what it refuses, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest
from embedkit.cli.main import app
from typer.testing import CliRunner

import embedkit
from embedkit.errors import OptionError, SearchError

if TYPE_CHECKING:
    from conftest import Explored


def call(*arguments: object, code: int = 0) -> tuple[str, str]:
    """Runs the command in this process and gives what it printed to stdout and to stderr."""
    result = CliRunner().invoke(app, ["index", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return str(result.stdout), str(result.stderr)


def test_an_index_tells_what_it_holds_and_where_it_is_searched(explored: Explored, tmp_path: Path) -> None:
    told = json.loads(call(explored.cache, "-o", tmp_path / "index", "--json")[0])
    assert told["kind"] == "flat" and told["recall"] == told["recall_low"] == told["recall_high"] == 1
    assert told["recall_reached"] is True and told["recall_asked"] == 0.95
    assert told["built_on"] == told["searched_on"] == "CPU: FAISS sees no GPU"


def test_a_recall_that_cannot_be_promised_is_said_and_exits_with_1(explored: Explored, tmp_path: Path) -> None:
    out, errors = call(explored.cache, "-o", tmp_path / "index", "--kind", "hnsw", "--recall", "1", code=1)
    assert "hnsw of" in out and "queries held out" in out
    assert "the recall of 1 that was asked for cannot be promised: ask for less" in errors
    assert len(embedkit.open_index(tmp_path / "index")) > 1
    told = call(explored.cache, "-o", tmp_path / "other", "--kind", "hnsw", "--recall", "1", "--json", code=1)[0]
    assert json.loads(told)["recall_reached"] is False


def test_a_recall_that_nobody_asked_for_is_told_alone(explored: Explored, tmp_path: Path) -> None:
    _, errors = call(explored.cache, "-o", tmp_path / "index", "--kind", "hnsw")
    assert "cannot be promised" in errors
    _, errors = call(explored.cache, "-o", tmp_path / "all", "--kind", "sq", "--recall", "0.95")
    assert "cannot be promised" not in errors  # so few that all are compared


def test_a_memory_that_is_too_small_is_told_with_what_would_be_taken(explored: Explored, tmp_path: Path) -> None:
    message = r"vectors of length \d+ take [\d.]+ k?B as sq, and tables and arrays .* [\d.]+ k?B: more than the 1 kB"
    with pytest.raises(OptionError, match=message):
        call(explored.cache, "-o", tmp_path / "index", "--memory", "1KB")
    assert not (tmp_path / "index").exists()
    assert call(explored.cache, "-o", tmp_path / "index", "--memory", "1GB")[0]


def test_cases_without_a_label_are_named_and_not_added_unsaid(explored: Explored, tmp_path: Path) -> None:
    cases = embedkit.open_cache(explored.cache).stacks["case_id"].unique().sort().to_list()
    labels = pl.DataFrame({"case_id": cases[:-2], "age": range(len(cases) - 2)})
    labels.write_csv(tmp_path / "labels.csv")
    out, errors = call(explored.cache, "-o", tmp_path / "index", "--labels", tmp_path / "labels.csv")
    assert "columns case_id, patient_id, age" in out
    assert f"2 of {len(cases)} cases have no label: {cases[-2]}, {cases[-1]}; filters leave them out" in errors
    call(explored.cache, "-o", tmp_path / "index", "--remove", cases[-1])
    with pytest.raises(
        SearchError, match=rf"the index has age of its cases, and 1 new case \({cases[-1]}\) would have"
    ):
        call(explored.cache, "-o", tmp_path / "index", "--add")
    out, errors = call(explored.cache, "-o", tmp_path / "index", "--add", "--unlabelled")
    assert f"added 1 cases: {cases[-1]}" in out and "2 of" in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--unlabelled",), "only cases that are added to an index can lack its labels"),
        (("--add", "--recall", "0.9", "--level", "case"), "keeps how it was made; leave out --level, --recall"),
        (("--memory", "much"), "size 'much' means nothing; give a number above 0 with B, kB"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(
    explored: Explored, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    errors = call(explored.cache, "-o", tmp_path / "index", *options, code=2)[1]
    assert message in " ".join(errors.replace("│", " ").split())

"""Opening checks what is parsed; numbers of large files on request, and wrong ones break nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from embedkit.cli.main import app
from typer.testing import CliRunner

from embedkit import indexfiles, indexseals, verify_index
from embedkit.errors import SearchError
from embedkit.index import Index, open_index
from embedkit.indextypes import KINDS, IndexOptions
from embedkit.indexwriting import write_index
from embedkit.recipe import Recipe

RECIPE = Recipe("toy", "builtin:1", ("cls:2",), 32, (0.5,), (0.25,))
COUNT, DIM = 10_000, 8


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("indexes")
    vectors = np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32)
    names = pl.int_range(COUNT, eager=True).cast(pl.String)
    for kind in KINDS:
        write_index(
            vectors,
            pl.DataFrame({"case_id": names, "patient_id": names}),
            embedding="mean:cls:2",
            recipe=RECIPE,
            out=folder / kind,
            options=IndexOptions(kind=kind, recall=0.5),
            extras={"slices": np.ones((200, 8), np.float16)},
        )
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file counts as large: its head alone is checked at opening, and it is mapped."""
    monkeypatch.setattr(indexseals, "_CHECKED_WHOLE_BYTES", 1000)
    monkeypatch.setattr(indexfiles, "_MAPPED_FROM_BYTES", 1000)


def search_everywhere(index: Index) -> None:
    queries = np.random.default_rng(1).standard_normal((4, DIM)).astype(np.float32)
    index.search(queries, 5)
    index.search(queries, 5, where="case_id < '3'")
    index.search_cases(["5", "77"], 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_of_a_large_index_breaks_nothing_and_is_found_on_request(
    indexes: dict[str, Path], kind: str, large: None
) -> None:
    file = indexes[kind] / "index.faiss"
    data, random, refused = file.read_bytes(), np.random.default_rng(7), 0
    head = json.loads((indexes[kind] / "index.json").read_text())["files"]["index.faiss"]["head_bytes"]
    places = [*random.integers(0, len(data), 30), *random.integers(0, head, 10), *random.integers(head, len(data), 10)]
    try:
        for place in map(int, places):
            changed = bytearray(data)
            changed[place] ^= 1 << int(random.integers(8))
            file.write_bytes(changed)
            try:
                search_everywhere(open_index(indexes[kind]))
                assert place >= head
            except SearchError as error:
                refused += 1
                assert "index.faiss is damaged" in str(error) or "not finite" in str(error)
            (damage,) = verify_index(indexes[kind])
            assert (damage.file.name, damage.problem) == ("index.faiss", "it is not what was written")
        file.write_bytes(data[:-1])
        with pytest.raises(SearchError, match=r"index.faiss is damaged: it is not what was written"):
            open_index(indexes[kind])
    finally:
        file.write_bytes(data)
    assert refused >= 10
    assert verify_index(indexes[kind]) == []


def test_opening_reads_no_more_of_a_large_file_than_its_head(
    indexes: dict[str, Path], large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: dict[str, int] = {}
    real = indexseals._sha256

    def count(file: Path, most: int | None = None) -> str:
        hashed[file.name] = file.stat().st_size if most is None else most
        return real(file, most)

    monkeypatch.setattr(indexseals, "_sha256", count)
    search_everywhere(open_index(indexes["ivf"]))
    assert hashed["index.faiss"] < COUNT * DIM * 4 / 10 and hashed["extra-slices.npy"] <= 128
    assert hashed["cases.parquet"] == (indexes["ivf"] / "cases.parquet").stat().st_size
    assert hashed["vectors.npy"] <= 128  # read for the queries of search_cases


def test_verify_tells_which_file_of_an_index_is_damaged(indexes: dict[str, Path], tmp_path: Path) -> None:
    def call(*args: Any) -> Any:
        return CliRunner().invoke(app, list(map(str, args)))

    done = call("verify", indexes["flat"])
    assert done.exit_code == 0 and "all checksums are right" in done.output
    file = indexes["flat"] / "vectors.npy"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"x")
    try:
        done = call("verify", indexes["flat"])
        assert done.exit_code == 1 and f"{file}: it is not what was written\n" in done.output
        assert "1 damaged; build the index again" in done.output
        done = call("verify", indexes["flat"], "--json")
        found = json.loads(done.stdout)
        assert done.exit_code == 1 and [each["file"].rpartition("/")[2] for each in found["damages"]] == ["vectors.npy"]
    finally:
        file.write_bytes(data)
    with pytest.raises(SearchError, match="is no index"):
        verify_index(tmp_path)

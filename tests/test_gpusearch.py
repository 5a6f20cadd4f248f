"""What may go to a GPU and what may not, with a stand-in for FAISS's: what a GPU answers is not tested without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from embedkit import gpusearch
from embedkit.faisssearching import FaissSearcher
from embedkit.gpusearch import explain_search_refusal, explain_stay
from embedkit.index import Index
from embedkit.indextypes import IndexOptions, faiss
from embedkit.indexwriting import write_index
from embedkit.recipe import Recipe

RECIPE = Recipe("toy", "builtin:1", ("cls:2",), 32, (0.5,), (0.25,))


class FakeGpu:
    """An index on a GPU: counts what it is asked, and refuses what FAISS would."""

    def __init__(self, index: Any, asked: list[int]) -> None:
        self.cpu, self.base, self.asked, self.d = index, faiss.downcast_index(index), asked, index.d

    @property
    def is_trained(self) -> bool:
        return bool(self.cpu.is_trained)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def search(self, queries: Any, k: int, *, params: Any) -> Any:
        assert k <= 2048 and getattr(params, "nprobe", 0) <= 2048 and getattr(params, "sel", None) is None
        self.asked.append(len(queries))
        return self.base.search(queries, k, params=params)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Queries that the stand-in was asked."""
    found: list[int] = []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(gpusearch, "_measure_free", lambda: 10**9)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda _, __, index: FakeGpu(index, found), raising=False)
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", lambda index: index.cpu, raising=False)
    return found


def build(out: Path, kind: str, count: int = 3000) -> Index:
    vectors = np.random.default_rng(0).standard_normal((count, 16)).astype(np.float32)
    names = pl.int_range(count, eager=True).cast(pl.String)
    table = pl.DataFrame({"case_id": names, "patient_id": names})
    options = IndexOptions(kind=kind, recall=0.8)
    return write_index(vectors, table, embedding="mean:cls:2", recipe=RECIPE, out=out, options=options)


@pytest.mark.parametrize("kind", ["flat", "ivf", "sq"])
def test_a_gpu_builds_and_searches_what_nothing_is_filtered_of(tmp_path: Path, asked: list[int], kind: str) -> None:
    index = build(tmp_path / kind, kind)
    assert index.built_on == index.searched_on == "GPU"
    asked.clear()
    query = index.read_vectors()[:3]
    found = index.search(query, 5)
    assert asked == [3]
    filtered = index.search(query, 5, where="case_id <> '1'")
    assert asked == [3] and filtered["case_id"].to_list()[:5] == found["case_id"].to_list()[:5]


def test_more_rows_or_cells_than_a_gpu_selects_are_searched_for_on_the_cpu(tmp_path: Path, asked: list[int]) -> None:
    index = build(tmp_path / "index", "flat")
    assert index.search(index.read_vectors()[:1], 2500).height == 2500 and asked == []
    assert explain_search_refusal(2048, 2048) is None
    assert explain_search_refusal(2049, 1) == "2,049 rows asked for are more than the 2,048 that FAISS takes on a GPU"
    assert str(explain_search_refusal(10, 4000)).startswith("4,000 cells looked into are more than the 2,048")


def test_a_graph_stays_on_the_cpu_and_says_so(tmp_path: Path, asked: list[int]) -> None:
    index = build(tmp_path / "index", "hnsw")
    assert asked == [] and index.built_on == index.searched_on == "CPU: FAISS has no graph index for GPUs"


@pytest.mark.parametrize(("code_bytes", "stays"), [(48, False), (24, False), (96, True), (192, True), (5, True)])
def test_only_codes_that_a_gpu_has_a_kernel_for_go_there(asked: list[int], code_bytes: int, stays: bool) -> None:
    reason = explain_stay("ivfpq", bytes_=1000, code_bytes=code_bytes)
    assert (reason is not None) == stays
    if reason is not None:
        assert reason.startswith(f"codes of {code_bytes} bytes are not among those that FAISS's GPU index takes (1, 2")


def test_what_a_gpu_has_no_room_for_stays(asked: list[int]) -> None:
    assert explain_stay("ivf", bytes_=700_000_000) is None
    assert explain_stay("ivf", bytes_=900_000_000) == "it takes 900 MB and the GPU has 1 GB free"


def test_no_gpu_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    assert explain_stay("flat", bytes_=1) == "FAISS sees no GPU"


def test_what_faiss_itself_refuses_falls_back_and_says_why(
    tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("out of memory on device\nat line 1")

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", refuse)
    index = build(tmp_path / "index", "ivf")
    assert index.built_on == index.searched_on == "CPU: FAISS could not: out of memory on device"
    assert index.search(index.read_vectors()[:2], 3).height == 6
    assert FaissSearcher(index._vectors.index, gpu=False).stays == "no GPU was to"

"""Storage: the same numbers wherever tokens lie, and a cache larger than memory can be trained on."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from embedkit import storage
from embedkit.cache import Cache, StackTokens, open_cache
from embedkit.crossfitting import CrossFit, cross_fit
from embedkit.errors import CacheError, OptionError
from embedkit.fitting import FitOptions
from embedkit.folder import create_cache, write_shard
from embedkit.foldjobs import FoldedTask
from embedkit.headplans import HeadPlan
from embedkit.preparation import Preparation
from embedkit.recipe import Recipe
from embedkit.storage import ResidentStore, Storage, StreamedStore, open_store
from embedkit.sweeps import Candidate
from embedkit.tasks import make_folds, make_task

CPU = torch.device("cpu")


def build_cache(folder: Path, *, cases: int, dim: int, slices: int, per_shard: int = 10) -> Cache:
    """One patient per case; odd cases have a high channel 0."""
    recipe = Recipe("tiny", "builtin:1", ("cls:2",), 32, (0.5,), (0.5,), preview=0)
    create_cache(folder, recipe)
    generator = np.random.default_rng(0)
    stacks = []
    for case in range(cases):
        count = slices - case % 3
        tokens = generator.normal(size=(count, dim)).astype(np.float16)
        tokens[:, 0] += 2 * (case % 2)
        stacks.append(
            StackTokens(
                case_id=f"c{case:03}", patient_id=f"p{case:03}", view="t1", plane="axial", sources=("t1",),
                indices=np.arange(count, dtype=np.int32), positions_mm=np.arange(count, dtype=np.float32),
                blank=np.arange(count) == 1, plane_shape=(8, 8), box=(0, 0, 8, 8), source_shape=(count, 8, 8),
                source_affine=np.eye(4), source_bytes=1, source_digest=f"{case}", tokens={"cls:2": tokens},
            )
        )  # fmt: skip
        if len(stacks) == per_shard or case == cases - 1:
            write_shard(folder, recipe, stacks)
            stacks = []
    return open_cache(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return build_cache(tmp_path_factory.mktemp("storage") / "cache", cases=30, dim=6, slices=7)


def fit(cache: Cache, where: Storage, block_bytes: int, head: str = "query") -> CrossFit:
    ids = sorted(set(cache.stacks["case_id"]))
    labels = pl.DataFrame({"case_id": ids, "odd": [int(case[1:]) % 2 for case in ids]})
    task, _ = make_task(labels, "odd", cache.stacks.select("case_id", "patient_id"))
    plan = HeadPlan(head, (Candidate(("cls:2",), {"dropout": 0.2}, FitOptions(epochs=4, batch_size=4)),))
    preparation = Preparation(cache, [plan], ids, CPU, storage=where, block_bytes=block_bytes)
    return cross_fit(preparation, [(plan, FoldedTask(task, make_folds(task, 3, seed=0)[None]))], seed=0)[0]


def test_streamed_tokens_give_the_numbers_of_tokens_in_memory(cache: Cache) -> None:
    """Blocks of a third of the cache, and of all of it; the blocks themselves are part of how a training goes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for block_bytes in (30 * 7 * 6 * 2 // 3, 2**20):
        memory, stream = (fit(cache, where, block_bytes) for where in ("memory", "stream"))
        np.testing.assert_allclose(stream.scores, memory.scores, rtol=1e-5, atol=1e-6)
        for first, second in zip(memory.members, stream.members, strict=True):
            for name, value in first.state_dict().items():
                torch.testing.assert_close(second.state_dict()[name], value, rtol=1e-5, atol=1e-6)
        for one, other in zip(memory.inner, stream.inner, strict=True):
            np.testing.assert_allclose(other.scores, one.scores, rtol=1e-5, atol=1e-6)
    torch.set_num_threads(threads)


def test_a_head_that_pools_first_needs_no_tokens_in_memory(cache: Cache) -> None:
    """It reads the cache once, whatever the storage: the store of the other heads is not opened at all."""
    plan = HeadPlan("linear", (Candidate(("cls:2",), {}, FitOptions()),))
    preparation = Preparation(cache, [plan], ["c000", "c001"], CPU, storage="stream")
    store = preparation.store(plan, plan.candidates[0])
    assert isinstance(store, ResidentStore)
    assert store.bags.table("cls:2").shape == (2, 1, 6)
    bag = store.batch(np.array([1]), ["cls:2"])
    expected = cache.read(1, "cls:2")[[0, *range(2, 6)]].astype(np.float32).mean(0)  # slice 1 is blank
    np.testing.assert_allclose(bag.tokens["cls:2"][0, 0, 0, 0], expected, atol=1e-3)


def test_what_is_not_at_hand_cannot_be_had_from_a_stream(cache: Cache) -> None:
    store = open_store(cache, ["c000", "c001", "c002"], ["cls:2"], CPU, "stream")
    assert isinstance(store, StreamedStore)
    visits = store.visit([np.array([2]), np.array([0, 1])], ["cls:2"])
    next(visits)
    assert store.batch(np.array([2]), ["cls:2"], slices=6).case_ids == ("c002",)
    with pytest.raises(ValueError, match="not in the part being visited"):
        store.batch(np.array([0]), ["cls:2"])
    next(visits)
    assert store.batch(np.array([1, 0]), ["cls:2"]).case_ids == ("c001", "c000")
    visits.close()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="not in the part being visited"):
        store.batch(np.array([0]), ["cls:2"])


def test_an_error_while_reading_ahead_reaches_the_training(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise CacheError("shard gone")

    store = open_store(cache, ["c000", "c001"], ["cls:2"], CPU, "stream")
    monkeypatch.setattr(cache, "read", fail, raising=True)
    with pytest.raises(CacheError, match="shard gone"):
        list(store.visit([np.array([0]), np.array([1])], ["cls:2"]))


def test_the_place_is_chosen_by_size(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    size = storage.count_bytes(cache, ["c000", "c001"], ["cls:2"])
    assert size == (7 + 6) * 6 * 2
    for free, kind in ((3 * size, ResidentStore), (1.5 * size, StreamedStore)):
        monkeypatch.setattr(storage, "_free_memory", lambda free=free: free)
        assert isinstance(open_store(cache, ["c000", "c001"], ["cls:2"], CPU, "auto"), kind)


@pytest.mark.parametrize(
    ("where", "words"),
    [("disk", "storage is 'disk', expected one of auto, device, memory, stream"), ("device", "without an accelerator")],
)
def test_a_place_that_there_is_not_is_refused(cache: Cache, where: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        open_store(cache, ["c000"], ["cls:2"], CPU, where)


SCRIPT = """
import functools, resource, sys
import polars as pl
import torch
from embedkit import rounds, storage, training
from embedkit.cache import open_cache

torch.set_num_threads(1)
cache = open_cache(sys.argv[1])
ids = sorted(set(cache.stacks["case_id"]))
size = storage.count_bytes(cache, ids, ["cls:2"])
labels = pl.DataFrame({"case_id": ids, "odd": [int(case[1:]) % 2 for case in ids]})

def train(labels, folder, where):
    return training.train(
        cache, labels, targets="odd", out=f"{sys.argv[2]}/{folder}", heads=["query"], folds=2, resamples=0,
        storage=where, fit_options={"epochs": 1, "batch_size": 2},
    )

rounds.Preparation = functools.partial(rounds.Preparation, block_bytes=size // 24)
train(labels[:8], "warm", "stream")  # loads all libraries
taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData:")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (taken + int(0.8 * size),) * 2)
result = train(labels, "all", sys.argv[3])
print("trained", len(result.runs))
"""


def test_a_cache_larger_than_memory_is_trained_on(tmp_path: Path) -> None:
    """With a limit of 0.8 of the tokens on what the process may still take, memory fails and auto streams."""
    build_cache(tmp_path / "cache", cases=192, dim=2048, slices=200, per_shard=16)

    def run(where: str) -> subprocess.CompletedProcess[str]:
        arguments = [str(tmp_path / "cache"), str(tmp_path / where), where]
        tidy = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | tidy)

    streamed = run("auto")
    assert streamed.stdout.endswith("trained 3\n"), streamed.stderr
    resident = run("memory")
    assert resident.returncode != 0
    assert "memory" in resident.stderr.lower()

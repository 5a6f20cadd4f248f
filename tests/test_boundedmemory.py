"""An index is built from a cache, and searched, in memory that does not grow with either."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np, polars as pl
import sklearn.utils.extmath
from embedkit import indexfiles, slicereading, unitvectors, whitening
from embedkit.cache import StackTokens, create_cache, write_shard
from embedkit.index import open_index
from embedkit.indexbuilding import build_index
from embedkit.indexchanging import add_cases, remove_cases
from embedkit.recipe import Recipe

DIM = 768
RECIPE = Recipe("made up", "builtin:0", ("cls:2", "patch@2:1"), 32, (0.0,), (1.0,), preview=0)


def stack(number):
    random = np.random.default_rng(number)
    patches = random.standard_normal((8, 4, DIM), np.float32)
    return StackTokens(
        case_id=f"c{number:03}", patient_id=f"p{number:03}", view="t1", plane="axial", sources=("t1",),
        indices=np.arange(8, dtype=np.int32), positions_mm=np.arange(8, dtype=np.float32),
        blank=np.zeros(8, bool), plane_shape=(8, 8), box=(0, 0, 8, 8), source_shape=(8, 8, 8),
        source_affine=np.eye(4), source_bytes=1, source_digest="0",
        tokens={"cls:2": patches.mean(1).astype(np.float16), "patch@2:1": patches.astype(np.float16)}, preview=None,
    )


def limit(megabytes):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    most = int(line.split()[1]) * 1024 + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


folder, cases, kind = Path(sys.argv[1]), int(sys.argv[2]), None if sys.argv[3] == "built" else sys.argv[3]
mapped = kind is not None
create_cache(folder / "few", RECIPE)
write_shard(folder / "few", RECIPE, [stack(number) for number in range(20)])
build_index(folder / "few", folder / "few-index", kind=kind)  # loads what is loaded at first use
if mapped:
    few = open_index(folder / "few-index")
    few.search(np.asarray(few.read_vectors()[7:8], np.float32), 3, where="case_id != 'x'")
create_cache(folder / "cache", RECIPE)
for start in range(0, cases, 20):
    write_shard(folder / "cache", RECIPE, [stack(number) for number in range(start, start + 20)])
unitvectors._BLOCK_BYTES = whitening._SAMPLE_BYTES = 1 << 22
slicereading._SAMPLE = 200
indexfiles._MAPPED_FROM_BYTES = 1 << 20 if mapped else 1 << 40
if mapped:
    how = {"whiten": 0, "embedding": "aligned:patch@2", "slices": "mean:cls", "kind": kind, "recall": 0.5}
    index = build_index(folder / "cache", folder / "index", **how)
    del index
    limit(12)
    index = open_index(folder / "index")
    assert index.kind == kind and index.count * index.dim * 4 > 2 * 12 * 2**20
    query = np.asarray(index.read_vectors()[7:8], np.float32)
    found = index.search(query, 3)
    for where in ("case_id != 'c200'", "case_id = 'c007' OR case_id > 'c270'"):
        assert index.search(query, 3, where=where)["case_id"][0] == "c007"
else:
    limit(34)
    index = build_index(folder / "cache", folder / "index", slices="mean:cls", whiten=8)
    assert index.count * index.dim * 4 == cases * 8 * 4 * DIM * 4
    index = remove_cases(index, ["c000", "c001"])
    index, taken = add_cases(index)
    assert taken == ["c000", "c001"]
    found = index.search(np.asarray(index.read_vectors()[7:8], np.float32), 3)
print("FOUND", *found["case_id"].to_list())
"""


def run_limited(folder: Path, cases: int, how: str) -> str:
    code = [sys.executable, "-W", "ignore", "-c", LIMITED, str(folder), str(cases), how]
    environment = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PATH": "/usr/bin"}
    done = subprocess.run(code, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_DATA") or sys.platform != "linux", reason="needs Linux's RLIMIT_DATA")
@pytest.mark.parametrize("cases", [100, 400])
def test_building_adding_and_withdrawing_take_the_same_memory_for_four_times_the_cache(
    tmp_path: Path, cases: int
) -> None:
    """34 MiB, where the vectors alone are 9.4 and 37.5 MiB and were held several times over."""
    assert run_limited(tmp_path, cases, "built").startswith("FOUND c")


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_DATA") or sys.platform != "linux", reason="needs Linux's RLIMIT_DATA")
@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_an_index_larger_than_the_memory_is_searched_from_disk(tmp_path: Path, kind: str) -> None:
    """12 MiB, where the vectors are 28; also under a filter."""
    assert run_limited(tmp_path, 300, kind).startswith("FOUND c007")

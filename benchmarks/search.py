"""embedkit search beside raw FAISS on the same vectors, and beside autofaiss; reranking; growth with the cases.

Usage: python benchmarks/search.py [--sizes N ...] [--dim N] [--threads N] [--repeats N] [--envs FOLDER]
                                   [--no-autofaiss] [--cpu-time]

Vectors are made up: clusters in 48 dimensions turned into --dim, with a little noise, so that neighbours mean something
to an approximate index; queries are 256 more of the same. For every size:

- embedkit builds an index of its own choice in a process of its own (seconds, CPU seconds and peak memory of that
  process), tuned to a recall of .95, and is searched for 10 neighbours: `Index.search` over what FAISS alone takes for
  the same index, parameters and queries, already of length 1. The two take turns; of 256 queries at once the least of
  --repeats counts (goal: 1.1), of single ones the median (goal: 2 ms more). Opening the index is timed too.
- autofaiss (`build_index` with its defaults, the machine's memory allowed) does the same in an environment of its own,
  made by pip below --envs the first time. Recall is of the ten nearest against an exact comparison with every vector,
  on the 256 queries, which neither side has seen. Its index is then searched again with the least effort (efSearch or
  nprobe, in steps of a tenth) at which it finds as many as embedkit's did: a comparison at equal recall.

Then 100 candidates of 64 slices of 256 dims are ranked again by `search` (goal: 20 ms for all of it). All sizes are
printed once more as a table, in milliseconds, with how much longer one query takes from size to size. Peak memory is
that of the whole process; pages of the mapped file of vectors count in it, though the system can take them back.

On a machine that others use, `--cpu-time --threads 1` counts CPU seconds instead, also of peers.

The default, 10,000 and 100,000 vectors, takes some minutes on two cores; `--sizes 1000000` a quarter of an hour or more
and 8 GB of disk. The last line is `ratio N.NN`: 256 queries at the largest size, embedkit over FAISS.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.index import Index, open_index
from embedkit.indexwriting import write_index
from embedkit.recipe import Recipe
from embedkit.retrieval import search
from embedkit.tuning import DEPTH
from peers import DEFAULT_ENVS, make_environment, run_program

RECIPE = Recipe("made up", "builtin:0", ("cls:2", "patch@2:1"), 32, (0.0,), (1.0,), preview=0)
PACKAGES = ("autofaiss==2.18.0", "numpy<2", "pyarrow<21")
BATCH = 50_000
QUERIES = 256
LATENT = 48
CANDIDATES, SLICES, SLICE_DIM = 100, 64, 256

EMBEDKIT = """
import json, sys, time
from pathlib import Path
import faiss, numpy as np, polars as pl
from embedkit.indexwriting import write_index
from embedkit.recipe import Recipe


def megabytes(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


task = json.loads(Path(sys.argv[1]).read_text())
faiss.omp_set_num_threads(task["threads"])
vectors = np.load(task["vectors"], mmap_mode="r")
names = pl.Series([f"case{number:08d}" for number in range(len(vectors))])
table = pl.DataFrame({"case_id": names, "patient_id": names})
idle = megabytes("VmRSS")
started, cpu = time.perf_counter(), time.process_time()
write_index(vectors, table, embedding="made up", recipe=Recipe.from_json(task["recipe"]), out=task["index"])
seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
print("RESULT", json.dumps({"seconds": seconds, "cpu": cpu, "idle": idle, "peak": megabytes("VmHWM")}))
"""

AUTOFAISS = """
import json, sys, time
from pathlib import Path
import faiss, numpy as np
from autofaiss import build_index


def megabytes(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


task = json.loads(Path(sys.argv[1]).read_text())
faiss.omp_set_num_threads(task["threads"])
idle = megabytes("VmRSS")
clock = time.process_time if task["cpu_time"] else time.perf_counter
started, cpu = time.perf_counter(), time.process_time()
index, infos = build_index(embeddings=str(Path(task["vectors"]).parent), index_path=task["out"] + ".faiss",
                           index_infos_path=task["out"] + ".json", metric_type="ip",
                           nb_cores=task["threads"], verbose=40)
seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
peak = megabytes("VmHWM")
queries, truth = np.load(task["queries"]), np.load(task["truth"])


def measure_recall():
    found = index.search(queries, truth.shape[1])[1]
    return sum(len(np.intersect1d(a, b)) for a, b in zip(found, truth)) / truth.size


def take(part):
    before = clock()
    index.search(part, truth.shape[1])
    return clock() - before


def measure_times():
    singles = [take(each[None]) for each in queries[:64]]
    return min(take(queries) for _ in range(task["repeats"])), float(np.median(singles))


def list_efforts():
    effort = 1
    while effort <= 16384:
        yield effort
        effort = max(effort + 1, round(1.1 * effort))


recall = measure_recall()
batch, single = measure_times()
result = {"seconds": seconds, "cpu": cpu, "idle": idle, "peak": peak, "recall": recall, "batch": batch}
result["single"] = single
first, _, rest = json.loads(Path(task["out"] + ".json").read_text())["index_param"].partition(",")
name = first.partition("=")[0]
for effort in list_efforts() if name else ():
    faiss.ParameterSpace().set_index_parameters(index, f"{name}={effort}" + (f",{rest}" if rest else ""))
    equal = measure_recall()
    if equal >= task["recall"]:
        batch, single = measure_times()
        result.update(equal=equal, effort=effort, equal_batch=batch, equal_single=single)
        break
print("RESULT", json.dumps(result))
"""


@dataclass(frozen=True)
class Timing:
    """Seconds of both sides."""

    embedkit: float
    faiss: float

    @property
    def ratio(self) -> float:
        return self.embedkit / self.faiss


@dataclass(frozen=True)
class Measured:
    """What was found at one size.

    Attributes:
        size: Vectors.
        batch, single: Of 256 queries, of one.
        rows: Of the table at the end: embedkit, autofaiss, autofaiss at equal recall.
    """

    size: int
    batch: Timing
    single: Timing
    rows: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--threads", type=int, default=2, help="of FAISS, on every side")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--envs", type=Path, default=DEFAULT_ENVS)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, not those of a clock on the wall")
    parser.add_argument("--autofaiss", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    faiss.omp_set_num_threads(options.threads)
    found = []
    for size in sorted(options.sizes):
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure_size(options, size, Path(folder)))
    print_table(found)
    with tempfile.TemporaryDirectory() as folder:
        measure_rerank(options, Path(folder))
    print(f"ratio {found[-1].batch.ratio:.2f}")


def measure_size(options: argparse.Namespace, size: int, folder: Path) -> Measured:
    print(f"{size:,} vectors of {options.dim} dims", flush=True)
    (folder / "vectors").mkdir()
    vectors, queries = make_vectors(folder / "vectors" / "vectors.npy", size, options.dim)
    truth = find_nearest(vectors, queries)
    np.save(folder / "queries.npy", queries)
    np.save(folder / "truth.npy", truth)
    task = {
        "vectors": str(folder / "vectors" / "vectors.npy"),
        "queries": str(folder / "queries.npy"),
        "truth": str(folder / "truth.npy"),
        "index": str(folder / "index"),
        "recipe": RECIPE.to_json(),
        "threads": options.threads,
        "repeats": options.repeats,
        "cpu_time": options.cpu_time,
    }
    built = run_program(sys.executable, EMBEDKIT, folder / "embedkit", task)
    started = time.perf_counter()
    index = open_index(folder / "index")
    opened = time.perf_counter() - started
    found = np.array([[int(case[4:]) for case in part] for part in list_cases(index, queries)])
    told, recall = index.tuning, measure_overlap(found, truth)
    print(
        f"  embedkit, {index.kind}: recall {recall:.3f} (told {told.recall:.3f}"
        f" [{told.recall_low:.3f}, {told.recall_high:.3f}]), {describe_build(built)}, opened in {1e3 * opened:.0f} ms",
        flush=True,
    )
    clock = time.process_time if options.cpu_time else time.perf_counter
    batch, single = time_both(index, queries, options.repeats, clock)
    print(
        f"  {QUERIES} queries: embedkit {1e3 * batch.embedkit:.2f} ms, FAISS {1e3 * batch.faiss:.2f} ms, ratio"
        f" {batch.ratio:.3f}; one query: {1e3 * single.embedkit:.2f} ms, {1e3 * single.faiss:.2f} ms, overhead"
        f" {1e3 * (single.embedkit - single.faiss):.2f} ms",
        flush=True,
    )
    rows = [
        f"| {size:,} | embedkit, {index.kind} | {recall:.3f} | {1e3 * batch.embedkit:.1f} ({batch.ratio:.2f}) |"
        f" {1e3 * single.embedkit:.2f} ({1e3 * single.faiss:.2f}) | {built['cpu']:.1f} |"
        f" {describe_peak(built)} |"
    ]
    if options.autofaiss:
        rows += measure_autofaiss(options, folder, task | {"recall": recall})
    return Measured(size, batch, single, tuple(rows))


def measure_autofaiss(options: argparse.Namespace, folder: Path, task: dict[str, Any]) -> list[str]:
    """Rows of the table: as it comes, and at the recall of embedkit's where it reaches that."""
    python = make_environment(options.envs, "autofaiss", PACKAGES, shared=False)
    try:
        result = run_program(python, AUTOFAISS, folder / "autofaiss", task)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"autofaiss could not be run: {' '.join((error.stderr or '').split())[-600:]}") from error
    kind = json.loads((folder / "autofaiss" / "out.json").read_text())
    name, parameters = f"autofaiss, {kind['index_key']}", kind["index_param"]
    print(
        f"  {name}, {parameters}: recall {result['recall']:.3f},"
        f" {describe_build(result)}; {QUERIES} queries {1e3 * result['batch']:.2f} ms, one"
        f" {1e3 * result['single']:.2f} ms",
        flush=True,
    )
    row = (
        f"| | {name}, {parameters} | {result['recall']:.3f} | {1e3 * result['batch']:.1f} |"
        f" {1e3 * result['single']:.2f} | {result['cpu']:.1f} | {describe_peak(result)} |"
    )
    if "equal" not in result:
        return [row]
    first = f"{parameters.partition('=')[0]}={result['effort']}"
    return [
        row,
        f"| | the same, {first} | {result['equal']:.3f} | {1e3 * result['equal_batch']:.1f} |"
        f" {1e3 * result['equal_single']:.2f} | | |",
    ]


def describe_build(result: dict[str, float]) -> str:
    return (
        f"built in {result['seconds']:.1f} s ({result['cpu']:.1f} s of CPU), peak {result['peak']:.0f} MB,"
        f" {result['peak'] - result['idle']:.0f} MB of them to build"
    )


def describe_peak(result: dict[str, float]) -> str:
    return f"{result['peak']:.0f} ({result['peak'] - result['idle']:.0f})"


def make_vectors(file: Path, size: int, dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors of length 1 in a file, mapped, and queries of the same make."""
    random = np.random.default_rng(0)
    turn = random.standard_normal((LATENT, dim)).astype(np.float32)
    centres = random.standard_normal((max(16, size // 200), LATENT)).astype(np.float32)

    def draw(count: int) -> NDArray[np.float32]:
        latent = centres[random.integers(len(centres), size=count)]
        latent = latent + 0.6 * random.standard_normal(latent.shape, np.float32)
        found = latent @ turn + 0.5 * random.standard_normal((count, dim), np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    vectors = np.lib.format.open_memmap(file, "w+", np.float32, (size, dim))
    for start in range(0, size, BATCH):
        vectors[start : start + BATCH] = draw(min(BATCH, size - start))
    vectors.flush()
    return vectors, draw(QUERIES)


def find_nearest(vectors: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rows of the ten vectors that are nearest by an exact comparison, [queries 10]."""
    best, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start in range(0, len(vectors), BATCH):
        found = queries @ vectors[start : start + BATCH].T
        places = np.argpartition(-found, DEPTH, axis=1)[:, :DEPTH]
        best = np.concatenate([best, np.take_along_axis(found, places, 1)], 1)
        rows = np.concatenate([rows, places + start], 1)
        kept = np.argsort(-best, axis=1)[:, :DEPTH]
        best, rows = np.take_along_axis(best, kept, 1), np.take_along_axis(rows, kept, 1)
    return rows


def list_cases(index: Index, queries: NDArray[np.float32]) -> Sequence[Sequence[str]]:
    found = index.search(queries, DEPTH)
    lists: list[list[str]] = found.group_by("query", maintain_order=True).agg("case_id")["case_id"].to_list()
    return lists


def measure_overlap(rows: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    return sum(len(np.intersect1d(mine, true)) for mine, true in zip(rows, truth, strict=True)) / truth.size


def time_both(
    index: Index, queries: NDArray[np.float32], repeats: int, clock: Callable[[], float]
) -> tuple[Timing, Timing]:
    """What 256 queries take, and one (the median of as many as there are repeats)."""
    raw = faiss.read_index(str(index.path / "index.faiss"))
    parameters = make_parameters(index)

    def ask_faiss(part: NDArray[np.float32]) -> None:
        raw.search(part, DEPTH * index.tuning.refine, params=parameters)

    def ask_embedkit(part: NDArray[np.float32]) -> None:
        index.search(part, DEPTH)

    def take(work: Callable[[NDArray[np.float32]], None], part: NDArray[np.float32]) -> float:
        started = clock()
        work(part)
        return clock() - started

    batch = [(take(ask_embedkit, queries), take(ask_faiss, queries)) for _ in range(repeats)]
    single = [(take(ask_embedkit, query[None]), take(ask_faiss, query[None])) for query in queries[: 4 * repeats]]
    return Timing(*np.min(batch, axis=0).tolist()), Timing(*np.median(single, axis=0).tolist())


def make_parameters(index: Index) -> Any:
    if index.kind == "flat":
        return None
    if index.kind == "hnsw":
        return faiss.SearchParametersHNSW(efSearch=max(index.tuning.effort, DEPTH))
    make = faiss.IVFPQSearchParameters if index.kind == "ivfpq" else faiss.SearchParametersIVF
    return make(nprobe=index.tuning.effort)


def print_table(found: Sequence[Measured]) -> None:
    asked = f"{QUERIES} queries (over FAISS) | one (FAISS)"
    print(f"| vectors | index | recall | {asked} | CPU to build, s | peak, MB (to build) |")
    print("|---|---|---|---|---|---|---|")
    for each in found:
        print("\n".join(each.rows))
    for few, many in pairwise(found):
        before, after = few.single, many.single
        print(
            f"growth: {many.size / few.size:.0f} times the cases, one query takes"
            f" {after.embedkit / before.embedkit:.2f} times as long"
            f" ({1e3 * before.embedkit:.2f} to {1e3 * after.embedkit:.2f} ms), FAISS {after.faiss / before.faiss:.2f}"
        )


def measure_rerank(options: argparse.Namespace, folder: Path) -> None:
    """`search` by a case with its 100 candidates ranked again by 64 slices each, among 1,000 cases and among 5,000."""
    for cases in (1_000, 5_000):
        index = make_slices_index(folder / str(cases), cases)
        for order in ("none", "free", "ordered"):
            times = []
            clock = time.process_time if options.cpu_time else time.perf_counter
            for number in range(options.repeats):
                started = clock()
                search(index, case_id=f"case{number:08d}", k=DEPTH, rerank=order, candidates=CANDIDATES)
                times.append(clock() - started)
            print(f"rerank {order}, {cases:,} cases: {1e3 * np.median(times):.1f} ms, least {1e3 * min(times):.1f}")


def make_slices_index(out: Path, cases: int) -> Index:
    """An index that keeps slices: those of a case resemble each other."""
    random = np.random.default_rng(1)
    vectors = random.standard_normal((cases, SLICE_DIM), np.float32)
    slices = vectors[:, None] + random.standard_normal((cases, SLICES, SLICE_DIM), np.float32)
    slices /= np.linalg.norm(slices, axis=2, keepdims=True)
    rows = np.tile(np.arange(SLICES), cases)
    places = np.stack([np.repeat(np.arange(cases), SLICES), np.zeros_like(rows), rows, rows], 1)
    names = pl.Series([f"case{number:08d}" for number in range(cases)])
    return write_index(
        vectors,
        pl.DataFrame({"case_id": names, "patient_id": names}),
        embedding="made up",
        recipe=RECIPE,
        out=out,
        details={"views": ["image/axial"], "slices": "mean:cls:2", "cache": str(out)},
        extras={
            "slices": slices.reshape(-1, SLICE_DIM).astype(np.float16),
            "slice_places": places.astype(np.int32),
            "slice_centres": np.zeros((1, 1, SLICE_DIM), np.float32),
        },
    )


if __name__ == "__main__":
    main()

"""embedkit search beside raw FAISS on the same vectors, and beside autofaiss; reranking; growth with the cases.

Usage: python benchmarks/search.py [--sizes N ...] [--dim N] [--threads N] [--repeats N] [--envs FOLDER]
                                   [--no-autofaiss] [--cpu-time] [--part compare,rerank,change] [--kinds KIND ...]

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

All sizes are printed once more as a table, in milliseconds, with how much longer one query takes from size to size.
Peak memory is that of the whole process; pages of the mapped file of vectors count in it, though the system can take
them back. `rerank`: 100 candidates of 64 slices of 256 dims are ranked again by `search` (goal: 20 ms for all of it).

`change`, only where it is asked for: a hundredth of the vectors is appended to an index (`embedkit index --add`) and
another withdrawn from it (`--remove`), each beside building an index of as many, in CPU seconds and recall; of every
type in --kinds, by default the one that the size asks for. Files are checked and written, tokens are not read.

On a machine that others use, `--cpu-time --threads 1` counts CPU seconds instead, also of peers.

The default, 10,000 and 100,000 vectors, takes some minutes on two cores; `--sizes 1000000` a quarter of an hour or more
and 8 GB of disk. The last line is `ratio N.NN`: 256 queries at the largest size, embedkit over FAISS;
of `change` alone what appending takes over building, at the largest size.
"""

from __future__ import annotations

import argparse
import os
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

from autofaiss_peer import describe_build, describe_peak, measure_autofaiss
from clusters import QUERIES, find_nearest, make_vectors, measure_overlap
from embedkit.index import Index, open_index
from embedkit.indexwriting import write_index
from embedkit.recipe import Recipe
from embedkit.retrieval import search
from embedkit.tuning import DEPTH
from indexchanges import print_changes
from peers import DEFAULT_ENVS, run_program

RECIPE = Recipe("made up", "builtin:0", ("cls:2", "patch@2:1"), 32, (0.0,), (1.0,), preview=0)
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
    parser.add_argument("--part", default="compare,rerank")
    parser.add_argument("--kinds", nargs="+", default=[None], help="of the part change")
    options = parser.parse_args()
    parts = options.part.split(",")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    faiss.omp_set_num_threads(options.threads)
    ratio, found = float("nan"), []
    if "change" in parts:
        ratio = print_changes(options.sizes, options.dim, options.kinds, recipe=RECIPE)
    if "compare" in parts:
        for size in sorted(options.sizes):
            with tempfile.TemporaryDirectory() as folder:
                found.append(measure_size(options, size, Path(folder)))
        print_table(found)
        ratio = found[-1].batch.ratio
    if "rerank" in parts:
        with tempfile.TemporaryDirectory() as folder:
            measure_rerank(options, Path(folder))
    print(f"ratio {ratio:.2f}")


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
        rows += measure_autofaiss(options.envs, folder, task | {"recall": recall, "asked": QUERIES})
    return Measured(size, batch, single, tuple(rows))


def list_cases(index: Index, queries: NDArray[np.float32]) -> Sequence[Sequence[str]]:
    found = index.search(queries, DEPTH)
    lists: list[list[str]] = found.group_by("query", maintain_order=True).agg("case_id")["case_id"].to_list()
    return lists


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

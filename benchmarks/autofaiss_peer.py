"""Owns autofaiss as a peer of search.py: its index built and searched in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from peers import make_environment, run_program

PACKAGES = ("autofaiss==2.18.0", "numpy<2", "pyarrow<21")

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


def measure_autofaiss(envs: Path, folder: Path, task: dict[str, Any]) -> list[str]:
    """Rows of the table: as it comes, and at the recall of embedkit's where it reaches that."""
    python = make_environment(envs, "autofaiss", PACKAGES, shared=False)
    try:
        result = run_program(python, AUTOFAISS, folder / "autofaiss", task)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"autofaiss could not be run: {' '.join((error.stderr or '').split())[-600:]}") from error
    kind = json.loads((folder / "autofaiss" / "out.json").read_text())
    name, parameters = f"autofaiss, {kind['index_key']}", kind["index_param"]
    print(
        f"  {name}, {parameters}: recall {result['recall']:.3f},"
        f" {describe_build(result)}; {task['asked']} queries {1e3 * result['batch']:.2f} ms, one"
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

"""Out-of-fold AUROC of heads and baselines on real scans, which layer does best, and retrieval of the paired case.

Usage: python benchmarks/real_tasks.py [--data ../shared/data] [--work FOLDER] [--backbone NAME [--weights FILE]]
                                       [--part heads|layers|retrieval] [--tasks side,gender] [--head NAME] [--seed 0]

The folder holds `hippocampus/` and `lgg/`, each with manifest.csv and labels.csv. Five patient-grouped folds, nothing
tuned on a test fold, 95% intervals by patient. Caches and runs stay in --work, so that a second call resumes.
Hippocampus `side` is also told by crop and orientation alone, so it measures whether places are kept, not anatomy.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from embedkit.cache import Cache, open_cache
from embedkit.embeddings import Embedding, embed_cases
from embedkit.extraction import extract
from embedkit.plots import describe_interval
from embedkit.runs import Run, open_run
from embedkit.training import train

PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Task:
    data: str
    target: str
    classes: tuple[str, ...] | None = None


TASKS = (
    Task("hippocampus", "side"),
    Task("lgg", "laterality", ("1", "3")),
    Task("lgg", "gender"),
    Task("lgg", "death01"),
)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark on the real scans is told: where they are, where to work, and through which backbone."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path("real-tasks"))
    parser.add_argument("--backbone", default="embedkit/scattering")
    parser.add_argument("--weights", type=Path)
    return parser


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--part", choices=("heads", "layers", "retrieval"), default="heads")
    parser.add_argument("--tasks", default=",".join(task.target for task in TASKS))
    parser.add_argument("--head", action="append", default=[], help="beside the baselines; default: the default heads")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tasks = [task for task in TASKS if task.target in options.tasks.split(",")]
    caches = {name: make_cache(name, options) for name in dict.fromkeys(task.data for task in tasks)}
    if options.part == "retrieval":
        print_retrieval(caches["hippocampus"])
        return
    for task in tasks:
        cache = caches[task.data]
        runs = train_heads(task, cache, options) if options.part == "heads" else train_layers(task, cache, options)
        for name, run in runs.items():
            score = describe_interval(run.metrics["auroc"])
            tokens = ",".join(run.record.token_sets)
            print(f"| {task.target} | {name} | {tokens} | {score} | {run.record.seconds:.1f} s |", flush=True)


def make_cache(name: str, options: argparse.Namespace) -> Cache:
    """The cache of a data set, extracted unless it is there."""
    layered = options.backbone != "embedkit/scattering"
    path = options.work / f"{name}-{options.backbone.replace('/', '-')}"
    summary = extract(
        options.data / name / "manifest.csv",
        path,
        backbone=options.backbone,
        weights=options.weights,
        tokens=["cls:8", "cls:12", *(f"patch@4:{layer}" for layer in (4, 6, 8, 10, 12))]
        if layered
        else ["cls", "patch@4"],
        crop="foreground" if name == "lgg" else "none",
    )
    print(f"{name}: {summary.cases_done} cases extracted, {summary.cases_before} there before", flush=True)
    return open_cache(path)


def train_heads(task: Task, cache: Cache, options: argparse.Namespace) -> dict[str, Run]:
    """The heads asked for and both baselines, each on the tokens that it chooses."""
    out = options.work / "runs" / f"{cache.path.name}-{options.seed}"
    names = ("logistic", "raptor", *(options.head or ("linear", "query", "abmil", "grid")))
    if not all((out / f"{task.target}.{name}" / "run.json").is_file() for name in names):
        train(
            cache,
            options.data / task.data / "labels.csv",
            targets=[task.target],
            heads=options.head or None,
            out=out,
            classes=task.classes,
            seed=options.seed,
            overwrite=True,
        )
    return {name: open_run(out / f"{task.target}.{name}") for name in names}


def train_layers(task: Task, cache: Cache, options: argparse.Namespace) -> dict[str, Run]:
    """Both baselines (and more with --head) on every cached token set: quick, and no seed decides."""
    found = {}
    for token_set in cache.token_sets:
        out = options.work / "runs" / f"{cache.path.name}-{options.seed}-{token_set}"
        places = ("raptor",) if token_set.startswith("patch") else ()
        names = ("logistic", *places, *options.head)
        if not all((out / f"{task.target}.{name}" / "run.json").is_file() for name in names):
            train(
                cache,
                options.data / task.data / "labels.csv",
                targets=[task.target],
                out=out,
                heads=options.head,
                token_sets=[token_set],
                classes=task.classes,
                seed=options.seed,
                overwrite=True,
            )
        found |= {f"{name} on {token_set}": open_run(out / f"{task.target}.{name}") for name in names}
    return found


def print_retrieval(cache: Cache) -> None:
    """How often the other case of the same patient is the nearest, and among the five nearest."""
    for token_set in cache.token_sets:
        for statistic in ("mean", "grid") if token_set.startswith("patch") else ("mean",):
            vectors = embed_cases(cache, Embedding.parse(f"{statistic}:{token_set}"))
            for name, mean in (("raw", 0 * vectors.view_means()), ("centred", vectors.view_means())):
                ranks = rank_pairs(vectors.fuse(mean), vectors.cases)
                print(
                    f"| {statistic}:{token_set} | {name} | {len(ranks)} queries among {len(vectors.cases)}"
                    f" | top-1 {np.mean(ranks < 1):.3f} | top-5 {np.mean(ranks < 5):.3f} |",
                    flush=True,
                )


def rank_pairs(vectors: np.ndarray, cases: pl.DataFrame) -> np.ndarray:
    """For each case whose patient has another: how many cases are nearer (cosine) than that one."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    patients = cases["patient_id"].to_numpy()
    same = (patients[:, None] == patients) & ~np.eye(len(patients), dtype=bool)
    queries = np.flatnonzero(same.any(1))
    best = np.where(same, similarity, -np.inf).max(1)
    return np.array([(similarity[query] > best[query]).sum() for query in queries])


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()

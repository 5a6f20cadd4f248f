"""Which way to score patches finds the lesion: pointing game, energy inside the mask, AUROC of score against cover.

Usage: python benchmarks/heatmaps.py [--work FOLDER] [--methods contribution,...] [--shuffles 3] [--cases 60]
       python benchmarks/heatmaps.py SLABS --weights FILE [--target tumour] [--split fold] [--heads grid,query,...]
                                     [--every 1]

Without SLABS phantoms are made, with lesions in known places. SLABS holds manifest.csv with the column mask, and
labels.csv with a binary target and a column of patient-grouped folds; three views are the channels of one image. Each
n-th positive case (--every n) is explained by the fold model that never saw it. Intervals are over patients. The last
column is the sanity check of Adebayo et al. (arXiv 1810.03292), see `embedkit.sanity`: the magnitude of Spearman's
correlation between the map of the trained head and maps of the same head with its fitted numbers shuffled, near 0 where
a map is about the head's answer; --shuffles 0 leaves it out. The last lines are paired differences from the default
method, and its energy over the mask's share of the image (chance), means over the heads. Caches and runs stay in
--work: a second call goes on.
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from embedkit.attribution import METHODS, Method
from embedkit.bootstrap import Floats, Interval, bootstrap_values, form_interval
from embedkit.cache import Cache, open_cache
from embedkit.errors import HeadError, RunError
from embedkit.explanation import canonical_shape
from embedkit.extraction import extract
from embedkit.localisation import judge_heatmap
from embedkit.manifest import read_manifest
from embedkit.phantoms import make_phantoms
from embedkit.plots import describe_interval
from embedkit.runs import Run, open_run
from embedkit.sanity import check_sanity
from embedkit.training import train
from embedkit.volumes import Array, read_mask, read_volume

BACKBONE, CHANNELS = "deit_tiny_patch16_224", ("pre", "flair", "post")
RESAMPLES = 2000
MEASURES = ("pointing", "energy", "auroc", "alike")
PHANTOM_HEADS = {"grid": "patch@4", "query": "patch@4", "raptor": "patch@4"}
SLAB_HEADS = {"grid": "patch:8", "query": "patch:8", "gridattention": "patch:8", "raptor": "patch:8", "tail": "cut:8"}
HEAD_OPTIONS = {"tail": {"blocks": 2}}
DEFAULT: Method = inspect.signature(Run.find_evidence).parameters["method"].default


@dataclass(frozen=True)
class Data:
    """A cache with labels and masks."""

    manifest: Path
    labels: Path
    cache: Cache
    target: str
    split: str | None
    heads: dict[str, str]

    def mask(self, case_id: str) -> Array:
        """Bool, canonical volume."""
        row = read_manifest(self.manifest).filter(pl.col("case_id") == case_id).row(0, named=True)
        return np.asarray(read_mask(row["mask"], read_volume(row["path"])) > 0)


@dataclass(frozen=True)
class Measured:
    """Of one head and method: patients and float64 [measures cases], chance [cases]."""

    patients: list[str]
    values: Floats
    chance: Floats


def prepare_phantoms(options: argparse.Namespace) -> Data:
    made = make_phantoms(options.work / "phantoms", cases=options.cases, seed=5)
    path = options.work / "cache"
    extract(
        made.manifest,
        path,
        backbone="embedkit/scattering",
        window="lung",
        tokens=["cls", "patch@4"],
        image_size=64,
        slices="count:14",
    )
    return Data(made.manifest, made.labels, open_cache(path), "lesion", None, name_sets(path, PHANTOM_HEADS))


def prepare_slabs(options: argparse.Namespace) -> Data:
    path = options.work / "cache"
    extract(
        options.slabs / "manifest.csv",
        path,
        backbone=BACKBONE,
        weights=options.weights,
        image_size=128,
        tokens=["cls:12", "patch:8", "attention"],
        cut=4,
        channels=CHANNELS,
        fill="flair",
    )
    manifest, labels = options.slabs / "manifest.csv", options.slabs / "labels.csv"
    return Data(manifest, labels, open_cache(path), options.target, options.split, SLAB_HEADS)


def name_sets(path: Path, heads: dict[str, str]) -> dict[str, str]:
    """Token sets with the layer that the cache gave them."""
    held = open_cache(path).recipe.token_sets
    return {head: next(name for name in held if name.startswith(f"{kind}:")) for head, kind in heads.items()}


def train_head(data: Data, head: str, work: Path) -> Run:
    """The run of a head, trained unless it is there."""
    folder = work / "runs" / head
    if not (folder / f"{data.target}.{head}" / "run.json").is_file():
        train(
            data.cache,
            data.labels,
            targets=[data.target],
            heads=[head],
            token_sets={head: [data.heads[head]]},
            head_options={name: each for name, each in HEAD_OPTIONS.items() if name == head},
            split=data.split,
            out=folder,
            overwrite=True,
            device="cpu",
        )
    return open_run(folder / f"{data.target}.{head}")


def measure(data: Data, run: Run, methods: Sequence[Method], *, every: int, shuffles: int) -> dict[Method, Measured]:
    """Scores of the maps of each n-th positive case that a fold tested, by method, without what a head lacks."""
    positive = run.record.classes[-1]
    cases = run.predictions.filter(pl.col("target").cast(pl.String) == positive).select("case_id", "patient_id")
    found: dict[Method, list[tuple[str, list[float]]]] = {}
    lacking: set[Method] = set()
    for case_id, patient in cases.gather_every(every).iter_rows():
        mask = data.mask(case_id)
        if not mask.any():
            continue
        for method in methods:
            if method in lacking:
                continue
            try:
                values = judge_case(data.cache, run, case_id, mask, method=method, shuffles=shuffles)
            except (HeadError, RunError) as error:
                print(f"{run.head} {method}: {error}")
                lacking.add(method)
                continue
            found.setdefault(method, []).append((patient, values))
    return {method: collect(rows) for method, rows in found.items()}


def judge_case(cache: Cache, run: Run, case_id: str, mask: Array, *, method: Method, shuffles: int) -> list[float]:
    """The measures of one map, then chance."""
    evidence = run.find_evidence(cache, case_id, method=method, held_out=True)
    (scores,) = evidence.scores.values()
    stack = int(cache.stacks.filter(pl.col("case_id") == case_id)["stack"][0])
    record, slices = cache.record(stack), cache.slices(stack)
    if mask.shape != canonical_shape(record):
        raise SystemExit(f"the mask of {case_id} has shape {mask.shape}, its image {canonical_shape(record)}")
    judged = judge_heatmap(scores, mask, indices=slices.indices, box=record.box, plane=record.plane)
    alike = float("nan")
    if shuffles:
        alike = check_sanity(run, cache, case_id, evidence, method=method, held_out=True, shuffles=shuffles).alike
    return [judged.pointing, judged.energy, judged.auroc, alike, judged.share]


def collect(rows: Sequence[tuple[str, list[float]]]) -> Measured:
    table = np.array([values for _, values in rows]).T
    return Measured([patient for patient, _ in rows], table[:-1], table[-1])


def average(values: Floats, patients: Sequence[str]) -> Interval:
    """The mean over cases with its interval over patients."""

    def mean(weights: Floats) -> Floats:
        return np.asarray(weights @ values / weights.sum(1))

    resampled = bootstrap_values({"mean": mean}, patients, resamples=RESAMPLES, seed=0)["mean"]
    return form_interval(float(values.mean()), resampled, patients)


def report(head: str, found: dict[Method, Measured]) -> None:
    for method, measured in found.items():
        known = [values for values in measured.values if not np.isnan(values).any()]
        cells = [describe_interval(average(values, measured.patients)) for values in known]
        print(f"| {head} | {method} | {' | '.join(cells)} |", flush=True)


def compare(found: dict[str, dict[Method, Measured]], default: Method) -> None:
    """How much better or worse each method is than the default, the mean over the heads that have both."""
    for method in METHODS:
        heads = [name for name, each in found.items() if method in each and default in each]
        if method == default or not heads:
            continue
        apart = np.mean([found[name][method].values - found[name][default].values for name in heads], axis=0)
        patients = found[heads[0]][default].patients
        cells = [f"{name} {describe_interval(average(apart[row], patients))}" for row, name in enumerate(MEASURES[:3])]
        print(f"{method} less {default}, mean over {', '.join(heads)}: {'; '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slabs", type=Path, nargs="?")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--work", type=Path, help="default: a temporary folder")
    parser.add_argument("--target", default="tumour")
    parser.add_argument("--split", default="fold")
    parser.add_argument("--heads", default="")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--every", type=int, default=1, help="explain each n-th positive case")
    parser.add_argument("--shuffles", type=int, default=3, help="randomised heads per trained one")
    parser.add_argument("--cases", type=int, default=60, help="of phantoms")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or Path(temporary)
        data = prepare_phantoms(options) if options.slabs is None else prepare_slabs(options)
        heads = options.heads.split(",") if options.heads else list(data.heads)
        methods = [name for name in METHODS if name in options.methods.split(",")]
        print("| head | method | pointing | energy | AUROC | alike without what was learned |")
        found = {}
        for head in heads:
            run = train_head(data, head, options.work)
            found[head] = measure(data, run, methods, every=options.every, shuffles=options.shuffles)
            report(f"{head} ({describe_interval(run.metrics['auroc'])})", found[head])
        compare(found, DEFAULT)
        usual = [each[DEFAULT] for each in found.values() if DEFAULT in each]
        if usual:
            chance = float(usual[0].chance.mean())
            print(f"cases {len(usual[0].chance)}, the mask's share of the image {chance:.3f}")
            print(f"ratio {np.mean([each.values[1].mean() for each in usual]) / chance:.2f}")


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()

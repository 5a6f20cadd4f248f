"""Masks from cached tokens: Dice out of fold, the label with and without masks, and Dice against the number of clicks.

Usage: python benchmarks/segmentation.py --weights FILE [--data ../shared/data] [--slabs FOLDER] [--work FOLDER]
           [--part masks,label,clicks] [--head segment] [--target tumour] [--cases 60] [--size 128] [--epochs 30]
           [--seed 0]

The folder holds `hippocampus/` and `lgg/`, each with manifest.csv (column ``mask``) and labels.csv; of each the first
--cases patients are taken. Tokens of `deit_tiny_patch16_224` at --size pixels, by head: block 8 on the full grid for
``segment``, blocks 4, 8 and 12 on 4 x 4 places for ``grid``, those entering the last 4 blocks for ``tail``; LGG is
three channels. Five patient-grouped folds, nothing tuned on a test fold, 95% intervals by patient; Dice is the mean
over cases whose mask is not empty, once on the token grid and once on the voxels of the source, upsampled, there cut at
a half, at .4, and at the share that does best on the cases of the other folds. ``masks``: the mask learned
without any label (all its labels as one), beside what the true shares of patches would give. ``label``: laterality of
LGG tumours, or with --slabs (manifest.csv, labels.csv with ``tumour`` and ``fold``) whether a slab holds tumour (or
--target), with the mask's loss at weight 1 and 0 and their paired difference. ``clicks`` (``segment``): a head that
practised on up to five; the clicks are voxels drawn from the true mask, more and more of them, answered by a model that
has not seen the case. Caches and runs stay in --work, so that a second call resumes. The last line is the Dice of LGG
masks on voxels, cut at a half, after one click over that without any, where clicks are a part.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.cache import Cache, StackRecord, open_cache
from embedkit.comparison import compare_runs
from embedkit.covers import Masks, read_stack_mask
from embedkit.extraction import extract
from embedkit.manifest import read_manifest
from embedkit.maskscores import mean_interval
from embedkit.patches import measure_patch_cover, place_patch_scores
from embedkit.plots import describe_interval
from embedkit.pooling import joined_grid
from embedkit.prompts import Click
from embedkit.runs import Run, open_run
from embedkit.segmentation import predict_mask
from embedkit.training import train
from embedkit.volumes import to_source

BACKBONE, CUT, CLICKS = "deit_tiny_patch16_224", 4, (0, 1, 2, 3, 5)
FINE = (14, 14)
LOWER, CUTS = 0.4, (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)  # shares from which on a voxel is in the mask
READS = {"segment": ("patch:8",), "grid": ("patch@4:4", "patch@4:8", "patch@4:12"), "tail": ("cut:8",)}
PROJECT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared" / "data")
    parser.add_argument("--slabs", type=Path)
    parser.add_argument("--work", type=Path, default=Path("segmentation"))
    parser.add_argument("--part", default="masks,label,clicks")
    parser.add_argument("--head", choices=tuple(READS), default="segment")
    parser.add_argument("--target", default="tumour", help="of the slabs")
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    parts = [part for part in options.part.split(",") if part != "clicks" or options.head == "segment"]
    if "masks" in parts:
        for name in ("hippocampus", "lgg"):
            print_masks(name, *make_cache(name, options), options)
    if "label" in parts:
        print_label(options)
    if "clicks" in parts:
        print_clicks(*make_cache("lgg", options), options)


def make_cache(name: str, options: argparse.Namespace) -> tuple[Cache, pl.DataFrame]:
    """The cache of a data set, extracted unless it is there, and the manifest of its cases."""
    folder = options.slabs if name == "slabs" else options.data / name
    manifest = read_manifest(folder / "manifest.csv")
    if name != "slabs":
        patients = manifest["patient_id"].unique(maintain_order=True)[: options.cases]
        manifest = manifest.filter(pl.col("patient_id").is_in(patients.implode()))
    channels: dict[str, Any] = {} if name == "hippocampus" else {"channels": ("pre", "flair", "post"), "fill": "flair"}
    reads = READS[options.head]
    path = options.work / f"{name}-{options.head}-{options.size}-{manifest['case_id'].n_unique()}"
    extract(
        manifest,
        path,
        backbone=BACKBONE,
        weights=options.weights,
        image_size=options.size,
        tokens=["cls:12", *(each for each in reads if not each.startswith("cut"))],
        cut=CUT if options.head == "tail" else None,
        crop="foreground" if name == "lgg" else "none",
        **channels,
    )
    return open_cache(path), manifest


def fit(cache: Cache, manifest: pl.DataFrame, part: str, options: argparse.Namespace, **how: Any) -> Run:
    """The run of the head, trained unless it is there."""
    head = options.head
    out = options.work / "runs" / f"{cache.path.name}-{part}-{options.epochs}-{options.seed}"
    given: dict[str, Any] = {"labels": None, "targets": (), "weight": 1.0, "clicks": 0} | how
    clicks = given.pop("clicks")
    target = given["targets"][0] if given["targets"] else "mask_ml"
    path = out / f"{target}.{head}"
    if not (path / "run.json").is_file():
        train(
            cache,
            given.pop("labels"),
            targets=given.pop("targets"),
            out=out,
            masks=manifest,
            heads=[head],
            token_sets={head: READS[head]},
            head_options={head: {"clicks": clicks}} if clicks else None,
            fit_options={"epochs": options.epochs, "mask_weight": given.pop("weight")},
            seed=options.seed,
            overwrite=True,
            **given,
        )
    return open_run(path)


def print_masks(name: str, cache: Cache, manifest: pl.DataFrame, options: argparse.Namespace) -> None:
    run = fit(cache, manifest, "masks", options)
    print(f"| {name}, masks alone | Dice on tokens {describe_interval(run.metrics['dice'])} |", flush=True)
    print(f"| {name}, on voxels | {score_voxels(run, cache, manifest, clicks=0, seed=options.seed)} |", flush=True)
    print_bounds(name, run, cache, manifest)


def print_bounds(name: str, run: Run, cache: Cache, manifest: pl.DataFrame) -> None:
    """What the true shares of patches would give, of those that the head reads and of a finer grid."""
    for grid in dict.fromkeys((joined_grid(run.record.shape, run.record.token_sets), FINE)):
        bound = score_bound(run, cache, manifest, grid)
        print(f"| {name}, true shares of {grid[0]} x {grid[1]} patches, on voxels | {bound} |", flush=True)


def print_label(options: argparse.Namespace) -> None:
    name, target = ("slabs", options.target) if options.slabs else ("lgg", "laterality")
    cache, manifest = make_cache(name, options)
    labels = (options.slabs or options.data / name) / "labels.csv"
    how: dict[str, Any] = {"split": "fold"} if options.slabs else {"classes": ("1", "3")}
    runs = []
    for weight in (1.0, 0.0):
        run = fit(cache, manifest, f"label-{weight:g}", options, labels=labels, targets=[target], weight=weight, **how)
        score = describe_interval(run.metrics["auroc"])
        dice = describe_interval(run.metrics["dice"]) if weight else "not learned"
        print(f"| {name} {target}, mask weight {weight:g} | AUROC {score} | Dice on tokens {dice} |", flush=True)
        runs.append(run)
    (contrast,) = compare_runs(runs).contrasts
    difference = describe_interval(contrast.difference)
    print(f"| {name} {target}, with masks less without | difference of AUROC {difference} |", flush=True)


def print_clicks(cache: Cache, manifest: pl.DataFrame, options: argparse.Namespace) -> None:
    run = fit(cache, manifest, "clicks", options, clicks=max(CLICKS))
    found = {}
    for count in CLICKS:
        found[count] = score_voxels(run, cache, manifest, clicks=count, seed=options.seed)
        print(f"| lgg, {count} clicks, Dice on voxels | {found[count]} |", flush=True)
    print_bounds("lgg", run, cache, manifest)
    plain = float(found[0].half.mean()) or float("nan")  # a few epochs find nothing
    print(f"ratio {found[1].half.mean() / plain:.2f}")


@dataclass(frozen=True)
class CutScores:
    """Dice on voxels of each case's mask at every cut of `CUTS`, float64 [cases cuts], with folds and patients."""

    scores: NDArray[np.float64]
    folds: NDArray[np.int64]
    patients: list[str]

    @property
    def half(self) -> NDArray[np.float64]:
        """At a half, [cases]."""
        return self.scores[:, -1]

    @property
    def chosen(self) -> NDArray[np.float64]:
        """Each case at the cut that did best on the cases of the other folds, [cases]."""
        best = {fold: self.scores[self.folds != fold].mean(0).argmax() for fold in np.unique(self.folds)}
        return self.scores[np.arange(len(self.scores)), [best[fold] for fold in self.folds]]

    def __str__(self) -> str:
        parts = (self.half, self.scores[:, CUTS.index(LOWER)], self.chosen, self.chosen - self.half)
        half, lower, chosen, gain = (describe_interval(mean_interval(each, self.patients)) for each in parts)
        return f"cut at .5 {half} | at {LOWER:g} {lower} | chosen on the other folds {chosen} | less half {gain}"


def score_bound(run: Run, cache: Cache, manifest: pl.DataFrame, grid: tuple[int, int]) -> CutScores:
    """Of the true share of each patch, drawn as predicted ones are: what a grid allows."""

    def draw(record: StackRecord, stack: int, truth: NDArray[np.bool_]) -> NDArray[np.float32]:
        where: dict[str, Any] = {"indices": cache.slices(stack).indices, "box": record.box, "plane": record.plane}
        shares = measure_patch_cover(truth, grid=grid, **where)
        return place_patch_scores(shares, shape=truth.shape, **where)

    return score_cuts(run, cache, manifest, draw)


def score_voxels(run: Run, cache: Cache, manifest: pl.DataFrame, *, clicks: int, seed: int) -> CutScores:
    """Of the predicted masks in the voxels of the source, each by the models that did not see the case."""

    def ask(record: StackRecord, _: int, truth: NDArray[np.bool_]) -> NDArray[np.float32]:
        inside = np.argwhere(to_source(truth, record.source_affine))
        drawn = np.random.default_rng([seed, len(inside)]).permutation(inside)[:clicks]
        points = [Click((float(k), float(j), float(i)), "voxel") for i, j, k in drawn]
        found = predict_mask(run, cache, record.case_id, clicks=points, held_out=True)
        return found[f"{record.view}/{record.plane}"][0]

    return score_cuts(run, cache, manifest, ask)


def score_cuts(
    run: Run,
    cache: Cache,
    manifest: pl.DataFrame,
    find_shares: Callable[[StackRecord, int, NDArray[np.bool_]], NDArray[np.float32]],
) -> CutScores:
    """Dice of shares in the canonical volume, cut, with the masks of all tested cases that are not empty."""
    folds = dict(run.predictions.select("case_id", "fold").iter_rows())
    scores, where, patients = [], [], []
    for record, stack, path in Masks(cache, manifest).stacks(list(folds)):
        truth = read_stack_mask(path, record) > 0
        if truth.any():
            shares = find_shares(record, stack, truth)
            scores.append([dice(shares >= cut, truth) for cut in CUTS])
            where.append(folds[record.case_id])
            patients.append(record.patient_id)
    return CutScores(np.array(scores), np.array(where), patients)


def dice(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    return float(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()

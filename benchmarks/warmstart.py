"""A new task from an old run against one from chance, and what is left of the old one: real scans, out of fold, paired.

Usage: python benchmarks/warmstart.py [--data ../shared/data] [--work FOLDER] [--backbone NAME [--weights FILE]]
                                      [--head grid] [--seeds 3] [--part gain|keep] [--exemplars 20,1000] [--weight 1]

Pairs of targets of the same patients: hippocampus side from the volume of its front part, and the other way about;
tumour laterality from its size, and patients' gender from laterality. The new head keeps the old run's folds, so no
head has trained on whoever it is tested on, not even for the other target; that from chance has the same folds.

``gain``: the last line is the mean gain of the new score, of an error as a part of what it is from chance.
``keep``: the old score before, after a plain start (its last layer as it was, on what the other layers became), and
held to the old answers on so many exemplars per fold (1000: all); and the new score of each. The last line is the mean
share of what a plain start lost that the fewest exemplars kept.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from embedkit.cache import Cache
from embedkit.canvas import describe_interval
from embedkit.comparison import compare_runs
from embedkit.manifest import read_labels
from embedkit.metrics import HIGHER_IS_BETTER
from embedkit.runs import Run, open_run
from embedkit.training import train
from real_tasks import make_cache, make_parser

PAIRS = (
    ("hippocampus", "anterior_mm3", "side"),
    ("hippocampus", "side", "anterior_mm3"),
    ("lgg", "tumour_voxels", "laterality"),
    ("lgg", "laterality", "gender"),
)


def fit(
    cache: Cache,
    target: str,
    out: Path,
    options: argparse.Namespace,
    *,
    how: dict[str, Any] | None = None,
    folds: pl.DataFrame | None = None,
) -> Run:
    """The run of the head on one target, on given folds where there are any."""
    labels = read_labels(options.data / cache.path.name.partition("-")[0] / "labels.csv")
    if folds is not None:
        labels = labels.with_columns(pl.col("case_id").cast(pl.String)).join(folds, on="case_id")
    classes = ("1", "3") if target == "laterality" else None
    how = {"seeds": options.seeds, "classes": classes, "overwrite": True, "heads": [options.head], **(how or {})}
    return train(cache, labels, targets=[target], out=out, **how).runs[-1]


def tell_gain(cache: Cache, old: str, new: str, out: Path, options: argparse.Namespace) -> float:
    """What the new target gains by the start, as a part; prints both scores."""
    before = fit(cache, old, out / f"{old}-first", options)
    warm = fit(cache, new, out / f"{new}-from-{old}", options, how={"start": before})
    folds = warm.predictions.select("case_id", dealt="fold")
    cold = fit(cache, new, out / f"{new}-from-chance", options, how={"split": "dealt"}, folds=folds)
    metric = "auroc" if cold.record.classes else "mae"
    (contrast,) = compare_runs([warm, cold], metric=metric).contrasts
    epochs = [np.mean([member["epochs"] for member in run.record.members]) for run in (cold, warm)]
    print(
        f"| {new} from {old} | {metric} | from chance {describe_interval(cold.metrics[metric])}"
        f" | from the run {describe_interval(warm.metrics[metric])}"
        f" | {describe_interval(contrast.difference)}, p {contrast.p_value:.2f}"
        f" | epochs {epochs[0]:.0f} and {epochs[1]:.0f} |",
        flush=True,
    )
    return _signed(metric, contrast.difference.value) / (cold.metrics[metric].value if metric == "mae" else 1.0)


def tell_kept(cache: Cache, old: str, new: str, out: Path, options: argparse.Namespace) -> tuple[float, float]:
    """What a plain start loses of the old score, and what is lost with the fewest exemplars; prints all scores."""
    before = fit(cache, old, out / f"{old}-first", options)
    metric = "auroc" if before.record.classes else "mae"
    sizes = [int(size) for size in options.exemplars.split(",")]
    losses = []
    for size, weight in ((1, 0.0), *((size, options.weight) for size in sizes)):
        where = out / f"{new}-keeping-{old}-{size}-{weight:g}"
        how = {"start": before, "keep_old": size, "keep_weight": weight}
        kept = fit(cache, new, where, options, how=how)
        now = open_run(where / f"{new}.{options.head}")
        (change,) = compare_runs([kept, before], metric=metric).contrasts
        named = "auroc" if now.record.classes else "mae"
        print(
            f"| {old}, then {new} | {f'{size} exemplars' if weight else 'plain'} | {old} {metric}"
            f" {describe_interval(before.metrics[metric])} then {describe_interval(kept.metrics[metric])}, difference"
            f" {describe_interval(change.difference)} | {new} {named} {describe_interval(now.metrics[named])} |",
            flush=True,
        )
        losses.append(
            -_signed(metric, change.difference.value) / (before.metrics[metric].value if metric == "mae" else 1)
        )
    return losses[0], losses[1]


def _signed(metric: str, difference: float) -> float:
    return difference if HIGHER_IS_BETTER[metric] else -difference


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--head", default="grid")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", choices=("gain", "keep"), default="gain")
    parser.add_argument("--exemplars", default="20,1000", help="of each fold, most; for --part keep")
    parser.add_argument("--weight", type=float, default=1.0, help="what keeping counts; for --part keep")
    options = parser.parse_args()
    caches = {name: make_cache(name, options) for name in dict.fromkeys(name for name, _, _ in PAIRS)}
    found = []
    for name, old, new in PAIRS:
        out = options.work / "runs" / f"{caches[name].path.name}-warmstart-{options.head}-{options.seeds}"
        found.append((tell_gain if options.part == "gain" else tell_kept)(caches[name], old, new, out, options))
    if options.part == "gain":
        print(f"gain {np.mean(found):+.3f}")
    else:
        lost, left = np.mean(found, axis=0)
        print(f"kept {1 - left / lost:.2f} of {lost:.3f}")


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()

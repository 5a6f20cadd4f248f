"""A new task from an old run against one from chance: out-of-fold scores on real scans, paired, and epochs run.

Usage: python benchmarks/warmstart.py [--data ../shared/data] [--work FOLDER] [--backbone NAME [--weights FILE]]
                                      [--head grid] [--seeds 3]

Pairs of targets of the same patients: hippocampus side from the volume of its front part, and the other way about;
tumour laterality from its size, and patients' gender from laterality. The new head keeps the old run's folds, so no
head has trained on whoever it is tested on, not even for the other target; that from chance has the same folds. The
last line is the mean gain, of an error as a part of what it is from chance.
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
from embedkit.runs import Run
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


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--head", default="grid")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    caches = {name: make_cache(name, options) for name in dict.fromkeys(name for name, _, _ in PAIRS)}
    gains = []
    for name, old, new in PAIRS:
        out = options.work / "runs" / f"{caches[name].path.name}-warmstart-{options.head}-{options.seeds}"

        before = fit(caches[name], old, out / f"{old}-first", options)
        warm = fit(caches[name], new, out / f"{new}-from-{old}", options, how={"start": before})
        folds = warm.predictions.select("case_id", dealt="fold")
        cold = fit(caches[name], new, out / f"{new}-from-chance", options, how={"split": "dealt"}, folds=folds)
        metric = "auroc" if cold.record.classes else "mae"
        (contrast,) = compare_runs([warm, cold], metric=metric).contrasts
        spread = abs(cold.metrics[metric].value) if metric == "mae" else 1.0
        gains.append((1 if HIGHER_IS_BETTER[metric] else -1) * contrast.difference.value / spread)
        epochs = [np.mean([member["epochs"] for member in run.record.members]) for run in (cold, warm)]
        print(
            f"| {new} from {old} | {metric} | from chance {describe_interval(cold.metrics[metric])}"
            f" | from the run {describe_interval(warm.metrics[metric])}"
            f" | {describe_interval(contrast.difference)}, p {contrast.p_value:.2f}"
            f" | epochs {epochs[0]:.0f} and {epochs[1]:.0f} |",
            flush=True,
        )
    print(f"gain {np.mean(gains):+.3f}")


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()

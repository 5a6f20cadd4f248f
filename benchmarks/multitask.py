"""Several targets on one trunk against a head of its own for each: out-of-fold AUROC on real scans, paired.

Usage: python benchmarks/multitask.py [--data ../shared/data] [--work FOLDER] [--backbone NAME [--weights FILE]]
                                      [--trunk grid] [--seeds 3] [--weighting uncertainty,gradnorm,equal]

Four targets of the LGG patients (laterality, gender, death01, histologic grade), some unknown for some patients. All
heads have the same five patient-grouped folds, nothing is tuned on a test fold; intervals and p-values are by patient.
The last line is the mean difference in AUROC of the first weighting to separate heads, over the four targets.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import polars as pl

from embedkit.cache import Cache
from embedkit.canvas import describe_interval
from embedkit.comparison import compare_runs
from embedkit.manifest import read_labels
from embedkit.training import train
from real_tasks import make_cache, make_parser

TARGETS = ("laterality", "gender", "death01", "neoplasm_histologic_grade")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--trunk", default="grid")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weighting", default="uncertainty,gradnorm,equal")
    options = parser.parse_args()
    cache = make_cache("lgg", options)
    # a laterality of 2, both sides, is one patient's: no class to learn
    labels = read_labels(options.data / "lgg" / "labels.csv").with_columns(
        laterality=pl.when(pl.col("laterality").cast(pl.Int64) != 2).then(pl.col("laterality"))
    )
    differences = {each: compare(cache, labels, each, options) for each in options.weighting.split(",")}
    for weighting, found in differences.items():
        print(f"{weighting}: mean difference in AUROC to separate heads {np.mean(found):+.3f}")
    print(f"difference {np.mean(next(iter(differences.values()))):+.3f}")


def compare(cache: Cache, labels: pl.DataFrame, weighting: str, options: argparse.Namespace) -> list[float]:
    """Trains both ways, prints a line per target, and gives the differences."""
    out = options.work / "runs" / f"{cache.path.name}-multitask-{options.trunk}-{weighting}-{options.seeds}"
    trained = train(
        cache,
        labels,
        targets=TARGETS,
        heads=[options.trunk, "multitask"],
        head_options={"multitask": {"trunk": options.trunk, "weighting": weighting}},
        seeds=options.seeds,
        out=out,
        resume=True,
    )
    found = []
    for target in TARGETS:
        runs = {run.head: run for run in trained.runs if run.record.target == target}
        one, together = runs[options.trunk], runs["multitask"]
        (contrast,) = compare_runs([together, one], metric="auroc").contrasts
        found.append(contrast.difference.value)
        print(
            f"| {target} | {weighting} | {len(one.predictions)} cases | alone {describe_interval(one.metrics['auroc'])}"
            f" | together {describe_interval(together.metrics['auroc'])}"
            f" | {describe_interval(contrast.difference)}, p {contrast.p_value:.2f} |",
            flush=True,
        )
    return found


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()

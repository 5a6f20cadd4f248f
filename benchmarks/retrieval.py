"""Similar cases on real scans: levels of vectors x reranking x backbone, beside the bare pixels.

Usage: python benchmarks/retrieval.py [--data ../shared/data] [--cache-dir FOLDER] [--weights FILE]
                                      [--truths hippocampus,lgg,sequences,sts] [--backbones deit_tiny,scattering]
                                      [--levels "slices,run"]

Ground truths: the other hippocampus of the same patient (`hippocampus`); another patient with the tumour on the same
side (`lgg`); an image of the same sequence of another patient (`sequences`: each of a brain tumour patient's sequences
is a case, by 12 of its slices); a piece of the same modality of the other patient (`sts`: CT, PET and T1 MR of two
sarcoma patients, each series cut along the stack into eight cases). Each case is a query once. 95% intervals are over
patients, of `sts` over the six series: they hold for other pieces of these, and say nothing of a third patient.

`pixels` crops or pads each volume around its centre to the median shape, takes the mean of blocks down to 48 voxels or
fewer per axis, and compares by cosine after centring; `whitened` as embedkit whitens its own vectors. Whitening is
fitted on all cases without labels, in all lines of the tables; retrieval_heldout.py fits it on other patients.
`slices` is an index of slices: a case is as similar as the best that the query's slices find in it. `run` lines are
pooled vectors of heads trained here for the target of the truth (the side of the hippocampus, of the tumour), five
patient-grouped folds: a query is searched for with the vectors of the fold's model that never saw its patient, which
saw most of the others.

Caches stay in --cache-dir, so that a second call resumes. --levels prints these levels alone (`run` for the runs). The
last line is `ratio N.NN`: top-1 of the default over that of the better pixels, other side of the hippocampus, mean over
the backbones.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from embedkit.cache import open_cache
from embedkit.indexwriting import write_index
from embedkit.manifest import read_labels
from embedkit.queries import embed_run
from embedkit.runs import Run
from embedkit.training import train
from retrieval_scores import DEFAULT_RERANK, RERANKS, judge, list_firsts, print_line, summarise
from retrieval_truths import (
    TRUTHS,
    Backbone,
    Truth,
    build,
    count_components,
    embed_pixels,
    list_backbones,
    list_levels,
    make_cache,
    parse_options,
    read_tables,
    write_pixels,
)

RUN_HEADS, FOLDS = ("grid", "abmil"), 5


def main() -> None:
    options = parse_options(__doc__, truths=",".join(truth.name for truth in TRUTHS), levels="")
    known = list_backbones(options.weights)
    ratio = float("nan")
    for truth in TRUTHS:
        if truth.name not in options.truths.split(","):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = measure_truth(truth, {name: known[name] for name in options.backbones.split(",")}, options, folder)
        ratio = found if truth.name == "hippocampus" else ratio
    print(f"ratio {ratio:.2f}")


def measure_truth(truth: Truth, backbones: dict[str, Backbone], options: argparse.Namespace, folder: str) -> float:
    """Prints the table of one ground truth; top-1 of the default over that of the better pixels."""
    manifest, labels = read_tables(truth, options.data, options.cache_dir)
    print(f"\n{truth.name}: the same {truth.relevant}, {labels['case_id'].len()} cases\n", flush=True)
    print("| Backbone | Level | Rerank | top-1 | top-5 | MRR |\n|---|---|---|---|---|---|")
    pixels, bare = embed_pixels(manifest, truth.view), []
    for label, whiten in (("as they are", None), ("whitened", count_components(len(labels)))):
        index = write_pixels(pixels, labels, Path(folder) / f"pixels-{label}", whiten)
        scores = judge(index, truth, "none")
        print_line("pixels", label, "none", scores)
        bare.append(scores["top-1"].value)
    defaults = []
    for name, backbone in backbones.items():
        cache = make_cache(truth, manifest, backbone, options.cache_dir / f"{truth.name}-{name}")
        shown = (
            options.levels.split(",") if options.levels else [level.label for level in list_levels(backbone)] + ["run"]
        )
        defaults.append(print_levels(truth, backbone, cache, labels, folder=Path(folder) / name, shown=shown))
        if truth.target is not None and "run" in shown:
            print_runs(truth, backbone, cache, options.data / truth.name / "labels.csv", labels)
    return float(np.mean(defaults)) / max(bare)


def print_levels(
    truth: Truth, backbone: Backbone, cache: Path, labels: pl.DataFrame, *, folder: Path, shown: Sequence[str]
) -> float:
    """A line for every level and rerank, patch by patch only from the default level, as it takes minutes; its top-1."""
    levels, top = list_levels(backbone), float("nan")
    for place, level in enumerate(levels):
        if level.label not in shown:
            continue
        index = build(cache, folder / str(place), backbone, level, labels=labels)
        for rerank in RERANKS:
            scores = judge(index, truth, rerank)
            print_line(backbone.name, level.label, rerank, scores)
            top = scores["top-1"].value if rerank == DEFAULT_RERANK else top  # at last of the default vectors
        if level == levels[-1]:
            print_line(backbone.name, level.label, "patches", judge(index, truth, "free", by_patch=True))
    return top


def print_runs(truth: Truth, backbone: Backbone, cache: Path, targets: Path, labels: pl.DataFrame) -> None:
    """A line for the pooled vectors of each head that is trained for the truth's target, out of fold."""
    known = read_labels(targets).filter(pl.len().over(str(truth.target)) >= FOLDS)  # the others cannot be folded
    with tempfile.TemporaryDirectory() as folder:
        trained = train(
            cache, known, targets=[str(truth.target)], heads=list(RUN_HEADS), folds=FOLDS, out=Path(folder) / "runs"
        )
        for run in (run for run in trained.runs if run.head in RUN_HEADS):
            firsts = [
                list_held_out_firsts(truth, run, cache, labels, fold=fold, out=Path(folder) / f"{run.head}-{fold}")
                for fold in sorted({int(member["fold"]) for member in run.record.members})
            ]
            print_line(backbone.name, f"run: {run.name}, out of fold", "none", summarise(pl.concat(firsts)))


def list_held_out_firsts(
    truth: Truth, run: Run, cache: Path, labels: pl.DataFrame, *, fold: int, out: Path
) -> pl.DataFrame:
    """A row per query that the fold held out, among all cases, by the vectors of the fold's models."""
    members = [
        member for member, made in zip(run.members, run.record.members, strict=True) if int(made["fold"]) == fold
    ]
    opened = open_cache(cache)
    table, vectors = embed_run(replace(run, members=tuple(members)), opened)
    table = table.join(labels.drop("patient_id"), on="case_id", how="left", maintain_order="left")
    index = write_index(
        vectors, table, embedding=run.name, recipe=opened.recipe, out=out, centre=True, details={"run": "x"}
    )
    held_out = run.predictions.filter(pl.col("fold") == fold)["case_id"]
    return list_firsts(index, truth, "none").filter(pl.col("case_id").is_in(held_out.to_list()))


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()

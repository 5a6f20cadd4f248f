"""Similar cases on real scans, all fitted on other patients than the queries: the default, and the best of all.

Usage: python benchmarks/retrieval_heldout.py [--data ../shared/data] [--cache-dir FOLDER] [--weights FILE]
                                              [--truths hippocampus,lgg,sequences,sts]
                                              [--backbones deit_tiny,scattering] [--seeds N]
                                              [--parts default,choice]

The truths are those of retrieval.py. The patients are split in two halves, at random, once per seed. Means and
whitenings, also those of the pixels, are fitted on the first half alone; the other half are the queries among all
cases, and each query's scores are averaged over the seeds that it was judged in. `default`: the vectors of
`embedkit index` where nothing is said, by every rerank, that of `embedkit search` among them. `choice`: level and
rerank are chosen on the first half as well, those that are most often right at place 1, of equals by the mean
reciprocal rank, then by that of the level's vectors alone, which tells how many of the right cases they recall where
there are more cases than are ranked again; not of `sts`, where a half is one patient.

The last column is the difference from the better pixels, paired by query, with its interval over patients (of `sts`
over series). Caches are those of retrieval.py. The last line is `ratio N.NN`: top-1 of the default over that of the
better pixels, other side of the hippocampus, mean over the backbones.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from embedkit.cache import open_cache
from embedkit.indexchanging import add_cases
from embedkit.plots import describe_interval
from retrieval_scores import DEFAULT_RERANK, RERANKS, bound, judge, list_firsts
from retrieval_truths import (
    TRUTHS,
    Backbone,
    FloatArray,
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


def main() -> None:
    truths = ",".join(truth.name for truth in TRUTHS)
    options = parse_options(__doc__, truths=truths, seeds="5", parts="default,choice")
    known = list_backbones(options.weights)
    ratio = float("nan")
    for truth in TRUTHS:
        if truth.name in options.truths.split(","):
            found = measure_truth(truth, {name: known[name] for name in options.backbones.split(",")}, options)
            ratio = found if truth.name == "hippocampus" else ratio
    print(f"ratio {ratio:.2f}")


def measure_truth(truth: Truth, backbones: dict[str, Backbone], options: argparse.Namespace) -> float:
    """Prints the table of one truth; top-1 of the best backbone over that of the better pixels."""
    manifest, labels = read_tables(truth, options.data, options.cache_dir)
    halves = [split_patients(labels, seed) for seed in range(int(options.seeds))]
    print(f"\n| {truth.name}, {len(labels)} cases | top-1 | top-5 | MRR | top-1 less pixels |\n|---|---|---|---|---|")
    pixels = embed_pixels(manifest, truth.view)
    bare = average_firsts(judge_pixels(truth, pixels, labels, half, None) for half in halves)
    whitened = average_firsts(judge_pixels(truth, pixels, labels, half, count_components(len(half))) for half in halves)
    better = max((bare, whitened), key=measure_top)
    print_scores("pixels", bare, better)
    print_scores("pixels, whitened", whitened, better)
    tops: list[float] = []
    for part in options.parts.split(","):
        for name, backbone in backbones.items():
            cache = make_cache(truth, manifest, backbone, options.cache_dir / f"{truth.name}-{name}")
            if part == "default":
                tops.append(print_default(truth, name, backbone, cache, labels, halves=halves, better=better))
            elif truth.name != "sts":
                found = average_firsts(choose(truth, backbone, cache, labels, half) for half in halves)
                print_scores(f"{name}, chosen", found, better)
    return float(np.mean(tops)) / measure_top(better) if tops else float("nan")


def print_default(
    truth: Truth,
    name: str,
    backbone: Backbone,
    cache: Path,
    labels: pl.DataFrame,
    *,
    halves: Sequence[Sequence[str]],
    better: pl.DataFrame,
) -> float:
    """A line for every rerank of the default vectors; top-1 of the default one."""
    found = [judge_default(truth, backbone, cache, labels, half) for half in halves]
    top = float("nan")
    for rerank in RERANKS:
        scores, default = average_firsts(each[rerank] for each in found), rerank == DEFAULT_RERANK
        print_scores(f"{name}, default vectors, {rerank}{' (default)' if default else ''}", scores, better)
        top = measure_top(scores) if default else top
    return top


def split_patients(labels: pl.DataFrame, seed: int) -> list[str]:
    """The cases of a random half of the patients."""
    patients = labels["patient_id"].unique().sort().to_list()
    drawn = np.random.default_rng(seed).permutation(len(patients))[: len(patients) // 2]
    return labels.filter(pl.col("patient_id").is_in([patients[place] for place in drawn]))["case_id"].to_list()


def judge_default(
    truth: Truth, backbone: Backbone, cache: Path, labels: pl.DataFrame, half: Sequence[str]
) -> dict[str, pl.DataFrame]:
    """By rerank what the default vectors, fitted on the half, find on the other."""
    with tempfile.TemporaryDirectory() as folder:
        level = list_levels(backbone)[-1]
        index = build(cache, Path(folder) / "index", backbone, level, labels=labels, cases=list_held(cache, half))
        whole, _ = add_cases(index, labels=labels)
        return {rerank: leave_out(list_firsts(whole, truth, rerank), half) for rerank in RERANKS}


def choose(truth: Truth, backbone: Backbone, cache: Path, labels: pl.DataFrame, half: Sequence[str]) -> pl.DataFrame:
    """The level and rerank that do best on the half, fitted there, and what they find on the other."""
    held = list_held(cache, half)
    with tempfile.TemporaryDirectory() as folder:
        tried = []
        for place, level in enumerate(list_levels(backbone)):
            index = build(cache, Path(folder) / str(place), backbone, level, labels=labels, cases=held)
            found = {rerank: judge(index, truth, rerank) for rerank in RERANKS}
            recall = found["none"]["MRR"].value
            tried += [
                (scores["top-1"].value, scores["MRR"].value, recall, level, rerank, index)
                for rerank, scores in found.items()
            ]
        *_, level, rerank, index = max(tried, key=lambda each: each[:3])
        whole, _ = add_cases(index, labels=labels)
        print(f"  chosen: {level.label} x {rerank}", flush=True)
        return leave_out(list_firsts(whole, truth, rerank), half)


def list_held(cache: Path, half: Sequence[str]) -> list[str]:
    """The cases of a half that the cache holds: a patient may lack the view."""
    held = set(open_cache(cache).stacks["case_id"])
    return [case for case in half if case in held]


def judge_pixels(
    truth: Truth, pixels: dict[str, FloatArray], labels: pl.DataFrame, half: Sequence[str], whiten: int | None
) -> pl.DataFrame:
    with tempfile.TemporaryDirectory() as folder:
        index = write_pixels(pixels, labels, Path(folder) / "index", whiten, fit=half)
        return leave_out(list_firsts(index, truth, "none"), half)


def leave_out(firsts: pl.DataFrame, half: Sequence[str]) -> pl.DataFrame:
    return firsts.filter(~pl.col("case_id").is_in(list(half)))


def average_firsts(parts: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """A row per query: its scores averaged over the seeds in which it was judged."""
    joined = pl.concat(list(parts))
    return (
        joined.group_by("case_id", "group")
        .agg(
            (pl.col("place") <= 1).mean().alias("top-1"),
            (pl.col("place") <= 5).mean().alias("top-5"),
            (1 / pl.col("place")).mean().alias("MRR"),
        )
        .sort("case_id")
    )


def measure_top(found: pl.DataFrame) -> float:
    return float(found["top-1"].mean())  # type: ignore[arg-type]


def print_scores(name: str, found: pl.DataFrame, pixels: pl.DataFrame) -> None:
    shown = [describe_interval(bound(found[column].to_numpy(), found["group"])) for column in ("top-1", "top-5", "MRR")]
    both = found.join(pixels, on="case_id", suffix="-pixels")
    difference = (both["top-1"] - both["top-1-pixels"]).to_numpy()
    print(f"| {name} | {' | '.join(shown)} | {describe_interval(bound(difference, both['group']))} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()

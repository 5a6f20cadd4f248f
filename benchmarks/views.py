"""One view, views joined early or late, and what is left when a view is missing: out-of-fold AUROC on real scans.

Usage: python benchmarks/views.py SLABS --weights FILE [--work FOLDER] [--target tumour] [--seeds 3]
                                  [--head grid|conv|fusion|abmil|query] [--tokens patch@4:8] [--view-dropout 0.3]

SLABS holds manifest.csv and labels.csv of small cases in several views, with a column of patient-grouped folds
(``fold``) and a binary target. Each single view is trained alone; then all of them in every way the head knows, without
and with views dropped at random in training; and the mean logit of two or more of the single runs, which share nothing.
Scores are of the mean over seeds, intervals are by patient, differences
paired, to the single view that scores best on these very cases (which makes it look better than it is). Columns
``without`` take a view away at test time from the cases that have another, with no training anew. Caches and runs stay
in --work, so that a second call resumes. The last line is the best fused score over that of the best single view.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from embedkit.bags import load_bags
from embedkit.bootstrap import bootstrap_values
from embedkit.cache import Cache, open_cache
from embedkit.extraction import extract
from embedkit.metrics import Interval, compute_metrics, form_interval, metric_statistics
from embedkit.plots import describe_interval
from embedkit.runs import Run
from embedkit.training import train

RESAMPLES = 2000
PLACED, POOLED = ("joint", "late", "early"), ("late", "early")
WAYS = {"grid": PLACED, "conv": PLACED, "fusion": PLACED, "abmil": POOLED, "query": POOLED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slabs", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--work", type=Path, default=Path("views"))
    parser.add_argument("--target", default="tumour")
    parser.add_argument("--head", choices=tuple(WAYS), default="grid")
    parser.add_argument("--tokens", help="default: patch@4:8, of abmil and query cls:12")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--view-dropout", type=float, default=0.3)
    options = parser.parse_args()
    options.tokens = options.tokens or ("patch@4:8" if WAYS[options.head] is PLACED else "cls:12")
    cache = make_cache(options)
    views = cache.stacks["view"].unique().sort().to_list()
    single = {view: fit(options, cache, view, views=[view]) for view in views}
    fused = {}
    for way in WAYS[options.head]:
        for rate in dict.fromkeys((0.0, options.view_dropout)):
            name = f"{way}, dropout {rate:g}" if rate else way
            fused[name] = fit(options, cache, name, head_options={options.head: {"views": way}}, rate=rate)
    best = max(single.values(), key=lambda run: run.metrics["auroc"].value)
    print("| views | AUROC | difference to the best view | " + " | ".join(f"without {view}" for view in views) + " |")
    print("|---" * (3 + len(views)) + "|")
    for name, run in (single | fused).items():
        difference = "" if run is best else describe_difference(run, run.predictions, best)
        missing = [describe_interval(score_without(run, cache, view)) if name in fused else "" for view in views]
        print(f"| {name} | {describe_interval(run.metrics['auroc'])} | {difference} | {' | '.join(missing)} |")
    for several in (each for count in range(2, len(views) + 1) for each in itertools.combinations(single, count)):
        table = average([single[name] for name in several])
        auroc = compute_metrics("binary", encode(best, table), table["score"].to_numpy(), table["patient_id"].to_list())
        difference = describe_difference(best, table, best)
        print(f"| mean of {' and '.join(several)} | {describe_interval(auroc['auroc'])} | {difference} |")
    top = max(run.metrics["auroc"].value for run in fused.values())
    print(f"ratio {top / best.metrics['auroc'].value:.2f}")


def make_cache(options: argparse.Namespace) -> Cache:
    """Every view a stack of its own; cases of which a view cannot be read are left out and told."""
    found = extract(
        options.slabs / "manifest.csv",
        options.work / "cache",
        backbone="deit_tiny_patch16_224",
        weights=options.weights,
        image_size=128,
        tokens=["cls:12", "patch@4:4", "patch@4:8", "patch@4:12"],
        preview=0,
    )
    print(f"{found.cases_done} cases extracted, {found.cases_before} there before", flush=True)
    return open_cache(options.work / "cache")


def fit(options: argparse.Namespace, cache: Cache, name: str, *, rate: float = 0.0, **how: Any) -> Run:
    """The head on some views; a run that is there already is taken."""
    out = options.work / "runs" / f"{options.head}-{options.tokens}-{name}".replace(", ", "-").replace(" ", "")
    trained = train(
        cache,
        options.slabs / "labels.csv",
        targets=[options.target],
        heads=[options.head],
        token_sets={options.head: [options.tokens]},
        split="fold",
        seeds=options.seeds,
        fit_options={"view_dropout": rate},
        out=out,
        resume=True,
        **how,
    )
    return next(run for run in trained.runs if run.head == options.head)


def average(runs: Sequence[Run]) -> pl.DataFrame:
    """Of each case the mean logit, as a probability, of those runs that tested it, which is where it has the view."""
    every = pl.concat([run.predictions for run in runs])
    inside = every.with_columns(pl.col("score").clip(1e-6, 1 - 1e-6))
    logits = inside.with_columns(score=(pl.col("score") / (1 - pl.col("score"))).log())
    means = logits.group_by("case_id", "patient_id", "target").agg(pl.col("score").mean()).sort("case_id")
    return means.with_columns(score=1 / (1 + (-pl.col("score")).exp()))


def describe_difference(run: Run, table: pl.DataFrame, best: Run) -> str:
    """AUROC less that of the best single view, by the paired bootstrap over patients, on the cases that both tested."""
    both = table.join(best.predictions.select("case_id", best="score"), on="case_id")
    groups, truth = both["patient_id"].to_list(), encode(run, both)
    own, other = (metric_statistics("binary", truth, both[name], groups)["auroc"] for name in ("score", "best"))
    whole = np.ones((1, len(both)))
    found = bootstrap_values({"own": own, "best": other}, groups, resamples=RESAMPLES, seed=0)
    difference = float(own(whole)[0] - other(whole)[0])
    return describe_interval(form_interval(difference, found["own"] - found["best"], groups))


def score_without(run: Run, cache: Cache, view: str) -> Interval:
    """Out-of-fold AUROC with a view taken away at test time, of the cases that have another."""
    rest = cache.only_views([each for each in cache.stacks["view"].unique().to_list() if each != view])
    table = run.predictions.filter(pl.col("case_id").is_in(rest.stacks["case_id"].unique().to_list()))
    scores = np.zeros(len(table))
    for fold in table["fold"].unique():
        tested = np.flatnonzero(table["fold"].to_numpy() == fold)
        scores[tested] = predict_fold(run, rest, table["case_id"].gather(tested).to_list(), fold)
    return compute_metrics("binary", encode(run, table), scores, table["patient_id"].to_list())["auroc"]


def encode(run: Run, table: pl.DataFrame) -> NDArray[np.int64]:
    """1 for each case of the second class, else 0."""
    return (table["target"].cast(pl.String) == run.record.classes[1]).cast(pl.Int64).to_numpy()


def predict_fold(run: Run, cache: Cache, case_ids: Sequence[str], fold: int) -> NDArray[np.float32]:
    """Mean score of the fold's members, which saw none of these cases."""
    bag = load_bags(cache, case_ids, run.record.token_sets, views=run.record.views).batch(range(len(case_ids)))
    members = [member for member, each in zip(run.members, run.record.members, strict=True) if each["fold"] == fold]
    with torch.no_grad():
        return torch.stack([member.scores(member(bag).logits) for member in members]).mean(0).numpy()


if __name__ == "__main__":
    main()

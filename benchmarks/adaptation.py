"""Adaptation from the cache against LoRA in every block from pixels: out-of-fold AUROC, paired differences, seconds.

Usage: python benchmarks/adaptation.py SLABS --weights FILE [--work FOLDER] [--seeds 3] [--epochs 12]
           [--targets tumour,side] [--methods grid,tail4,...] [--no-reference]

SLABS holds manifest.csv and labels.csv of small cases with a column of patient-grouped folds (``fold``) and binary
targets. Every row is at one resolution (128 px, ``deit_tiny_patch16_224``, three views as channels). Intervals are over
patients; with several seeds a score is the mean over them. The row ``chosen inside`` takes in each fold the cached
method that does best on the inner split of its training cases: nothing is chosen on a test fold. Everything done stays
in --work: a second call goes on. With the references it takes an hour or two; they are trained by this script.

The first line of the report says which goals hold: on ``tumour`` a cached method at least .04 above frozen query
pooling and not below the reference (lower bound of the paired difference above -.02); on ``side`` a cached method at
.90 or better while class-token pooling stays under .70, and not below the stronger reference; an epoch of the grid
head takes at most a twentieth, of the tail a third, of an epoch of the reference. The last line is the seconds per
epoch of the tail over those of the reference.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from anymc3d_reference import PixelSource, train_reference
from embedkit.backbones import load_backbone
from embedkit.bootstrap import bootstrap_values
from embedkit.extraction import extract
from embedkit.metrics import Interval, compute_metrics, form_interval, metric_statistics
from embedkit.plots import describe_interval
from embedkit.runs import open_run
from embedkit.training import train

BACKBONE, SIZE, CHANNELS, CUT = "deit_tiny_patch16_224", 128, ("pre", "flair", "post"), 4
RESAMPLES = 2000


@dataclass(frozen=True)
class Method:
    """A row of the table: a head on cached tokens, or, where ``grid`` is given, the reference with that read-out."""

    name: str
    title: str
    head: str = "tail"
    tokens: str = "cut:8"
    options: dict[str, Any] = field(default_factory=dict)
    grid: int | None = None


METHODS = (
    Method("logistic", "class token mean, logistic regression", "logistic", "cls:12"),
    Method("query", "query pooling of frozen class tokens", "query", "cls:12"),
    Method("abmil", "gated ABMIL on class tokens", "abmil", "cls:12"),
    Method("grid", "grid head on block 8", "grid", "patch:8"),
    *(
        Method(f"tail{blocks}cls", f"LoRA in the last {blocks}, class token", options={"grid": 0, "blocks": blocks})
        for blocks in (1, 2, 4)
    ),
    Method("tail4", "LoRA in the last 4, class token and places"),
    Method("reference", "LoRA in all blocks from pixels, class token", grid=0),
    Method("reference4", "LoRA in all blocks from pixels, class token and places", grid=4),
)


@dataclass(frozen=True)
class Scores:
    """Out-of-fold scores of one method and seed, with those of the inner splits (fold, case_id, target, score)."""

    cases: pl.DataFrame
    inner: pl.DataFrame | None
    seconds: float
    per_epoch: float


class Bench:
    """What all rows share: data, caches, what was done before."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.labels = pl.read_csv(options.slabs / "labels.csv", schema_overrides={"side": pl.String})
        self.cache = options.work / "cache"
        extract(
            options.slabs / "manifest.csv",
            self.cache,
            backbone=BACKBONE,
            weights=options.weights,
            image_size=SIZE,
            tokens=["cls:12", "patch:8"],
            cut=CUT,
            channels=CHANNELS,
            fill="flair",
        )
        self._pixels: PixelSource | None = None

    def pixels(self) -> PixelSource:
        if self._pixels is None:
            backbone = load_backbone(BACKBONE, weights=self.options.weights, image_size=SIZE)
            self._pixels = PixelSource(self.options.slabs / "manifest.csv", backbone, channels=CHANNELS)
        return self._pixels

    def run(self, method: Method, target: str, seed: int) -> Scores:
        """Trains a method unless that was done before."""
        folder = self.options.work / target / f"{method.name}-{seed}"
        return self._cached(method, target, seed, folder) if method.grid is None else self._reference(
            method, target, seed, folder
        )  # fmt: skip

    def _cached(self, method: Method, target: str, seed: int, folder: Path) -> Scores:
        path = folder / f"{target}.{method.head}"
        if not (path / "run.json").is_file():
            epochs = {} if method.head == "logistic" else {"epochs": self.options.epochs}
            train(
                self.cache,
                self.labels,
                targets=[target],
                heads=[method.head],
                token_sets={method.head: [method.tokens]},
                head_options={method.head: method.options} if method.options else None,
                fit_options=epochs,
                split="fold",
                seed=seed,
                out=folder,
                overwrite=True,
                resamples=0,
            )
        run = open_run(path)
        fitted = sum(self.options.epochs + int(member.get("epochs", 0)) for member in run.record.members)
        cases = run.predictions.select("case_id", "patient_id", "fold", "target", "score")
        return Scores(cases, run.inner, run.record.seconds, run.record.seconds / max(1, fitted))

    def _reference(self, method: Method, target: str, seed: int, folder: Path) -> Scores:
        record = folder / "seconds.json"
        if not record.is_file():
            found = train_reference(
                self.pixels(),
                self.labels,
                target,
                split="fold",
                grid=method.grid or 0,
                epochs=self.options.epochs,
                seed=seed,
            )
            folder.mkdir(parents=True, exist_ok=True)
            pl.DataFrame(
                {
                    "case_id": found.case_ids,
                    "patient_id": found.patients,
                    "target": found.targets,
                    "score": found.scores,
                }
            ).write_parquet(folder / "scores.parquet")
            record.write_text(json.dumps([found.seconds, found.seconds_per_epoch]))
        seconds, per_epoch = json.loads(record.read_text())
        return Scores(pl.read_parquet(folder / "scores.parquet"), None, seconds, per_epoch)


def choose_inside(found: dict[str, Scores]) -> pl.DataFrame:
    """In each fold the scores of the cached method with the lowest log loss on the inner split."""
    losses: dict[int, dict[str, float]] = {}
    for name, scores in found.items():
        if scores.inner is None:
            continue
        truth = (pl.col("target") == scores.cases["target"].max()).cast(pl.Float64)
        likely = pl.col("score").clip(1e-6, 1 - 1e-6)
        loss = -(truth * likely.log() + (1 - truth) * (1 - likely).log())
        for fold, value in scores.inner.group_by("fold").agg(loss.mean().alias("loss")).iter_rows():
            losses.setdefault(fold, {})[name] = value
    best = {fold: min(each, key=each.__getitem__) for fold, each in losses.items()}
    return pl.concat([found[name].cases.filter(pl.col("fold") == fold) for fold, name in best.items()])


def align(frames: Sequence[pl.DataFrame]) -> tuple[NDArray[np.int64], NDArray[np.float64], list[str]]:
    """Targets [cases], scores [seeds cases] and patients of the same cases in one order."""
    ordered = [frame.sort("case_id") for frame in frames]
    targets = ordered[0]["target"].cast(pl.String).to_numpy()
    positive = sorted(set(targets))[-1]
    scores = np.stack([frame["score"].to_numpy() for frame in ordered])
    return (targets == positive).astype(np.int64), scores, ordered[0]["patient_id"].to_list()


def score(frames: Sequence[pl.DataFrame]) -> Interval:
    """AUROC, its mean over seeds, with the interval over patients."""
    targets, scores, patients = align(frames)
    return compute_metrics("binary", targets, scores, patients, repeated=True, resamples=RESAMPLES)["auroc"]


def differ(frames: Sequence[pl.DataFrame], others: Sequence[pl.DataFrame]) -> Interval:
    """AUROC less that of another method on the same resamples of patients."""
    (targets, first, patients), (_, second, _) = align(frames), align(others)
    both = {
        name: metric_statistics("binary", targets, scores, patients, repeated=True, resamples=RESAMPLES)["auroc"]
        for name, scores in (("a", first), ("b", second))
    }
    resampled = bootstrap_values(both, patients, resamples=RESAMPLES, seed=0)
    plain = np.ones((1, len(patients)))
    value = float(both["a"](plain)[0] - both["b"](plain)[0])
    return form_interval(value, resampled["a"] - resampled["b"], patients)


def report(target: str, found: dict[str, list[Scores]], methods: Sequence[Method]) -> tuple[list[str], dict[str, Any]]:
    """The lines of a target's table, and the figures that goals are about."""
    frames = {name: [each.cases for each in seeds] for name, seeds in found.items()}
    seeds = range(len(next(iter(found.values()))))
    frames["chosen"] = [choose_inside({name: each[seed] for name, each in found.items()}) for seed in seeds]
    rows = [(method.name, method.title) for method in methods] + [("chosen", "chosen inside (nested)")]
    lines = [
        f"\n{target}: {len(frames['chosen'][0])} cases",
        "| method | AUROC | less reference | less reference4 | s per epoch of a fold |",
    ]
    figures: dict[str, Any] = {}
    for name, title in rows:
        against = [differ(frames[name], frames[other]) if other in frames else None for other in REFERENCES]
        figures[name] = {"auroc": score(frames[name]), **dict(zip(REFERENCES, against, strict=True))}
        if "query" in frames:
            figures[name]["query"] = differ(frames[name], frames["query"])
        pace = np.mean([each.per_epoch for each in found[name]]) if name in found else None
        figures[name]["pace"] = pace
        cells = [describe_interval(figures[name]["auroc"])]
        cells += ["" if each is None else describe_interval(each) for each in against]
        lines.append(f"| {title} | {' | '.join(cells)} | {'' if pace is None else f'{pace:.2f}'} |")
    return lines, figures


REFERENCES = ("reference", "reference4")


def judge(figures: dict[str, dict[str, Any]]) -> list[str]:
    """Which goals hold, in words."""
    said = []

    def tell(name: str, holds: bool) -> None:
        said.append(f"{name}: {'holds' if holds else 'does not hold'}")

    if tumour := figures.get("tumour"):
        headline = tumour["chosen"]
        if "query" in headline:
            tell("tumour .04 above frozen query pooling", headline["query"].value >= 0.04)
        if headline["reference"] is not None:
            tell("tumour not below the reference", headline["reference"].low > -0.02)
    if side := figures.get("side"):
        tell("side .90 or better", side["chosen"]["auroc"].value >= 0.90)
        if "logistic" in side:
            tell("class tokens under .70 on side", side["logistic"]["auroc"].value < 0.70)
        if side["chosen"]["reference4"] is not None:
            tell("side not below the stronger reference", side["chosen"]["reference4"].low > -0.02)
    first = next(iter(figures.values()))
    if "reference" in first:
        for name, share in (("grid", 20), ("tail4", 3)):
            if name in first:
                tell(f"{name} in 1/{share} of the time", first[name]["pace"] * share <= first["reference"]["pace"])
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slabs", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("adaptation"))
    parser.add_argument("--targets", default="tumour,side")
    parser.add_argument("--methods", default=",".join(method.name for method in METHODS))
    parser.add_argument("--no-reference", action="store_true", help="leave out what is trained from pixels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    asked = options.methods.split(",")
    methods = [each for each in METHODS if each.name in asked and not (options.no_reference and each.grid is not None)]
    bench, figures, lines = Bench(options), {}, []
    for target in options.targets.split(","):
        found: dict[str, list[Scores]] = {}
        for method in methods:
            for seed in range(options.seeds):
                found.setdefault(method.name, []).append(bench.run(method, target, seed))
                print(f"{target} {method.name} seed {seed}: {found[method.name][-1].seconds:.0f} s", flush=True)
        more, figures[target] = report(target, found, methods)
        lines += more
    print("; ".join(judge(figures)))
    print("\n".join(lines))
    first = next(iter(figures.values()))
    if "reference" in first and "tail4" in first:
        print(f"ratio {first['tail4']['pace'] / first['reference']['pace']:.2f}")


if __name__ == "__main__":
    main()

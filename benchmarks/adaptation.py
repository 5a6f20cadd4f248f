"""Adaptation from the cache against LoRA in every block from pixels: out-of-fold AUROC, differences, time.

Usage: python benchmarks/adaptation.py SLABS --weights FILE [--data ../shared/data] [--work FOLDER] [--seeds 3]
           [--epochs 12] [--batch-size 4] [--tasks tumour,side,...] [--methods grid,tail4,...] [--no-reference]
           [--rounds 3]

SLABS holds manifest.csv (with masks) and labels.csv of small cases with a column of patient-grouped folds (``fold``)
and the binary targets ``tumour`` and ``side``. --data holds `hippocampus/` and `lgg/`, whose tasks are run on five
patient-grouped folds without the references (``side`` of the hippocampus is told by pixels alone, and the LGG tasks
lie near chance with this backbone, so no goal rests on them). Every row of a table is at one resolution, 128 px,
through ``deit_tiny_patch16_224``; LGG has three views as channels. Intervals are over patients; with several seeds a
score is the mean over them. The rows ``chosen inside`` and ``mean of three`` take in each fold the cached method, or
the mean of the three, that did best on the inner split of its training cases: nothing is chosen on a test fold. Heads
with masks learn those of the training cases beside the label, and see none at prediction; as the references have
none, they are chosen from in a row of their own, which no goal is about. Heads that adapt
blocks, cached or from pixels, run --epochs in batches of --batch-size: as many steps as so few cases allow; the others
have the library's defaults; with altered copies (`extract --augment 4`) epochs are fewer by as much as there is more
to see. Everything done stays in --work: a second call goes on. With the references it takes some
hours; they are trained by this script.

Last, an epoch of a fold is timed in turns, --rounds times each, for the reference and the heads that goals are about,
and multiplied by the epochs that a fold has at most: on the cache twice the schedule, once for the inner split.

The first line of the report says which goals hold: on ``tumour`` a cached method at least .04 above frozen query
pooling and not below the reference (lower bound of the paired difference above -.02); on ``side`` a cached method at
.90 or better while class-token pooling stays under .70, and not below the stronger reference; an epoch of the grid
head takes at most a twentieth, of the tail a third, of an epoch of the reference. The last line is the seconds per
epoch of the tail over those of the reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from anymc3d_reference import PixelSource, train_reference
from embedkit.backbones import load_backbone
from embedkit.bootstrap import bootstrap_values
from embedkit.extraction import extract
from embedkit.fitting import FitOptions
from embedkit.manifest import read_manifest
from embedkit.metrics import Interval, compute_metrics, form_interval, metric_statistics
from embedkit.plots import describe_interval
from embedkit.runs import Run, open_run
from embedkit.training import train

BACKBONE, SIZE, CUT = "deit_tiny_patch16_224", 128, 4
LAYERS = ("patch:4", "patch:8", "patch:12")
RESAMPLES = 2000
PROJECT = Path(__file__).resolve().parents[1]
REFERENCES = ("reference", "reference4")


@dataclass(frozen=True)
class Task:
    """A target of a data set, and of its values those that are told apart (all where None)."""

    name: str
    data: str
    target: str
    classes: tuple[str, ...] | None = None


TASKS = (
    Task("tumour", "slabs", "tumour"),
    Task("side", "slabs", "side"),
    Task("hippocampus", "hippocampus", "side"),
    Task("laterality", "lgg", "laterality", ("1", "3")),
    Task("gender", "lgg", "gender"),
    Task("death", "lgg", "death01"),
)


@dataclass(frozen=True)
class Method:
    """A row of the table: a head on cached tokens, or, where ``grid`` is given, the reference with that read-out.

    With ``copies``, so many altered ones of each case are trained on beside it.
    """

    name: str
    title: str
    head: str = "tail"
    tokens: tuple[str, ...] = ("cut:8",)
    options: dict[str, Any] = field(default_factory=dict)
    masks: bool = False
    grid: int | None = None
    copies: int = 0


METHODS = (
    Method("logistic", "class token mean, logistic regression", "logistic", ("cls:12",)),
    Method("query", "query pooling of frozen class tokens", "query", ("cls:12",)),
    Method("abmil", "gated ABMIL on class tokens", "abmil", ("cls:12",)),
    Method("grid", "grid head on block 8", "grid", ("patch:8",)),
    Method("layers", "grid head on blocks 4, 8 and 12, weights learned", "grid", LAYERS),
    Method("segment", "head segment on block 8", "segment", ("patch:8",)),
    *(
        Method(f"tail{blocks}cls", f"LoRA in the last {blocks}, class token", options={"grid": 0, "blocks": blocks})
        for blocks in (1, 2, 4)
    ),
    Method("tail4", "LoRA in the last 4, class token and places"),
    Method("layersmasks", "grid head on blocks 4, 8 and 12, masks beside the label", "grid", LAYERS, masks=True),
    Method("segmentmasks", "head segment on block 8, masks beside the label", "segment", ("patch:8",), masks=True),
    Method("tail4masks", "LoRA in the last 4, class token and places, masks beside the label", masks=True),
    Method("querycopies", "query pooling, 4 altered copies of each case", "query", ("cls:12",), copies=4),
    Method("gridcopies", "grid head on block 8, 4 copies", "grid", ("patch:8",), copies=4),
    Method("segmentcopies", "head segment on block 8, 4 copies", "segment", ("patch:8",), copies=4),
    Method("tail4copies", "LoRA in the last 4, class token, 4 copies", options={"grid": 0}, copies=4),
    Method("tail4placescopies", "LoRA in the last 4, class token and places, 4 copies", copies=4),
    Method("segmentmaskscopies", "segment on block 8, masks, 4 copies", "segment", ("patch:8",), masks=True, copies=4),
    Method("tail4maskscopies", "LoRA in the last 4, class token and places, masks, 4 copies", masks=True, copies=4),
    Method("reference", "LoRA in all blocks from pixels, class token", grid=0),
    Method("reference4", "LoRA in all blocks from pixels, class token and places", grid=4),
)
PACED = ("grid", "layers", "tail4cls", "tail4", "reference", "reference4")


@dataclass(frozen=True)
class Scores:
    """Out-of-fold scores of one method and seed, with those of the inner splits (fold, case_id, target, score)."""

    cases: pl.DataFrame
    inner: pl.DataFrame | None


@dataclass(frozen=True)
class Pace:
    """Seconds that an epoch of a fold takes, and how many epochs a fold has at most."""

    seconds: float
    epochs: int


class Bench:
    """What all rows of a data set share: data, cache, what was done before."""

    def __init__(self, data: str, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = options.slabs if data == "slabs" else options.data / data
        self.manifest = self.folder / "manifest.csv"
        self.labels = pl.read_csv(self.folder / "labels.csv", schema_overrides={"side": pl.String})
        self.channels = () if data == "hippocampus" else ("pre", "flair", "post")
        self.split = "fold" if data == "slabs" else None
        self.work = options.work / data
        self.crop = "foreground" if data == "lgg" else "none"
        self.cache = self.extract(self.manifest, "cache", ["cls:12", *LAYERS])
        self._pixels: PixelSource | None = None

    def extract(self, manifest: Path | pl.DataFrame, name: str, tokens: list[str], **how: Any) -> Path:
        """A cache in the work folder."""
        cache = self.work / name
        extract(
            manifest,
            cache,
            backbone=BACKBONE,
            weights=self.options.weights,
            image_size=SIZE,
            tokens=tokens,
            cut=CUT,
            channels=self.channels,
            fill="flair" if self.channels else "",
            crop=self.crop,
            **how,
        )
        return cache

    def copy(self, task: Task, copies: int) -> Path:
        """A cache of altered copies of a task's cases; what asks for a side is not flipped."""
        labels = self.labels.drop_nulls(task.target)
        manifest = read_manifest(self.manifest).filter(pl.col("case_id").is_in(labels["case_id"].implode()))
        how = {"augment": copies, "augment_flip": task.target != "side", "preview": 0}
        return self.extract(manifest, f"copies-{task.name}-{copies}", ["cls:12", "patch:8"], **how)

    def has_masks(self) -> bool:
        return "mask" in read_manifest(self.manifest).columns

    def pixels(self) -> PixelSource:
        if self._pixels is None:
            backbone = load_backbone(BACKBONE, weights=self.options.weights, image_size=SIZE)
            self._pixels = PixelSource(self.manifest, backbone, channels=self.channels)
        return self._pixels

    def run(self, method: Method, task: Task, seed: int) -> Scores:
        """Trains a method unless that was done before."""
        folder = self.work / task.name / f"{method.name}-{seed}"
        if method.grid is not None:
            path = folder / "scores.parquet"
            if not path.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                self.fit_reference(method, task, seed, self.options.epochs)[0].write_parquet(path)
            return Scores(pl.read_parquet(path), None)
        path = folder / f"{task.target}.{method.head}"
        run = open_run(path) if (path / "run.json").is_file() else self.fit_cached(method, task, seed, folder)
        return Scores(run.predictions.select("case_id", "patient_id", "fold", "target", "score"), run.inner)

    def fit_cached(self, method: Method, task: Task, seed: int, folder: Path, **changed: Any) -> Run:
        steps = {"epochs": self.options.epochs, "batch_size": self.options.batch_size}
        train(
            self.cache,
            self.labels,
            targets=[task.target],
            classes=task.classes,
            masks=self.manifest if method.masks else None,
            copies=self.copy(task, method.copies) if method.copies else None,
            heads=[method.head],
            token_sets={method.head: list(method.tokens)},
            head_options={method.head: method.options} if method.options else None,
            fit_options=(steps if method.head == "tail" else {}) | changed,
            split=self.split,
            seed=seed,
            out=folder,
            overwrite=True,
            resamples=0,
        )
        return open_run(folder / f"{task.target}.{method.head}")

    def fit_reference(self, method: Method, task: Task, seed: int, epochs: int) -> tuple[pl.DataFrame, float]:
        """Out-of-fold scores, and seconds per epoch of a fold."""
        found = train_reference(
            self.pixels(),
            self.labels,
            task.target,
            split=self.split,
            grid=method.grid or 0,
            epochs=epochs,
            seed=seed,
            batch_size=self.options.batch_size,
        )
        columns = {"case_id": found.case_ids, "patient_id": found.patients, "target": found.targets}
        return pl.DataFrame({**columns, "score": found.scores}), found.seconds_per_epoch

    def time_epoch(self, method: Method, task: Task) -> Pace:
        """One epoch of one fold, from a short training of all folds."""
        epochs = 2
        if method.grid is not None:
            return Pace(self.fit_reference(method, task, 0, epochs)[1], self.options.epochs)
        record = self.fit_cached(method, task, 0, self.work / task.name / "pace", epochs=epochs).record
        seconds = record.seconds / sum(epochs + int(member["epochs"]) for member in record.members)
        return Pace(seconds, 2 * (self.options.epochs if method.head == "tail" else FitOptions().epochs))


def choose_inside(found: Mapping[str, Scores], count: int) -> pl.DataFrame:
    """In each fold the mean score of those cached methods whose AUROC on the inner splits that all have is highest."""
    inner = {name: scores.inner for name, scores in found.items() if scores.inner is not None}
    common = set.intersection(*(set(frame["split"]) for frame in inner.values()))
    parts = []
    for fold in sorted(set(next(iter(inner.values()))["fold"])):
        reached = {}
        for name, frame in inner.items():
            each = [frame.filter(fold=fold, split=split) for split in sorted(common)]
            reached[name] = float(np.mean([_auroc(part) for part in each]))
        best = sorted(reached, key=lambda name: -reached[name])[:count]
        together = pl.concat([found[name].cases.filter(pl.col("fold") == fold) for name in best])
        parts.append(together.group_by("case_id", "patient_id", "target").agg(pl.col("score").mean()))
    return pl.concat(parts)


def _auroc(cases: pl.DataFrame) -> float:
    return float(roc_auc_score((cases["target"] == cases["target"].max()).to_numpy(), cases["score"].to_numpy()))


def groups_to_choose_from(
    found: Mapping[str, Sequence[Scores]], methods: Iterable[Method]
) -> list[tuple[str, str, list[str], int]]:
    """Name, title, methods and count of each row that is chosen inside: without masks, and with them where they are."""
    cached = [each for each in methods if each.name in found and found[each.name][0].inner is not None]
    plain = [method.name for method in cached if not method.masks]
    groups = [("chosen", "", plain, 1), ("three", "mean of three ", plain, 3)]
    if len(plain) < len(cached):
        every = [method.name for method in cached]
        groups += [("any", "", every, 1), ("anythree", "mean of three ", every, 3)]
    return [
        (name, f"{title}chosen inside{', masks or not' if among != plain else ''}", among, count)
        for name, title, among, count in groups
        if among
    ]


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


def report(task: Task, found: dict[str, list[Scores]], methods: Iterable[Method]) -> tuple[list[str], dict[str, Any]]:
    """The lines of a task's table, and the figures that goals are about."""
    frames = {name: [each.cases for each in seeds] for name, seeds in found.items()}
    seeds = range(len(next(iter(found.values()))))
    rows = [(method.name, method.title) for method in methods if method.name in found]
    for name, title, among, count in groups_to_choose_from(found, methods):
        frames[name] = [choose_inside({key: found[key][seed] for key in among}, count) for seed in seeds]
        rows.append((name, title))
    others = ("query", *REFERENCES)
    cases = next(iter(frames.values()))[0]
    lines = [
        f"\n{task.name}: {len(cases)} cases of {cases['patient_id'].n_unique()} patients, {len(seeds)} seeds",
        f"| method | AUROC | {' | '.join(f'less {other}' for other in others)} |",
        "|---" * (2 + len(others)) + "|",
    ]
    figures: dict[str, Any] = {}
    for name, title in rows:
        figures[name] = {"auroc": score(frames[name])}
        figures[name] |= {
            other: differ(frames[name], frames[other]) for other in others if other in frames and name != other
        }
        cells = [describe_interval(figures[name][key]) if key in figures[name] else "" for key in ("auroc", *others)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines, figures


def judge(figures: Mapping[str, Mapping[str, Any]], paces: Mapping[str, Pace]) -> list[str]:
    """Which goals hold, in words; a cached method is the one chosen inside."""
    said = []

    def tell(name: str, holds: bool) -> None:
        said.append(f"{name}: {'holds' if holds else 'does not hold'}")

    if headline := figures.get("tumour", {}).get("chosen"):
        if "query" in headline:
            tell("tumour .04 above frozen query pooling", headline["query"].value >= 0.04)
        if "reference" in headline:
            tell("tumour not below the reference", headline["reference"].low > -0.02)
    if headline := figures.get("side", {}).get("chosen"):
        tell("side .90 or better", headline["auroc"].value >= 0.90)
        if "logistic" in figures["side"]:
            tell("class tokens under .70 on side", figures["side"]["logistic"]["auroc"].value < 0.70)
        if "reference4" in headline:
            tell("side not below the stronger reference", headline["reference4"].low > -0.02)
    for name, share in (("grid", 20), ("tail4cls", 3), ("tail4", 3)):
        if name in paces and "reference" in paces:
            tell(f"{name} in 1/{share} of the time", paces[name].seconds * share <= paces["reference"].seconds)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slabs", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path("adaptation"))
    parser.add_argument("--tasks", default=",".join(task.name for task in TASKS))
    parser.add_argument("--methods", default=",".join(method.name for method in METHODS))
    parser.add_argument("--no-reference", action="store_true", help="leave out what is trained from pixels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="times that an epoch is timed; 0 leaves it out")
    options = parser.parse_args()
    asked = options.methods.split(",")
    methods = [each for each in METHODS if each.name in asked and not (options.no_reference and each.grid is not None)]
    figures, lines = {}, []
    benches: dict[str, Bench] = {}
    for task in (each for each in TASKS if each.name in options.tasks.split(",")):
        bench = benches.setdefault(task.data, benches.get(task.data) or Bench(task.data, options))
        found: dict[str, list[Scores]] = {}
        for seed in range(options.seeds):
            for method in methods:
                of_slabs = method.grid is not None or method.copies
                if (of_slabs and task.data != "slabs") or (method.masks and not bench.has_masks()):
                    continue
                found.setdefault(method.name, []).append(bench.run(method, task, seed))
                print(f"{task.name}: {method.name} of seed {seed} is there", flush=True)
        more, figures[task.name] = report(task, found, methods)
        lines += more
    paces = time_epochs(benches["slabs"], methods, options.rounds) if "slabs" in benches and options.rounds else {}
    print("; ".join(judge(figures, paces)))
    print("\n".join(lines))
    if paces:
        print("\n".join(describe_paces(paces)))
    if {"reference", "tail4"} <= set(paces):
        print(f"ratio {paces['tail4'].seconds / paces['reference'].seconds:.2f}")


def time_epochs(bench: Bench, methods: Sequence[Method], rounds: int) -> dict[str, Pace]:
    """The median pace of each method, taken in turns."""
    paced = [method for method in methods if method.name in PACED]
    taken = [[bench.time_epoch(method, TASKS[0]) for method in paced] for _ in range(rounds)]
    medians = [sorted(each, key=lambda pace: pace.seconds)[rounds // 2] for each in zip(*taken, strict=True)]
    return {method.name: pace for method, pace in zip(paced, medians, strict=True)}


def describe_paces(paces: Mapping[str, Pace]) -> list[str]:
    """A table of paces, with their shares of the reference's."""
    lines = [
        "\n| tumour | s per epoch of a fold | of the reference | s per fold at most | of the reference |",
        "|---" * 5 + "|",
    ]
    whole = {name: pace.seconds * pace.epochs for name, pace in paces.items()}
    for name, pace in paces.items():
        shares = [
            f"{found / beside:.3f}" if beside else ""
            for found, beside in (
                (pace.seconds, paces["reference"].seconds if "reference" in paces else 0.0),
                (whole[name], whole.get("reference", 0.0)),
            )
        ]
        lines.append(f"| {name} | {pace.seconds:.2f} | {shares[0]} | {whole[name]:.0f} | {shares[1]} |")
    return lines


if __name__ == "__main__":
    main()

"""Similar cases on real scans: levels of vectors x reranking x backbone, beside the bare pixels, and an honest choice.

Usage: python benchmarks/retrieval.py [--data ../shared/data] [--cache-dir FOLDER] [--weights FILE] [--seeds N]
                                      [--truths hippocampus,lgg,sequences,sts] [--backbones deit_tiny,scattering]
                                      [--levels "slices,run"]

Ground truths: the other hippocampus of the same patient (`hippocampus`); another patient with the tumour on the same
side (`lgg`); an image of the same sequence of another patient (`sequences`: each of a brain tumour patient's sequences
is a case, by 12 of its slices); a piece of the same modality of the other patient (`sts`: CT, PET and T1 MR of two
sarcoma patients, each series cut along the stack into eight cases). Each case is a query once. 95% intervals are over
patients, of `sts` over the six series: they hold for other pieces of these, and say nothing of a third patient.

`pixels` crops or pads each volume around its centre to the median shape, takes the mean of blocks down to 48 voxels or
fewer per axis, and compares by cosine after centring; `whitened` as embedkit whitens its own vectors. Whitening is
fitted on all cases without labels, in all lines of the tables. `slices` is an index of slices: a case is as similar as
the best that the query's slices find in it. `run` lines are pooled vectors of heads trained here for the target of the
truth (the side of the hippocampus, of the tumour), five patient-grouped folds: a query is searched for with the vectors
of the fold's model that never saw its patient, which saw most of the others.

The honest choice splits the patients in two halves, at random, once per seed. Level and rerank are chosen on the first
half alone: most often right at place 1, of equals by the mean reciprocal rank, then by that of the level's vectors
alone, which tells how many of the right cases they recall where there are more cases than are ranked again. All that is
fitted is fitted there; the other half are the queries among all cases. Pixels go through the same. Each query's scores
are averaged over the seeds that it was judged in.

Caches stay in --cache-dir, so that a second call resumes. --levels prints these levels alone (`run` for the runs), and
the choice is still among all. The last line is `ratio N.NN`: top-1 of the honest choice
over that of the better pixels, other side of the hippocampus.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import SimpleITK as sitk
from numpy.typing import NDArray

from embedkit.bootstrap import Interval, bootstrap_values, form_interval
from embedkit.cache import open_cache
from embedkit.extraction import extract
from embedkit.formulas import weigh_mean
from embedkit.index import Index
from embedkit.indexbuilding import build_index
from embedkit.indexchanging import add_cases
from embedkit.indexwriting import rewrite_index, write_index
from embedkit.manifest import read_labels
from embedkit.plots import describe_interval
from embedkit.queries import embed_run
from embedkit.recipe import Recipe
from embedkit.runs import Run
from embedkit.searchevaluation import evaluate_search
from embedkit.training import train
from embedkit.volumes import read_volume

SHARED = Path(__file__).resolve().parents[2] / "shared"
RERANKS = ("none", "free", "ordered", "both")
MOST_PIXELS = 48
COMPONENTS = 64
MODALITIES = {"CT": "CT", "PET": "PET", "MR_T1": "MR"}
PIECES = 8

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Truth:
    """What counts as similar.

    Attributes:
        name: Of the data set.
        relevant: The column that similar cases share.
        exclude_same: The column that they must not share.
        view: Whose pixels are compared.
        crop: Of the extraction.
        slices: Of the extraction.
        target: What runs are trained for; None trains none.
        group: The column of the labels that is resampled.
    """

    name: str
    relevant: str
    exclude_same: str | None
    view: str
    crop: str
    slices: str = "all"
    target: str | None = None
    group: str = "patient_id"


TRUTHS = (
    Truth("hippocampus", "patient_id", None, "t1", "none", target="side"),
    Truth("lgg", "laterality", "patient_id", "flair", "foreground", target="laterality"),
    Truth("sequences", "sequence", "patient_id", "image", "foreground", slices="count:12"),
    Truth("sts", "modality", "patient_id", "image", "foreground", group="series"),
)
RUN_HEADS, FOLDS = ("grid", "abmil"), 5


@dataclass(frozen=True)
class Backbone:
    """A backbone with the layers that are compared, in the words of its token sets."""

    name: str
    cls: str
    patch: str
    weights: Path | None = None


@dataclass(frozen=True)
class Level:
    """What a vector is: an embedding of a case or slice, and so many whitened components, 0 for none."""

    label: str
    embedding: str
    whiten: int | None
    unit: str = "case"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    parser.add_argument("--cache-dir", type=Path, default=Path("retrieval-caches"))
    parser.add_argument("--weights", type=Path, default=SHARED / "weights" / "deit_tiny_patch16_224.safetensors")
    parser.add_argument("--truths", default=",".join(truth.name for truth in TRUTHS))
    parser.add_argument("--backbones", default="deit_tiny,scattering")
    parser.add_argument("--levels", default="")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    known = list_backbones(options.weights)
    ratio = float("nan")
    for truth in TRUTHS:
        if truth.name not in options.truths.split(","):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = measure_truth(truth, {name: known[name] for name in options.backbones.split(",")}, options, folder)
        ratio = found if truth.name == "hippocampus" else ratio
    print(f"ratio {ratio:.2f}")


def list_backbones(weights: Path) -> dict[str, Backbone]:
    """The backbones compared, by the names that --backbones takes."""
    return {
        "deit_tiny": Backbone("deit_tiny_patch16_224", "cls:12", "patch@4:12", weights),
        "scattering": Backbone("embedkit/scattering", "cls:2", "patch@4:2"),
    }


def measure_truth(truth: Truth, backbones: dict[str, Backbone], options: argparse.Namespace, folder: str) -> float:
    """Prints the tables of one ground truth; the ratio of the honest choice to the better pixels."""
    manifest, labels = read_tables(truth, options.data, options.cache_dir)
    print(f"\n{truth.name}: the same {truth.relevant}, {labels['case_id'].len()} cases\n", flush=True)
    print("| Backbone | Level | Rerank | top-1 | top-5 | MRR |\n|---|---|---|---|---|---|")
    pixels = embed_pixels(manifest, truth.view)
    for label, whiten in (("as they are", None), ("whitened", count_components(len(labels)))):
        index = write_pixels(pixels, labels, Path(folder) / f"pixels-{label}", whiten)
        print_line("pixels", label, "none", judge(index, truth, "none"))
    caches = {}
    for name, backbone in backbones.items():
        caches[name] = make_cache(truth, manifest, backbone, options.cache_dir / f"{truth.name}-{name}")
        shown = (
            options.levels.split(",") if options.levels else [level.label for level in list_levels(backbone)] + ["run"]
        )
        print_levels(truth, backbone, caches[name], labels, folder=Path(folder) / name, shown=shown)
        if truth.target is not None and "run" in shown:
            print_runs(truth, backbone, caches[name], options.data / truth.name / "labels.csv", labels)
    if truth.name == "sts" or not options.seeds:
        return float("nan")
    return print_choice(truth, backbones, caches, labels=labels, pixels=pixels, seeds=options.seeds)


def read_tables(truth: Truth, data: Path, pieces: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The manifest with paths in full, and a label per case; sequences are a case each, as are ``pieces`` of series."""
    if truth.name == "sts":
        return cut_series(data / "sts" / "nifti", pieces / "sts-pieces")
    folder = data / ("lgg" if truth.name == "sequences" else truth.name)
    manifest = pl.read_csv(folder / "manifest.csv").with_columns(path=str(folder) + "/" + pl.col("path")).drop("mask")
    if truth.name == "sequences":
        apart = manifest.with_columns(
            case_id=pl.col("case_id") + "-" + pl.col("view"), view=pl.lit(truth.view), sequence="view"
        )
        return apart.drop("sequence"), apart.select("case_id", "patient_id", "sequence")
    columns = ["case_id", "patient_id", *({truth.relevant} - {"patient_id"})]
    return manifest, pl.read_csv(folder / "labels.csv").select(columns)


def cut_series(data: Path, out: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Manifest and labels of the sarcoma series, each cut along the stack into files of about as many slices."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for folder in sorted(data.iterdir()):
        for name, modality in MODALITIES.items():
            image = sitk.ReadImage(str(folder / f"{name}_image.nii.gz"))
            ends = np.linspace(0, image.GetDepth(), PIECES + 1).astype(int).tolist()
            for start, end in pairwise(ends):
                case = f"{folder.name}-{modality}-{start:03d}"
                sitk.WriteImage(image[:, :, start:end], str(out / f"{case}.nii.gz"))
                rows.append((case, folder.name, "image", str(out / f"{case}.nii.gz"), modality, case[:-4]))
    names = ["case_id", "patient_id", "view", "path", "modality", "series"]
    table = pl.DataFrame(rows, schema=names, orient="row")
    return table.drop("modality", "series"), table.drop("view", "path")


def make_cache(truth: Truth, manifest: pl.DataFrame, backbone: Backbone, path: Path) -> Path:
    """The cache of a data set and backbone, extracted unless it is there; one of more token sets will do."""
    tokens = [backbone.cls, backbone.patch]
    if path.exists():
        held = open_cache(path).recipe.token_sets
        tokens = list(held) if set(tokens) <= set(held) else tokens
    summary = extract(
        manifest,
        path,
        backbone=backbone.name,
        weights=backbone.weights,
        tokens=tokens,
        slices=truth.slices,
        crop=truth.crop,
        device="cpu",
    )
    if summary.failures:
        raise SystemExit(f"{len(summary.failures)} cases could not be extracted: {summary.failures[0].reason}")
    return path


def list_levels(backbone: Backbone) -> list[Level]:
    """The levels compared; None leaves the number of components to `build_index`."""
    cls, patch = f"mean:{backbone.cls}", f"mean:{backbone.patch}"
    return [
        Level("mean class token", cls, 0),
        Level("mean patch", patch, 0),
        Level("both side by side", f"{cls}+{patch}", 0),
        Level("both side by side, whitened", f"{cls}+{patch}", None),
        Level("slices", f"grid:{backbone.patch}", 0, "slice"),
        Level("aligned grid", f"aligned:{backbone.patch}", 0),
        Level("aligned grid, whitened (default)", f"aligned:{backbone.patch}", None),
    ]


def print_levels(
    truth: Truth, backbone: Backbone, cache: Path, labels: pl.DataFrame, *, folder: Path, shown: Sequence[str]
) -> None:
    """A line for every level and rerank; patch by patch only from the default level, since it takes minutes."""
    levels = list_levels(backbone)
    for place, level in enumerate(levels):
        if level.label not in shown:
            continue
        index = build(cache, folder / str(place), backbone, level, labels=labels)
        for rerank in RERANKS:
            print_line(backbone.name, level.label, rerank, judge(index, truth, rerank))
        if level == levels[-1]:
            print_line(backbone.name, level.label, "patches", judge(index, truth, "free", by_patch=True))


def build(
    cache: Path,
    out: Path,
    backbone: Backbone,
    level: Level,
    *,
    labels: pl.DataFrame,
    cases: Sequence[str] | None = None,
) -> Index:
    return build_index(
        cache,
        out,
        embedding=level.embedding,
        level=level.unit,
        slices=None if level.unit == "slice" else f"grid:{backbone.patch}",
        whiten=level.whiten,
        labels=labels,
        cases=cases,
    )


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


def judge(index: Index, truth: Truth, rerank: str, *, by_patch: bool = False) -> dict[str, Interval]:
    """How often a case that is relevant comes first and among the first five, and the mean reciprocal rank."""
    return summarise(list_firsts(index, truth, rerank, by_patch=by_patch))


def list_firsts(index: Index, truth: Truth, rerank: str, *, by_patch: bool = False) -> pl.DataFrame:
    """A row per query with the place of the first relevant case."""
    found = evaluate_search(
        index,
        relevant=truth.relevant,
        k=(1, 5),
        exclude_same=truth.exclude_same,
        rerank=rerank,
        by_patch=by_patch,
        resamples=0,
    )
    groups = index.cases.select("case_id", group=truth.group)
    return found.queries.select("case_id", place=pl.col("first").fill_null(10**9)).join(
        groups, on="case_id", maintain_order="left"
    )


def summarise(firsts: pl.DataFrame) -> dict[str, Interval]:
    places = firsts["place"]
    values = {"top-1": places <= 1, "top-5": places <= 5, "MRR": 1 / places}
    return {name: bound(value.cast(pl.Float64).to_numpy(), firsts["group"]) for name, value in values.items()}


def bound(values: NDArray[np.float64], groups: pl.Series) -> Interval:
    """The mean of a value per query with its interval over the groups, patients as a rule."""
    named = groups.to_list()
    resampled = bootstrap_values({"mean": weigh_mean(values)}, named, resamples=2000, seed=0)
    return form_interval(float(values.mean()), resampled["mean"], named)


def print_line(backbone: str, level: str, rerank: str, scores: dict[str, Interval]) -> None:
    shown = " | ".join(describe_interval(scores[name]) for name in ("top-1", "top-5", "MRR"))
    print(f"| {backbone} | {level} | {rerank} | {shown} |", flush=True)


def embed_pixels(manifest: pl.DataFrame, view: str) -> dict[str, FloatArray]:
    """By case the pixels around the centre of one view, standardised, [slices height width] alike for all, as a row."""
    paths = dict(manifest.filter(pl.col("view") == view).select("case_id", "path").iter_rows())
    volumes = {case: read_volume(path).array for case, path in paths.items()}
    shape = np.median([volume.shape for volume in volumes.values()], axis=0).astype(int).tolist()
    return {case: take_centre(volume, shape).reshape(-1) for case, volume in volumes.items()}


def take_centre(volume: NDArray[np.generic], shape: Sequence[int]) -> FloatArray:
    """The middle of a volume, cropped or padded with its least value to a shape, in blocks of few enough voxels."""
    values = np.asarray(volume, np.float32)
    values = (values - values.mean()) / max(float(values.std()), 1e-6)
    for axis, size in enumerate(shape):
        have = values.shape[axis]
        if have < size:
            before = (size - have) // 2
            widths = [(before, size - have - before) if each == axis else (0, 0) for each in range(3)]
            values = np.pad(values, widths, constant_values=float(values.min()))
        else:
            values = np.take(values, np.arange(size) + (have - size) // 2, axis)
        block = -(-size // MOST_PIXELS)
        kept = size // block * block
        parts = [np.take(values, np.arange(start, kept, block), axis) for start in range(block)]
        values = np.mean(parts, axis=0, dtype=np.float32)
    return values


def count_components(cases: int) -> int | None:
    """As `build_index` counts them."""
    components = min(COMPONENTS, cases // 3)
    return components if components >= 8 else None


def write_pixels(
    pixels: dict[str, FloatArray], labels: pl.DataFrame, out: Path, whiten: int | None, fit: Sequence[str] | None = None
) -> Index:
    """An index of pixels; with ``fit`` mean and whitening are those of these cases."""
    table = labels.filter(pl.col("case_id").is_in(list(pixels))).cast({"patient_id": pl.String})
    recipe = Recipe("pixels", "builtin:0", ("cls:1",), 32, (0.0,), (1.0,), preview=0)
    first = table if fit is None else table.filter(pl.col("case_id").is_in(list(fit)))
    vectors = [np.stack([pixels[case] for case in part["case_id"]]) for part in (first, table)]
    index = write_index(
        vectors[0], first, embedding="pixels", recipe=recipe, out=out, centre=True, whiten=whiten, details={"run": "x"}
    )
    return index if fit is None else rewrite_index(index, vectors[1], table)


def print_choice(
    truth: Truth,
    backbones: dict[str, Backbone],
    caches: dict[str, Path],
    *,
    labels: pl.DataFrame,
    pixels: dict[str, FloatArray],
    seeds: int,
) -> float:
    """The honest choice of every backbone beside pixels, over the seeds; the ratio of top-1 of the best to pixels."""
    print("\n| Chosen on one half of the patients, scored on the other | top-1 | top-5 | MRR | top-1 less pixels |")
    print("|---|---|---|---|---|")
    halves = [split_patients(labels, seed) for seed in range(seeds)]
    bare = average_firsts(judge_pixels(truth, pixels, labels, half, None) for half in halves)
    whitened = average_firsts(judge_pixels(truth, pixels, labels, half, count_components(len(half))) for half in halves)
    better = max((bare, whitened), key=lambda each: float(each["top-1"].mean()))  # type: ignore[arg-type]
    print_scores("pixels", bare, better)
    print_scores("pixels, whitened", whitened, better)
    best = 0.0
    for name, backbone in backbones.items():
        parts, chosen = [], []
        for half in halves:
            level, rerank, firsts = choose(truth, backbone, caches[name], labels, half)
            chosen.append(f"{level.label} x {rerank}")
            parts.append(firsts)
        found = average_firsts(parts)
        print_scores(name, found, better)
        print(f"  chosen: {'; '.join(chosen)}", flush=True)
        best = max(best, float(found["top-1"].mean()))  # type: ignore[arg-type]
    return best / float(better["top-1"].mean())  # type: ignore[arg-type]


def split_patients(labels: pl.DataFrame, seed: int) -> list[str]:
    """The cases of a random half of the patients."""
    patients = labels["patient_id"].unique().sort().to_list()
    drawn = np.random.default_rng(seed).permutation(len(patients))[: len(patients) // 2]
    return labels.filter(pl.col("patient_id").is_in([patients[place] for place in drawn]))["case_id"].to_list()


def choose(
    truth: Truth, backbone: Backbone, cache: Path, labels: pl.DataFrame, half: Sequence[str]
) -> tuple[Level, str, pl.DataFrame]:
    """The level and rerank that do best on the half, and the places of the first relevant case on the other."""
    held = set(open_cache(cache).stacks["case_id"])
    half = [case for case in half if case in held]
    with tempfile.TemporaryDirectory() as folder:
        tried = []
        for place, level in enumerate(list_levels(backbone)):
            index = build(cache, Path(folder) / str(place), backbone, level, labels=labels, cases=half)
            found = {rerank: judge(index, truth, rerank) for rerank in RERANKS}
            recall = found["none"]["MRR"].value
            tried += [
                (scores["top-1"].value, scores["MRR"].value, recall, level, rerank, index)
                for rerank, scores in found.items()
            ]
        *_, level, rerank, index = max(tried, key=lambda each: each[:3])
        whole, _ = add_cases(index, labels=labels)
        return level, rerank, leave_out(list_firsts(whole, truth, rerank), half)


def judge_pixels(
    truth: Truth, pixels: dict[str, FloatArray], labels: pl.DataFrame, half: Sequence[str], whiten: int | None
) -> pl.DataFrame:
    with tempfile.TemporaryDirectory() as folder:
        index = write_pixels(pixels, labels, Path(folder) / "index", whiten, fit=half)
        return leave_out(list_firsts(index, truth, "none"), half)


def leave_out(firsts: pl.DataFrame, half: Sequence[str]) -> pl.DataFrame:
    return firsts.filter(~pl.col("case_id").is_in(list(half)))


def average_firsts(parts: Iterator[pl.DataFrame] | Sequence[pl.DataFrame]) -> pl.DataFrame:
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


def print_scores(name: str, found: pl.DataFrame, pixels: pl.DataFrame) -> None:
    shown = [describe_interval(bound(found[column].to_numpy(), found["group"])) for column in ("top-1", "top-5", "MRR")]
    both = found.join(pixels, on="case_id", suffix="-pixels")
    difference = (both["top-1"] - both["top-1-pixels"]).to_numpy()
    print(f"| {name} | {' | '.join(shown)} | {describe_interval(bound(difference, both['group']))} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()

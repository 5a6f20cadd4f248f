"""Owns the demo: the whole pipeline on generated phantoms, offline, ending in one HTML report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from embedkit.cache import Cache, open_cache
from embedkit.errors import OptionError
from embedkit.explanation import explain
from embedkit.extraction import extract
from embedkit.indexbuilding import build_index
from embedkit.manifest import read_labels, read_manifest
from embedkit.patches import measure_patch_cover
from embedkit.phantoms import make_phantoms
from embedkit.pictures import draw_similar_cases, picture_case
from embedkit.plots import RocLine, Score, describe_interval, plot_montage, plot_roc, plot_scores
from embedkit.report import Figure, Report, Section, score_table, write_report
from embedkit.retrieval import search
from embedkit.roc import compute_roc
from embedkit.runs import Run, open_run
from embedkit.training import BASELINES, train
from embedkit.volumes import read_volume

__all__ = ["DemoResult", "run_demo"]

_BACKBONE = "embedkit/scattering"
_IMAGE_SIZE = 64
"""Phantoms are 96 pixels wide and their lesions large: this shows them all, at a fifth of the backbone's own 128."""
_TARGETS = ("lesion", "side")
_MARKER = "embedkit-demo.txt"
_FEWEST = 40


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's parts are.

    Attributes:
        report: The HTML file.
        pointing: Share of lesion cases whose heatmap has its maximum on the lesion.
        seconds: Wall time.
    """

    report: Path
    pointing: float
    seconds: float


def run_demo(
    out: Path,
    *,
    cases: int = 64,
    seed: int = 0,
    overwrite: bool = False,
    on_step: Callable[[str], None] = print,
) -> DemoResult:
    """Makes phantoms, extracts them, trains heads on two tasks, explains a case, searches, and writes a report.

    Args:
        out: Folder for everything; must not exist unless ``overwrite`` and made by an earlier demo.
        cases: How many phantoms.
        seed: Of phantoms and heads.
        overwrite: Replace what an earlier demo left in ``out``.
        on_step: Told what comes next, in a line.

    Raises:
        OptionError: ``out`` exists and may not be replaced, or too few cases.
    """
    if cases < _FEWEST:
        raise OptionError(f"{cases} phantoms asked for, expected {_FEWEST} or more: five folds need some of each side")
    started = time.perf_counter()
    _clear(out, overwrite=overwrite)
    on_step(f"1/6 phantoms: {cases} CT-like volumes with and without a lung lesion")
    made = make_phantoms(out / "phantoms", cases=cases, seed=seed)
    on_step(f"2/6 extract: every slice once through {_BACKBONE}")
    summary = extract(made.manifest, out / "cache", backbone=_BACKBONE, window="lung", image_size=_IMAGE_SIZE)
    on_step(f"    {summary.slices} slices in {summary.seconds:.0f} s")
    on_step(f"3/6 train: heads and baselines on {' and '.join(_TARGETS)}, five patient-grouped folds")
    train(out / "cache", made.labels, targets=list(_TARGETS), out=out / "runs", seed=seed)
    cache, labels = open_cache(out / "cache"), read_labels(made.labels)
    runs = {target: _open_runs(out / "runs", target) for target in _TARGETS}
    placed = open_run(out / "runs" / "lesion.grid")
    on_step(f"4/6 explain: heatmaps of {placed.name}")
    pointing, hits = _point(placed, cache, made.manifest, labels, out / "heatmaps")
    on_step(f"    the maximum falls on the lesion in {hits}")
    on_step("5/6 search: an index over the cases, and the neighbours of one")
    query = labels.filter(pl.col("side") == "left")["case_id"][0]
    similar = _search(out, made.labels, query)
    on_step("6/6 report")
    sections = (
        _phantom_section(cache, labels),
        *(_score_section(target, runs[target]) for target in _TARGETS),
        _heatmap_section(out / "heatmaps", placed, hits),
        similar,
    )
    seconds = time.perf_counter() - started
    report = Report(
        title="embedkit demo",
        lead=f"{cases} phantoms went through a frozen backbone once; everything below was then made from the cache.",
        sections=sections,
        facts=(
            ("backbone", _BACKBONE),
            ("recipe", summary.fingerprint),
            ("slices", f"{summary.slices:,}"),
            ("seed", str(seed)),
            ("whole demo", f"{seconds:.0f} s"),
        ),
    )
    return DemoResult(write_report(out / "report.html", report), pointing, seconds)


def _clear(out: Path, *, overwrite: bool) -> None:
    """Makes ``out`` empty; only a folder that an earlier demo made is ever removed."""
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        if not (overwrite and (out / _MARKER).is_file()):
            raise OptionError(f"{out} exists; choose another --out, or --overwrite what an earlier demo left there")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).write_text("Made by embedkit demo; --overwrite may remove this folder.\n")


def _open_runs(folder: Path, target: str) -> list[Run]:
    return [open_run(path) for path in sorted(folder.glob(f"{target}.*")) if path.is_dir()]


def _point(run: Run, cache: Cache, manifest: Path, labels: pl.DataFrame, out: Path) -> tuple[float, str]:
    """How often the heatmap is highest on the lesion, each made by the member that never saw the case."""
    masks = dict(read_manifest(manifest).select("case_id", "mask").iter_rows())
    with_lesion = labels.filter(pl.col("lesion") == 1)["case_id"].to_list()
    hits = sum(_peak_is_on_lesion(run, cache, case_id, Path(masks[case_id])) for case_id in with_lesion)
    likeliest = run.predictions.filter(pl.col("case_id").is_in(with_lesion)).sort("score", descending=True)
    explain(run, cache, likeliest["case_id"][0], out, manifest=manifest, held_out=True)
    return hits / len(with_lesion), f"{hits} of {len(with_lesion)} lesion cases"


def _peak_is_on_lesion(run: Run, cache: Cache, case_id: str, mask: Path) -> bool:
    """Whether the patch of most evidence covers some of the lesion."""
    (scores,) = run.find_evidence(cache, case_id, held_out=True).scores.values()
    stack = int(cache.stacks.filter(pl.col("case_id") == case_id)["stack"][0])
    record = cache.record(stack)
    lesion = read_volume(mask).array > 0
    cover = measure_patch_cover(
        lesion, indices=cache.slices(stack).indices, box=record.box, plane=record.plane, grid=scores.shape[1:]
    )
    return bool(cover.reshape(-1)[scores.argmax()] > 0)


def _search(out: Path, labels: Path, query: str) -> Section:
    index = build_index(out / "cache", out / "index", labels=labels)
    found = search(index, case_id=query, k=6, exclude_same="patient_id")
    draw_similar_cases(index, found, out / "similar.png", query=query)
    sides = ", ".join(f"{side or 'no lesion'}" for side in found["side"])
    return Section(
        title="Similar cases",
        text=f"The six cases of other patients most like {query} (lesion on the left), by {index.embedding}: {sides}.",
        figures=(
            Figure(
                (out / "similar.png").read_bytes(),
                "A row for each case: framed slices of the query, each beside the slice that matches it,"
                " and where their patches match.",
                f"Slices of {query} beside those of its six nearest neighbours",
            ),
        ),
    )


def _phantom_section(cache: Cache, labels: pl.DataFrame) -> Section:
    shown = labels.head(6)
    pictures = [picture_case(cache, case_id, places=(0.5,))[0] for case_id in shown["case_id"]]
    titles = [f"{case}\nlesion: {side or 'none'}" for case, side in shown.select("case_id", "side").iter_rows()]
    lesions = int(labels["lesion"].sum())
    return Section(
        title="Phantoms",
        text=f"{len(labels)} CT-like volumes of {labels['patient_id'].n_unique()} patients, {lesions} with a lung"
        " lesion of varying site, size and density among vessels of the same density.",
        figures=(Figure(plot_montage(pictures, titles), "Middle slices in the lung window.", "Six phantom slices"),),
    )


def _score_section(target: str, runs: Sequence[Run]) -> Section:
    """Scores of every head on one target, and the ROC of the best one beside the baselines."""
    order = sorted(runs, key=lambda run: -run.record.metrics["auroc"].value)
    baselines = {run.record.head for run in runs if run.record.head in BASELINES}
    best = next(run for run in order if run.record.head not in BASELINES)
    lines = [_roc_line(run) for run in (best, *(run for run in order if run.record.head in BASELINES))]
    panel = [Score(run.record.head, run.record.metrics["auroc"], run.record.head in BASELINES) for run in order]
    best_score = describe_interval(best.record.metrics["auroc"])
    return Section(
        title=f"Task: {target}",
        text=f"Out-of-fold scores with 95% intervals by patient. Best head: {best.record.head}, AUROC {best_score}.",
        figures=(
            Figure(plot_scores({target: panel}, metric="AUROC", chance=0.5), "Hollow: baselines.", f"AUROC, {target}"),
            Figure(plot_roc(lines, title=target), "Band: 95%, by patient.", f"ROC curves, {target}"),
        ),
        table=score_table({run.record.head: run.record.metrics for run in order}, baselines=baselines),
    )


def _roc_line(run: Run) -> RocLine:
    frame, record = run.predictions, run.record
    positive = (frame["target"].cast(pl.String) == record.classes[-1]).to_numpy()
    curve = compute_roc(positive.astype(np.int64), frame["score"].to_numpy(), frame["patient_id"].to_list())
    return RocLine(record.head, curve, record.metrics["auroc"], baseline=record.head in BASELINES)


def _heatmap_section(folder: Path, run: Run, hits: str) -> Section:
    (picture,) = folder.glob("*.png")
    return Section(
        title="Where the head looked",
        text=f"What each patch adds to the logit of a lesion, by {run.name}, from the member that never saw the case."
        f" The patch of most evidence touches the lesion in {hits}. The same heatmap lies beside this report as NIfTI"
        " in the geometry of the scan.",
        figures=(Figure(picture.read_bytes(), f"{picture.stem}: the slices of most weight.", "Slices with heatmap"),),
    )

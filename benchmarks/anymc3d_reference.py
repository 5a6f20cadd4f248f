"""LoRA in every block, trained from pixels (AnyMC3D, arXiv 2512.12887): what adaptation from a cache is held against.

Usage: python benchmarks/anymc3d_reference.py MANIFEST LABELS --target NAME --weights FILE
           [--backbone NAME] [--channels pre,flair,post] [--size 128] [--split fold] [--grid 0] [--epochs 20] [--seed 0]

Slices lie in memory as bytes, but every step runs the whole backbone: patch embedding, all blocks with LoRA on q, k, v
and proj (r 8, alpha 16), the final norm, and back. ``--grid 0`` reads class tokens by query pooling per view, the
paper's equation 5; ``--grid 4`` adds a read-out that keeps the places of a 4 x 4 patch grid, the stronger reference.
Folds, batches, rate schedule and metrics are those of `embedkit train`; but tokens are not cached, and the schedule is
run to its end, where heads on a cache stop when inner splits say so.
Prints the out-of-fold AUROC with its 95% interval by patient, and the seconds per epoch.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedkit.backbones import load_backbone
from embedkit.bags import Bag, BagShape
from embedkit.batching import Deck
from embedkit.fitting import FitOptions
from embedkit.foldjobs import FoldedTask, FoldJob, make_job
from embedkit.headplans import HeadPlan
from embedkit.images import normalize_images
from embedkit.manifest import read_manifest
from embedkit.members import complete_options
from embedkit.metrics import compute_metrics
from embedkit.passes import run_passes
from embedkit.planning import make_recipe
from embedkit.plots import describe_interval
from embedkit.slices import plan_stacks, render_slices
from embedkit.sources import group_cases, read_case
from embedkit.stacks import Fit
from embedkit.standardisation import Standardiser
from embedkit.sweeps import Candidate
from embedkit.tails import Tail, TailShape
from embedkit.tasks import make_folds, make_task

TOKENS = "cut:0"  # the tokens that enter the first block
PLANE = "axial"


@dataclass(frozen=True)
class Reference:
    """What came of a reference: out-of-fold scores [cases], and the seconds of all fits and of one epoch of a fold."""

    case_ids: tuple[str, ...]
    patients: tuple[str, ...]
    targets: NDArray[Any]
    scores: NDArray[np.float64]
    seconds: float
    seconds_per_epoch: float


class PixelSource:
    """Slices of all cases in memory, which become tokens batch by batch; stands where training expects a cache.

    It is token source and store in one, with what `embedkit.preparation` makes of these.
    """

    def __init__(self, manifest: Path, backbone: Any, *, channels: Sequence[str]) -> None:
        self.device = torch.device("cpu")
        self.backbone = backbone
        self.images: dict[str, dict[str, Tensor]] = {}
        rows = []
        fill = next((view for view in channels if view == "flair"), "")
        recipe = make_recipe(backbone.info, tokens=["cls"], channels=channels, fill=fill, planes=(PLANE,))
        for case in group_cases(read_manifest(manifest)):
            volumes = read_case(case).volumes
            for stack in plan_stacks(volumes, recipe):
                images, blank = render_slices(stack, volumes, recipe, 0, len(stack.indices))
                self.images.setdefault(case.case_id, {})[stack.view] = (images[~blank] * 255).round().to(torch.uint8)
                rows.append((case.case_id, case.patient_id, stack.view, PLANE, int((~blank).sum())))
        self.stacks = pl.DataFrame(rows, schema=["case_id", "patient_id", "view", "plane", "count"], orient="row")
        self.views = tuple(sorted({f"{view}/{PLANE}" for view in self.stacks["view"]}))
        self.case_ids = sorted(self.images)
        info, block = backbone.info, backbone.model.blocks[0]
        tokens = info.class_tokens + info.register_tokens + info.grids[-1][0] * info.grids[-1][1]
        self.token_sets = {TOKENS: _Size((tokens, info.dims[-1]))}
        self._tail = Tail(
            TailShape(
                layer=0,
                depth=info.depth,
                dim=info.dims[-1],
                class_tokens=info.class_tokens,
                prefix=info.class_tokens + info.register_tokens,
                grid=info.grids[-1],
                linears=tuple((name, *value.shape) for name, value in block.named_parameters() if value.ndim == 2),
            ),
            backbone,
        )
        self.shape = BagShape({TOKENS: (tokens, info.dims[-1])}, {}, self.views, self._tail.shape)

    # As a token source, see `embedkit.bags.TokenSource`.

    def tail_shape(self) -> TailShape:
        return self._tail.shape

    # As a store, see `embedkit.storage.TokenStore`.

    def batch(self, places: NDArray[np.int64], _token_sets: Sequence[str], *, slices: int | None = None) -> Bag:
        """Embeds the pixels of some cases: what enters the first block."""
        ids = [self.case_ids[place] for place in places]
        counts = [[len(self.images[case].get(view.partition("/")[0], ())) for view in self.views] for case in ids]
        longest = slices or max(map(max, counts))
        mask = torch.arange(longest) < torch.tensor(counts)[..., None]
        wanted = [self.images[case].get(view.partition("/")[0]) for case in ids for view in self.views]
        pixels = torch.cat([images for images in wanted if images is not None])
        model = self.backbone.model
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            embedded = model.patch_embed(normalize_images(pixels.float() / 255, self.backbone.info))
            entering = model.norm_pre(model._pos_embed(embedded)).float()
        tokens = torch.zeros(*mask.shape, *entering.shape[1:])
        tokens[mask] = entering
        return Bag({TOKENS: tokens}, mask, torch.full(mask.shape, 0.5), tuple(ids), tail=self._tail)

    def visit(self, parts: Sequence[NDArray[np.int64]], _token_sets: Sequence[str], /) -> Iterator[None]:
        for _ in parts:
            yield

    # As a preparation, see `embedkit.preparation.Preparation`.

    def deck(self, _plan: HeadPlan, _candidate: Candidate, task: Any, *, seed: int) -> Deck:
        places = np.searchsorted(self.case_ids, task.case_ids)
        counts = dict(self.stacks.group_by("case_id").agg(pl.col("count").max()).iter_rows())
        lengths = np.array([counts[case] for case in task.case_ids])
        return Deck(places, lengths, longest=max(counts.values()), blocks=1, seed=seed)

    def standardiser(self, candidate: Candidate, _places: NDArray[np.int64]) -> Standardiser:
        return Standardiser(self.shape, candidate.token_sets)


@dataclass(frozen=True)
class _Size:
    shape: tuple[int, ...]


def train_reference(
    source: PixelSource,
    labels: pl.DataFrame,
    target: str,
    *,
    split: str | None,
    grid: int,
    epochs: int,
    seed: int,
    batch_size: int = 16,
) -> Reference:
    """Trains the reference on every fold of a binary task, the whole of its schedule on all training cases."""
    task, _ = make_task(labels, target, source.stacks.select("case_id", "patient_id").unique())
    if split is None:
        folds = make_folds(task, 5, seed=seed)
    else:
        given = dict(labels.select("case_id", split).iter_rows())
        folds = np.array([given[case] for case in task.case_ids], np.int64)
    target, nobody = FoldedTask(task, folds[None]), np.zeros(len(folds), dtype=bool)
    how = FitOptions(learning_rate=2e-3, epochs=epochs, batch_size=batch_size, precision="bf16")
    candidate = Candidate((TOKENS,), complete_options("tail", {"grid": grid}), how)
    plan = HeadPlan("tail", (candidate,))
    jobs = [make_job(plan, target, fold, seed=seed, device=source.device) for fold in target.tested]
    deck, standardiser = source.deck(plan, candidate, task, seed=seed), source.standardiser(candidate, folds)
    fits: dict[Fit, FoldJob] = {}
    for job in jobs:
        torch.manual_seed(job.seed)
        head = job.build_member(source.shape, candidate).head
        key = f"fold {job.fold}"
        fit = Fit("tail", head, how, source, standardiser, job.loss, deck, key, job.training, nobody, seed, epochs)
        fits[fit] = job
    started = time.perf_counter()
    outcomes = run_passes(list(fits), {"tail": "its blocks keep the machine busy by themselves"})
    seconds = time.perf_counter() - started
    scores = np.full(len(folds), np.nan)
    for fit, job in fits.items():
        fit.head.load_state_dict(outcomes[fit].state)
        fit.head.eval()
        for tested in np.array_split(job.tested, math.ceil(len(job.tested) / batch_size)):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                scores[tested] = fit.head(source.batch(deck.places[tested], (TOKENS,))).logits[:, 0].sigmoid().float()
    ran = len(jobs) * epochs
    return Reference(tuple(task.case_ids), tuple(task.patient_ids), task.targets, scores, seconds, seconds / ran)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--backbone", default="deit_tiny_patch16_224")
    parser.add_argument("--channels", default="pre,flair,post")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--split", help="column of folds; default: five patient-grouped ones")
    parser.add_argument("--grid", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    channels = [view for view in options.channels.split(",") if view]
    backbone = load_backbone(options.backbone, weights=options.weights, image_size=options.size)
    source = PixelSource(options.manifest, backbone, channels=channels)
    found = train_reference(
        source,
        pl.read_csv(options.labels),
        options.target,
        split=options.split,
        grid=options.grid,
        epochs=options.epochs,
        seed=options.seed,
    )
    auroc = compute_metrics("binary", found.targets, found.scores, found.patients)["auroc"]
    print(
        f"{options.target}: LoRA in all {backbone.info.depth} blocks, grid {options.grid}:"
        f" AUROC {describe_interval(auroc)}, {found.seconds:.0f} s, {found.seconds_per_epoch:.1f} s per epoch of a fold"
    )


if __name__ == "__main__":
    main()

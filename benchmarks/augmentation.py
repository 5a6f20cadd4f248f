"""Augmentation of what heads are shown in training: out-of-fold AUROC with each way, and paired with none.

Usage: python benchmarks/augmentation.py SLABS --weights FILE [--work FOLDER] [--target tumour] [--heads grid,abmil]
                                         [--arms flip,mixup,...] [--seeds 1] [--epochs 30] [--copies 4] [--no-flip]

SLABS holds manifest.csv and labels.csv of small cases with a column of patient-grouped folds (``fold``) and a binary
target; three views are the channels of one image, ``deit_tiny`` at 128 px. In feature space: tokens of chance places
replaced by the average one (``tokens``); slices left out, or replaced by a neighbour (``slices``, ``jitter``); bags and
their labels mixed (``mixup``, Zhang et al., arXiv 1710.09412, as in its reference code one share per batch); noise in
units of each channel's deviation (``noise``); columns of the token grid from right to left (``flip``, not for a target
that asks for a side: --no-flip). From pixels: ``copies``, --copies of each case turned, moved, scaled, in another
contrast and flipped (not with --no-flip). A copy is trained on alone: of patients whose cases are tested, or held out
to choose the number of epochs, none is seen. Heads read what `DEFAULT_TOKENS` says. Scores are of the mean over --seeds
members, intervals are over patients. Caches and runs stay in --work: a second call goes on. The last line is the best
AUROC over that without augmentation, the mean over heads.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from scipy.ndimage import affine_transform
from torch import Tensor, nn

from embedkit import foldjobs, passes
from embedkit.bags import Bag
from embedkit.cache import Cache, open_cache
from embedkit.extraction import extract
from embedkit.foldjobs import FoldJob
from embedkit.folds import inner_split
from embedkit.gradientfits import GradientFitter
from embedkit.losses import StackedFitLoss
from embedkit.manifest import read_labels, read_manifest
from embedkit.metrics import Interval, compute_metrics
from embedkit.plots import describe_interval
from embedkit.recipe import TokenSet
from embedkit.runs import Run, open_run
from embedkit.stacks import Fit, Stack
from embedkit.tasks import Task
from embedkit.training import train
from embedkit.volumes import read_volume, write_volume
from views import describe_difference, encode

DEFAULT_TOKENS = {"grid": "patch@4:8", "abmil": "cls:12", "tail": "cut:8"}
CHANNELS = ("pre", "flair", "post")
NO_COPY, COPY = "none", "copies"
MARK = "#"  # in the name of a case that is a copy


@dataclasses.dataclass(frozen=True)
class Draw:
    """What an arm may use beside the tokens: how many cases have chance of their own, and where patches lie."""

    size: int
    rows: int

    def chance(self, *shape: int) -> Tensor:
        """Uniform numbers [rows * size ...], alike for all rows."""
        return torch.rand(self.size, *shape).repeat(self.rows, *[1] * len(shape))


Arm = Callable[[Bag, Draw], Bag]


def drop_tokens(bag: Bag, draw: Draw) -> Bag:
    """A fifth of all tokens become the average one of the batch."""
    tokens = {}
    for name, values in bag.tokens.items():
        average, _ = measure_channels(values, bag.mask)
        gone = draw.chance(*values.shape[1:4]) < 0.2
        tokens[name] = torch.where(gone[..., None], average, values.float())
    return dataclasses.replace(bag, tokens=tokens)


def drop_slices(bag: Bag, draw: Draw) -> Bag:
    """A fifth of the slices go, never the last of a view."""
    chance = draw.chance(*bag.mask.shape[1:]).masked_fill(~bag.mask, -1.0)
    stays = chance >= torch.minimum(chance.amax(2, keepdim=True), torch.tensor(0.2))
    return dataclasses.replace(bag, mask=bag.mask & stays, zeroed=False)


def jitter_slices(bag: Bag, draw: Draw) -> Bag:
    """Half of the slices become the one before or after, where that is real."""
    slices = bag.mask.shape[2]
    chance = draw.chance(*bag.mask.shape[1:])
    step = (chance < 0.25).long() - (chance > 0.75).long()
    there = torch.arange(slices)
    wanted = (there + step).clamp(0, slices - 1)
    source = torch.where(bag.mask.gather(2, wanted), wanted, there)[..., None, None]
    tokens = {name: values.gather(2, source.expand_as(values)) for name, values in bag.tokens.items()}
    return dataclasses.replace(bag, tokens=tokens)


def add_noise(bag: Bag, draw: Draw) -> Bag:
    """Gaussian noise of .3 of each channel's deviation."""
    tokens = {}
    for name, values in bag.tokens.items():
        _, deviation = measure_channels(values, bag.mask)
        noise = torch.randn(draw.size, *values.shape[1:]).repeat(draw.rows, 1, 1, 1, 1)
        tokens[name] = values.float() + 0.3 * deviation * noise
    return dataclasses.replace(bag, tokens=tokens)


def flip_grid(bag: Bag, draw: Draw) -> Bag:
    """Columns of patches from right to left in half of the cases; tokens keep what their place wrote into them."""
    flipped = (draw.chance() < 0.5)[:, None, None, None, None]
    tokens = {}
    for name, values in bag.tokens.items():
        first = 0 if bag.tail is None or TokenSet.parse(name).kind != "cut" else bag.tail.shape.prefix
        side = round((values.shape[3] - first) ** 0.5)
        order = torch.arange(side * side).view(side, side).flip(1).flatten() + first
        order = torch.cat([torch.arange(first), order])
        tokens[name] = torch.where(flipped, values[:, :, :, order], values)
    return dataclasses.replace(bag, tokens=tokens)


ARMS: Mapping[str, Arm | None] = {
    NO_COPY: None,
    "tokens": drop_tokens,
    "slices": drop_slices,
    "jitter": jitter_slices,
    "noise": add_noise,
    "flip": flip_grid,
    "mixup": None,
    COPY: None,
}


def measure_channels(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [dim] of the tokens of real slices."""
    real = values[mask].float().flatten(0, 1)
    return real.mean(0), real.std(0)


class AugmentedStack(Stack):
    """Fits that are shown altered bags in training."""

    arm: Arm

    def alter(self, bag: Bag, *, rows: int) -> Bag:
        return self.arm(super().alter(bag, rows=rows), Draw(len(bag) // rows, rows))


class MixedStack(Stack):
    """Fits that are shown mixtures of two bags each, and learn both labels by their shares."""

    share, partner = 1.0, torch.zeros(0, dtype=torch.int64)

    def alter(self, bag: Bag, *, rows: int) -> Bag:
        size = len(bag) // rows
        self.share = float(torch.distributions.Beta(0.4, 0.4).sample())
        self.partner = torch.randperm(size)
        other = (torch.arange(rows)[:, None] * size + self.partner).flatten()
        there = (bag.mask & bag.mask[other])[..., None, None]
        tokens = {
            name: torch.where(there, self.share * values + (1 - self.share) * values[other], values)
            for name, values in bag.tokens.items()
        }
        return dataclasses.replace(bag, tokens=tokens)

    def _arrange(self) -> None:
        super()._arrange()
        if self.fits:
            self._loss = MixedLoss(self._loss, self)


class MixedLoss:
    """The loss of both labels, each by its share."""

    def __init__(self, loss: StackedFitLoss, stack: MixedStack) -> None:
        self.loss, self.stack, self.kind, self.each = loss, stack, loss.kind, loss.each

    def total(
        self, logits: Tensor, cases: Tensor, rows: Sequence[int], head: nn.Module, leaves: Mapping[str, Tensor]
    ) -> Tensor:
        own, other = (
            self.loss.total(logits, each, rows, head, leaves) for each in (cases, cases[:, self.stack.partner])
        )
        return self.stack.share * own + (1 - self.stack.share) * other


def choose_stack(name: str) -> type[Stack]:
    """The stack in which an arm trains."""
    if name == "mixup":
        return MixedStack
    arm = ARMS[name]
    return Stack if arm is None else type("ArmStack", (AugmentedStack,), {"arm": staticmethod(arm)})


def find_copies(task: Task) -> NDArray[np.bool_]:
    """Which cases of a task are copies, bool [cases]."""
    return np.array([MARK in case_id for case_id in task.case_ids])


def hold_originals(task: Task, training: NDArray[np.bool_], **how: Any) -> NDArray[np.bool_]:
    """As `inner_split`, but no copy is among what is held out."""
    held: NDArray[np.bool_] = inner_split(task, training & ~find_copies(task), **how)
    return held


def leave_copies(fit: Callable[..., Fit]) -> Callable[..., Fit]:
    """`GradientFitter._fit` without the copies of patients that are held out in what is trained on."""

    def fit_others(fitter: GradientFitter, job: FoldJob, *args: Any, held_out: NDArray[np.bool_], **how: Any) -> Fit:
        whole = fit(fitter, job, *args, held_out=held_out, **how)
        patients = np.asarray(job.task.patient_ids)
        return dataclasses.replace(whole, training=whole.training & ~np.isin(patients, patients[held_out]))

    return fit_others


@contextmanager
def alter_training(arm: str) -> Iterator[None]:
    """While it lasts fits are trained with an arm, and no copy is held out or seen of a patient who is."""
    with (
        patch.object(passes, "Stack", choose_stack(arm)),
        patch.object(foldjobs, "inner_split", hold_originals),
        patch.object(GradientFitter, "_fit", leave_copies(GradientFitter._fit)),
    ):
        yield


def make_cache(options: argparse.Namespace, manifest: pl.DataFrame, name: str) -> Cache:
    extract(
        manifest,
        options.work / name,
        backbone="deit_tiny_patch16_224",
        weights=options.weights,
        image_size=128,
        tokens=["cls:12", "patch@4:8"],
        cut=4,
        channels=CHANNELS,
        fill="flair",
        preview=0,
    )
    return open_cache(options.work / name)


def copy_cases(manifest: pl.DataFrame, out: Path, copies: int, *, flip: bool) -> pl.DataFrame:
    """The manifest with altered copies of all cases, which are written unless they are there."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, ((case_id,), images) in enumerate(manifest.group_by("case_id", maintain_order=True)):
        for copy in range(1, copies + 1):
            chance = np.random.default_rng([number, copy])
            matrix, offset = draw_motion(chance, flip=flip)
            for row in images.iter_rows(named=True):
                path = out / f"{case_id}_{row['view']}_{copy}.nii"
                gamma = float(np.exp(chance.uniform(-0.25, 0.25)))
                if not path.is_file():
                    image = read_volume(row["path"])
                    write_volume(path, alter_image(image.array, matrix, offset, gamma), image.affine)
                rows.append(row | {"case_id": f"{case_id}{MARK}{copy}", "path": str(path)})
    return pl.concat([manifest, pl.DataFrame(rows, schema=manifest.schema)])


def draw_motion(chance: np.random.Generator, *, flip: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """In the plane of a slice, from the middle: turned by up to 10 degrees, scaled and moved by up to a tenth."""
    angle, scale = np.radians(chance.uniform(-10, 10)), chance.uniform(0.9, 1.1)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    if flip and chance.random() < 0.5:
        matrix[:, 1] *= -1
    return matrix, chance.uniform(-0.1, 0.1, 2)


def alter_image(
    array: NDArray[Any], matrix: NDArray[np.float64], offset: NDArray[np.float64], gamma: float
) -> NDArray[np.float32]:
    """A volume [slices height width] moved slice by slice, with its contrast bent by a power."""
    size = np.array(array.shape[1:])
    middle = (size - 1) / 2
    start = middle - matrix @ (middle + offset * size)
    moved = np.stack([affine_transform(each.astype(np.float32), matrix, start, order=1) for each in array])
    highest = float(moved.max()) or 1.0
    return np.asarray(highest * (moved / highest).clip(0) ** gamma, np.float32)


def fit(options: argparse.Namespace, cache: Cache, labels: pl.DataFrame, head: str, arm: str) -> Run:
    """The run of a head with an arm, trained unless it is there."""
    extra = f"-{options.copies}" if arm == COPY else ""
    name = f"{options.target}-{head}-{arm}{extra}-{options.epochs}-{options.seeds}"
    folder = options.work / "runs" / name
    path = folder / f"{options.target}.{head}"
    if not (path / "run.json").is_file():
        with alter_training(arm):
            train(
                cache,
                labels,
                targets=[options.target],
                heads=[head],
                token_sets={head: [DEFAULT_TOKENS[head]]},
                fit_options={"epochs": options.epochs},
                split="fold",
                seeds=options.seeds,
                out=folder,
                overwrite=True,
                device="cpu",
            )
    return open_run(path)


def score(run: Run) -> Interval:
    """AUROC of the cases that are no copies."""
    table = run.predictions.filter(~pl.col("case_id").str.contains(MARK, literal=True))
    return compute_metrics("binary", encode(run, table), table["score"].to_numpy(), table["patient_id"].to_list())[
        "auroc"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slabs", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("augmentation"))
    parser.add_argument("--target", default="tumour")
    parser.add_argument("--heads", default=",".join(DEFAULT_TOKENS))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=1, help="members per fold")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--no-flip", action="store_true", help="the target asks for a side")
    options = parser.parse_args()
    arms = [NO_COPY, *(name for name in ARMS if name in options.arms.split(",") and name != NO_COPY)]
    arms = [name for name in arms if not (options.no_flip and name == "flip")]
    labels = read_labels(options.slabs / "labels.csv").drop_nulls(options.target)
    manifest = read_manifest(options.slabs / "manifest.csv")
    manifest = manifest.filter(pl.col("case_id").is_in(labels["case_id"].implode()))
    data = {NO_COPY: (make_cache(options, manifest, f"cache-{options.target}"), labels)}
    if COPY in arms:
        folder = options.work / f"images-{options.target}-{options.copies}{'' if options.no_flip else '-flipped'}"
        more = copy_cases(manifest, folder, options.copies, flip=not options.no_flip)
        copied = [
            labels.with_columns(case_id=pl.col("case_id") + f"{MARK}{copy}") for copy in range(1, options.copies + 1)
        ]
        data[COPY] = (
            make_cache(options, more, f"cache{folder.name.removeprefix('images')}"),
            pl.concat([labels, *copied]),
        )
    print("| head | augmentation | AUROC | less none |")
    ratios = []
    for head in options.heads.split(","):
        plain = fit(options, *data[NO_COPY], head, NO_COPY)
        values = {}
        for arm in arms:
            if arm == "flip" and TokenSet.parse(DEFAULT_TOKENS[head]).kind == "cls":
                continue  # a class token has no place
            run = plain if arm == NO_COPY else fit(options, *data.get(arm, data[NO_COPY]), head, arm)
            values[arm] = score(run)
            difference = "" if run is plain else describe_difference(run, plain)
            print(f"| {head} | {arm} | {describe_interval(values[arm])} | {difference} |", flush=True)
        ratios.append(max(each.value for each in values.values()) / values[NO_COPY].value)
    print(f"ratio {np.mean(ratios):.2f}")


if __name__ == "__main__":
    main()

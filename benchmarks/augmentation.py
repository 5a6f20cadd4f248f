"""Augmentation of what heads are shown in training: out-of-fold AUROC with each way, and paired with none.

Usage: python benchmarks/augmentation.py SLABS --weights FILE [--work FOLDER] [--target tumour] [--heads grid,abmil]
                                         [--arms flip,mixup,...] [--seeds 1] [--epochs 30] [--copies 4] [--no-flip]

SLABS holds manifest.csv and labels.csv of small cases with a column of patient-grouped folds (``fold``) and a binary
target; three views are the channels of one image, ``deit_tiny`` at 128 px. In feature space: tokens of chance places
replaced by the average one (``tokens``); slices left out, or replaced by a neighbour (``slices``, ``jitter``); bags and
their labels mixed (``mixup``, Zhang et al., arXiv 1710.09412, as in its reference code one share per batch); noise in
units of each channel's deviation (``noise``); columns of the token grid from right to left (``flip``, not for a target
that asks for a side: --no-flip). From pixels: ``copies``, --copies of each case as
`extract --augment` makes them, mirrored too unless --no-flip, in as many steps as without. Heads read what
`DEFAULT_TOKENS` says. Scores are of the mean over --seeds members, intervals are over patients. Caches and runs stay in
--work: a second call goes on. The last line is the best AUROC over that without augmentation, the mean over heads.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from embedkit import passes
from embedkit.bags import Bag
from embedkit.cache import Cache, open_cache
from embedkit.extraction import extract
from embedkit.losses import StackedFitLoss
from embedkit.manifest import read_labels, read_manifest
from embedkit.metrics import Interval, compute_metrics
from embedkit.plots import describe_interval
from embedkit.recipe import TokenSet
from embedkit.runs import Run, open_run
from embedkit.stacks import Stack
from embedkit.training import train
from views import describe_difference, encode

DEFAULT_TOKENS = {"grid": "patch@4:8", "abmil": "cls:12", "tail": "cut:8"}
CHANNELS = ("pre", "flair", "post")
NONE, COPY = "none", "copies"


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
    NONE: None,
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


def make_cache(options: argparse.Namespace, manifest: pl.DataFrame, name: str, **how: Any) -> Cache:
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
        **how,
    )
    return open_cache(options.work / name)


def fit(
    options: argparse.Namespace, cache: Cache, labels: pl.DataFrame, head: str, arm: str, *, copies: Cache | None = None
) -> Run:
    """The run of a head with an arm, or with copies, trained unless it is there."""
    extra = f"-{options.copies}" if arm == COPY else ""
    name = f"{options.target}-{head}-{arm}{extra}-{options.epochs}-{options.seeds}"
    folder = options.work / "runs" / name
    path = folder / f"{options.target}.{head}"
    if not (path / "run.json").is_file():
        with patch.object(passes, "Stack", choose_stack(arm)):
            train(
                cache,
                labels,
                targets=[options.target],
                copies=copies,
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
    """AUROC out of fold."""
    table = run.predictions
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
    arms = [NONE, *(name for name in ARMS if name in options.arms.split(",") and name != NONE)]
    arms = [name for name in arms if not (options.no_flip and name == "flip")]
    labels = read_labels(options.slabs / "labels.csv").drop_nulls(options.target)
    manifest = read_manifest(options.slabs / "manifest.csv")
    manifest = manifest.filter(pl.col("case_id").is_in(labels["case_id"].implode()))
    cache = make_cache(options, manifest, f"cache-{options.target}")
    copies = None
    if COPY in arms:
        name = f"copies-{options.target}-{options.copies}{'' if options.no_flip else '-flipped'}"
        copies = make_cache(options, manifest, name, augment=options.copies, augment_flip=not options.no_flip)
    print("| head | augmentation | AUROC | less none |")
    ratios = []
    for head in options.heads.split(","):
        plain = fit(options, cache, labels, head, NONE)
        values = {}
        for arm in arms:
            if arm == "flip" and TokenSet.parse(DEFAULT_TOKENS[head]).kind == "cls":
                continue  # a class token has no place
            shown = copies if arm == COPY else None
            run = plain if arm == NONE else fit(options, cache, labels, head, arm, copies=shown)
            values[arm] = score(run)
            difference = "" if run is plain else describe_difference(run, plain)
            print(f"| {head} | {arm} | {describe_interval(values[arm])} | {difference} |", flush=True)
        ratios.append(max(each.value for each in values.values()) / values[NONE].value)
    print(f"ratio {np.mean(ratios):.2f}")


if __name__ == "__main__":
    main()

"""Training of gated ABMIL: slices per second of embedkit and of torchmil, and the floor that arithmetic sets.

Usage: python benchmarks/train_peers.py [--cases N] [--slices MIN MAX] [--epochs N] [--envs FOLDER] [--repeats N]

One head on one training set: embed 384 -> 128, gates 128 -> 64, batches of 16 cases, AdamW, equal epochs, on the same
bags, already in memory on both sides (embedkit's as its cache has them, float16; torchmil's as float32 tensors). The
label says whether a few slices of the bag are shifted; AUROC is of test bags.

torchmil 1.0.2 runs in an environment of its own (see `peers.py`), with its own `Trainer`, of which only the pass that
trains is timed: the documented loop makes a second pass over the data after it. No progress bar, one or two threads,
whichever is faster; both sides keep freed memory, as embedkit's command line does (`embedkit.allocator`). embedkit
runs `run_passes`, what `train` runs, without inner splits. What differs: embedkit standardises and pads to like
lengths, follows a one-cycle schedule, and with ``bf16`` multiplies in bfloat16.

The floor is the bare matrix products of the head, forward and backward, on the real slices alone, in the same
precision, batch by batch. Sides take turns; each counts by its fastest turn. The last line, `ratio N.NN`, is
embedkit's speed over torchmil's, at the faster of embedkit's precisions.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

from embedkit.allocator import keep_freed_memory
from embedkit.bags import BagShape, BagStore
from embedkit.batching import Deck
from embedkit.fitting import FitOptions
from embedkit.losses import TaskLoss
from embedkit.passes import run_passes
from embedkit.plugins import create_head
from embedkit.stacks import Fit
from embedkit.standardisation import compute_moments, fit_standardiser
from embedkit.storage import ResidentStore
from peers import DEFAULT_ENVS, make_environment, run_program

DIM, WIDTH, ATTENTION, BATCH = 384, 128, 64, 16
TOKENS = "cls:12"
PACKAGES = ("torchmil==1.0.2",)
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}

TORCHMIL = """
import json, sys, time
from pathlib import Path
import torch, torchmetrics
from safetensors.torch import load_file
from torch import nn
from torchmil.data import collate_fn
from torchmil.models import ABMIL
from torchmil.utils.trainer import Trainer

task = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(task["threads"])
torch.manual_seed(0)
data = load_file(task["bags"])
bags = torch.split(data["tokens"].float(), data["lengths"].tolist())
items = [{"X": bag, "Y": label} for bag, label in zip(bags, data["labels"].float())]
training, test = items[: task["training"]], items[task["training"] :]
embed = nn.Sequential(nn.Linear(task["dim"], task["width"]), nn.ReLU(), nn.Dropout(0.2))
model = ABMIL(in_shape=(task["dim"],), att_dim=task["attention"], gated=True, feat_ext=embed)
optimizer = torch.optim.AdamW(model.parameters(), lr=task["learning_rate"], weight_decay=1e-2)
loader = torch.utils.data.DataLoader(training, batch_size=task["batch"], shuffle=True, collate_fn=collate_fn)
trainer = Trainer(model, optimizer, {"accuracy": torchmetrics.Accuracy(task="binary")}, device="cpu",
                  disable_pbar=True, verbose=False)
started = time.perf_counter()
for epoch in range(task["epochs"]):
    trainer._shared_loop(loader, epoch=epoch, mode="train")
seconds = time.perf_counter() - started
model.eval()
with torch.no_grad():
    scores = [float(model(item["X"][None])) for item in test]
print("RESULT", json.dumps({"seconds": seconds, "auroc": torchmetrics.functional.auroc(
    torch.tensor(scores), torch.stack([item["Y"] for item in test]).int(), task="binary").item()}))
"""


@dataclass(frozen=True)
class Bags:
    """Labelled bags, of which the first ``training`` train: tokens [slices dim], lengths and labels [cases]."""

    tokens: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor
    training: int

    @property
    def slices(self) -> int:
        """Of all training bags."""
        return int(self.lengths[: self.training].sum())


def make_bags(cases: int, shortest: int, longest: int) -> Bags:
    """Random tokens; in every second case a tenth of the slices are shifted along one direction."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (2 * cases,), generator=generator)
    labels = torch.arange(2 * cases) % 2
    tokens = torch.randn(int(lengths.sum()), DIM, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(DIM, generator=generator), dim=0)
    stops = lengths.cumsum(0)
    for label, length, stop in zip(labels.tolist(), lengths.tolist(), stops.tolist(), strict=True):
        if label:
            tokens[stop - length : stop - length + max(1, length // 10)] += 2.5 * direction
    return Bags(tokens.half(), lengths, labels, cases)


def fit_embedkit(bags: Bags, how: FitOptions) -> tuple[float, float]:
    """Seconds of the training, and AUROC on the test bags."""
    store = make_store(bags)
    cases = len(bags.labels)
    training = np.arange(cases) < bags.training
    names = (TOKENS,)
    everyone = (store.bags.batch([case]) for case in range(cases))
    standardiser = fit_standardiser(
        store.shape, compute_moments(store.shape, everyone, names), np.flatnonzero(training).tolist()
    )
    torch.manual_seed(0)
    head = create_head("abmil", store.shape, names, 1, options={"width": WIDTH, "attention_width": ATTENTION})
    longest = int(bags.lengths.max())
    fit = Fit(
        name="abmil",
        head=head,
        how=how,
        store=store,
        standardiser=standardiser,
        loss=TaskLoss("binary", bags.labels.numpy(), training, class_weights=False),
        deck=Deck(np.arange(cases), bags.lengths.numpy(), longest=longest, blocks=1, seed=0),
        key="all",
        training=training,
        held_out=np.zeros(cases, dtype=bool),
        noise=0,
        epochs=how.epochs,
    )
    started = time.perf_counter()
    outcome = run_passes([fit], {})[fit]
    seconds = time.perf_counter() - started
    head.load_state_dict(outcome.state)
    head.eval()
    test = np.flatnonzero(~training)
    with torch.no_grad():
        scores = [float(head(standardiser(store.bags.batch([int(case)]))).logits) for case in test]
    return seconds, float(roc_auc_score(bags.labels.numpy()[test], scores))


def make_store(bags: Bags) -> ResidentStore:
    """As `embedkit.bags.load_bags` would fill it from a cache."""
    cases, longest, rows = len(bags.lengths), int(bags.lengths.max()), len(bags.tokens)
    starts = bags.lengths.cumsum(0) - bags.lengths
    places = torch.arange(longest)
    real = places < bags.lengths[:, None]
    where = torch.where(real, starts[:, None] + places, rows)[:, None]
    positions = (places / (bags.lengths[:, None] - 1).clamp(min=1)).clamp(max=1.0)[:, None]
    table = torch.cat([bags.tokens, torch.zeros(1, DIM, dtype=torch.float16)])[:, None]
    shape = BagShape({TOKENS: (1, DIM)}, {}, ("ct/axial",))
    names = [f"c{case:05}" for case in range(cases)]
    return ResidentStore(BagStore(shape, names, {TOKENS: table}, where, positions), torch.device("cpu"))


def time_floor(bags: Bags, epochs: int, dtype: torch.dtype) -> float:
    """Seconds of the head's matrix products alone."""
    parts = torch.split(bags.tokens[: bags.slices].to(dtype), bags.lengths[: bags.training].tolist())
    batches = [torch.cat(parts[start : start + BATCH]) for start in range(0, len(parts), BATCH)]
    embed, gates = torch.randn(WIDTH, DIM).to(dtype), torch.randn(2 * ATTENTION, WIDTH).to(dtype)
    started = time.perf_counter()
    for _ in range(epochs):
        for tokens in batches:
            hidden = tokens @ embed.T
            gated = hidden @ gates.T
            gated.T @ hidden
            slope = gated @ gates
            slope.T @ tokens
    return time.perf_counter() - started


def time_torchmil(options: argparse.Namespace, folder: Path, bags: Bags, threads: int) -> dict[str, float]:
    """Seconds and AUROC of torchmil, in a process of its own."""
    place = Path(tempfile.mkdtemp(dir=folder)) / "run"
    task: dict[str, Any] = {
        "bags": str(folder / "bags.safetensors"),
        "training": bags.training,
        "threads": threads,
        "dim": DIM,
        "width": WIDTH,
        "attention": ATTENTION,
        "batch": BATCH,
        "epochs": options.epochs,
        "learning_rate": options.torchmil_rate,
    }
    python = make_environment(options.envs, "torchmil", PACKAGES)
    return run_program(python, TORCHMIL, place, task, **KEEP_FREED_MEMORY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400, help="that train; as many test")
    parser.add_argument("--slices", type=int, nargs=2, default=(30, 120))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of embedkit and of the floor")
    parser.add_argument("--torchmil-rate", type=float, default=1e-3, help="its learning rate")
    parser.add_argument("--envs", type=Path, default=DEFAULT_ENVS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    bags = make_bags(options.cases, *options.slices)
    print(
        f"{bags.training} bags of {options.slices[0]} to {options.slices[1]} slices, {DIM} numbers each,"
        f" {options.epochs} epochs, batches of {BATCH}"
    )
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"tokens": bags.tokens, "lengths": bags.lengths, "labels": bags.labels}, folder / "bags.safetensors")
        how = FitOptions(epochs=options.epochs, batch_size=BATCH, class_weights=False)
        fit_embedkit(bags, how.replace(epochs=1))
        for _ in range(options.repeats):
            for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                seconds, auroc = fit_embedkit(bags, how.replace(precision=precision))
                found.append({"side": f"embedkit {precision}", "seconds": seconds, "auroc": auroc})
                found.append({"side": f"floor {precision}", "seconds": time_floor(bags, options.epochs, dtype)})
            for threads in (1, 2):
                side = {"side": f"torchmil, {threads} threads"}
                found.append(side | time_torchmil(options, folder, bags, threads))
    print_ratios(pl.DataFrame(found), bags.slices * options.epochs)


def print_ratios(found: pl.DataFrame, slices: int) -> None:
    best = found.group_by("side", maintain_order=True).agg(pl.col("seconds").min(), pl.col("auroc").median())
    for side, seconds, auroc in best.iter_rows():
        score = "" if auroc is None else f", test AUROC {auroc:.3f}"
        print(f"{side:20} {slices / seconds:10,.0f} slices/s{score}")
    seconds = dict(best.select("side", "seconds").iter_rows())
    peer = min(seconds[f"torchmil, {threads} threads"] for threads in (1, 2))
    for precision in ("fp32", "bf16"):
        own = seconds[f"embedkit {precision}"]
        print(f"embedkit {precision}: {own / seconds[f'floor {precision}']:.2f} times the floor's time,")
        print(f"    {peer / own:.2f} times torchmil's speed")
    print(f"ratio {peer / min(seconds[f'embedkit {precision}'] for precision in ('fp32', 'bf16')):.2f}")


if __name__ == "__main__":
    main()

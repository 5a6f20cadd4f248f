"""What int8 tokens cost and save: the same heads on float16 and int8 copies of real caches, error, bytes and speed.

Usage: python benchmarks/int8.py [--data ../shared/data] [--work FOLDER] [--backbone NAME [--weights FILE]]
                                 [--heads all|none|linear,query,grid] [--seed 0]
                                 [--tasks side,laterality,gender,death01,contrast]

--work holds the float16 caches that benchmarks/real_tasks.py makes, and they are made where they are not there; each is
written anew as int8 in a temporary folder. The task `contrast` tells T1 images after contrast agent from those before:
each of the LGG patients' is a case of its own, patients kept together. Both baselines on every token set, and the heads
of --heads (by default every one installed) on the sets that they choose, are trained on both with equal folds and seed;
the difference is int8 less float16 with its 95% interval by patient, both scored on the same resamples. A head trained
by gradient can move by as much as another seed would move it, for whatever grain of noise. Speed is that of one pass
over all stacks, whose tokens are copied from the map of a float16 cache (in memory already) and restored from an int8
one, in turns, by the time of the processor on one thread; beside it what the five steps of restoring take by
themselves, in the processor's cache: each is rounded, so that all machines give the same bits, and fusing them would
round once less. On a disk that gives less than the rate printed for int8, int8 is the faster. The last line is bytes of
int8 over float16.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch

from embedkit.cache import Cache, StackTokens, create_cache, open_cache, write_shard
from embedkit.errors import EmbedkitError, HeadError
from embedkit.members import complete_options
from embedkit.metrics import Interval, paired_difference
from embedkit.plots import describe_interval
from embedkit.plugins import is_joint, list_heads, load_head
from embedkit.quantisation import bytes_per_slice
from embedkit.recipe import Recipe, TokenSet
from embedkit.runs import Run, open_run
from embedkit.training import BASELINES, train
from real_tasks import PROJECT, TASKS, Task, make_cache

STACKS_PER_SHARD = 64
CONTRAST = Task("lgg", "contrast", ("pre", "post"))


def main() -> None:
    shared = PROJECT.parent / "shared"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=shared / "data")
    parser.add_argument("--work", type=Path, default=Path("real-tasks"))
    parser.add_argument("--backbone", default="embedkit/scattering")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--heads", default="all", help="besides the baselines, on the token sets that they choose")
    parser.add_argument("--tasks", default="laterality,gender,contrast")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    known = (*TASKS, CONTRAST)
    tasks = [task for task in known if task.target in options.tasks.split(",")]
    if not tasks:
        parser.error(f"--tasks {options.tasks} names none of {', '.join(task.target for task in known)}")
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: make_pair(name, options, Path(folder)) for name in dict.fromkeys(task.data for task in tasks)}
        for task in tasks:
            pair, labels = caches[task.data], options.data / task.data / "labels.csv"
            if task is CONTRAST:
                pair, labels = split_pair(pair[0], task, Path(folder))
            compare_heads(task, pair, labels, options, Path(folder) / "runs")
    total, quantised = (sum(token_bytes(pair[side]) for pair in caches.values()) for side in (0, 1))
    print(f"ratio {quantised / total:.3f}")


def make_pair(name: str, options: argparse.Namespace, folder: Path) -> tuple[Cache, Cache]:
    """A float16 cache and its int8 copy; prints what the copy costs."""
    full = make_cache(name, options)
    started = time.perf_counter()
    copy = write_int8(full, folder / name)
    print(
        f"{full.path.name}: {token_bytes(full) / 1e6:.1f} MB of tokens, {token_bytes(copy) / 1e6:.1f} MB as int8"
        f" (written in {time.perf_counter() - started:.1f} s), ratio {token_bytes(copy) / token_bytes(full):.3f}",
        flush=True,
    )
    print_speed(full, copy)
    print("| token set | shape | error / norm | error / sd of its channel | bytes per slice |")
    for token_set, info in full.token_sets.items():
        relative, of_spread = errors(full, copy, token_set)
        sizes = " -> ".join(str(bytes_per_slice(info.shape, dtype)) for dtype in ("float16", "int8"))
        print(f"| {token_set} | {info.shape} | {relative:.3%} | {of_spread:.3%} | {sizes} |", flush=True)
    return full, copy


def write_int8(cache: Cache, path: Path) -> Cache:
    """The same cache with its tokens stored as int8."""
    recipe = Recipe(**{**vars(cache.recipe), "dtype": "int8"})
    create_cache(path, recipe)
    for start in range(0, len(cache), STACKS_PER_SHARD):
        stacks = range(start, min(start + STACKS_PER_SHARD, len(cache)))
        write_shard(path, recipe, [stored_stack(cache, stack) for stack in stacks])
    return open_cache(path)


def split_pair(full: Cache, task: Task, folder: Path) -> tuple[tuple[Cache, Cache], Path]:
    """A cache with the images of the classes of ``task`` as cases of their own, its int8 copy, and their labels."""
    create_cache(folder / "split", full.recipe)
    chosen = full.stacks.filter(pl.col("view").is_in(task.classes)).select("stack", "case_id", "view")
    stacks = [
        replace(stored_stack(full, stack), case_id=f"{case}-{view}", view="image")
        for stack, case, view in chosen.iter_rows()
    ]
    write_shard(folder / "split", full.recipe, stacks)
    split, labels = open_cache(folder / "split"), folder / "split.csv"
    names = pl.format("{}-{}", "case_id", "view").alias("case_id")
    chosen.select(names, pl.col("view").alias(task.target)).write_csv(labels)
    return (split, write_int8(split, folder / "split-int8")), labels


def stored_stack(cache: Cache, stack: int) -> StackTokens:
    tokens = {name: cache.read(stack, name) for name in cache.token_sets}
    return StackTokens(
        **vars(cache.record(stack)), **vars(cache.slices(stack)), tokens=tokens, preview=cache.preview(stack)
    )


def token_bytes(cache: Cache) -> int:
    """Bytes of all tokens with their scales, previews and tables left out."""
    return sum(place.bytes for shard in cache.shards for name, place in shard.arrays.items() if name != "preview")


def errors(full: Cache, copy: Cache, token_set: str) -> tuple[float, float]:
    """Root mean square error of the slices that show something: over the norm, and over the channel's spread.

    The spread is over the whole cache, which is what a head that standardises its input sees.
    """
    channels: list[np.ndarray] = [np.zeros(0)] * 3
    count = 0
    for stack in range(len(full)):
        shown = ~full.slices(stack).blank
        before = full.read(stack, token_set)[shown].astype(np.float64).reshape(-1, full.token_sets[token_set].shape[-1])
        after = copy.read(stack, token_set)[shown].astype(np.float64).reshape(before.shape)
        parts = ((after - before) ** 2).sum(0), (before**2).sum(0), before.sum(0)
        channels = [part if not len(total) else total + part for total, part in zip(channels, parts, strict=True)]
        count += len(before)
    wrong, squares, total = channels
    spread = squares / count - (total / count) ** 2
    varied = spread > 0
    return float(np.sqrt(wrong.sum() / squares.sum())), float(np.sqrt((wrong[varied] / count / spread[varied]).mean()))


def print_speed(full: Cache, copy: Cache, repeats: int = 7) -> None:
    """Float16 bytes per second that a reader gets of each token set, the best of turns."""
    torch.set_num_threads(1)
    bound = max(steps_per_second() for _ in range(repeats))
    print(f"the five steps of restoring by themselves: {bound / 1e9:.2f} GB/s")
    for token_set in full.token_sets:
        size = sum(full.read(stack, token_set).nbytes for stack in range(len(full)))
        turns = [(time_pass(full, token_set), time_pass(copy, token_set)) for _ in range(repeats)]
        first, second = (min(turn[side] for turn in turns) for side in (0, 1))
        print(
            f"{token_set}: {size / first / 1e9:.2f} GB/s copied from float16, {size / second / 1e9:.2f} GB/s restored"
            f" from int8, {first / second:.2f} of the speed",
            flush=True,
        )


def time_pass(cache: Cache, token_set: str) -> float:
    """Seconds to have all tokens of a set in memory of their own, one stack after the other."""
    started = time.process_time()
    for stack in range(len(cache)):
        tokens = cache.read(stack, token_set)
        if cache.recipe.dtype == "float16":
            tokens.copy()
    return time.process_time() - started


def steps_per_second(rounds: int = 100) -> float:
    """Float16 bytes per second of int8 to float32, times, times, plus, to float16, on one block again and again."""
    stored, wide = np.ones((340, 384), np.int8), np.empty((340, 384), np.float32)
    part, restored = torch.from_numpy(wide), torch.empty(340, 384, dtype=torch.float16)
    token_scales, channels = torch.ones(340, 1), torch.ones(384)
    started = time.process_time()
    for _ in range(rounds):
        np.copyto(wide, stored)
        part.mul_(token_scales).mul_(channels).add_(channels)
        restored.copy_(part)
    return rounds * restored.nbytes / (time.process_time() - started)


def compare_heads(task: Task, pair: tuple[Cache, Cache], labels: Path, options: argparse.Namespace, out: Path) -> None:
    """Prints a row per head and token set: both scores and their difference."""
    for token_set in pair[0].token_sets:
        names = ("logistic", "raptor") if token_set.startswith("patch") else ("logistic",)
        runs = [train_on(cache, task, [], [token_set], labels=labels, seed=options.seed, out=out) for cache in pair]
        print_rows(task, names, runs)
    if heads := choose_heads(pair[0], options.heads):
        print_rows(
            task,
            heads,
            [train_on(cache, task, heads, None, labels=labels, seed=options.seed, out=out) for cache in pair],
        )


def choose_heads(cache: Cache, asked: str) -> list[str]:
    """The heads to compare: those named, none, or every one installed that can be trained here without further options.

    That is: which reads tokens of this cache, takes a single binary task, and asks for no option that only the user can
    give.
    """
    if asked != "all":
        return [name for name in asked.split(",") if name not in {"", "none"}]
    kinds = {TokenSet.parse(name).kind for name in cache.token_sets}
    return [
        name
        for name in list_heads()
        if name not in BASELINES
        and not is_joint(name)
        and load_head(name).reads & kinds
        and "binary" in getattr(load_head(name), "kinds", {"binary"})
        and needs_no_options(name)
    ]


def needs_no_options(name: str) -> bool:
    """Whether a head can be trained as it comes; says why where it cannot."""
    try:
        complete_options(name, {})
    except HeadError as error:
        print(f"{name} is left out: {error}", flush=True)
        return False
    return True


def train_on(
    cache: Cache,
    task: Task,
    heads: list[str],
    token_sets: list[str] | None,
    *,
    labels: Path,
    seed: int,
    out: Path,
) -> Path:
    """Trains heads and baselines; returns the folder of the runs."""
    out = out / cache.recipe.dtype
    train(
        cache,
        labels,
        targets=[task.target],
        out=out,
        heads=heads,
        token_sets=token_sets,
        classes=task.classes,
        seed=seed,
        overwrite=True,
    )
    return out


def print_rows(task: Task, names: Sequence[str], folders: list[Path]) -> None:
    """A row per head: AUROC on float16 and on int8 tokens, and the difference."""
    for name in names:
        first, second = (open_run(folder / f"{task.target}.{name}") for folder in folders)
        scores = [describe_interval(run.metrics["auroc"]) for run in (first, second)]
        difference = describe_interval(score_difference(first, second))
        tokens = ",".join(first.record.token_sets)
        print(f"| {task.target} | {name} | {tokens} | {scores[0]} | {scores[1]} | {difference} |", flush=True)


def score_difference(first: Run, second: Run) -> Interval:
    """AUROC of the second run less that of the first, on the same cases."""
    joined = first.predictions.join(second.predictions, on=["case_id", "fold", "target"], suffix="_b")
    if not len(joined) == len(first.predictions) == len(second.predictions):
        raise EmbedkitError(f"{first.name} was tested on other cases or folds than its int8 twin; give one seed")
    positive = (joined["target"] == first.record.classes[1]).to_numpy().astype(int)
    return paired_difference(
        "binary", positive, joined["score_b"], joined["score"], joined["patient_id"].to_list(), metric="auroc"
    )


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()

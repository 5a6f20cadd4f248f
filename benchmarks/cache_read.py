"""Speed of reading a cache beside a plain memory map, h5py on the same shards, and the layout that other tools write.

Usage: python benchmarks/cache_read.py [--stacks N] [--slices N] [--dim N] [--shards N] [--repeats N]
                                       [--keep-pages]

A synthetic cache of class tokens and one of 49 pooled patch tokens, float16. `sequential` takes every stack whole,
`random` single slices of any stack. The sides:

- embedkit: `Cache.read`, a view of the memory map;
- memory map: `numpy.memmap` over the same shard files, sliced by the same first row and count, known beforehand;
- bare array: the same map as a plain `ndarray`, which spares numpy's bookkeeping of a `memmap` per slice;
- h5py: the same rows of the same shards through HDF5, files held open;
- (1, D) chunks: one HDF5 file per stack in which every token is a chunk, without filters, as TRIDENT and CLAM write
  their features; files held open, or opened for every read as their data sets do.

Every side sums what it reads as integers, so that all touch the same bytes; the sums must agree. The page cache is
warm. Times are of the processor, of rounds in which the sides take turns: GB/s are those of the best round, and the
pace of one side beside another is the median over rounds, with quartiles, so that it holds on a machine that does other
things. An open cache holds bytes against their checksums when it first reads them, so the first reading is told apart,
with and without: all stacks of a cache that has just been opened, summed, and copied to tensors as training reads them.
The last line is `ratio N.NN`: the pace (bytes per second) of embedkit over that of the memory map, sequentially, on
both token sets together; above 1 embedkit is the faster.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

import embedkit.cache
from embedkit.bags import load_bags
from embedkit.cache import Cache, StackTokens, create_cache, open_cache, write_shard
from embedkit.recipe import Recipe

TOKEN_SETS = ("cls:12", "patch@7:12")
RECIPE = Recipe("toy", "builtin:1", TOKEN_SETS, 224, (0.5,), (0.25,), preview=0)
SLOW_S = 0.5
"""A side that takes longer for all reads is timed twice only."""
Reader = Callable[[int, int, int], NDArray[np.float16]]
"""From a stack, a first slice and a count to those tokens: float16 [slices ...]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", type=int, default=120)
    parser.add_argument("--slices", type=int, default=40)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--reads", type=int, default=2000, help="random slices per round")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--keep-pages", action="store_true", help="never let go of pages that were read")
    options = parser.parse_args()
    if options.keep_pages:
        embedkit.cache._MOST_RESIDENT = sys.maxsize
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        measure(options, Path(folder), stack)


def measure(options: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
    cache = stack.enter_context(write_cache(options, folder / "cache"))
    counts = cache.stacks["count"].to_list()
    random = np.random.default_rng(0)
    chosen = random.integers(0, len(counts), options.reads)
    orders = {
        "sequential": [(number, 0, count) for number, count in enumerate(counts)],
        "random": [(int(number), int(random.integers(counts[number])), 1) for number in chosen],
    }
    rounds: dict[tuple[str, str], list[list[float]]] = {}
    for token_set in TOKEN_SETS:
        files = write_chunked(cache, token_set, folder / token_set.partition(":")[0])
        readers = {
            "embedkit": read_cache(cache, token_set),
            "memory map": read_map(cache, token_set),
            "bare array": read_map(cache, token_set, bare=True),
            "h5py": read_hdf5(cache, token_set, stack),
            "(1, D) chunks, held open": read_chunked(cache, token_set, files, stack),
            "(1, D) chunks, opened": read_chunked(cache, token_set, files, None),
        }
        for order, reads in orders.items():
            size, seconds = time_readers(readers, reads, options.repeats)
            for side, each in seconds.items():
                rounds.setdefault((order, side), []).append(each)
                pace = compare([seconds["memory map"]], [each])[1]
                print(
                    f"{token_set} {order}, {side}: {size / min(each) / 1e9:.2f} GB/s,"
                    f" {1e6 * min(each) / len(reads):.1f} us a read, {pace:.2f} of the memory map"
                )
    measure_first(cache, options.repeats)
    for order in ("random", "sequential"):
        for side in ("bare array", "h5py", "(1, D) chunks, held open", "(1, D) chunks, opened", "memory map"):
            low, middle, high = compare(rounds[order, side], rounds[order, "embedkit"])
            print(f"{order}, pace of embedkit over {side}: {middle:.2f} (quartiles {low:.2f} to {high:.2f})")
    print(f"ratio {compare(rounds['sequential', 'memory map'], rounds['sequential', 'embedkit'])[1]:.2f}")


def compare(others: list[list[float]], own: list[list[float]]) -> list[float]:
    """Quartiles over rounds of the seconds of one side over those of another, all token sets together.

    A slow side has but a few rounds, the first ones.
    """
    shares = [
        sum(other) / sum(each) for other, each in zip(zip(*others, strict=False), zip(*own, strict=False), strict=False)
    ]
    return [float(value) for value in np.percentile(shares, [25, 50, 75])]


def measure_first(cache: Cache, repeats: int) -> None:
    """Prints what the first reading of all tokens takes, bytes held against their checksums, and without that."""
    ids = sorted(set(cache.stacks["case_id"]))
    size = sum(cache.read(stack, name).nbytes for stack in range(len(cache)) for name in TOKEN_SETS)

    def unchecked() -> Cache:
        fresh = open_cache(cache.path)
        fresh._rows_of = lambda number, name, first, count: fresh._map(number)[name][first : first + count]  # type: ignore[method-assign]
        return fresh

    def take(fresh: Cache) -> None:
        for stack in range(len(fresh)):
            for name in TOKEN_SETS:
                fresh.read(stack, name).view(np.uint16).sum(dtype=np.uint64)

    for what, work in (("summed", take), ("copied for training", lambda fresh: load_bags(fresh, ids, TOKEN_SETS))):
        best = [float("inf")] * 2
        for _ in range(repeats):
            for side, make in enumerate((lambda: open_cache(cache.path), unchecked)):
                fresh = make()
                started = time.process_time()
                work(fresh)
                best[side] = min(best[side], time.process_time() - started)
        checked, plain = (size / each / 1e9 for each in best)
        print(
            f"first reading, {what}: {checked:.2f} GB/s with checksums, {plain:.2f} without, checksums"
            f" {1e3 * (best[0] - best[1]) / (size / 1e9):.0f} ms per GB, {best[0] / best[1] - 1:+.0%}"
        )


def time_readers(
    readers: dict[str, Reader], reads: list[tuple[int, int, int]], repeats: int
) -> tuple[int, dict[str, list[float]]]:
    """Bytes that every reader touched, and its seconds in each round; the first, which warms up, is not counted."""
    seconds: dict[str, list[float]] = {side: [] for side in readers}
    sides = list(readers.items())
    found = set()
    for turn in range(repeats + 1):
        for side, read in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
            if turn > 2 and min(seconds[side]) > SLOW_S:
                continue
            total = size = 0
            started = time.process_time()
            for number, first, count in reads:
                tokens = read(number, first, count)
                total += int(tokens.view(np.uint16).sum(dtype=np.uint64))
                size += tokens.nbytes
            if turn:
                seconds[side].append(time.process_time() - started)
            found.add((size, total))
    if len(found) != 1:
        raise SystemExit(f"the sides read different tokens: {sorted(found)}")
    return size, seconds


def read_cache(cache: Cache, token_set: str) -> Reader:
    return lambda number, first, count: cache.read(number, token_set)[first : first + count]


def read_map(cache: Cache, token_set: str, *, bare: bool = False) -> Reader:
    maps: list[NDArray[np.float16]] = [
        np.memmap(shard.path, mode="r", dtype=place.dtype, shape=place.shape, offset=place.offset)
        for shard in cache.shards
        for place in (shard.arrays[f"tokens/{token_set}"],)
    ]
    if bare:
        maps = [mapped.view(np.ndarray) for mapped in maps]
    places = cache.stacks.select("shard_number", "first_row").rows()

    def read(number: int, first: int, count: int) -> NDArray[np.float16]:
        shard, start = places[number]
        tokens: NDArray[np.float16] = maps[shard][start + first : start + first + count]
        return tokens

    return read


def read_hdf5(cache: Cache, token_set: str, stack: ExitStack) -> Reader:
    files = [stack.enter_context(h5py.File(shard.path, "r", locking=False)) for shard in cache.shards]
    arrays = [file[f"tokens/{token_set}"] for file in files]
    places = cache.stacks.select("shard_number", "first_row").rows()

    def read(number: int, first: int, count: int) -> NDArray[np.float16]:
        shard, start = places[number]
        tokens: NDArray[np.float16] = arrays[shard][start + first : start + first + count]
        return tokens

    return read


def write_chunked(cache: Cache, token_set: str, folder: Path) -> list[Path]:
    """The same tokens rewritten: `features` [tokens dim] in chunks of one token, one file per stack."""
    folder.mkdir()
    dim = cache.token_sets[token_set].shape[-1]
    files = [folder / f"{number}.h5" for number in range(len(cache))]
    for number, path in enumerate(files):
        tokens = cache.read(number, token_set).reshape(-1, dim)
        with h5py.File(path, "w") as file:
            file.create_dataset("features", data=tokens, chunks=(1, dim), maxshape=(None, dim))
    return files


def read_chunked(cache: Cache, token_set: str, files: list[Path], stack: ExitStack | None) -> Reader:
    """Reads what `write_chunked` wrote; without a ``stack`` that keeps the files open, opens one for every read."""
    per_slice = int(np.prod(cache.token_sets[token_set].shape[:-1]))

    def take(file: h5py.File, first: int, count: int) -> NDArray[np.float16]:
        return np.asarray(file["features"][first * per_slice : (first + count) * per_slice], np.float16)

    def read(number: int, first: int, count: int) -> NDArray[np.float16]:
        with h5py.File(files[number], "r", locking=False) as file:
            return take(file, first, count)

    if stack is None:
        return read
    held = [stack.enter_context(h5py.File(path, "r", locking=False)) for path in files]
    return lambda number, first, count: take(held[number], first, count)


def write_cache(options: argparse.Namespace, path: Path) -> Cache:
    create_cache(path, RECIPE)
    for part in np.array_split(np.arange(options.stacks), options.shards):
        write_shard(path, RECIPE, [make_stack(int(number), options.slices, options.dim) for number in part])
    return open_cache(path)


def make_stack(number: int, slices: int, dim: int) -> StackTokens:
    random = np.random.default_rng(number)
    shapes = {"cls:12": (slices, dim), "patch@7:12": (slices, 49, dim)}
    return StackTokens(
        case_id=f"case-{number:05d}",
        patient_id=f"case-{number:05d}",
        view="image",
        plane="axial",
        sources=("image",),
        indices=np.arange(slices, dtype=np.int32),
        positions_mm=np.arange(slices, dtype=np.float32),
        blank=np.zeros(slices, bool),
        plane_shape=(224, 224),
        box=(0, 0, 224, 224),
        source_shape=(slices, 224, 224),
        source_affine=np.eye(4),
        source_bytes=1,
        source_digest="0" * 64,
        tokens={name: random.random(shape, np.float32).astype(np.float16) for name, shape in shapes.items()},
    )


if __name__ == "__main__":
    main()

"""What similar cases have in common, on real scans: the default index, asked about more than what it is judged by.

Usage: python benchmarks/retrieval_meaning.py [--data ../shared/data] [--cache-dir FOLDER] [--weights FILE]
                                              [--backbones deit_tiny,scattering] [--parts hippocampus,lgg,regions]

`hippocampus`: the other hippocampus of the same patient, found by the vectors alone; by those of the query mirrored
left to right in its grid of patches, as the two sides are mirror images; and by the shape of the volumes in voxels,
without any image. `lgg`: whether the nearest other patient was scanned at the same institution (of the TCGA code), and
how often it has the tumour on the same side, among all and among other institutions. `regions`: the tumour's mask as
the query; in the best pair of slices of each of the five cases found, how many of the patches that the tumour's were
found in touch that patient's tumour, beside as many patches at the same places of the slice (`same place`) and any
patch (`chance`).

95% intervals are over patients. The caches are those of retrieval.py. The last line is `ratio N.NN`: patches on the
tumour over those at the same place.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embedkit.cache import Cache, open_cache
from embedkit.embeddings import parse_embeddings
from embedkit.index import Index
from embedkit.indexbuilding import build_index
from embedkit.matching import Match, SlicePair
from embedkit.plots import describe_interval
from embedkit.queries import read_case_query
from embedkit.regions import Region
from embedkit.retrieval import match_cases, search
from embedkit.searchevaluation import evaluate_search
from embedkit.volumes import read_volume
from retrieval_scores import bound, list_firsts, print_line, summarise
from retrieval_truths import TRUTHS, Backbone, list_backbones, make_cache, parse_options, read_tables

FOUND = 5

FloatArray = NDArray[np.float32]


def main() -> None:
    options = parse_options(__doc__, parts="hippocampus,lgg,regions")
    known = list_backbones(options.weights)
    ratios = []
    for name in options.backbones.split(","):
        with tempfile.TemporaryDirectory() as folder:
            ratios += measure(name, known[name], options, Path(folder))
    print(f"ratio {np.mean(ratios) if ratios else float('nan'):.2f}")


def measure(name: str, backbone: Backbone, options: argparse.Namespace, folder: Path) -> list[float]:
    """Prints the parts asked for; the ratio of the regions, where they are among them."""
    parts, ratios = options.parts.split(","), []
    for truth in TRUTHS[:2]:
        if truth.name not in parts and not (truth.name == "lgg" and "regions" in parts):
            continue
        manifest, labels = read_tables(truth, options.data, options.cache_dir)
        cache = open_cache(make_cache(truth, manifest, backbone, options.cache_dir / f"{truth.name}-{name}"))
        labels = labels.with_columns(institution=pl.col("case_id").str.slice(5, 2))
        embedding = f"aligned:{backbone.patch}"
        index = build_index(cache.path, folder / truth.name, embedding=embedding, labels=labels)
        print(f"\n{truth.name}, {backbone.name}\n", flush=True)
        if truth.name == "hippocampus":
            print_twins(index, cache, manifest)
        if "lgg" in parts and truth.name == "lgg":
            print_institutions(index)
        if "regions" in parts and truth.name == "lgg":
            ratios.append(print_regions(index, cache, options.data / "lgg"))
    return ratios


def print_twins(index: Index, cache: Cache, manifest: pl.DataFrame) -> None:
    """How well the other side is found as it is, mirrored, and by the shape of the volumes alone."""
    print("| | Level | Rerank | top-1 | top-5 | MRR |\n|---|---|---|---|---|---|")
    print_line("", "the default's vectors", "none", summarise(list_firsts(index, TRUTHS[0], "none")))
    similarity = np.zeros((len(index), len(index)), np.float32)
    mirrored = embed_mirrored(index, cache)
    found = index.search(np.stack([mirrored[case] for case in index.cases["case_id"]]), len(index))
    rows = index.number_cases(found["case_id"].to_list())
    similarity[found["query"].to_numpy(), rows] = found["similarity"].to_numpy()
    print_line("", "the same, query mirrored", "none", summarise(rank_twins(index, similarity)))
    paths = dict(manifest.select("case_id", "path").iter_rows())
    shapes = np.array([read_volume(paths[case]).array.shape for case in index.cases["case_id"]], np.float32)
    distance = np.abs(shapes[:, None] - shapes).sum(2)
    print_line("", "shape in voxels", "none", summarise(rank_twins(index, -distance)))


def embed_mirrored(index: Index, cache: Cache) -> dict[str, FloatArray]:
    """By case its vector as if its tokens lay in a mirror, left to right of an axial slice."""
    (embedding,) = parse_embeddings(index.embedding, cache)
    side = int(cache.token_sets[embedding.token_set].shape[0] ** 0.5)
    found = {}
    for stack, case in cache.stacks.select("stack", "case_id").iter_rows():
        tokens = cache.read(stack, embedding.token_set)[~cache.slices(stack).blank]
        grid = tokens.reshape(len(tokens), side, side, -1)[:, :, ::-1]
        found[case] = embedding.stack_vector(grid.reshape(tokens.shape)) - index.extras["view_means"][0]
    return found


def rank_twins(index: Index, similarity: FloatArray) -> pl.DataFrame:
    """A row per query with the place of the other case of its patient; of equals half come before."""
    patients = index.cases["patient_id"].to_numpy()
    rows = []
    for row, case in enumerate(index.cases["case_id"]):
        others = np.arange(len(index)) != row
        right = others & (patients == patients[row])
        if right.any():
            best = similarity[row][right].max()
            wrong = similarity[row][others & ~right]
            place = 1 + int((wrong > best).sum()) + int((wrong == best).sum() / 2)
            rows.append({"case_id": case, "group": patients[row], "place": place})
    return pl.DataFrame(rows)


def print_institutions(index: Index) -> None:
    """How often the nearest other patient shares the institution, and the tumour's side."""
    print("| The nearest other patient | share | chance |\n|---|---|---|")
    for words, relevant, exclude_same in (
        ("is of the same institution", "institution", "patient_id"),
        ("has the tumour on the same side", "laterality", "patient_id"),
        ("of another institution has the tumour on the same side", "laterality", "institution"),
    ):
        for rerank in ("none", "ordered"):
            found = evaluate_search(index, relevant=relevant, k=(1,), exclude_same=exclude_same, rerank=rerank)
            by_name = {row["measure"]: row for row in found.table.iter_rows(named=True)}
            hit, chance = by_name["precision@1"], by_name["chance"]
            shown = f"{hit['value']:.3f} [{hit['low']:.3f}, {hit['high']:.3f}]"
            print(f"| {words}, rerank {rerank} | {shown} | {chance['value']:.3f} |", flush=True)


def print_regions(index: Index, cache: Cache, data: Path) -> float:
    """How often the patches in which a tumour is found are of a tumour; over those at the same place of the slice."""
    masks = dict(
        pl.read_csv(data / "manifest.csv").select("case_id", (f"{data}/" + pl.col("mask")).alias("mask")).iter_rows()
    )
    covers = {case: measure_covers(index, cache, case, Path(mask)) for case, mask in masks.items()}
    scores, patients = [], []
    for case, patient in index.cases.select("case_id", "patient_id").iter_rows():
        query = read_case_query(index, cache, case, region=Region("mask", mask=Path(masks[case])))
        found = search(index, query=query, k=FOUND, exclude_same="patient_id", cache=cache)["case_id"].to_list()
        matches = match_cases(index, query, found, cache=cache, order="ordered", by_patch=True)
        scores.append(
            np.mean([score_pair(match, covers[other]) for match, other in zip(matches, found, strict=True)], 0)
        )
        patients.append(patient)
    values = np.array(scores)
    print("\n| Patches that the tumour's were found in | touch a tumour |\n|---|---|")
    for column, words in enumerate(("best cosine", "same place", "chance")):
        print(f"| {words} | {describe_interval(bound(values[:, column], pl.Series(patients)))} |", flush=True)
    return float(values[:, 0].mean() / values[:, 1].mean())


def measure_covers(index: Index, cache: Cache, case: str, mask: Path) -> dict[str, NDArray[np.bool_]]:
    """By ``view/plane`` which patches touch the tumour, [slices patches], by the rows of the stack."""
    region, covers = Region("mask", mask=mask), {}
    patches = index.extras["slice_centres"].shape[1]
    for stack, view, plane in (
        cache.stacks.filter(pl.col("case_id") == case).select("stack", "view", "plane").iter_rows()
    ):
        covers[f"{view}/{plane}"] = region.measure_cover(cache.record(stack), cache.slices(stack).indices, patches) > 0
    return covers


def score_pair(match: Match, covers: dict[str, NDArray[np.bool_]]) -> tuple[float, float, float]:
    """Shares that touch the tumour: of the patches found, of those at the same place, and of all of the case."""
    pair: SlicePair = match.top(1)[0]
    cover = covers[pair.view]
    found = match.locate_region(pair).reshape(-1)
    stack = match.query[pair.view]
    assert stack.votes is not None
    same = stack.votes[np.searchsorted(stack.rows, pair.query_row)] > 0
    row = cover[pair.other_row]
    return float(row[found].mean()), float(row[same].mean()), float(cover[match.other[pair.view].rows].mean())


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()

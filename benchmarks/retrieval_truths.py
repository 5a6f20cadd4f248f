"""Owns what similar cases are judged on: ground truths, backbones and levels, their caches and indexes, and pixels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import SimpleITK as sitk
from numpy.typing import NDArray

from embedkit.cache import open_cache
from embedkit.extraction import extract
from embedkit.index import Index
from embedkit.indexbuilding import build_index
from embedkit.indexwriting import rewrite_index, write_index
from embedkit.recipe import Recipe
from embedkit.volumes import read_volume

SHARED = Path(__file__).resolve().parents[2] / "shared"
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


def parse_options(doc: str | None, **defaults: str) -> argparse.Namespace:
    """The options that all scripts on these truths share, and further ones of a text each."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    parser.add_argument("--cache-dir", type=Path, default=Path("retrieval-caches"))
    parser.add_argument("--weights", type=Path, default=SHARED / "weights" / "deit_tiny_patch16_224.safetensors")
    parser.add_argument("--backbones", default="deit_tiny,scattering")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_args()


def list_backbones(weights: Path) -> dict[str, Backbone]:
    """The backbones compared, by the names that --backbones takes."""
    return {
        "deit_tiny": Backbone("deit_tiny_patch16_224", "cls:12", "patch@4:12", weights),
        "scattering": Backbone("embedkit/scattering", "cls:2", "patch@4:2"),
    }


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

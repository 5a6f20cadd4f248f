"""Tails: the blocks after a cut travel with the cache, give what the backbone gives, and can be adapted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import timm
import torch
from safetensors.torch import load_file, save, save_file

from embedkit.backbones import load_backbone
from embedkit.cache import Cache, open_cache
from embedkit.errors import CacheError, HeadError
from embedkit.exporting import export_run
from embedkit.extraction import extract
from embedkit.features import Backbone
from embedkit.inspection import verify_cache
from embedkit.ladder import list_settings, list_wanting
from embedkit.lora import LowRankUpdates
from embedkit.packing import pack_cache
from embedkit.planning import make_recipe
from embedkit.runs import open_run, predict
from embedkit.segmentation import segment
from embedkit.tails import keep_tail, load_tail, read_tail_shape, tail_path
from embedkit.training import train
from embedkit.volumes import read_volume

TINY = "test_vit"  # timm's own for tests: 6 blocks of 64 numbers


def save_weights(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    file = folder / f"{name}.safetensors"
    save_file(timm.create_model(name, pretrained=False, num_classes=0).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(TINY, tmp_path_factory.mktemp("weights"))


def load(name: str, weights: Path, *, size: int = 64) -> Backbone:
    return load_backbone(name, weights=weights, image_size=size)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (TINY, 160),
        ("test_vit3", 64),
        ("vit_small_patch14_reg4_dinov2", 56),
        ("eva02_tiny_patch14_224", 56),
        ("vit_small_patch16_dinov3", 64),
        ("vit_tiny_r_s16_p8_224", 64),
    ],
)
def test_the_tail_gives_exactly_what_the_backbone_gives(name: str, size: int, tmp_path: Path) -> None:
    backbone = load(name, save_weights(name, tmp_path), size=size)
    recipe = make_recipe(backbone.info, tokens=["cls"], cut=2, precision="fp32")
    keep_tail(tmp_path, backbone, recipe)
    tail, layer = load_tail(tmp_path, recipe.fingerprint), backbone.info.depth - 2
    torch.manual_seed(1)
    given = backbone.forward_layers(torch.rand(2, 1, size, size), [layer, backbone.info.depth])
    sequence, last = given.layers[layer].sequence, given.layers[backbone.info.depth]
    assert sequence is not None
    for updates in ((), zero_updates(tail.shape.linears, 2)):
        summary, patches = tail.run(sequence, updates)
        assert torch.equal(summary, backbone.run_tail(sequence, layer).summary)  # type: ignore[arg-type]
        torch.testing.assert_close(summary, last.summary, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(patches, last.patches, rtol=1e-4, atol=1e-5)


def zero_updates(linears: Any, blocks: int, **options: Any) -> list[dict[str, torch.Tensor]]:
    """Of an adaptation as it starts."""
    settings = {"rank": 4, "alpha": 8.0, "projections": ("q", "v", "proj", "mlp")} | options
    found: list[dict[str, torch.Tensor]] = LowRankUpdates(linears, blocks, **settings)()
    assert all((change == 0).all() for block in found for change in block.values())
    return found


def test_updates_are_scaled_products_in_the_rows_of_their_projection() -> None:
    linears = [("attn.qkv.weight", 12, 4), ("attn.proj.weight", 4, 4), ("mlp.fc1.weight", 8, 4)]
    updates = LowRankUpdates(linears, 2, rank=2, alpha=6.0, projections=("k", "proj"))
    with torch.no_grad():
        for parameter in updates.parameters():
            parameter.normal_()
    found = updates()
    assert [sorted(block) for block in found] == [["attn.proj.weight", "attn.qkv.weight"]] * 2
    whole = found[1]["attn.qkv.weight"]
    assert (whole[:4] == 0).all() and (whole[8:] == 0).all()
    torch.testing.assert_close(whole[4:8], 3.0 * updates.up[2] @ updates.down[2])
    torch.testing.assert_close(found[0]["attn.proj.weight"], 3.0 * updates.up[1] @ updates.down[1])
    assert sum(parameter.numel() for parameter in updates.parameters()) == 2 * 2 * (4 + 4) * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0, expected 1 or more"),
        ({"projections": ("q", "z")}, "projection 'z' is unknown, expected some of q, k, v, proj, mlp"),
        ({"projections": ()}, "no projection to adapt was given"),
        ({"projections": ("proj",)}, "these blocks have no proj to adapt; their weights are attn.qkv.weight"),
    ],
)
def test_adaptations_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadError, match=message):
        zero_updates([("attn.qkv.weight", 12, 4)], 1, **options)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> tuple[Path, str]:
    """A folder with a tail, and its fingerprint."""
    folder = tmp_path_factory.mktemp("kept")
    backbone = load(TINY, tiny_weights)
    recipe = make_recipe(backbone.info, tokens=["cls"], cut=2, precision="fp32")
    keep_tail(folder, backbone, recipe)
    return folder, recipe.fingerprint


def test_a_cache_without_cut_tokens_keeps_no_tail(tmp_path: Path, tiny_weights: Path) -> None:
    backbone = load(TINY, tiny_weights)
    keep_tail(tmp_path, backbone, make_recipe(backbone.info, tokens=["cls"], precision="fp32"))
    assert list(tmp_path.iterdir()) == []


def test_another_writer_keeps_what_is_there(kept: tuple[Path, str], tiny_weights: Path) -> None:
    folder, _ = kept
    before = tail_path(folder).read_bytes()
    backbone = load(TINY, tiny_weights)
    keep_tail(folder, backbone, make_recipe(backbone.info, tokens=["cls"], cut=2, precision="fp32"))
    assert tail_path(folder).read_bytes() == before
    with pytest.raises(CacheError, match="is of recipe"):
        keep_tail(folder, backbone, make_recipe(backbone.info, tokens=["cls"], cut=1, precision="fp32"))


def rewrite(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Writes the tail again with another header."""

    def write(file: Path) -> None:
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            header = json.loads(opened.metadata()["embedkit-tail"])
        change(header)
        file.write_bytes(save(load_file(file), {"embedkit-tail": json.dumps(header)}))

    return write


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGES = [
    (lambda file: file.unlink(), "not the blocks that they enter: .* is missing; run the same embedkit extract again"),
    (lambda file: file.write_bytes(b"nonsense"), "is damaged .*; delete it and run the same embedkit extract again"),
    (lambda file: file.write_bytes(file.read_bytes()[:-9]), "is damaged"),
    (flip_last_byte, "its weights are not what was written"),
    (rewrite(lambda header: header.update(format="other")), "its format is 'other'"),
    (rewrite(lambda header: header.update(format_version=2)), "format version 2, newer than 1: upgrade embedkit"),
    (rewrite(lambda header: header.pop("sha256")), "is damaged"),
    (rewrite(lambda header: header["shape"].update(depth="deep")), "is damaged"),
    (rewrite(lambda header: header.update(fingerprint="0" * 16)), "is of recipe 0000000000000000, this cache has"),
    (rewrite(lambda header: header.update(backbone="vit_tiny_patch16_224")), "does not fit vit_tiny_patch16_224"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_tail_that_will_not_do_is_refused(
    kept: tuple[Path, str], damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder, fingerprint = kept
    shutil.copy(tail_path(folder), tmp_path)
    damage(tail_path(tmp_path))
    with pytest.raises(CacheError, match=message):
        load_tail(tmp_path, fingerprint)


def write_cases(folder: Path, *, cases: int = 12) -> tuple[Path, pl.DataFrame]:
    """Volumes of noise; every second one is bright on its left half in some slices."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for case in range(cases):
        volume = generator.normal(100, 10, (3, 64, 64)).astype(np.float32)
        volume[1:, :, :32] += 60 * (case % 2)
        np.save(folder / f"c{case:02}.npy", volume)
    names = [f"c{case:02}" for case in range(cases)]
    frame = pl.DataFrame({"case_id": names, "path": [f"{name}.npy" for name in names]})
    frame.write_csv(folder / "cases.csv")
    return folder / "cases.csv", pl.DataFrame({"case_id": names, "bright": [case % 2 for case in range(cases)]})


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> tuple[Cache, pl.DataFrame]:
    folder = tmp_path_factory.mktemp("extracted")
    manifest, labels = write_cases(folder / "scans")
    options: dict[str, Any] = {"backbone": TINY, "weights": tiny_weights, "image_size": 64, "cut": 2}
    options["tokens"] = ["cls", "attention"]
    extract(manifest, folder / "cache", **options, precision="fp32", device="cpu")
    tail_path(folder / "cache").unlink()
    again = extract(manifest, folder / "cache", **options, precision="fp32", device="cpu")
    assert (again.cases_done, again.cases_before) == (0, 12)
    return open_cache(folder / "cache"), labels


def test_extracting_again_adds_the_tail_and_packing_carries_it(
    extracted: tuple[Cache, pl.DataFrame], tmp_path: Path
) -> None:
    cache, _ = extracted
    shape = cache.tail_shape()
    assert (shape.layer, shape.depth, shape.prefix, shape.grid) == (4, 6, 1, (4, 4))
    pack_cache(cache.path, tmp_path / "packed.h5")
    pack_cache(cache.path, tmp_path / "packed", shard_bytes=1 << 20)
    for packed in (tmp_path / "packed.h5", tmp_path / "packed"):
        assert read_tail_shape(packed, cache.fingerprint) == shape
        assert verify_cache(packed) == []
        flip_last_byte(tail_path(packed))
        (damage,) = verify_cache(packed)
        assert "its weights are not what was written" in str(damage)


def test_advice_would_try_every_number_of_blocks_that_the_tail_has(extracted: tuple[Cache, pl.DataFrame]) -> None:
    cache, _ = extracted
    names = [str(setting) for setting in list_settings(cache, "binary")]
    assert names == ["logistic on cls:6", "query on cls:6", "tail (blocks=1) on cut:4", "tail (blocks=2) on cut:4"]
    assert not any("cut" in line for line in list_wanting(cache, "binary"))


def test_a_tail_is_trained_predicts_and_explains(extracted: tuple[Cache, pl.DataFrame], tmp_path: Path) -> None:
    cache, labels = extracted
    result = train(
        cache,
        labels,
        targets=["bright"],
        heads=["tail"],
        out=tmp_path,
        folds=2,
        resamples=20,
        fit_options={"epochs": 12, "precision": "fp32", "holdout": 0.3, "batch_size": 4, "learning_rate": 5e-3},
        head_options={"tail": {"rank": 2, "grid": 2, "blocks": 1}},
    )
    assert result.table.filter(pl.col("head") == "tail")["auroc"][0] > 0.9
    run = open_run(tmp_path / "bright.tail")
    assert run.record.shape.tail == cache.tail_shape()
    weights = load_file(tmp_path / "bright.tail" / "weights.safetensors")
    assert not any("blocks" in name or "norm" in name for name in weights)
    assert any(value.abs().max() > 0 for name, value in weights.items() if ".up." in name)
    with pytest.raises(HeadError, match="head 'tail' cannot be exported: it runs blocks of the backbone"):
        export_run(run, tmp_path / "tail.pt2", format="torch")
    found = predict(run, cache).join(labels, on="case_id")
    scores, truth = found["score"].to_numpy(), found["bright"].to_numpy()
    assert scores[truth == 1].mean() > scores[truth == 0].mean() + 0.2
    for method in ("contribution", "occlusion", "attention"):
        (shown,) = run.find_evidence(cache, "c01", method=method).scores.values()
        assert shown.shape == (3, 4, 4)
        assert shown[:, :, :2].sum() > shown[:, :, 2:].sum()
    (rows,) = run.find_evidence(cache, "c01", method="backbone").scores.values()
    assert rows.shape == (3, 4, 4) and (rows > 0).all()
    slices = run.find_evidence(cache, "c01").slice_attention
    assert slices is not None
    attention = cache.read(int(cache.stacks.filter(pl.col("case_id") == "c01")["stack"][0]), "attention:6")
    expected = slices["image/axial"][:, None] * attention.astype(np.float32).mean(1)
    np.testing.assert_allclose(rows.reshape(3, 16), expected, rtol=0.05)


def test_a_tail_learns_masks_on_all_its_patches_and_draws_them(
    extracted: tuple[Cache, pl.DataFrame], tmp_path: Path
) -> None:
    cache, labels = extracted
    scans = cache.path.parent / "scans"
    mask = np.zeros((3, 64, 64), np.uint8)
    mask[1:, :, :32] = 1
    np.save(tmp_path / "mask.npy", mask)
    odd = pl.when(pl.col("case_id").str.tail(1).cast(pl.Int64) % 2 == 1)
    table = pl.read_csv(scans / "cases.csv").with_columns(
        path=str(scans) + "/" + pl.col("path"), mask=odd.then(pl.lit(str(tmp_path / "mask.npy")))
    )
    fit = {"epochs": 12, "precision": "fp32", "holdout": 0.3, "batch_size": 4, "learning_rate": 5e-3}
    small = {"rank": 2, "grid": 2, "blocks": 1, "dropout": 0.0}
    given: dict[str, Any] = {"targets": ["bright"], "heads": ["tail"], "folds": 2, "resamples": 20}
    train(cache, labels, masks=table, out=tmp_path, fit_options=fit, head_options={"tail": small}, **given)
    run = open_run(tmp_path / "bright.tail")
    assert run.record.masks == 6 and run.metrics["dice"].value > 0.8
    (drawn,) = segment(run, cache, tmp_path / "masks", case_ids=["c03"], held_out=True)
    found = read_volume(drawn.path).array > 0
    assert 2 * (found & (mask > 0)).sum() / (found.sum() + mask.sum()) > 0.7


def test_a_cache_whose_tail_is_gone_says_so_before_training(
    extracted: tuple[Cache, pl.DataFrame], tmp_path: Path
) -> None:
    cache, labels = extracted
    shutil.copytree(cache.path, tmp_path / "cache")
    tail_path(tmp_path / "cache").unlink()
    with pytest.raises(CacheError, match="not the blocks that they enter"):
        train(tmp_path / "cache", labels, targets=["bright"], heads=["tail"], out=tmp_path / "runs")

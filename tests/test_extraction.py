"""Extraction from real files to a cache: what lands, what is recorded, what a second call repeats."""

from __future__ import annotations

import errno
import gzip
import os
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from embedkit import slices, voxels
from embedkit.backbones import load_backbone
from embedkit.cache import open_cache
from embedkit.errors import CacheError, ManifestError, OptionError, RecipeError
from embedkit.extraction import ExtractionProgress, ExtractionSummary, extract
from embedkit.failures import read_failures
from embedkit.planning import choose_device, make_recipe
from embedkit.volumes import write_volume

SCATTERING = {"backbone": "embedkit/scattering", "image_size": 64, "tokens": ["cls", "patch@2"], "preview": 16}


AFFINE = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]])
"""Of an array in canonical order: slices 3 mm apart going up, rows to posterior, columns to the left."""


def write_case(folder: Path, name: str, *, seed: int, slices: int = 5, blank: tuple[int, ...] = ()) -> str:
    generator = np.random.default_rng(seed)
    array = generator.normal(100, 30, (slices, 20, 24)).astype(np.float32)
    array[list(blank)] = 0
    write_volume(folder / f"{name}.nii.gz", array, AFFINE)
    return f"{name}.nii.gz"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Four cases of one view, of 5, 3, 1 and 7 slices; the last has two blank slices."""
    rows = [
        {"case_id": "a", "path": write_case(tmp_path, "a", seed=0)},
        {"case_id": "b", "path": write_case(tmp_path, "b", seed=1, slices=3)},
        {"case_id": "c", "path": write_case(tmp_path, "c", seed=2, slices=1)},
        {"case_id": "d", "path": write_case(tmp_path, "d", seed=3, slices=7, blank=(0, 6))},
    ]
    pl.DataFrame(rows).write_csv(tmp_path / "cases.csv")
    return tmp_path / "cases.csv"


def run(manifest: Path, out: Path, **changes: object) -> ExtractionSummary:
    return extract(manifest, out, **{**SCATTERING, **changes})  # type: ignore[arg-type]


def read_all(cache_path: Path) -> dict[str, np.ndarray]:
    with open_cache(cache_path) as cache:
        return {
            f"{case}/{view}/{plane}/{name}": np.array(cache.read(stack, name))
            for stack, case, view, plane in cache.stacks.select("stack", "case_id", "view", "plane").iter_rows()
            for name in cache.token_sets
        }


def test_every_case_lands_with_its_slices_and_blank_ones_hold_zeros(manifest: Path, tmp_path: Path) -> None:
    summary = run(manifest, tmp_path / "cache", batch_size=4)
    assert (summary.cases, summary.cases_done, summary.slices, summary.blank_slices) == (4, 4, 16, 2)
    with open_cache(tmp_path / "cache") as cache:
        counts = dict(cache.stacks.select("case_id", "count").iter_rows())
        assert counts == {"a": 5, "b": 3, "c": 1, "d": 7}
        last = cache.slices(3)
        assert last.blank.tolist() == [True, False, False, False, False, False, True]
        assert last.positions_mm.tolist() == [0, 3, 6, 9, 12, 15, 18]
        tokens = cache.read(3, "patch@2:2")
        assert not tokens[[0, 6]].any() and tokens[1:6].any((1, 2)).all()
        assert cache.preview(3) is not None


def test_tokens_do_not_depend_on_batch_size_or_neighbours(manifest: Path, tmp_path: Path) -> None:
    run(manifest, tmp_path / "one", batch_size=1)
    run(manifest, tmp_path / "many", batch_size=32, workers=1)
    one, many = read_all(tmp_path / "one"), read_all(tmp_path / "many")
    assert one.keys() == many.keys()
    for name, tokens in one.items():
        np.testing.assert_allclose(tokens.astype(float), many[name].astype(float), rtol=2e-3, atol=2e-3, err_msg=name)


def test_tokens_equal_a_direct_run_of_the_backbone(manifest: Path, tmp_path: Path) -> None:
    from embedkit.slices import plan_stacks, render_slices
    from embedkit.volumes import read_volume

    run(manifest, tmp_path / "cache", batch_size=3)
    with open_cache(tmp_path / "cache") as cache:
        backbone = load_backbone("embedkit/scattering", image_size=64)
        volumes = {"image": read_volume(tmp_path / "a.nii.gz")}
        (stack,) = plan_stacks(volumes, cache.recipe)
        images, _ = render_slices(stack, volumes, cache.recipe, 0, 5)
        with torch.inference_mode():
            direct = backbone.forward_layers(images, [2]).layers[2].summary
        assert direct is not None
        np.testing.assert_allclose(cache.read(0, "cls:2"), direct.numpy(), rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tokens_of_a_gpu_are_those_of_the_cpu_however_batches_fall(manifest: Path, tmp_path: Path) -> None:
    run(manifest, tmp_path / "cpu", device="cpu")
    expected = read_all(tmp_path / "cpu")
    for batch_size in (1, 3, 32):
        out = tmp_path / f"cuda{batch_size}"
        run(manifest, out, device="cuda", batch_size=batch_size)
        for name, tokens in read_all(out).items():
            np.testing.assert_allclose(
                tokens.astype(float), expected[name].astype(float), rtol=1e-2, atol=1e-2, err_msg=name
            )


def test_resume_repeats_nothing_finished(manifest: Path, tmp_path: Path) -> None:
    run(manifest, tmp_path / "cache")
    before = sorted((tmp_path / "cache" / "shards").iterdir())
    again = run(manifest, tmp_path / "cache")
    assert (again.cases_before, again.cases_done, again.slices) == (4, 0, 0)
    assert sorted((tmp_path / "cache" / "shards").iterdir()) == before


def test_stop_keeps_finished_cases_and_the_next_call_gives_the_same_tokens(manifest: Path, tmp_path: Path) -> None:
    stop = threading.Event()

    def after_two(progress: ExtractionProgress) -> None:
        if progress.cases_done == 2:
            stop.set()

    halted = run(manifest, tmp_path / "cache", batch_size=2, on_progress=after_two, stop=stop)
    assert halted.interrupted and halted.cases_done == 2
    with open_cache(tmp_path / "cache") as cache:
        assert sorted(cache.stacks["case_id"]) == ["a", "b"]
    resumed = run(manifest, tmp_path / "cache", batch_size=2)
    assert (resumed.cases_before, resumed.cases_done, resumed.interrupted) == (2, 2, False)
    run(manifest, tmp_path / "whole", batch_size=2)
    parts, whole = read_all(tmp_path / "cache"), read_all(tmp_path / "whole")
    assert parts.keys() == whole.keys()
    assert all(np.array_equal(parts[name], whole[name]) for name in whole)


def test_a_bad_case_is_recorded_the_others_land_and_a_mended_one_is_taken_up(manifest: Path, tmp_path: Path) -> None:
    good = (tmp_path / "b.nii.gz").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(good[:100])
    summary = run(manifest, tmp_path / "cache")
    assert summary.cases_done == 3
    assert [failure.case_id for failure in summary.failures] == ["b"]
    assert "view image" in summary.failures[0].reason and "b.nii.gz" in summary.failures[0].reason
    assert [failure.case_id for failure in read_failures(tmp_path / "cache").failures] == ["b"]
    (tmp_path / "b.nii.gz").write_bytes(good)
    mended = run(manifest, tmp_path / "cache")
    assert (mended.cases_done, mended.failures) == (1, ())
    assert read_failures(tmp_path / "cache").failures == ()


def test_what_failed_in_a_case_is_replaced_by_what_fails_in_it_now(tmp_path: Path) -> None:
    rows = [
        {"case_id": "a", "view": "t1", "path": write_case(tmp_path, "a_t1", seed=0)},
        {"case_id": "a", "view": "t2", "path": write_case(tmp_path, "a_t2", seed=1)},
    ]
    pl.DataFrame(rows).write_csv(tmp_path / "cases.csv")
    first, second = (tmp_path / f"a_{view}.nii.gz" for view in ("t1", "t2"))
    good = first.read_bytes(), second.read_bytes()

    def failing() -> list[tuple[str, str]]:
        run(tmp_path / "cases.csv", tmp_path / "cache")
        return [(failure.view, failure.path) for failure in read_failures(tmp_path / "cache").failures]

    first.write_bytes(b"nothing")
    assert failing() == [("t1", "a_t1.nii.gz")]
    first.write_bytes(good[0])
    second.write_bytes(b"nothing")
    assert failing() == [("t2", "a_t2.nii.gz")]
    second.write_bytes(good[1])
    assert failing() == []


def test_no_slice_is_read_or_decoded_twice_for_several_planes_and_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(write_case(tmp_path, "a", seed=0, slices=7))
    inflated = gzip.decompress((tmp_path / path).read_bytes())
    read: dict[str, int] = {}
    decoded: list[int] = []
    copied: list[tuple[str, int]] = []
    real_read, real_inflate, real_copy = voxels._HashedFile.read, voxels.zlib.decompressobj, slices.copy_slices

    class Inflating:
        """zlib's own object, every byte that it gives counted."""

        def __init__(self, window: int) -> None:
            self._real = real_inflate(window)

        def decompress(self, data: bytes, most: int) -> bytes:
            part = self._real.decompress(data, most)
            decoded.append(len(part))
            return part

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    def reading(file: Any, *count: int) -> bytes:
        data = real_read(file, *count)
        read[file._file.name] = read.get(file._file.name, 0) + len(data)
        return data

    def copying(images: np.ndarray, chosen: Any) -> np.ndarray:
        found = real_copy(images, chosen)
        copied.append((str(images.shape), len(found)))
        return found

    monkeypatch.setattr(voxels._HashedFile, "read", reading)
    monkeypatch.setattr(voxels, "zlib", SimpleNamespace(decompressobj=Inflating, error=zlib.error))
    monkeypatch.setattr(slices, "copy_slices", copying)
    options = {"planes": ("axial", "coronal", "sagittal"), "window": ("range:0:100", "range:50:150", "percentile:1:99")}
    pl.DataFrame([{"case_id": "a", "path": str(path)}]).write_csv(tmp_path / "cases.csv")
    assert run(tmp_path / "cases.csv", tmp_path / "cache", batch_size=3, **options).slices > 7
    assert list(read.values()) == [(tmp_path / path).stat().st_size] and sum(decoded) == len(inflated)
    with open_cache(tmp_path / "cache") as cache:
        assert sum(count for _, count in copied) == cache.stacks["count"].sum()  # each once, for all three windows
        assert len({shape for shape, _ in copied}) == 3 == len(cache.stacks)


def test_a_case_fails_as_a_whole_when_one_view_is_unreadable(tmp_path: Path) -> None:
    rows = [
        {"case_id": "a", "view": "t1", "path": write_case(tmp_path, "a_t1", seed=0)},
        {"case_id": "a", "view": "t2", "path": "missing.nii.gz"},
        {"case_id": "b", "view": "t1", "path": write_case(tmp_path, "b_t1", seed=1)},
    ]
    pl.DataFrame(rows).write_csv(tmp_path / "cases.csv")
    summary = run(tmp_path / "cases.csv", tmp_path / "cache")
    assert [failure.case_id for failure in summary.failures] == ["a"]
    assert "view t2" in summary.failures[0].reason
    with open_cache(tmp_path / "cache") as cache:
        assert cache.stacks["case_id"].to_list() == ["b"]


def test_a_constant_image_fails_with_its_reason(manifest: Path, tmp_path: Path) -> None:
    write_volume(tmp_path / "c.nii.gz", np.full((4, 8, 8), 7, np.int16), AFFINE)
    summary = run(manifest, tmp_path / "cache")
    assert [failure.case_id for failure in summary.failures] == ["c"]
    assert "no content" in summary.failures[0].reason


def test_a_changed_source_is_extracted_anew_and_reported(manifest: Path, tmp_path: Path) -> None:
    run(manifest, tmp_path / "cache")
    old = read_all(tmp_path / "cache")
    write_case(tmp_path, "a", seed=99)
    summary = run(manifest, tmp_path / "cache")
    assert (summary.changed, summary.cases_done, summary.cases_before) == (("a",), 1, 3)
    new = read_all(tmp_path / "cache")
    assert not np.array_equal(old["a/image/axial/cls:2"], new["a/image/axial/cls:2"])
    assert np.array_equal(old["b/image/axial/cls:2"], new["b/image/axial/cls:2"])


def test_a_touched_file_of_the_same_bytes_is_not_extracted_again(manifest: Path, tmp_path: Path) -> None:
    run(manifest, tmp_path / "cache")
    os.utime(tmp_path / "a.nii.gz", ns=(1, 1))
    summary = run(manifest, tmp_path / "cache")
    assert (summary.changed, summary.cases_done, summary.cases_before) == ((), 0, 4)


def test_another_recipe_on_the_same_cache_is_refused_with_the_field(manifest: Path, tmp_path: Path) -> None:
    run(manifest, tmp_path / "cache")
    with pytest.raises(RecipeError, match=r"image_size is 64 there and 32 here.*another --out"):
        run(manifest, tmp_path / "cache", image_size=32)


def test_all_planes_and_three_channels_make_their_stacks(tmp_path: Path) -> None:
    views = ("pre", "flair", "post")
    rows = [
        {"case_id": case, "view": view, "path": write_case(tmp_path, f"{case}_{view}", seed=i)}
        for i, (case, view) in enumerate([("a", "pre"), ("a", "flair"), ("a", "post"), ("b", "flair")])
    ]
    pl.DataFrame(rows).write_csv(tmp_path / "cases.csv")
    planes = ("axial", "coronal", "sagittal")
    notices: list[str] = []
    options = {"fill": "flair", "planes": planes, "on_notice": notices.append}
    run(tmp_path / "cases.csv", tmp_path / "cache", channels=views, **options)
    assert notices == []
    with open_cache(tmp_path / "cache") as cache:
        assert cache.stacks.select("case_id", "view", "plane").rows() == [
            (case, "pre+flair+post", plane) for case in ("a", "b") for plane in planes
        ]
        assert cache.stacks["count"].to_list() == [5, 20, 24] * 2
        assert cache.stacks["sources"].to_list()[3] == ["flair", "flair", "flair"]


def test_a_channel_that_no_case_has_is_reported(manifest: Path, tmp_path: Path) -> None:
    """A cohort may lack a sequence altogether; a name that was misspelt looks the same."""
    notices: list[str] = []
    channels = ("image", "flare", "image")
    run(manifest, tmp_path / "cache", channels=channels, fill="image", part="1/2", on_notice=notices.append)
    assert notices == ["no case has a view 'flare' (there are image): 'image' stands for it in all 4 cases"]


def test_progress_counts_every_case_once(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "c.nii.gz").unlink()
    seen: list[ExtractionProgress] = []
    run(manifest, tmp_path / "cache", on_progress=seen.append)
    assert [(p.cases_done + p.cases_failed, p.cases) for p in seen] == [(i, 4) for i in range(5)]
    assert seen[-1].cases_failed == 1


def test_progress_moves_within_a_case(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedkit import account

    monkeypatch.setattr(account, "_TELL_EVERY_S", 0.0)
    seen: list[ExtractionProgress] = []
    summary = run(manifest, tmp_path / "cache", batch_size=2, on_progress=seen.append)
    slices = [progress.slices for progress in seen]
    assert 0 < next(progress for progress in seen if progress.slices).slices <= 2
    assert seen[1].cases_done == 0 and sorted(slices) == slices and slices[-1] == summary.slices


def test_two_extractions_at_once_give_one_right_cache(manifest: Path, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run(manifest, tmp_path / "cache")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    run(manifest, tmp_path / "alone")
    both, alone = read_all(tmp_path / "cache"), read_all(tmp_path / "alone")
    assert both.keys() == alone.keys() and all(np.array_equal(both[name], alone[name]) for name in alone)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_with_what_to_do(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CacheError, match="locked"):
        run(manifest, tmp_path / "locked" / "cache")


def test_a_cache_that_cannot_be_written_is_found_out_before_anything_is_computed(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(manifest, tmp_path / "cache", part="1/2")

    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("embedkit.folder.tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("embedkit.extraction.extract_stream", lambda *_, **__: pytest.fail("cases were computed"))
    with pytest.raises(CacheError, match=r"cannot write into the cache: .* is read-only"):
        run(manifest, tmp_path / "cache")
    monkeypatch.undo()
    monkeypatch.setattr("embedkit.folder.tempfile.TemporaryFile", refuse)
    again = run(manifest, tmp_path / "cache", part="1/2")  # nothing is left, so nothing need be written
    assert (again.cases_before, again.cases_done) == (2, 0)


def test_a_packed_copy_holds_the_same_tokens(manifest: Path, tmp_path: Path) -> None:
    from embedkit.packing import pack_cache

    run(manifest, tmp_path / "cache", shard_bytes=1)
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 4
    pack_cache(tmp_path / "cache", tmp_path / "packed.h5")
    folder, packed = read_all(tmp_path / "cache"), read_all(tmp_path / "packed.h5")
    assert folder.keys() == packed.keys() and all(np.array_equal(folder[name], packed[name]) for name in folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"planes": ["axial", "oblique"]}, "plane 'oblique' is unknown; expected one of axial, coronal, sagittal"),
        ({"crop": "tight"}, "crop 'tight' is unknown"),
        ({"resize": "squash"}, "resize 'squash' is unknown"),
        ({"dtype": "int4"}, "dtype 'int4' is unknown"),
        ({"precision": "fp8"}, "precision 'fp8' is unknown; expected one of auto, fp32, bf16, fp16"),
        ({"fill": "flair"}, "no channels are given"),
        ({"preview": 4096}, "preview is 4096 pixels"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"channels": ["a", "b"]}, "2 channels and 1 windows"),
        ({"planes": []}, "no plane given"),
        ({"device": "warp"}, "device 'warp' cannot be used here"),
    ],
)
def test_an_option_without_meaning_is_refused(
    manifest: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        run(manifest, tmp_path / "cache", **changes)
    assert not (tmp_path / "cache").exists()


def test_automatic_device_is_one_that_works() -> None:
    assert choose_device("auto").type in {"cuda", "mps", "cpu"}


def test_recipe_keeps_one_spelling_of_equal_options() -> None:
    info = load_backbone("embedkit/scattering", image_size=64).info
    one = make_recipe(info, tokens=["cls", "patch@2"], planes=["sagittal", "axial"], window="percentile:0.50:99.5")
    other = make_recipe(info, tokens=["patch@2:2", "cls:-1"], planes=["axial", "sagittal"], slices="all")
    assert one.fingerprint == other.fingerprint


@pytest.mark.realdata
def test_dicom_and_nifti_of_one_image_give_equal_tokens(real_data: Path, tmp_path: Path) -> None:
    nifti = real_data / "sts" / "nifti" / "STS_001"
    dicom = real_data / "sts" / "dicom" / "STS_001"
    for name, paths in {
        "nifti": [nifti / "MR_T1_image.nii.gz"],
        "dicom": [dicom / "MR_T1" / "image"],
    }.items():
        pl.DataFrame({"case_id": ["x"], "path": [str(path) for path in paths]}).write_csv(tmp_path / f"{name}.csv")
        run(tmp_path / f"{name}.csv", tmp_path / name, slices="count:8")
    one, other = read_all(tmp_path / "nifti"), read_all(tmp_path / "dicom")
    assert one.keys() == other.keys()
    for key, tokens in one.items():
        np.testing.assert_array_equal(tokens, other[key], err_msg=key)


def test_another_patient_for_a_cached_case_is_refused_so_that_no_patient_gets_into_two_folds(
    manifest: Path, tmp_path: Path
) -> None:
    run(manifest, tmp_path / "cache")
    pl.read_csv(manifest).with_columns(patient_id=pl.lit("p1")).write_csv(manifest)
    with pytest.raises(ManifestError, match=r"case a is of patient p1 in the manifest but of a in the cache"):
        run(manifest, tmp_path / "cache")


def test_a_view_that_left_the_manifest_is_refused_because_heads_would_train_on_it(tmp_path: Path) -> None:
    rows = [{"case_id": "a", "view": view, "path": write_case(tmp_path, view, seed=0)} for view in ("t1", "t2")]
    pl.DataFrame(rows).write_csv(tmp_path / "cases.csv")
    run(tmp_path / "cases.csv", tmp_path / "cache")
    pl.DataFrame(rows[:1]).write_csv(tmp_path / "cases.csv")
    with pytest.raises(ManifestError, match=r"the cache holds t2 of case a, which the manifest does not have"):
        run(tmp_path / "cases.csv", tmp_path / "cache")


def test_a_channel_that_went_missing_fails_its_case_alone(tmp_path: Path) -> None:
    rows = [
        {"case_id": case, "view": view, "path": write_case(tmp_path, f"{case}{view}", seed=0)}
        for case in ("a", "b")
        for view in ("x", "y", "z")
    ]
    pl.DataFrame(rows).write_csv(tmp_path / "cases.csv")
    run(tmp_path / "cases.csv", tmp_path / "cache", channels=("x", "y", "z"))
    pl.DataFrame(rows[:-1]).write_csv(tmp_path / "cases.csv")
    summary = run(tmp_path / "cases.csv", tmp_path / "cache", channels=("x", "y", "z"))
    assert [failure.case_id for failure in summary.failures] == ["b"]
    assert "lacks the view z" in summary.failures[0].reason
    assert summary.cases_before == 1


def test_the_record_of_failures_names_files_but_not_their_folders(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "b.nii.gz").write_bytes(b"nothing")
    summary = run(manifest, tmp_path / "cache")
    assert str(tmp_path) in summary.failures[0].reason
    (recorded,) = read_failures(tmp_path / "cache").failures
    assert "b.nii.gz" in recorded.reason and str(tmp_path) not in recorded.reason
    assert (recorded.view, recorded.path) == ("image", "b.nii.gz")


def test_tokens_outside_the_range_of_float16_fail_their_case_and_no_other(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedkit.forward import PendingTokens

    real = PendingTokens.result

    def overflowing(self: PendingTokens) -> dict[str, np.ndarray]:
        tokens = real(self)
        tokens["cls:2"][0] = np.inf
        return tokens

    monkeypatch.setattr(PendingTokens, "result", overflowing)
    summary = run(manifest, tmp_path / "cache", batch_size=64)
    assert [failure.case_id for failure in summary.failures] == ["a"]
    assert "outside float16's range" in summary.failures[0].reason
    assert summary.cases_done == 3

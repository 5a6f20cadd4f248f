"""One case on its way through extraction: spilled tokens, unforeseen errors, checked precision."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from embedkit import casework, pipeline, writing
from embedkit.backbones import load_backbone
from embedkit.cache import create_cache, open_cache
from embedkit.errors import BackboneError, CacheError, VolumeError
from embedkit.extraction import ExtractionSummary, extract, extract_cases
from embedkit.failures import read_failures
from embedkit.features import BackboneOutput, LayerTokens
from embedkit.forward import require_precision
from embedkit.pipeline import Rendered, compute_cases, fail_case
from embedkit.planning import make_recipe
from embedkit.readahead import Waits
from embedkit.sources import Case, group_cases
from embedkit.volumes import write_volume
from embedkit.writing import ShardWriter

CPU = torch.device("cpu")
AFFINE = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]])


@pytest.fixture
def manifest(tmp_path: Path) -> pl.DataFrame:
    generator = np.random.default_rng(0)
    rows = []
    for name in "abc":
        path = tmp_path / f"{name}.nii.gz"
        write_volume(path, generator.normal(100, 30, (6, 16, 16)).astype(np.float32), AFFINE)
        rows.append({"case_id": name, "patient_id": name, "view": "image", "path": str(path)})
    return pl.DataFrame(rows)


def extract_small(manifest: pl.DataFrame, out: Path, **options: Any) -> ExtractionSummary:
    tokens = ["cls", "patch"]
    return extract(manifest, out, backbone="embedkit/scattering", image_size=32, tokens=tokens, preview=8, **options)


def test_tokens_kept_in_a_file_are_the_same_and_leave_no_file(
    manifest: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_small(manifest, tmp_path / "memory")
    monkeypatch.setattr(casework, "SPILL_BYTES", 100)
    kept: list[type] = []
    real = casework.allocate

    def watched(*arguments: Any, **options: Any) -> object:
        array = real(*arguments, **options)
        kept.append(type(array))
        return array

    monkeypatch.setattr(casework, "allocate", watched)
    extract_small(manifest, tmp_path / "file")
    assert kept == [np.memmap] * 6
    one, other = open_cache(tmp_path / "memory"), open_cache(tmp_path / "file")
    for stack in range(3):
        for name in one.token_sets:
            np.testing.assert_array_equal(one.read(stack, name), other.read(stack, name))
    assert sorted(path.name for path in (tmp_path / "file").iterdir()) == ["recipe.json", "shards"]


@pytest.mark.parametrize("what", ["tokens of one stack", "voxels of b.nii.gz"])
def test_no_room_for_a_large_case_stops_the_run_keeps_what_is_finished_and_blames_no_case(
    what: str, manifest: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve, reserved = os.posix_fallocate, []

    def nearly_full(*arguments: int) -> None:
        reserved.append(arguments)
        if len(reserved) > kept:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(*arguments)

    if what.startswith("tokens"):
        monkeypatch.setattr(casework, "SPILL_BYTES", 100)
        kept = 2  # token sets of the first case
    else:
        monkeypatch.setattr("embedkit.sources.VOXEL_BYTES", 100)
        kept = 1
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", nearly_full)
        with pytest.raises(CacheError, match=rf"cannot keep 1 MiB of {what}: the disk .* is full; free some space"):
            extract_small(manifest, tmp_path / "cache", workers=1, batch_size=2)
    assert open_cache(tmp_path / "cache").stacks["case_id"].to_list() == ["a"]
    assert not (tmp_path / "cache" / "failures.jsonl").exists()
    assert extract_small(manifest, tmp_path / "cache").cases_before == 1


@pytest.mark.parametrize("stage", ["read_case", "render_slices"])
def test_an_unforeseen_error_fails_its_case_alone_and_tells_where_it_happened(
    stage: str, manifest: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedkit import stream

    owner = stream if stage == "read_case" else pipeline
    real, calls = getattr(owner, stage), []

    def breaking(*arguments: object, **options: object) -> object:
        calls.append(stage)
        if len(calls) == 2:
            raise ZeroDivisionError("seven\ndivided by zero")
        return real(*arguments, **options)

    monkeypatch.setattr(owner, stage, breaking)
    summary = extract(
        manifest, tmp_path / "cache", backbone="embedkit/scattering", image_size=32, workers=1, tokens=["cls"]
    )
    (failure,) = summary.failures
    assert failure.case_id == "b" and summary.cases_done == 2
    assert "unforeseen ZeroDivisionError at test_casework.py:" in failure.reason
    assert "please report it, and leave the case out meanwhile (seven divided by zero)" in failure.reason
    (kept,) = read_failures(tmp_path / "cache").failures
    assert f"{kept.reason} (seven divided by zero)" == failure.reason
    assert open_cache(tmp_path / "cache").stacks["case_id"].to_list() == ["a", "c"]


def test_the_reason_of_a_failure_is_told_whole_and_kept_without_what_the_files_say() -> None:
    case = Case("a", "a", {})
    assert fail_case(case, BackboneError("no such layer")).told == "no such layer"
    failed = fail_case(case, VolumeError("its second file is missing", view="flair", found="it names 'Doe.raw'"))
    assert (failed.kept, failed.view) == ("view flair: its second file is missing", "flair")
    assert failed.told == "view flair: its second file is missing (it names 'Doe.raw')"
    failed = fail_case(case, ValueError("could not convert string to float: 'DOE^JOHN'"))
    assert failed.kept == "unforeseen ValueError; please report it, and leave the case out meanwhile"
    assert failed.told == f"{failed.kept} (could not convert string to float: 'DOE^JOHN')"


class Rough:
    """A backbone whose tokens are off by ``error`` under autocast."""

    def __init__(self, error: float) -> None:
        self.info = load_backbone("embedkit/scattering", image_size=32).info
        self.error = error

    def forward_layers(self, images: Tensor, layers: object, *, attention: bool = False) -> BackboneOutput:  # noqa: ARG002
        patches = torch.ones(len(images), 4, 3) * (1 + self.error * torch.is_autocast_enabled("cpu"))
        return BackboneOutput({2: LayerTokens(patches.mean(1), patches)})

    def run_tail(self, sequence: Tensor, layer: int) -> LayerTokens:
        raise NotImplementedError


@pytest.mark.parametrize(("error", "told"), [(0.2, "20%"), (float("nan"), "nan%")])
def test_a_precision_that_changes_the_tokens_is_refused_before_the_first_case(error: float, told: str) -> None:
    recipe = make_recipe(Rough(error).info, tokens=["cls"], precision="bf16")
    with pytest.raises(
        BackboneError, match=f"bf16 gives cls:2 tokens that deviate by {told}.* from fp32; use --precision fp32"
    ):
        require_precision(Rough(error), recipe, torch.device("cpu"))
    require_precision(Rough(0.01), recipe, torch.device("cpu"))
    require_precision(Rough(error), make_recipe(Rough(error).info, tokens=["cls"]), torch.device("cpu"))


def test_nothing_is_left_to_do_without_a_forward_pass(manifest: pl.DataFrame, tmp_path: Path) -> None:
    extract_small(manifest, tmp_path / "cache")
    recipe = open_cache(tmp_path / "cache").recipe

    class Never(Rough):
        def forward_layers(self, *_: object, **__: object) -> BackboneOutput:
            raise AssertionError("not to be run")

    summary = extract_cases(group_cases(manifest), tmp_path / "cache", Never(0), recipe, device=torch.device("cpu"))
    assert summary.cases_before == 3


def test_blank_slices_alone_are_settled_at_once_and_no_case_waits_for_others() -> None:
    class Blank:
        def __init__(self) -> None:
            self.stacks: list[object] = []

        def count_down(self, slices: int) -> bool:
            return slices == 3

    pulled: list[int] = []

    def parts() -> Iterator[Rendered]:
        for number in range(50):
            pulled.append(number)
            yield Rendered(Blank(), 0, np.empty(0, np.intp), torch.empty(0, 1, 8, 8), 3)  # type: ignore[arg-type]

    backbone = Rough(0)
    recipe = make_recipe(backbone.info, tokens=["cls"])
    for done, _ in enumerate(compute_cases(parts(), backbone, recipe, batch_size=4)):
        assert len(pulled) == done + 1
    assert len(pulled) == 50


def test_a_stop_in_the_middle_of_a_large_case_ends_with_the_batch(manifest: pl.DataFrame, tmp_path: Path) -> None:
    stop, batches = threading.Event(), []
    real = load_backbone("embedkit/scattering", image_size=32)
    recipe = make_recipe(real.info, tokens=["cls"], preview=0)

    class Counting(Rough):
        def forward_layers(self, images: Tensor, layers: object, *, attention: bool = False) -> BackboneOutput:
            batches.append(len(images))
            stop.set()
            return real.forward_layers(images, layers, attention=attention)  # type: ignore[arg-type]

    create_cache(tmp_path / "cache", recipe)
    summary = extract_cases(
        group_cases(manifest), tmp_path / "cache", Counting(0), recipe, device=CPU, batch_size=2, stop=stop
    )
    assert summary.interrupted and batches == [2] and summary.cases_done == 0 and summary.failures == ()


def test_finished_cases_are_written_in_time_while_a_long_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(writing, "write_shard", lambda _, __, stacks: written.append(len(stacks)))
    clock = iter([0.0, 1.0, 2.0, 30.0, 61.0])
    monkeypatch.setattr(writing.time, "monotonic", lambda: next(clock))
    recipe = make_recipe(load_backbone("embedkit/scattering", image_size=32).info, tokens=["cls"])
    with ShardWriter(tmp_path, recipe, shard_bytes=1 << 20, shard_seconds=60, waits=Waits()) as writer:
        writer.add([SimpleNamespace(tokens={})])  # type: ignore[list-item]
        writer.tick()
        assert len(writer._stacks) == 1
        writer.tick()
        assert writer._stacks == []
    assert written == [1]

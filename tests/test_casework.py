"""One case on its way through extraction: spilled tokens, unforeseen errors, checked precision."""

from __future__ import annotations

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
from embedkit.errors import BackboneError
from embedkit.extraction import extract, extract_cases
from embedkit.features import BackboneOutput, LayerTokens
from embedkit.forward import require_precision
from embedkit.pipeline import Rendered, compute_cases, explain_failure
from embedkit.planning import make_recipe
from embedkit.readahead import Waits
from embedkit.sources import group_cases
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


def extract_small(manifest: pl.DataFrame, out: Path) -> object:
    return extract(manifest, out, backbone="embedkit/scattering", image_size=32, tokens=["cls", "patch"], preview=8)


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


def test_no_room_for_a_large_stack_fails_its_case_with_what_to_do(
    manifest: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(casework, "SPILL_BYTES", 100)
    monkeypatch.setattr("os.posix_fallocate", full)
    summary = extract_small(manifest, tmp_path / "cache")
    assert [failure.case_id for failure in summary.failures] == ["a", "b", "c"]  # type: ignore[attr-defined]
    assert "is full; free some space" in summary.failures[0].reason  # type: ignore[attr-defined]


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
    assert "seven divided by zero; please report it" in failure.reason
    assert open_cache(tmp_path / "cache").stacks["case_id"].to_list() == ["a", "c"]


def test_an_error_of_embedkit_is_told_as_it_is() -> None:
    assert explain_failure(BackboneError("no such layer")) == "no such layer"


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

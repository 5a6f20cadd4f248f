"""Exported runs give the scores of the run, without embedkit, for any number of cases and slices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import torch

from embedkit.bags import Bag, BagShape
from embedkit.errors import HeadError, OptionError
from embedkit.exporting import DESCRIPTION, export_run
from embedkit.members import build_member
from embedkit.plugins import HeadOutput, list_heads, load_head
from embedkit.recipe import Recipe
from embedkit.runs import Run
from embedkit.textvectors import write_vectors

onnxruntime = pytest.importorskip("onnxruntime")

SHAPE = BagShape({"cls:2": (1, 6)}, {}, ("a/axial", "b/axial"))
RECIPE = Recipe("tiny", "builtin:1", ("cls:2",), 32, (0.5,), (0.5,), preview=0)
OPTIONS = {"text": {"vectors": write_vectors(np.ones((2, 3), np.float32))}}


@pytest.fixture(autouse=True)
def one_step_of_the_pseudo_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of transmil's are alike, and each takes a second to trace and translate."""
    monkeypatch.setattr("embedkit.heads.transmil._INVERSE_STEPS", 1)


def make_run(head: str, members: int = 1) -> Run:
    """An untrained run with random standardisation."""
    torch.manual_seed(0)
    built = []
    for _ in range(members):
        member = build_member(head, SHAPE, outputs=1, kind="binary", options=OPTIONS.get(head, {})).eval()
        member.sharpness.fill_(0.7)
        for name, buffer in member.named_buffers():
            if "mean" in name or name.endswith("readout.weight"):
                buffer.normal_()
        built.append(member.requires_grad_(False))
    record = SimpleNamespace(
        name=f"t.{head}", target="t", kind="binary", classes=("no", "yes"), head=head, shape=SHAPE, recipe=RECIPE,
        score_columns=("score",), versions={}, token_sets=("cls:2",),
    )  # fmt: skip
    nothing = pl.DataFrame()
    return Run(Path("nowhere"), cast(Any, record), predictions=nothing, inner=nothing, members=tuple(built))


def make_inputs(cases: int, slices: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(slices)
    mask = torch.rand(cases, 2, slices, generator=generator) < 0.7
    tokens = torch.randn(cases, 2, slices, 1, 6, generator=generator).masked_fill(~mask[..., None, None], 1e4)
    return tokens, mask, torch.linspace(0, 1, slices).expand(mask.shape).contiguous()


def score(run: Run, inputs: tuple[torch.Tensor, ...]) -> np.ndarray:
    tokens, mask, positions = inputs
    bag = Bag({"cls:2": tokens}, mask, positions, tuple(map(str, range(len(mask)))))
    return run.predict_bag(bag)


@pytest.mark.parametrize("head", [name for name in sorted(list_heads()) if "cls" in load_head(name).reads])
def test_every_head_of_class_tokens_exports_to_torch(head: str, tmp_path: Path) -> None:
    run = make_run(head)
    export_run(run, tmp_path / "run.pt2", format="torch")
    program = torch.export.load(tmp_path / "run.pt2").module()
    for size in ((1, 1), (4, 11)):
        found = program(*make_inputs(*size)).numpy()
        np.testing.assert_allclose(found, score(run, make_inputs(*size)), atol=1e-5)


@pytest.mark.parametrize("head", ["linear", "logistic", "raptor", "gru", "transmil"])
def test_onnxruntime_gives_the_scores_of_the_whole_ensemble(head: str, tmp_path: Path) -> None:
    run = make_run(head, members=2 if head == "linear" else 1)
    exported = export_run(run, tmp_path / "run.onnx", format="onnx")
    session = onnxruntime.InferenceSession((tmp_path / "run.onnx").read_bytes())
    assert [each.name for each in session.get_inputs()] == ["cls_2", "mask", "positions"] == list(exported.inputs)
    for size in ((1, 1), (4, 11)):
        inputs = make_inputs(*size)
        arrays = {name: each.numpy() for name, each in zip(exported.inputs, inputs, strict=True)}
        np.testing.assert_allclose(session.run(["scores"], arrays)[0], score(run, inputs), atol=1e-5)
    described = json.loads(session.get_modelmeta().custom_metadata_map[DESCRIPTION])
    assert described == exported.description
    assert described["views"] == ["a/axial", "b/axial"] and described["classes"] == ["no", "yes"]
    assert described["fingerprint"] == RECIPE.fingerprint and described["members"] == len(run.members)


def test_a_torch_file_runs_where_embedkit_cannot_be_imported(tmp_path: Path) -> None:
    run = make_run("gru")
    export_run(run, tmp_path / "run.pt2", format="torch")
    inputs = make_inputs(2, 7)
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import sys, json, torch; sys.modules['embedkit'] = None; extra = {'embedkit.json': ''};"
        f"program = torch.export.load(r'{tmp_path / 'run.pt2'}', extra_files=extra).module();"
        f"found = program(*torch.load(r'{tmp_path / 'inputs.pt'}', weights_only=True));"
        "print(json.dumps([found.tolist(), json.loads(extra['embedkit.json'])['inputs'][0]['token_set']]))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    found, token_set = json.loads(done.stdout)
    np.testing.assert_allclose(found, score(run, inputs), atol=1e-5)
    assert token_set == "cls:2"


def test_formats_and_files_that_will_not_do_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("linear")
    with pytest.raises(OptionError, match="format is 'tflite', expected onnx or torch"):
        export_run(run, tmp_path / "x", format=cast(Any, "tflite"))
    (tmp_path / "there").write_text("mine")
    with pytest.raises(OptionError, match="exists already; choose another --out, or pass --overwrite"):
        export_run(run, tmp_path / "there", format="torch")
    assert (tmp_path / "there").read_text() == "mine"
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(OptionError, match=r"pip install 'embedkit\[export\]', or choose --format torch"):
        export_run(run, tmp_path / "x", format="onnx")


def test_a_head_that_cannot_be_exported_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    class Counting(torch.nn.Module):
        def forward(self, bag: Bag) -> HeadOutput:
            return HeadOutput(bag.positions.sum((1, 2))[:, None] * float(bag.mask.sum()))

    run = make_run("linear")
    run.members[0].head = Counting()
    with pytest.raises(HeadError, match=r"'linear' cannot be exported to torch: .*must be made of torch operations"):
        export_run(run, tmp_path / "x.pt2", format="torch")
    assert list(tmp_path.iterdir()) == []

"""Owns the export of a run: its whole ensemble as one ONNX or PyTorch file that runs without embedkit; trains nothing.

The file takes what a bag holds, raw tokens as they are cached, and gives the mean of the members' scores:

=============  ==========================================  =======================================================
``cls_12``, …  float32 [batch views slices patches dim]    a token set; ``:`` and ``@`` of its name become ``_``
``mask``       bool [batch views slices]                   True for a real slice that is not blank
``positions``  float32 [batch views slices]                place along the stack, 0 for the first slice, 1 for the last
``scores``     float32 [batch columns]                     as `embedkit.predict` gives them, standardisation included
=============  ==========================================  =======================================================

Any number of cases and slices will do; what masked slices hold does not matter. A JSON text inside the file, under
``embedkit.json``, tells all else: token sets, views and their order, columns, classes, the recipe and its fingerprint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from embedkit.bags import Bag, BagShape
from embedkit.errors import HeadError, OptionError, RunError
from embedkit.files import explain_os_error, publish_file, temporary_path
from embedkit.members import Member
from embedkit.runs import Run, open_run

__all__ = ["DESCRIPTION", "ExportFormat", "Exported", "export_run"]

ExportFormat = Literal["onnx", "torch"]
DESCRIPTION = "embedkit.json"
"""Name of the description: among the metadata properties of an ONNX file, among the extra files of a PyTorch one."""
_OPSET = 20
_TRACED = (3, 5)  # cases and slices; neither may be 0 or 1, which a trace takes for a special size
_TRIED = ((1, 1), (2, 9))
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Exported:
    """A file that `export_run` wrote.

    Attributes:
        path: The file.
        format: Its format.
        inputs: Names of its inputs, in order.
        description: What the file holds as ``embedkit.json``.
        difference: Largest difference of its scores to the run's on random tokens.
    """

    path: Path
    format: ExportFormat
    inputs: tuple[str, ...]
    description: dict[str, Any]
    difference: float


def export_run(run: Run | Path | str, out: Path | str, *, format: ExportFormat, overwrite: bool = False) -> Exported:
    """Writes a run as one file that gives the same scores without embedkit, and compares both before it is kept.

    Args:
        run: A run or its folder.
        out: The file to write.
        format: ``onnx`` (opset 20, for onnxruntime; needs ``embedkit[export]``), or ``torch`` (a ``torch.export``
            program: ``torch.export.load(FILE).module()(*inputs)``).
        overwrite: Replace a file that is there.

    Raises:
        OptionError: unknown format, ``out`` exists, or the packages that ONNX needs are not installed.
        HeadError: the head cannot be exported, or what was exported answers differently.
        RunError: not a run, or the file system refuses.
    """
    if format not in get_args(ExportFormat):
        raise OptionError(f"export format is {format!r}, expected {' or '.join(get_args(ExportFormat))}")
    path = Path(out)
    if path.exists() and not overwrite:
        raise OptionError(f"{path} exists already; choose another --out, or pass --overwrite to replace it")
    opened = run if isinstance(run, Run) else open_run(run)
    if opened.record.shape.tail is not None:
        raise HeadError(
            f"head {opened.head!r} cannot be exported: it runs blocks of the backbone, which lie with the cache;"
            " predict with embedkit, or export a head on cls or patch tokens"
        )
    description = _describe(opened)
    ensemble = _Ensemble(opened.members, opened.record.shape)
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        call = _write(ensemble, temporary, format, description, opened.head)
        difference = _compare(ensemble, call, opened.head, format)
        path.unlink(missing_ok=True)
        publish_file(temporary, path)
    except OSError as error:
        raise RunError(f"run {opened.name} cannot be exported: {explain_os_error(error, path)}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(path, format, ensemble.inputs, description, difference)


class _Ensemble(nn.Module):
    """The members of a run as one function from tensors to scores."""

    def __init__(self, members: Sequence[Member], shape: BagShape) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.shape = shape
        self.inputs = (*map(_input_name, shape.token_sets), "mask", "positions")
        self.cpu().eval()

    def forward(self, *inputs: Tensor) -> Tensor:
        """Scores [batch columns] of the tokens, mask and positions, in the order of ``inputs``."""
        *tokens, mask, positions = inputs
        bag = Bag(dict(zip(self.shape.token_sets, tokens, strict=True)), mask, positions, ())
        members = (cast(Member, member) for member in self.members)
        each = [member.scores(member(bag).logits).reshape(mask.shape[0], -1) for member in members]
        return torch.stack(each).mean(0)

    def example(self, cases: int, slices: int) -> tuple[Tensor, ...]:
        """Random inputs, the last slice of every other case and, of several views, one view masked."""
        generator = torch.Generator().manual_seed(cases)
        size = (cases, len(self.shape.views), slices)
        mask = torch.ones(size, dtype=torch.bool)
        mask[1::2, :, -1:] = False
        mask[1::2, 1:2] = False
        tokens = [torch.randn(*size, *each, generator=generator) for each in self.shape.token_sets.values()]
        return (*tokens, mask, torch.linspace(0, 1, slices).expand(size).contiguous())


def _input_name(token_set: str) -> str:
    return token_set.replace(":", "_").replace("@", "_")


def _describe(run: Run) -> dict[str, Any]:
    """What a user of the file must know, as plain data."""
    record, views = run.record, len(run.views)
    slices = ["batch", views, "slices"]
    sets = [
        {"name": _input_name(name), "token_set": name, "dtype": "float32", "shape": [*slices, *size]}
        for name, size in record.shape.token_sets.items()
    ]
    return {
        "format": "embedkit-export",
        "format_version": 1,
        "run": record.name,
        "target": record.target,
        "kind": record.kind,
        "classes": list(record.classes),
        "head": record.head,
        "members": len(run.members),
        "views": list(record.shape.views),
        "inputs": [
            *sets,
            {"name": "mask", "dtype": "bool", "shape": slices},
            {"name": "positions", "dtype": "float32", "shape": slices},
        ],
        "outputs": [{"name": "scores", "dtype": "float32", "columns": list(record.score_columns)}],
        "fingerprint": record.recipe.fingerprint,
        "recipe": json.loads(record.recipe.to_json()),
        "versions": dict(record.versions),
    }


def _write(
    ensemble: _Ensemble, path: Path, format: ExportFormat, description: Mapping[str, Any], head: str
) -> Callable[..., Tensor]:
    """Writes the file and opens it again as a function of the same inputs."""
    text = json.dumps(description, ensure_ascii=False)
    if format == "onnx":
        _require_onnx()
    with _quiet():
        try:
            program = _trace(ensemble)
            if format == "onnx":
                return _write_onnx(program, ensemble.inputs, path, text)
            return _write_torch(program, path, text)
        except OSError:
            raise
        except Exception as error:  # torch raises what it likes for a module that it cannot trace or translate
            first = next(iter(str(error).strip().splitlines()), "")
            raise HeadError(
                f"head {head!r} cannot be exported to {format}: {type(error).__name__}: {first}; its forward must be"
                " made of torch operations that do not depend on how many cases and slices there are"
            ) from error


def _trace(ensemble: _Ensemble) -> torch.export.ExportedProgram:
    batch, slices = torch.export.Dim("batch"), torch.export.Dim("slices")
    dynamic = tuple({0: batch, 2: slices} for _ in ensemble.inputs)
    return torch.export.export(ensemble, ensemble.example(*_TRACED), dynamic_shapes=(dynamic,), strict=False)


def _write_torch(program: torch.export.ExportedProgram, path: Path, text: str) -> Callable[..., Tensor]:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={DESCRIPTION: text})
    with path.open("rb") as file:
        loaded: Callable[..., Tensor] = torch.export.load(file).module()
    return loaded


def _write_onnx(
    program: torch.export.ExportedProgram, names: Sequence[str], path: Path, text: str
) -> Callable[..., Tensor]:
    import onnxruntime

    exported = torch.onnx.export(
        program, dynamo=True, opset_version=_OPSET, input_names=list(names), output_names=["scores"],
        verbose=False,
    )  # fmt: skip
    if exported is None:
        raise RuntimeError("torch.onnx.export gave no program")
    exported.model.metadata_props[DESCRIPTION] = text
    exported.save(path, external_data=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])

    def call(*inputs: Tensor) -> Tensor:
        arrays = {name: np.asarray(each) for name, each in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(["scores"], arrays)[0])

    return call


def _compare(ensemble: _Ensemble, call: Callable[..., Tensor], head: str, format: str) -> float:
    """The largest difference of the file's scores to the run's, on sizes other than the traced ones."""
    largest = 0.0
    for cases, slices in _TRIED:
        inputs = ensemble.example(cases, slices)
        with torch.no_grad():
            expected, found = ensemble(*inputs), call(*inputs)
        scale = max(1.0, float(expected.abs().max()))
        apart = float((found - expected).abs().max()) / scale if found.shape == expected.shape else float("inf")
        if not apart <= _TOLERANCE:
            raise HeadError(
                f"head {head!r}, exported to {format}, gives scores that differ by {apart:.2g} from the run's on"
                f" {cases} cases of {slices} slices, expected at most {_TOLERANCE:g}; predict with embedkit instead"
            )
        largest = max(largest, apart)
    return largest


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"export to onnx needs onnx, onnxscript and onnxruntime, which cannot be imported ({error});"
            " pip install 'embedkit[export]', or choose --format torch"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's warnings and progress about its own doings from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)

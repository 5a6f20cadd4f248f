"""What is installed, what imports what, and what starting the program loads."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "timm", "faiss", "polars", "SimpleITK", "h5py", "sklearn", "matplotlib", "starlette", "uvicorn"}
STAGES = {"manifest", "volumes", "slices", "backbones", "tokens", "cache", "tasks", "bags", "metrics", "index"}
ABOVE = {
    "account",
    "batchqueries",
    "benching",
    "benchpage",
    "casework",
    "cohort",
    "comparison",
    "comparisonpage",
    "demo",
    "engines",
    "estimate",
    "evaluation",
    "evaluationpage",
    "explanation",
    "exporting",
    "extraction",
    "imagequeries",
    "indexbuilding",
    "indexchanging",
    "keeping",
    "keptruns",
    "ledger",
    "orders",
    "overlays",
    "pictures",
    "pipeline",
    "processes",
    "queries",
    "queryjob",
    "ranking",
    "rayengine",
    "report",
    "retrieval",
    "rounds",
    "runs",
    "sanity",
    "scanning",
    "searchevaluation",
    "segmentation",
    "serving",
    "shots",
    "slicepairs",
    "sources",
    "strays",
    "stream",
    "suitedata",
    "suitesearch",
    "survivalsection",
    "training",
    "warmstart",
    "webapp",
    "worker",
}


def imported_modules(file: Path) -> set[str]:
    """Names of the embedkit modules that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "embedkit":
                names |= {f"embedkit.{alias.name}" for alias in node.names}
            elif node.module.startswith("embedkit."):
                names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("embedkit")}
    return names


def imported_names(file: Path, module: str) -> set[str]:
    return {
        alias.name
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == f"embedkit.{module}"
        for alias in node.names
    }


def test_the_core_never_imports_heads_or_the_command_line() -> None:
    for file in (PROJECT / "embedkit").glob("*.py"):
        forbidden = {name for name in imported_modules(file) if name.startswith(("embedkit.heads", "embedkit.cli"))}
        assert not forbidden, f"{file.name} imports {forbidden}"


def test_heads_never_import_the_command_line_or_training() -> None:
    for file in (PROJECT / "heads").glob("*.py"):
        assert not imported_modules(file) & {"embedkit.cli", "embedkit.training", "embedkit.extraction"}, file.name


def test_stages_take_nothing_but_plain_data_types_from_each_other() -> None:
    for stage in STAGES:
        file = PROJECT / "embedkit" / f"{stage}.py"
        for other in STAGES - {stage}:
            functions = {name for name in imported_names(file, other) if name[0].islower()}
            assert not functions, f"{stage} imports {functions} from {other}"


def test_nothing_below_imports_what_is_above() -> None:
    for file in (PROJECT / "embedkit").glob("*.py"):
        if file.stem in ABOVE | {"__init__"}:
            continue
        above = {name.removeprefix("embedkit.") for name in imported_modules(file)} & ABOVE
        assert not above, f"{file.name} imports {above}"


@pytest.mark.parametrize("statement", ["import embedkit", "import embedkit.cli.main"])
def test_importing_loads_no_heavy_library(statement: str) -> None:
    code = f"{statement}; import sys; print(*sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_public_name_can_be_imported() -> None:
    import embedkit

    for name in embedkit.__all__:
        assert getattr(embedkit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = embedkit.nothing


def test_no_module_bears_the_name_of_a_public_function() -> None:
    import embedkit

    assert not {file.stem for file in (PROJECT / "embedkit").glob("*.py")} & set(embedkit.__all__)


def test_the_wheel_holds_embedkit_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, PROJECT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"embedkit"}
    for wanted in (
        "embedkit/heads/linear.py",
        "embedkit/cli/main.py",
        "embedkit/py.typed",
        "embedkit/static/index.html",
        "embedkit/suites/real.toml",
    ):
        assert wanted in names


def test_nothing_unpickles() -> None:
    for file in [
        *(PROJECT / "embedkit").glob("*.py"),
        *(PROJECT / "heads").glob("*.py"),
        *(PROJECT / "cli").glob("*.py"),
    ]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
                modules -= {"pickle"} if file.name == "weights.py" else set()  # for UnpicklingError alone
                assert not modules & {"pickle", "joblib", "dill", "shelve", "cloudpickle"}, file.name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if called == "torch.load":
                    assert keywords.get("weights_only") == "True", f"{file.name}:{node.lineno}"
                if called == "np.load":
                    assert keywords.get("allow_pickle") == "False", f"{file.name}:{node.lineno}"

"""The examples run as they stand, and the README's first screen holds the two commands."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import polars as pl
import pytest

from embedkit.phantoms import make_phantoms

PROJECT = Path(__file__).resolve().parent.parent


def test_the_example_on_an_own_folder_goes_from_scans_to_similar_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_phantoms(tmp_path / "phantoms", cases=16, seed=2)
    scans, labels = tmp_path / "phantoms", tmp_path / "labels.csv"
    pl.read_csv(scans / "labels.csv").drop("patient_id").write_csv(labels)
    arguments = [str(scans), str(labels), "lesion", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["own_folder.py", *arguments])
    runpy.run_path(str(PROJECT / "examples" / "own_folder.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "16 cases" in printed and "0 failed" in printed
    assert "auroc" in printed and "similarity" in printed
    assert (tmp_path / "out" / "runs" / "lesion.grid" / "run.json").is_file()


def test_the_readme_names_both_commands_on_its_first_screen() -> None:
    first_screen = "\n".join((PROJECT / "README.md").read_text(encoding="utf-8").splitlines()[:30])
    assert "make demo" in first_screen and "make test" in first_screen and "pip install ." in first_screen

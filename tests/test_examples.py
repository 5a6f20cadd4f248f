"""The examples run as they stand, and the README's first screen holds the two commands."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import embedkit
from embedkit.phantoms import make_phantoms
from embedkit.volumes import write_volume

PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "smoothmax"
version = "1.0"
[project.entry-points."embedkit.heads"]
smoothmax = "custom_head:SmoothMaxHead"
[tool.setuptools]
py-modules = ["custom_head"]
"""


def test_the_example_on_an_own_folder_goes_from_scans_to_similar_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_phantoms(tmp_path / "phantoms", cases=16, seed=2)
    scans, labels = tmp_path / "phantoms", tmp_path / "labels.csv"
    for scan in sorted((scans / "volumes").glob("*.nii.gz")):  # every fourth slice will do
        volume = embedkit.read_volume(scan)
        write_volume(scan, volume.array[::4], volume.affine @ np.diag([4.0, 1, 1, 1]))
    pl.read_csv(scans / "labels.csv").drop("patient_id").write_csv(labels)
    arguments = [str(scans), str(labels), "lesion", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["own_folder.py", *arguments])
    runpy.run_path(str(PROJECT / "examples" / "own_folder.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "16 cases" in printed and "0 failed" in printed
    assert "auroc" in printed and "similarity" in printed
    assert (tmp_path / "out" / "runs" / "lesion.grid" / "run.json").is_file()


def test_a_head_of_another_package_is_installed_found_and_trained(tmp_path: Path) -> None:
    source = PROJECT / "examples" / "custom_head.py"
    assert len(source.read_text(encoding="utf-8").splitlines()) < 40
    package, site = tmp_path / "package", tmp_path / "site"
    package.mkdir()
    shutil.copy(source, package)
    (package / "pyproject.toml").write_text(PACKAGE)
    how = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *how, str(package)], check=True)
    scans, cache, runs = tmp_path / "scans", tmp_path / "cache", tmp_path / "runs"
    make_phantoms(scans, cases=12, seed=2)
    embedkit.extract(scans / "manifest.csv", cache, backbone="embedkit/scattering", image_size=64, slices="count:6")
    options = ["--head", "smoothmax", "--head-option", "smoothmax.sharp=3", "--folds", 2, "--device", "cpu", "--json"]
    command = ["train", cache, "--labels", scans / "labels.csv", "--target", "lesion", *options, "-o", runs]
    program = [sys.executable, "-c", "from embedkit.cli.main import main; main()", *map(str, command)]
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    printed = subprocess.check_output(program, text=True, env=environment)
    assert {row["head"]: 0 <= row["auroc"] <= 1 for row in json.loads(printed)}["smoothmax"]
    assert json.loads((runs / "lesion.smoothmax" / "run.json").read_text())["head_options"] == {"sharp": 3}


def test_the_readme_names_both_commands_on_its_first_screen() -> None:
    first_screen = "\n".join((PROJECT / "README.md").read_text(encoding="utf-8").splitlines()[:30])
    assert "make demo" in first_screen and "make test" in first_screen and "pip install ." in first_screen

"""Fixtures shared by every test module: where the real scans and the real weights are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=20, help="How often tests/test_crash.py kills an extraction.")


PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real scans; the test is skipped where they are absent."""
    folder = Path(os.environ.get("EMBEDKIT_TEST_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real scans at {folder}; set EMBEDKIT_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def deit_weights(real_data: Path) -> Path:
    """Real ImageNet weights of timm's deit_tiny_patch16_224; the test is skipped where they are absent."""
    file = real_data.parent / "weights" / "deit_tiny_patch16_224.safetensors"
    if not file.is_file():
        pytest.skip(f"no weights at {file}")
    return file

"""The demo does what the README's first command promises, and removes nothing that it did not make."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from embedkit import demo
from embedkit.demo import run_demo
from embedkit.errors import OptionError


def test_the_demo_ends_in_one_report_whose_heatmaps_point_at_the_lesions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the one head whose heatmaps it shows, and every other slice."""
    monkeypatch.setattr(demo, "train", partial(demo.train, heads=["grid"]))
    monkeypatch.setattr(demo, "extract", partial(demo.extract, slices="count:14"))
    steps: list[str] = []
    result = run_demo(tmp_path / "demo", cases=40, on_step=steps.append)
    assert [step[:3] for step in steps if step[0] != " "] == [f"{number}/6" for number in range(1, 7)]
    assert result.pointing > 0.7
    page = result.report.read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 4 and "://" not in page
    with pytest.raises(OptionError, match="demo exists; choose another --out, or --overwrite what an earlier demo"):
        run_demo(tmp_path / "demo")
    assert result.report.is_file()


def test_a_folder_that_no_demo_made_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OptionError, match="exists; choose another --out"):
        run_demo(tmp_path, overwrite=True)
    assert (tmp_path / "mine").read_text() == "mine"


def test_too_few_phantoms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="16 phantoms asked for, expected 40 or more: five folds need"):
        run_demo(tmp_path / "demo", cases=16)
    assert not (tmp_path / "demo").exists()

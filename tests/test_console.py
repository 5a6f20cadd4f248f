"""How commands talk: sizes, durations, tables, and progress where there is no terminal."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import typer
from embedkit.cli import console
from embedkit.cli.console import format_bytes, format_seconds, parse_size, print_table, show_progress, tell_strays
from embedkit.cli.main import app
from typer.testing import CliRunner

import embedkit
from embedkit.errors import RecallWarning, StrayWarning, VolumeError


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (834, "834 B"),
        (999.6, "1 kB"),
        (13_344, "13.3 kB"),
        (292_384, "292 kB"),
        (2_500_000, "2.5 MB"),
        (1.25e9, "1.25 GB"),
        (999.4e9, "999 GB"),
        (3e12, "3 TB"),
    ],
)
def test_a_size_is_told_in_the_unit_that_fits_it(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize("text", ["834 B", "292 kB", "1.25 GB"])
def test_a_size_as_it_is_told_is_a_size_that_can_be_given(text: str) -> None:
    assert format_bytes(parse_size(text)) == text


@pytest.mark.parametrize("text", ["", "0", "64 MiB", "-1MB", "1e9"])
def test_a_size_without_meaning_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="give a number above 0 with B, kB, MB, GB or TB"):
        parse_size(text)


def test_durations_are_told_in_seconds_minutes_or_hours() -> None:
    assert [format_seconds(seconds) for seconds in (3.4, 89, 90, 5399, 5400)] == [
        "3 s", "89 s", "2 min", "90 min", "1.5 h",
    ]  # fmt: skip


def test_without_a_terminal_progress_is_a_line_every_ten_seconds_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with show_progress("extract", "cases") as meter:
        for done, second in ((0, 1.0), (1, 9.9), (2, 10.1), (3, 20.0), (4, 20.2), (5, 20.3), (5, 20.4)):
            now[0] = second
            meter(done, 5, f"at {second:g}")
    assert capsys.readouterr().err.splitlines() == [
        "extract: 2/5 cases  at 10.1",
        "extract: 4/5 cases  at 20.2",
        "extract: 5/5 cases  at 20.3",
    ]


def test_columns_of_numbers_are_set_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("token set", "size"), [("cls", "834 B"), ("patch@4:2", "13.3 kB")])
    assert capsys.readouterr().out == "token set     size\ncls          834 B\npatch@4:2  13.3 kB\n"


def test_a_stray_is_told_once_as_it_is_met_also_where_the_command_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def read() -> None:
        for file in ("a.dcm", "b.dcm", "a.dcm"):
            warnings.warn(f"{file}, which lies beside c: damaged", StrayWarning, stacklevel=1)

    with pytest.raises(VolumeError), pytest.warns(RecallWarning, match="few"), tell_strays():
        read()
        assert capsys.readouterr().err.splitlines() == [
            "stray a.dcm, which lies beside c: damaged",
            "stray b.dcm, which lies beside c: damaged",
        ]
        warnings.warn("few", RecallWarning, stacklevel=1)
        read()
        raise VolumeError("is no image")
    assert capsys.readouterr() == ("", "")
    with pytest.warns(StrayWarning):
        read()


def test_train_tells_of_strays_beside_the_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reading(*_: object, **__: object) -> None:
        warnings.warn("a.dcm, which lies beside mask: damaged", StrayWarning, stacklevel=1)
        raise VolumeError("mask of case c: is no image")

    monkeypatch.setattr(embedkit, "train", reading)
    done = CliRunner().invoke(app, ["train", str(tmp_path), "--masks", "m.csv", "-o", str(tmp_path / "runs")])
    assert done.stderr.splitlines()[0] == "stray a.dcm, which lies beside mask: damaged"
    assert isinstance(done.exception, VolumeError)

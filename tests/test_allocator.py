"""The hint to the allocator, in a process of its own since it cannot be undone."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from embedkit.cli.main import app
from typer.testing import CliRunner

PROGRAM = """
import resource, sys
import numpy as np
from embedkit.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    print(keep_freed_memory())
blocks = [np.ones(20 << 20, np.uint8) for _ in range(2)]
del blocks
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    blocks = [np.ones(20 << 20, np.uint8) for _ in range(2)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(mode: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a hint to glibc alone")
def test_freed_memory_is_taken_again_without_faulting_its_pages_in_anew() -> None:
    (faults_plain,) = run("plain")
    took_effect, faults_kept = run("keep")
    assert took_effect == "True"
    assert int(faults_kept) < 100 < int(faults_plain)


@pytest.mark.parametrize(
    "command",
    [
        ["train", "absent", "--labels", "absent.csv", "--target", "y", "-o", "runs"],
        ["bench", "absent", "-o", "bench"],
        ["demo", "--cases", "2", "--out", "demo"],
    ],
)
def test_programs_that_train_keep_freed_memory(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("embedkit.allocator.keep_freed_memory", lambda: asked.append(command[0]))
    assert CliRunner().invoke(app, command).exit_code != 0  # nothing is there to work on
    assert asked == [command[0]]

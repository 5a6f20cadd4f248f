"""Owns the virtual environments in which benchmarks run peers, and how a program is run there; measures nothing."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

DEFAULT_ENVS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "embedkit-peers"


def make_environment(envs: Path, peer: str, packages: Sequence[str], *, shared: bool = True) -> Path:
    """The Python of a peer's virtual environment, made where it is not there.

    Without ``shared`` it finds nothing of this environment, torch neither: for a peer that needs other versions.
    """
    python = envs / peer / "bin" / "python"
    mark = envs / peer / "installed"
    if not mark.exists():
        print(f"installing {' '.join(packages)} into {envs / peer}", flush=True)
        venv.create(envs / peer, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *packages]
        if shared:
            (own,) = (envs / peer).glob("lib/*/site-packages")
            (own / "shared.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # searched after the peer's own
            command.append(f"torch=={version('torch')}")
        subprocess.run(command, check=True, capture_output=True, text=True)
        mark.touch()
    return python


def run_program(
    python: Path | str, program: str, folder: Path, task: dict[str, Any], **environment: str
) -> dict[str, float]:
    """Runs a program that reads task.json and prints one line RESULT, with these variables set."""
    folder.mkdir()
    (folder / "program.py").write_text(program)
    (folder / "task.json").write_text(json.dumps(task | {"out": str(folder / "out")}))
    command = [str(python), str(folder / "program.py"), str(folder / "task.json")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env=offline(**environment))
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result: dict[str, float] = json.loads(line.removeprefix("RESULT "))
    return result


def offline(**more: str) -> dict[str, str]:
    """The environment of a side: no hub is asked for anything."""
    return os.environ | {"HF_HUB_OFFLINE": "1"} | more

"""What SIGTERM leaves behind: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from embedkit.termination import end_on_terminate


def test_sigterm_leaves_by_way_of_every_clean_up_and_the_handler_goes_with_it() -> None:
    before, cleaned = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(SystemExit) as ended, end_on_terminate():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            cleaned.append(True)
    assert ended.value.code == 143 and cleaned and signal.getsignal(signal.SIGTERM) is before


def test_another_thread_sets_no_handler() -> None:
    found = []

    def work() -> None:
        with end_on_terminate():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_the_program_leaves_no_temporary_folder_when_it_is_terminated(tmp_path: Path) -> None:
    work = "import tempfile, time\nwith tempfile.TemporaryDirectory(): time.sleep(60)"
    code = f"from embedkit.cli import main\nmain.app = lambda: exec({work!r})\nmain.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.iterdir()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (143, "")
    assert list(tmp_path.iterdir()) == []

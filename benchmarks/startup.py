"""Time of `embedkit --help` over that of a bare Python start.

Usage: python benchmarks/startup.py [--repeats N]. The last line is `ratio N.NN`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "embedkit --help": [sys.executable, "-c", "from embedkit.cli.main import main; main()", "--help"],
    }
    best = dict.fromkeys(commands, float("inf"))
    for _ in range(repeats):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            best[name] = min(best[name], time.perf_counter() - started)
    for name, seconds in best.items():
        print(f"{name}: {1e3 * seconds:.0f} ms")
    bare, helped = best.values()
    print(f"ratio {helped / bare:.2f}")


if __name__ == "__main__":
    main()

"""The figures of README.md and benchmarks/RESULTS.md are those of the stored raw samples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_figures_are_those_of_the_stored_results() -> None:
    command = [sys.executable, "benchmarks/publish.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

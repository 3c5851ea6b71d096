"""Whoever reads TOML here neither waits for a pipe nor fills the memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

READERS = {
    "profile": "from tinyllava_edge.export.profiles import load; load(path)",
    "recipe": "from tinyllava_edge.train.recipes import load; load(path)",
    "data": "from tinyllava_edge.data.sets import read_sets; read_sets([path], [])",
    "grid": "from tinyllava_edge.ablate.grid_toml import read_grid; read_grid(path)",
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_small_file_is_not_read(reader: str, tmp_path: Path) -> None:
    pipe, sparse = tmp_path / "pipe.toml", tmp_path / "sparse.toml"
    os.mkfifo(pipe)
    with sparse.open("wb") as handle:
        handle.truncate(1 << 40)
    code = f"import sys, pathlib; path = pathlib.Path(sys.argv[1])\n{READERS[reader]}"
    for path, words in ((pipe, "no regular file"), (sparse, "larger than")):
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and f"{path.name}: {words}" in done.stderr, done.stderr

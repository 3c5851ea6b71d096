"""Nothing is gathered about the user, by the engines neither."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ASK = """
import sys
from tinyllava_edge import open_bundle

with open_bundle(sys.argv[1], build="int8+q4_k_m") as engine:
    print(engine.generate("what color?", image=sys.argv[2], max_tokens=2).text)
"""


def test_an_answer_leaves_nothing_in_the_home(tiny_bundle: Path, tmp_path: Path) -> None:
    """ONNX Runtime 1.31 writes a device id and a database of events below ~/.cache when it isn't told not to."""
    home, picture = tmp_path / "home", tmp_path / "a.png"
    home.mkdir()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(picture)
    kept = {key: value for key, value in os.environ.items() if key not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    command = [sys.executable, "-c", ASK, str(tiny_bundle), str(picture)]
    done = subprocess.run(command, env={**kept, "HOME": str(home)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    written = [str(path) for path in home.rglob("*") if path.is_file()]
    assert not [path for path in written if "onnxruntime" in path.lower() or "Microsoft" in path], written

"""The device runtime answers where torch, transformers and everything for training and export are absent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from .conftest import Pair, picture

SCRIPT = """
import json, sys

BLOCKED = {"torch", "transformers", "tokenizers", "safetensors", "onnx", "onnxscript", "gguf", "accelerate"}
BLOCKED_HERE = {"train", "export", "model", "checkpoint", "cli"}

class Block:
    def find_spec(self, name, path=None, target=None):
        parts = name.split(".")
        if parts[0] in BLOCKED or (parts[0] == "tinyllava_edge" and len(parts) > 1 and parts[1] in BLOCKED_HERE):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
try:
    import torch
except ImportError:
    pass
else:
    sys.exit("torch was not blocked")

from tinyllava_edge.runtimes.edge import open_edge

with open_edge(sys.argv[1], "fp32+f16", allow_unverified=True, n_threads=1) as edge:
    answer = edge.answer(sys.argv[2], "what color is the shape?", max_tokens=6)
    many = edge.answer_many(sys.argv[2], ["what color is the shape?"], max_tokens=6)
    json.dumps(edge.environment())
loaded = sorted(BLOCKED & {name.split(".")[0] for name in sys.modules})
print(json.dumps({"ids": answer.token_ids, "many": many[0].token_ids, "loaded": loaded}))
"""


def test_answers_with_torch_blocked(siglip: Pair, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture()).save(tmp_path / "cat.png")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(siglip.bundle), str(tmp_path / "cat.png")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["loaded"] == [] and len(found["ids"]) == 6
    assert all(np.array(found["many"][:1]) == np.array(found["ids"][:1]))

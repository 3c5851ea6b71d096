"""A small LLaVA data set: random pictures, each with questions, a caption, and some rows without a picture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "teal": (0, 128, 128)}
PICTURES = 8


@dataclass(frozen=True)
class Files:
    """What the fixture wrote."""

    images: Path
    qa: Path
    captions: Path
    mixed: Path


def message(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("llava")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    qa, captions = [], []
    for k in range(PICTURES):
        name, rgb = list(COLORS.items())[k % len(COLORS)]
        pixels = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        pixels[8:40, 8 + k : 40 + k] = rgb
        Image.fromarray(pixels).save(root / "images" / f"{k}.png")
        asked = [("what color is the shape?", name), (f"is there a {name} shape?", "yes"), ("is it black?", "no")]
        for j, (question, answer) in enumerate(asked[: 2 + k % 2]):
            talk = [message("human", f"<image>\n{question}"), message("gpt", answer)]
            qa.append({"id": f"{k}-{j}", "image": f"{k}.png", "conversations": talk})
        talk = [message("human", "<image>\ndescribe"), message("gpt", f"a {name} square.")]
        captions.append({"id": f"c{k}", "image": f"{k}.png", "conversations": talk})
    turns = [message("human", "<image>\nwhat color?"), message("gpt", "red")]
    mixed = [
        *qa[:4],
        {"id": "m", "image": "0.png", "conversations": [*turns, message("human", "sure?"), message("gpt", "yes")]},
        {"id": "t", "conversations": [message("human", "hello"), message("gpt", "hi there")]},
    ]
    written = Files(root / "images", root / "qa.json", root / "captions.json", root / "mixed.json")
    for path, rows in ((written.qa, qa), (written.captions, captions), (written.mixed, mixed)):
        path.write_text(json.dumps(rows))
    return written

"""Bundles whose GGUF is float32 too, so that single and batched answers can be compared exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tinyllava_edge.errors import EngineError
from tinyllava_edge.runtimes.devices import DevicePlan, choose_device
from tinyllava_edge.runtimes.edge import EdgeRuntime, open_edge
from tinyllava_edge.runtimes.reference import ReferenceRuntime, open_reference

QUESTIONS = [
    "what color is the shape?",
    "is there a small blue circle in the image?",
    "</s> <image> <s> what? 😀 naïve",
    "how many?",
    "x" * 50,
    *(f"question {i} about the green triangle {'word ' * i}" for i in range(12)),
]


@dataclass(frozen=True)
class Pair:
    """A checkpoint and the bundle made from it."""

    checkpoint: Path
    bundle: Path


def export(checkpoint: Path, out: Path) -> Pair:
    from tinyllava_edge.export.bundle_writer import export_bundle

    export_bundle(checkpoint, out, llm=("f32", "f16"), vision=("fp32",))
    return Pair(checkpoint, out)


def factory_like(checkpoint: Path, out: Path) -> Path:
    """The checkpoint as Factory would have trained it: first patch dropped, pictures padded to a square."""
    shutil.copytree(checkpoint, out)
    changes = {
        "config.json": {"vision_feature_select_strategy": "default", "image_seq_length": 63},
        "model_spec.json": {"select_strategy": "default", "visual_tokens": 63, "image_policy": "pad"},
    }
    for name, change in changes.items():
        path = out / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return out


@pytest.fixture(scope="session")
def siglip(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return export(tiny_checkpoint, tmp_path_factory.mktemp("runtimes") / "siglip")


@pytest.fixture(scope="session")
def clip(tiny_checkpoint_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return export(tiny_checkpoint_clip, tmp_path_factory.mktemp("runtimes") / "clip")


@pytest.fixture(scope="session")
def factory(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("runtimes")
    return export(factory_like(tiny_checkpoint, root / "checkpoint"), root / "factory")


@pytest.fixture(scope="session")
def edge(siglip: Pair) -> Iterator[EdgeRuntime]:
    """The float32 build: exact enough to compare ids."""
    with open_edge(siglip.bundle, "fp32+f32", allow_unverified=True, n_threads=1) as runtime:
        yield runtime


@pytest.fixture(scope="session")
def reference(siglip: Pair) -> ReferenceRuntime:
    return open_reference(siglip.checkpoint, n_threads=1)


def picture(seed: int = 0, height: int = 64, width: int = 64) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def image() -> npt.NDArray[np.uint8]:
    return picture()


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> DevicePlan:
    """Each device in turn; one that this machine hasn't is skipped with what is missing."""
    try:
        return choose_device(request.param)
    except EngineError as error:
        pytest.skip(error.message)

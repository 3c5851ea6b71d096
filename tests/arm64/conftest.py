"""What runs in the arm64 root, and what it takes to get there. Nothing is timed: qemu says nothing about a device."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
RUN_THERE = ROOT / "runtimes" / "native" / "arm64-run.sh"
BUILT = ROOT / "build" / "arm64"
DEMO = Path(os.environ.get("TINYLLAVA_EDGE_DEMO", ROOT / "demo"))


def missing() -> str:
    """Why nothing can be run there, with the remedy; empty if it can."""
    done = subprocess.run([str(RUN_THERE), "--", "-V"], capture_output=True, text=True)
    return "" if done.returncode == 0 else " ".join(done.stderr.split()) + " (make arm64)"


@pytest.fixture(scope="session")
def scripts() -> Iterator[Any]:
    """Of benchmarks/: arm64_agreement.py, stock_agreement.py and stock_server.py, by these names."""
    folder = str(ROOT / "benchmarks")
    names = ("arm64_agreement", "stock_agreement", "stock_server")
    sys.path.insert(0, folder)
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        while folder in sys.path:
            sys.path.remove(folder)
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def agreement(scripts: Any) -> Any:
    """benchmarks/arm64_agreement.py, whose `there` runs the arm64 Python."""
    if reason := missing():
        pytest.skip(reason)
    return scripts.arm64_agreement


@pytest.fixture(scope="session")
def demo_bundle() -> Path:
    """The trained nano model's bundle."""
    bundle = DEMO / "bundle"
    if not (bundle / "bundle.json").is_file():
        pytest.skip(f"no trained bundle in {bundle} (make demo, or name its directory in TINYLLAVA_EDGE_DEMO)")
    return bundle


@pytest.fixture(scope="session")
def all_types(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in every vision precision and language-model type that the tests compare."""
    from tinyllava_edge.export.bundle_writer import export_bundle

    out = tmp_path_factory.mktemp("arm64") / "tiny"
    llm, vision = ("f32", "f16", "q8_0", "q4_k_m", "q4_0"), ("fp32", "fp16", "int8", "w8", "w4")
    export_bundle(tiny_checkpoint, out, llm=llm, vision=vision)
    return out


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise that is not square, so that resizing has something to do."""
    from PIL import Image

    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)).save(path)
    return path

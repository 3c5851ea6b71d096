"""Who may import whom. Read from the source, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tinyllava_edge

ROOT = Path(tinyllava_edge.__file__).parent
OURS = "tinyllava_edge"
ENGINES = {"torch", "transformers", "onnxruntime", "llama_cpp", "onnx", "gguf", "accelerate", "safetensors"}
CORE = ("errors", "files", "spec", "prompt", "image", "bundle")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, relative ones made absolute; `from x import y` yields x and x.y."""
    package = [OURS, *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def reaches(path: Path, forbidden: set[str]) -> list[str]:
    """Imports that are a forbidden module or lie inside one."""
    return sorted({name for name in imports(path) if any(f"{name}.".startswith(f"{wall}.") for wall in forbidden)})


def modules(*parts: str) -> list[Path]:
    return sorted(ROOT.joinpath(*parts).rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", modules("runtimes"), ids=name)
def test_runtimes(path: Path) -> None:
    """The device runtime needs neither torch nor anything for training and export; the reference may use torch."""
    walls = {f"{OURS}.train", f"{OURS}.export", f"{OURS}.benchmarks", f"{OURS}.cli", "onnx", "gguf"}
    if path.name != "reference.py":
        walls |= {"torch", "transformers", "tokenizers", f"{OURS}.model", f"{OURS}.checkpoint"}
        walls.add(f"{OURS}.runtimes.reference")
    assert reaches(path, walls) == []


@pytest.mark.parametrize("path", modules(), ids=name)
def test_nobody_imports_the_command_line(path: Path) -> None:
    if path.name not in ("cli.py", "__main__.py"):
        assert reaches(path, {f"{OURS}.cli"}) == []


@pytest.mark.parametrize("module", CORE)
def test_core(module: str) -> None:
    walls = ENGINES | {
        f"{OURS}.{room}" for room in ("train", "export", "runtimes", "benchmarks", "model", "checkpoint")
    }
    assert reaches(ROOT / f"{module}.py", walls) == []


def test_the_wall_sees_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above could not fail."""
    path = tmp_path / "runtimes" / "bad.py"
    path.parent.mkdir()
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    sources = {
        "import torch.nn as nn": "torch",
        "def f():\n    from torch import nn": "torch",
        "from ..train import trainer": f"{OURS}.train",
        "from .. import cli": f"{OURS}.cli",
        "from ..export.vision import x": f"{OURS}.export",
        "from tinyllava_edge import model": f"{OURS}.model",
        "from . import reference": f"{OURS}.runtimes.reference",
    }
    for source, wall in sources.items():
        path.write_text(source)
        assert reaches(path, {wall}), source
        assert not reaches(path, {"torchvision", f"{OURS}.trainer"}), source


def test_the_tower_table_needs_no_engine() -> None:
    """The device runtime reads spec.py, which reads the table: in a fresh process neither loads torch."""
    code = "import sys, tinyllava_edge.spec; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

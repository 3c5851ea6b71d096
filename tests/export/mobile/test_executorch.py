"""ExecuTorch programs in ExecuTorch's own runtime; a wrong GELU is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("executorch.exir", reason="executorch, extra [executorch], is not installed")

from tinyllava_edge.errors import ExportError
from tinyllava_edge.export.mobile import executorch, rewrites, write
from tinyllava_edge.export.mobile.parity import compare
from tinyllava_edge.export.vision import vision_graph

from .samples import FAMILIES, still, tower


@pytest.mark.parametrize("family", [*FAMILIES, "mof-siglip-registers"])
def test_equals_the_checkpoint(family: str, tmp_path: Path) -> None:
    """Within float32's own rounding; attention is left whole to XNNPACK; the kernels that a host links are known."""
    model, spec, wanted = tower(family)
    path = tmp_path / "vision.pte"
    parts = executorch.write_executorch(vision_graph(model, spec), still(spec), path)
    figures = compare(path, executorch.runner(path), wanted, wanted.limit)
    assert figures["image_embeds"]["relative"] < 5e-6
    assert parts["delegates"] >= 9 and "aten.native_layer_norm.out" in parts["kernels"]
    for heavy in ("softmax", "bmm", "mm.out", "gelu", "where", "logical_not"):
        assert not any(heavy in name for name in parts["kernels"]), parts
    assert [p.name for p in tmp_path.iterdir()] == ["vision.pte"]
    data = path.read_bytes()
    assert data[4:6] == b"ET" and str(Path.cwd()).encode() not in data and b".py" not in data


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_gelu_is_refused(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """erf-GELU for the tanh form, and the other way round in CLIP's connector: outside the limit, with the number."""
    model, spec, wanted = tower(family)
    path = tmp_path / "vision.pte"
    other = {"siglip": "none", "clip": "tanh"}[family]

    def wrong(x: torch.Tensor, *, approximate: str = "none") -> Any:
        if approximate == other:
            return NotImplemented
        if other == "none":
            return torch.nn.functional.gelu(x)
        return rewrites.tanh_gelu(x, approximate="tanh")

    monkeypatch.setitem(rewrites.REWRITES, torch.ops.aten.gelu.default, wrong)
    executorch.write_executorch(vision_graph(model, spec), still(spec), path)
    with pytest.raises(ExportError, match=r"vision.pte: image_embeds differs from the checkpoint by a relative \d"):
        compare(path, executorch.runner(path), wanted, wanted.limit)


def test_a_graph_that_cannot_be_lowered(tmp_path: Path) -> None:
    """Control flow on values: an ExportError that names the file, and no file."""

    class Branch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if float(x.sum()) > 0 else x - 1

    with pytest.raises(ExportError, match=r"vision.pte: ExecuTorch can't lower the vision graph \(."):
        executorch.write_executorch(Branch(), torch.zeros(1, 3, 8, 8), tmp_path / "vision.pte")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    """What the engine raises becomes one error with the file's name."""
    model, spec, wanted = tower("clip")
    job = write._Job(tmp_path, model, spec, {}, wanted, print)
    (tmp_path / "vision.pte").write_bytes(b"damaged" * 99)
    with pytest.raises(ExportError, match=r"vision.pte: its engine can't open it \("):
        write._checked(job, tmp_path / "vision.pte", executorch.runner, "executorch_fp32", {})

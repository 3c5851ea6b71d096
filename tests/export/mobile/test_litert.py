"""LiteRT files in LiteRT's own interpreter; a wrong GELU is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("litert_torch", reason="litert-torch, extra [litert], is not installed")

from tinyllava_edge.errors import ExportError
from tinyllava_edge.export.mobile import litert, write
from tinyllava_edge.export.mobile.parity import OUTPUTS, compare
from tinyllava_edge.export.vision import vision_graph

from .samples import FAMILIES, still, tower, with_erf_gelu


@pytest.mark.parametrize("family", [*FAMILIES, "mof-siglip-registers"])
def test_equals_the_checkpoint(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Within float32's own rounding; inputs and outputs are named as in the ONNX graph; nothing on stdout."""
    from ai_edge_litert.interpreter import Interpreter

    model, spec, wanted = tower(family)
    path = tmp_path / "vision.tflite"
    litert.write_litert(vision_graph(model, spec), still(spec), path)
    figures = compare(path, litert.runner(path), wanted, wanted.limit)
    assert figures["image_embeds"]["relative"] < 5e-6
    signature = Interpreter(model_path=str(path)).get_signature_list()[litert.SIGNATURE]
    assert signature["inputs"] == ["pixel_values"] and sorted(signature["outputs"]) == sorted(OUTPUTS)
    assert [p.name for p in tmp_path.iterdir()] == ["vision.tflite"]
    data = path.read_bytes()
    assert data[4:8] == b"TFL3" and str(Path.cwd()).encode() not in data
    assert not capsys.readouterr().out


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_gelu_is_refused(family: str, tmp_path: Path) -> None:
    """A file with erf-GELU in the tower is outside the limit, with the number."""
    model, spec, wanted = tower(family)
    path = tmp_path / "vision.tflite"
    litert.write_litert(vision_graph(with_erf_gelu(model), spec), still(spec), path)
    with pytest.raises(ExportError, match=r"vision.tflite: image_embeds differs from the checkpoint by a relative \d"):
        compare(path, litert.runner(path), wanted, wanted.limit)


def test_a_graph_that_cannot_be_converted(tmp_path: Path) -> None:
    """Control flow on values: an ExportError that names the file, and no file."""

    class Branch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (x + 1, x) if float(x.sum()) > 0 else (x - 1, x)

    with pytest.raises(ExportError, match=r"vision.tflite: LiteRT can't convert the vision graph \(."):
        litert.write_litert(Branch(), torch.zeros(1, 3, 8, 8), tmp_path / "vision.tflite")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    """What the engine raises becomes one error with the file's name."""
    model, spec, wanted = tower("clip")
    job = write._Job(tmp_path, model, spec, {}, wanted, print)
    (tmp_path / "vision.tflite").write_bytes(b"damaged" * 99)
    with pytest.raises(ExportError, match=r"vision.tflite: its engine can't open it \("):
        write._checked(job, tmp_path / "vision.tflite", litert.runner, "litert_fp32", {})

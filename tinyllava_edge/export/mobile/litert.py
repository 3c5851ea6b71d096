"""The vision graph as a LiteRT file, `.tflite`, with the names of the ONNX graph in its signature."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import nn

from ...errors import ExportError
from ...files import new_file
from .. import onnx_io
from ..ranges import Floats
from .parity import OUTPUTS, Runner, reason

SIGNATURE = "serving_default"  # LiteRT's name of the only one


class Named(nn.Module):
    """A vision graph whose outputs have names, which the converter takes over."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.vision = graph  # `graph` is a name of fx

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """(1, 3, s, s) → image embeddings (1, t, d) and tower features (1, t, v)."""
        return dict(zip(OUTPUTS, self.vision(pixel_values), strict=True))


def write_litert(graph: nn.Module, pixels: torch.Tensor, target: Path) -> None:
    """Convert a graph and write the file, whole or not at all.

    Args:
        graph: what `vision.vision_graph` gives.
        pixels: (1, 3, s, s), which fixes the shapes.
        target: file to write.

    Raises:
        ExportError: LiteRT can't convert it.
        StorageError: the disk is full.
    """
    try:
        import litert_torch

        with onnx_io.quiet(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            model = litert_torch.convert(Named(graph).eval(), sample_kwargs={"pixel_values": pixels})
    except Exception as error:  # whatever fails in its passes, or while it loads
        raise ExportError(
            f"{target.name}: LiteRT can't convert the vision graph ({reason(error)})", "leave litert out of --mobile"
        ) from error
    with new_file(target) as temporary, contextlib.redirect_stdout(io.StringIO()):
        model.export(str(temporary))


def runner(path: Path) -> Runner:
    """Open a file in LiteRT's interpreter for this machine."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    call = interpreter.get_signature_runner(SIGNATURE)

    def run(pixel_values: Floats) -> list[Floats]:
        found = call(pixel_values=pixel_values)
        return [found[name] for name in OUTPUTS]

    return run

"""The vision graph as an ExecuTorch program: `.pte`, matrix products and the like lowered to XNNPACK."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ...errors import ExportError
from ...files import new_file
from .. import onnx_io
from ..ranges import Floats
from .parity import Runner, reason
from .rewrites import spelled_out

_DELEGATE = "executorch_call_delegate"


def write_executorch(graph: torch.nn.Module, pixels: torch.Tensor, target: Path) -> dict[str, Any]:
    """Lower a graph and write the program, whole or not at all.

    Args:
        graph: what `vision.vision_graph` gives.
        pixels: (1, 3, s, s), which fixes the shapes.
        target: file to write.

    Returns:
        `delegates`, the calls of XNNPACK, and `kernels`, operator → calls of what the host must link beside it.

    Raises:
        ExportError: ExecuTorch can't lower it, or leaves nothing to XNNPACK.
        StorageError: the disk is full.
    """
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        with onnx_io.quiet(), torch.no_grad():
            program = spelled_out(torch.export.export(graph, (pixels,)))
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    except Exception as error:  # whatever fails in its passes, or while it loads
        raise ExportError(
            f"{target.name}: ExecuTorch can't lower the vision graph ({reason(error)})",
            "leave executorch out of --mobile",
        ) from error
    nodes = lowered.exported_program().graph.nodes
    calls = Counter(str(node.target) for node in nodes if node.op == "call_function")
    if not calls[_DELEGATE]:
        raise ExportError(f"{target.name}: XNNPACK takes no part of the vision graph", "leave executorch out")
    with new_file(target) as temporary, temporary.open("wb") as handle:
        lowered.write_to_file(handle)
    kernels = {name: count for name, count in sorted(calls.items()) if name.endswith("out")}
    return {"delegates": calls[_DELEGATE], "kernels": kernels}


def runner(path: Path) -> Runner:
    """Open a program in ExecuTorch's runtime for this machine."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)

    def run(pixel_values: Floats) -> list[Floats]:
        method = program.load_method("forward")  # the program keeps it
        return [output.numpy() for output in method.execute([torch.from_numpy(pixel_values)])]

    return run

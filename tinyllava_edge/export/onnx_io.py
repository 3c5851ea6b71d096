"""ONNX files: written whole or not at all, and read back for the types that were really written."""

from __future__ import annotations

from pathlib import Path

import onnx

from ..errors import ExportError
from ..files import new_file

MAX_BYTES = (1 << 31) - 1  # a protobuf message, and so a single-file graph, ends here


def save(model: onnx.ModelProto, target: Path) -> None:
    """Write a graph as one file. Raises ExportError above 2 GiB and StorageError when the disk is full."""
    size = model.ByteSize()
    if size > MAX_BYTES:
        raise ExportError(
            f"{target}: {size:,} bytes, a single ONNX file ends at {MAX_BYTES:,}", "export a smaller precision"
        )
    with new_file(target) as temporary, temporary.open("wb") as handle:
        handle.write(model.SerializeToString())


def tensor_types(path: Path) -> dict[str, int]:
    """Type → number of constant tensors with at least one element, read from the file; most frequent first.

    Both forms of a constant count: initialisers and the tensors of Constant nodes.
    """
    graph = onnx.load(path).graph
    tensors = list(graph.initializer)
    tensors += [a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.HasField("t")]
    counts: dict[str, int] = {}
    for tensor in tensors:
        name = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))

"""How large the values inside a vision graph get on given pictures, and which block makes them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from .lazy_graph import LazyGraph, open_graph, pointing

Floats = npt.NDArray[np.float32]
FP16_MAX = 65504.0  # largest finite float16
_COMPUTES = ("Add", "Conv", "Gelu", "Gemm", "LayerNormalization", "MatMul", "Mul", "Sigmoid")
_BLOCK = re.compile(
    r"^(?:(?:first\.|second\.)?(?:layers\.\d+|embeddings)|connector)\b"
)  # of a mixture's two towers, too


def too_large(path: Path, pictures: Sequence[Floats], limit: float) -> list[tuple[str, float]]:
    """Blocks of a float32 graph whose values pass `limit` on some picture: name and largest magnitude, in order.

    Args:
        path: graph as `export_vision_fp32` writes it.
        pictures: pixel_values (b, 3, s, s).
        limit: largest magnitude allowed.
    """
    if not pictures:
        return []
    largest: dict[str, float] = {}
    for name, value in magnitudes(path, pictures):
        if not value <= limit:  # NaN too
            largest[name] = max(value, largest.get(name, 0.0))
    return list(largest.items())


def magnitudes(path: Path, pictures: Sequence[Floats]) -> list[tuple[str, float]]:
    """(block, largest magnitude over all pictures) of every computed value, in the graph's order.

    A value's block is the layer whose parameters were used last, e.g. `layers.7`.
    """
    blocks = _blocks(open_graph(path))
    found = extrema(path, pictures, set(blocks))
    return [(block, max(abs(found[name][0]), abs(found[name][1]))) for name, block in blocks.items()]


def extrema(
    path: Path, pictures: Sequence[Floats], wanted: Collection[str] | None = None
) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of float tensors over all pictures.

    Args:
        path: float32 graph as `export_vision_fp32` writes it.
        pictures: pixel_values (b, 3, s, s), at least one.
        wanted: names of computed values; None takes all of them, and the graph's input.
    """
    import onnxruntime as ort

    graph = open_graph(path)
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.model.graph.value_info, *graph.model.graph.output)}
    nodes: list[onnx.NodeProto] = []
    names: list[str] = []
    for node in graph.model.graph.node:  # measured at once: a runtime keeps what is still to be read
        nodes.append(node)
        for name in node.output:
            if name in wanted if wanted is not None else kinds.get(name) == onnx.TensorProto.FLOAT:
                names.append(name)
                nodes += [
                    helper.make_node(f"Reduce{kind}", [name], [f"{name}/{kind}"], keepdims=0) for kind in ("Min", "Max")
                ]
    del graph.model.graph.node[:]
    graph.model.graph.node.extend(nodes)
    scalars = [f"{name}/{kind}" for name in names for kind in ("Min", "Max")]
    graph.model.graph.output.extend(helper.make_tensor_value_info(s, onnx.TensorProto.FLOAT, []) for s in scalars)
    for name, weight in graph.weights.items():  # they stay in the file that they are in
        if weight.place is not None:
            pointing(graph, name, weight, weight.place[0].name, weight.place[1])
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # else all measuring is left to the end
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".ranges-", suffix=".onnx") as handle:
        handle.write(graph.model.SerializeToString())
        handle.flush()
        session = ort.InferenceSession(handle.name, options, providers=["CPUExecutionProvider"])
    rows = [session.run(scalars, {"pixel_values": np.ascontiguousarray(p, np.float32)}) for p in pictures]
    table = np.array(rows, np.float64).reshape(len(pictures), len(names), 2)
    lowest, highest = table[..., 0].min(axis=0), table[..., 1].max(axis=0)
    found = {name: (float(lowest[i]), float(highest[i])) for i, name in enumerate(names)}
    if wanted is None:
        found["pixel_values"] = (float(min(p.min() for p in pictures)), float(max(p.max() for p in pictures)))
    return found


def _blocks(lazy: LazyGraph) -> dict[str, str]:
    """Name of every computed float value → the block that it belongs to."""
    graph = lazy.model.graph
    weights = {tensor.name for tensor in graph.initializer} | set(lazy.weights)
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    block, found = "embeddings", {}
    for node in graph.node:
        for name in node.input:
            match = _BLOCK.match(name) if name in weights else None
            block = match[0] if match else block
        if node.op_type in _COMPUTES:
            found.update({out: block for out in node.output if kinds.get(out) == onnx.TensorProto.FLOAT})
    return found

"""ONNX files: written whole or not at all, and read back for the types that were really written.

A graph above 2 GB keeps its weights beside it, in one file named after the graph: `vision.onnx` and `vision.onnx.data`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx

from .lazy_graph import data_file, from_model, open_graph, write_graph


def save(model: onnx.ModelProto, target: Path) -> None:
    """Write a graph that is in memory; its large initialisers are moved out of `model`.

    Raises:
        StorageError: the disk is full.
    """
    write_graph(from_model(model), target)


def parts(path: Path) -> tuple[Path, ...]:
    """Further files that belong to a graph: its external data, or nothing."""
    data = data_file(path)
    return (data,) if data.is_file() else ()


def remove(path: Path) -> None:
    """Delete a graph and its external data."""
    for part in (*parts(path), path):
        part.unlink(missing_ok=True)


def total_bytes(path: Path) -> int:
    """Size of a graph and its external data."""
    return sum(part.stat().st_size for part in (path, *parts(path)))


def tensor_types(path: Path) -> dict[str, int]:
    """Type → number of constant tensors with at least one element, read from the file; most frequent first.

    Both forms of a constant count: initialisers and the tensors of Constant nodes.
    """
    graph = open_graph(path)
    nodes = graph.model.graph.node
    kinds = [tensor.data_type for tensor in graph.model.graph.initializer]
    kinds += [a.t.data_type for node in nodes if node.op_type == "Constant" for a in node.attribute if a.HasField("t")]
    kinds += [onnx.helper.np_dtype_to_tensor_dtype(weight.dtype) for weight in graph.weights.values()]
    counts: dict[str, int] = {}
    for kind in kinds:
        name = onnx.TensorProto.DataType.Name(kind).lower()
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' advice off the screen, and off stdout in any case: stdout is data."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

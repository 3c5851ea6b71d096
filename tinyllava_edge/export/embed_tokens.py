"""Token ids → text embeddings as a graph of its own, for runtimes whose decoder takes `inputs_embeds`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .. import checkpoint
from ..errors import ExportError, UsageError
from .onnx_parts import save_parts

BLOCK = 32  # weights that share one scale in the 4-bit form
TABLES = ("float32", "float16", "int4")
_NAME = "embed_tokens.weight"


def export_embed_tokens(source: checkpoint.LlmSource, target: Path, table: str = "float32") -> list[Path]:
    """Write `input_ids` int64 (b, n) → `inputs_embeds` float32 (b, n, h).

    Gemma's factor √h is part of the table, as Hugging Face's embedding applies it to text and not to pictures.

    Args:
        source: language model of a checkpoint.
        target: file to write.
        table: one of TABLES: how the rows are stored. `int4` is symmetric, in blocks of BLOCK.

    Returns:
        The graph, then its weight parts, if any.

    Raises:
        UsageError: unknown `table`.
        ExportError: the width is no multiple of BLOCK.
    """
    if table not in TABLES:
        raise UsageError(f"unknown form {table!r} of an embedding table", f"known: {', '.join(TABLES)}")
    rows = source.get("model.embed_tokens.weight").float().numpy()
    width = rows.shape[1]
    if source.config.model_type == "gemma":
        rows = rows * np.float32(width**0.5)
    ids = _value("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    if table == "int4":
        if width % BLOCK:
            raise ExportError(f"{source.root}: embeddings of width {width} have no blocks of {BLOCK}")
        codes, scales = _int4(rows)
        data = _constant(f"{_NAME}_q4", codes)
        steps = _constant(f"{_NAME}_scales", scales)
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK}
        nodes = [ir.node("GatherBlockQuantized", [data, ids, steps], attributes, domain="com.microsoft", name="rows")]
        weights = [data, steps]
    else:
        data = _constant(_NAME, rows.astype(table, copy=False))
        nodes, weights = [ir.node("Gather", [data, ids], {"axis": 0}, name="rows")], [data]
    if table == "float16":
        nodes[0].outputs[0].name = "stored"
        nodes.append(ir.node("Cast", [nodes[0].outputs[0]], {"to": ir.DataType.FLOAT}, name="widen"))
    out = nodes[-1].outputs[0]
    out.name, out.dtype = "inputs_embeds", ir.DataType.FLOAT
    out.shape = ir.Shape(["batch_size", "sequence_length", width])
    opsets = {"": 20, "com.microsoft": 1}
    graph = ir.Graph([ids], [out], nodes=nodes, initializers=weights, opset_imports=opsets, name="embed_tokens")
    return [target, *save_parts(ir.Model(graph, ir_version=10, producer_name="tinyllava_edge"), target)]


def _int4(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """(vocab, h) → codes −8…7 and one scale per block; the value furthest from zero becomes −8 exactly."""
    blocks = rows.reshape(rows.shape[0], -1, BLOCK)
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]  # (vocab, h / BLOCK)
    scales = (furthest / -8).astype(np.float32)
    steps = np.where(scales == 0, np.float32(1), scales)
    codes = np.clip(np.rint(blocks / steps[..., None]), -8, 7).astype(np.int8)
    return codes.reshape(rows.shape).astype(ml_dtypes.int4), scales


def _value(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _constant(name: str, values: npt.NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(values, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(values.shape), const_value=tensor)

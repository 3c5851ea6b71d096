"""Graphs in the form that browsers fetch: weights beside the graph, in pieces that fit into one ArrayBuffer."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from ..files import storage_errors

INLINE_BYTES = 1 << 26  # weights below this stay inside the graph
PART_BYTES = 2_000_000_000  # an ArrayBuffer ends at 2 GiB in some browsers, and so does a protobuf message
_SMALL = 1024  # bytes; shapes and other small constants stay inside, where the runtime folds them
_ALIGN = 4096  # bytes; a weight that starts on a page can be mapped


def save_parts(
    model: ir.Model, target: Path, *, inline_bytes: int = INLINE_BYTES, part_bytes: int = PART_BYTES
) -> list[Path]:
    """Write a graph, one tensor at a time in memory, with its weights in `NAME.onnx_data`, `NAME.onnx_data_1`, …

    These are the names that transformers.js asks for. A single tensor is never cut, so a part may be larger than
    `part_bytes` where one tensor is.

    Args:
        model: graph; its weights may be lazy. It is changed: weights become references to the parts.
        target: the `.onnx` file; parts are written beside it.
        inline_bytes: with fewer bytes of weights there are no parts.
        part_bytes: size that a part is closed at.

    Returns:
        Parts, in order; none where everything is inside.

    Raises:
        StorageError: the disk is full or not writable.
    """
    held = [(value, value.const_value) for value in model.graph.initializers.values() if value.const_value is not None]
    parts: list[Path] = []
    with storage_errors(target):
        if sum(tensor.nbytes for _, tensor in held) > inline_bytes:
            handle: BinaryIO | None = None
            try:
                for value, tensor in held:
                    if tensor.nbytes < _SMALL:
                        value.const_value = _inside(tensor)
                        continue
                    if handle is None or (handle.tell() and handle.tell() + tensor.nbytes > part_bytes):
                        if handle is not None:
                            handle.close()
                        parts.append(target.with_name(f"{target.name}_data" + (f"_{len(parts)}" if parts else "")))
                        handle = parts[-1].open("wb")
                    handle.write(b"\0" * (-handle.tell() % _ALIGN))
                    offset = handle.tell()
                    data = tensor.tobytes()
                    handle.write(data)
                    value.const_value = ir.ExternalTensor(
                        parts[-1].name,
                        offset,
                        len(data),
                        tensor.dtype,
                        shape=ir.Shape(tensor.shape.numpy()),
                        name=value.name or "",
                        base_dir=target.parent,
                    )
            finally:
                if handle is not None:
                    handle.close()
        else:
            for value, tensor in held:
                value.const_value = _inside(tensor)
        ir.save(model, target)
    return parts


def _inside(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A tensor that is written into the graph; one from another graph's parts would stay a reference to them."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)

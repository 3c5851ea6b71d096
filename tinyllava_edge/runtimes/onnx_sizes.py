"""What an ONNX graph's tensors will take in memory, read in plain Python from a read-only map; weights are not touched.

Two facts of ONNX Runtime on a CPU decide it. A weight is kept once: what a kernel reads in an order of its own is
packed, and the original dropped. And x86 has no float16 kernels: casts are put in, those of weights are computed at
load, so float16 weights stand in memory as float32.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import BundleError
from .gguf_front import AGAIN, Damaged, opened
from .headers import onnx_field

# Of onnx.proto: TensorProto.DataType → bytes of one value.
_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_FLOAT16, _EXTERNAL = 10, 1
_GRAPH = 7  # of ModelProto
_NODE, _INITIALIZER, _VALUE = 1, 5, 13  # of GraphProto
_INPUT, _OUTPUT, _OPERATOR = 1, 2, 4  # of NodeProto
_DIMS, _KIND, _NAME, _LOCATION = 1, 2, 8, 14  # of TensorProto
_SCALES = 2  # which input of MatMulNBits


@dataclass(frozen=True)
class OnnxSizes:
    """Bytes of one graph's tensors."""

    weights: int
    """what the loaded session keeps"""
    inline: int
    """weights inside the graph's own file, which are parsed into memory before they are packed; those in a file beside
    it are mapped instead"""
    largest: int
    """the largest value between two nodes, for a batch of one: one layer's attention scores, in a tower"""


def onnx_sizes(path: Path, *, float16: bool = False) -> OnnxSizes:
    """Read a graph's tensor sizes.

    Args:
        path: the graph.
        float16: whether it runs where there are float16 kernels, as on a GPU.

    Raises:
        BundleError: missing, truncated, or not an ONNX file.
    """
    with opened(path) as data:
        try:
            return _sizes(data, 1 if float16 else 2)
        except (Damaged, IndexError, UnicodeDecodeError) as error:
            raise BundleError(f"{path}: truncated or not an ONNX file ({error})", AGAIN) from error


def initializers(data: mmap.mmap) -> Iterator[tuple[str, int, int]]:
    """Name, TensorProto.DataType and number of elements of each initialiser. Raises Damaged or IndexError."""
    for field, start, end in _children(data, 0, len(data)):
        if field == _GRAPH:
            for inner, first, last in _children(data, start, end):
                if inner == _INITIALIZER:
                    name, kind, size, _ = _tensor(data, first, last)
                    yield name, kind, size // _BYTES.get(kind, 1)


def _sizes(data: mmap.mmap, widened: int) -> OnnxSizes:
    tensors: dict[str, tuple[int, int]] = {}  # name → kind, bytes
    values: dict[str, int] = {}
    outputs: set[str] = set()
    scales: list[str] = []
    inline = 0
    for field, start, end in _children(data, 0, len(data)):
        if field != _GRAPH:
            continue
        for inner, first, last in _children(data, start, end):
            if inner == _INITIALIZER:
                name, kind, size, outside = _tensor(data, first, last)
                tensors[name] = (kind, size)
                inline += 0 if outside else size
            elif inner == _NODE:
                made, scale = _node(data, first, last)
                outputs.update(made)
                scales += scale
            elif inner == _VALUE:
                name, size = _value(data, first, last, widened)
                values[name] = size
    weights = sum(widened * size if kind == _FLOAT16 else size for kind, size in tensors.values())
    # its kernel keeps a copy of the scales and, for each of them, the sum of the block's weights
    weights += 2 * sum(tensors[name][1] for name in scales if name in tensors)
    largest = max((size for name, size in values.items() if name in outputs), default=0)
    return OnnxSizes(weights, inline, largest)


def _tensor(data: mmap.mmap, place: int, end: int) -> tuple[str, int, int, bool]:
    """Name, kind, bytes, and whether they lie in another file."""
    name, kind, outside, sizes = "", 0, False, list[int]()
    while place < end:
        field, wire, start, place = onnx_field(data, place, end)
        if field == _DIMS:
            sizes += [start] if wire == 0 else _varints(data, start, place)
        elif field == _KIND and wire == 0:
            kind = start
        elif field == _NAME and wire == 2:
            name = data[start:place].decode("utf-8")
        elif field == _LOCATION and wire == 0:
            outside = start == _EXTERNAL
    return name, kind, _BYTES.get(kind, 0) * math.prod(sizes), outside


def _node(data: mmap.mmap, place: int, end: int) -> tuple[list[str], list[str]]:
    """Names of what a node makes, and of the scales if it is a MatMulNBits."""
    inputs, outputs, operator = list[str](), list[str](), b""
    for field, start, last in _children(data, place, end):
        if field == _INPUT:
            inputs.append(data[start:last].decode("utf-8"))
        elif field == _OUTPUT:
            outputs.append(data[start:last].decode("utf-8"))
        elif field == _OPERATOR:
            operator = data[start:last]
    return outputs, inputs[_SCALES : _SCALES + 1] if operator == b"MatMulNBits" else []


def _value(data: mmap.mmap, place: int, end: int, widened: int) -> tuple[str, int]:
    """Name and bytes of a ValueInfoProto's tensor.

    The exporter leaves two sizes open: the batch, which is first and counts as one, and the last of attention's scores,
    which equals the one before it.
    """
    name, kind, sizes = "", 0, list[int]()
    for field, start, last in _children(data, place, end):
        if field == 1:
            name = data[start:last].decode("utf-8")
        elif field == 2:  # its type, of which field 1 is a tensor's
            for _, first, close in (child for child in _children(data, start, last) if child[0] == 1):
                at = first
                while at < close:
                    number, wire, begin, at = onnx_field(data, at, close)
                    if number == 1 and wire == 0:
                        kind = begin
                    elif number == 2 and wire == 2:
                        for _, *bounds in _children(data, begin, at):
                            sizes.append(_size(data, *bounds) or (sizes[-1] if sizes else 1))
    return name, (widened if kind == _FLOAT16 else 1) * _BYTES.get(kind, 0) * math.prod(sizes)


def _size(data: mmap.mmap, place: int, end: int) -> int:
    """A dimension's size; 0 where it is open."""
    while place < end:
        field, wire, start, place = onnx_field(data, place, end)
        if field == 1 and wire == 0:
            return start
    return 0


def _children(data: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field that has a length."""
    while place < end:
        field, wire, start, place = onnx_field(data, place, end)
        if wire == 2:
            yield field, start, place


def _varints(data: mmap.mmap, place: int, end: int) -> list[int]:
    found, value, shift = list[int](), 0, 0
    for byte in data[place:end]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            found.append(value)
            value = shift = 0
    return found

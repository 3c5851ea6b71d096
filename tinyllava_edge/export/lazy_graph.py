"""An ONNX graph whose large weights stay where they are until they are written: peak memory is one tensor.

A protobuf message's fields may stand in any order, so a file is the graph without weights followed by one initialiser
after the other. Above 2 GB the weights go into `<name>.data` beside the graph, as ONNX's external data.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper

from ..errors import BundleError, ExportError
from ..files import new_file
from ..runtimes.headers import check_onnx, onnx_field

Array = npt.NDArray[Any]
MAX_BYTES = (1 << 31) - 1  # a protobuf message ends here
INLINE_BYTES = 1024  # smaller tensors stay in the graph: shapes are read from them
ALIGNMENT = 4096  # bytes; lets a runtime map a tensor from the file
_GRAPH, _INITIALIZER, _RAW_DATA, _BYTES = 7, 5, 9, 2  # field numbers of onnx.proto, and the wire type of bytes


@dataclass(frozen=True)
class Weight:
    """A large tensor that is not in memory."""

    shape: tuple[int, ...]
    """sizes, outermost first"""
    dtype: np.dtype[Any]
    """element type"""
    read: Callable[[], Array]
    """reads or computes it; the result is not kept"""
    place: tuple[Path, int] | None = None
    """file and offset where its bytes lie as they are; none if it is computed"""

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass
class LazyGraph:
    """A graph and its large weights by name; small initialisers and all nodes are in `model`."""

    model: onnx.ModelProto
    """the graph without its large initialisers"""
    weights: dict[str, Weight] = field(default_factory=dict)
    """name → weight, in the file's order"""

    def add(self, name: str, value: Array) -> None:
        """Add an initialiser that is in memory; a large one is kept as a weight."""
        if value.nbytes < INLINE_BYTES:
            self.model.graph.initializer.append(numpy_helper.from_array(value, name))
        else:
            self.weights[name] = Weight(value.shape, value.dtype, lambda: value)

    def add_all(self, values: Mapping[str, Array]) -> None:
        """`add` for several."""
        for name, value in values.items():
            self.add(name, value)


def open_graph(path: Path) -> LazyGraph:
    """Open a graph without reading its weights.

    Raises:
        ExportError: not a valid graph, or its external data is missing or cut off.
    """
    try:
        check_onnx(path, frozenset(sibling.name for sibling in path.parent.iterdir()))
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            rest, graph_rest, weights = bytearray(), bytearray(), dict[str, Weight]()
            for number, start, end, whole in _fields(data, 0, len(data)):
                if number != _GRAPH:
                    rest += data[whole:end]
                    continue
                for inner, inner_start, inner_end, inner_whole in _fields(data, start, end):
                    kept = _initializer(path, data, inner_start, inner_end, weights) if inner == _INITIALIZER else False
                    if not kept:
                        graph_rest += data[inner_whole:inner_end]
        model = onnx.ModelProto.FromString(bytes(rest))
        model.graph.MergeFromString(bytes(graph_rest))
    except (BundleError, DecodeError) as error:
        raise ExportError(f"{path}: not a valid graph ({error})", "export again") from error
    return LazyGraph(model, weights)


def from_model(model: onnx.ModelProto) -> LazyGraph:
    """A graph that is in memory. Its large initialisers are moved out of `model`."""
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    graph = LazyGraph(model)
    for tensor in tensors:
        shape, dtype = tuple(tensor.dims), np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        if _is_large(len(tensor.raw_data), shape, dtype):
            graph.weights[tensor.name] = Weight(shape, dtype, functools.partial(numpy_helper.to_array, tensor))
        else:
            model.graph.initializer.append(tensor)
    return graph


def write_graph(graph: LazyGraph, target: Path) -> None:
    """Write a graph, whole or not at all, reading each weight once.

    Raises:
        StorageError: the disk is full, or the place may not be written to.
    """
    heads = {name: _head(name, weight) for name, weight in graph.weights.items()}
    sizes = {name: len(heads[name]) + _sized(_RAW_DATA, graph.weights[name].bytes) for name in heads}
    body = graph.model.graph.SerializeToString()
    inside = len(body) + sum(_sized(_INITIALIZER, size) for size in sizes.values())
    outer = onnx.ModelProto()
    outer.CopyFrom(graph.model)
    outer.ClearField("graph")
    front = outer.SerializeToString()
    if len(front) + _sized(_GRAPH, inside) > MAX_BYTES:
        _write_apart(graph, target)
        return
    with new_file(target) as temporary, temporary.open("wb") as handle:
        handle.write(front + _tag(_GRAPH, inside) + body)
        for name, weight in graph.weights.items():
            handle.write(_tag(_INITIALIZER, sizes[name]) + heads[name] + _tag(_RAW_DATA, weight.bytes))
            _write_bytes(handle, name, weight)


def data_file(path: Path) -> Path:
    """Where a graph above 2 GB keeps its weights."""
    return path.with_name(path.name + ".data")


def pointing(graph: LazyGraph, name: str, weight: Weight, location: str, offset: int) -> None:
    """Add an initialiser whose bytes lie in `location`, a file beside the graph."""
    tensor = graph.model.graph.initializer.add()
    tensor.ParseFromString(_head(name, weight))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", weight.bytes)):
        tensor.external_data.add(key=key, value=str(value))


def _write_apart(graph: LazyGraph, target: Path) -> None:
    data, whole = data_file(target), LazyGraph(onnx.ModelProto())
    whole.model.CopyFrom(graph.model)
    with new_file(data) as temporary, temporary.open("wb") as handle:
        for name, weight in graph.weights.items():
            handle.write(b"\0" * (-handle.tell() % ALIGNMENT))
            pointing(whole, name, weight, data.name, handle.tell())
            _write_bytes(handle, name, weight)
    with new_file(target) as temporary:
        temporary.write_bytes(whole.model.SerializeToString())


def _write_bytes(handle: BinaryIO, name: str, weight: Weight) -> None:
    value = np.ascontiguousarray(weight.read())
    if value.shape != weight.shape or value.dtype != weight.dtype:
        raise ExportError(f"tensor {name} came out as {value.dtype} {value.shape}", "report this with config.json")
    handle.write(value.reshape(-1).view(np.uint8).data)


def _initializer(path: Path, data: mmap.mmap, start: int, end: int, weights: dict[str, Weight]) -> bool:
    """Note a large initialiser as a weight; False for a small one, which belongs into the graph."""
    head, raw = bytearray(), (0, 0)
    for number, inner_start, inner_end, whole in _fields(data, start, end):
        if number == _RAW_DATA:
            raw = (inner_start, inner_end)
        else:
            head += data[whole:inner_end]
    tensor = TensorProto.FromString(bytes(head))
    shape, dtype = tuple(tensor.dims), np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    count = int(np.prod(shape, dtype=np.int64))
    place = (path, raw[0])
    if tensor.data_location == TensorProto.EXTERNAL:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        place = (path.with_name(entries["location"]), int(entries.get("offset", "0")))
        if int(entries.get("length", count * dtype.itemsize)) != count * dtype.itemsize:  # packed: known, never read
            weights[tensor.name] = Weight(shape, dtype, functools.partial(_packed, path, tensor.name))
            return True
    elif not _is_large(raw[1] - raw[0], shape, dtype):
        return False
    weights[tensor.name] = Weight(shape, dtype, lambda: _from_file(place, dtype, count).reshape(shape), place)
    return True


def _packed(path: Path, name: str) -> Array:
    raise ExportError(f"{path}: tensor {name} is packed", "start from the float32 graph")


def _is_large(size: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether a tensor of `size` raw bytes is kept as a weight; packed 4-bit ones are not."""
    return size >= INLINE_BYTES and size == int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _from_file(place: tuple[Path, int], dtype: np.dtype[Any], count: int) -> Array:
    value = np.fromfile(place[0], dtype=np.uint8, count=count * dtype.itemsize, offset=place[1])
    if value.size != count * dtype.itemsize:
        raise ExportError(f"{place[0]}: cut off", "export again")
    return value.view(dtype)


def _fields(data: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Field number, where its content starts and ends, and where its tag starts."""
    while place < end:
        whole = place
        number, _, start, place = onnx_field(data, place, end)
        yield number, start, place, whole


def _head(name: str, weight: Weight) -> bytes:
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    head: bytes = TensorProto(name=name, dims=weight.shape, data_type=kind).SerializeToString()
    return head


def _tag(number: int, size: int) -> bytes:
    """A field's tag and length in front of `size` bytes."""
    out, rest = bytearray([number << 3 | _BYTES]), size
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def _sized(number: int, size: int) -> int:
    return len(_tag(number, size)) + size

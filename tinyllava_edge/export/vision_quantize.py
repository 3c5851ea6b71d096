"""The float32 vision graph → its smaller precisions. Sources above 2 GB and their external data included.

Nothing is fused: weight-only kernels want the plain MatMul, and fusing gains nothing on a CPU.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import helper, numpy_helper

from ..errors import ExportError, UsageError
from ..files import is_full, new_file, no_space
from . import onnx_io
from .lazy_graph import LazyGraph, Weight, open_graph, write_graph
from .ranges import FP16_MAX, Floats, extrema, too_large

FP16_PICTURES = 4  # run in float32 to look for overflow
BLOCK = 32  # weights that share a scale in w8 and w4
ACCURACY_LEVEL = 4  # MatMulNBits multiplies in int8: the fast form on CPUs
PAIR_MAX = 128  # 255 * 128 is the last multiple of 255 within 16 bits
Converter = Callable[[Path, Path, Sequence[Floats]], dict[str, int]]


def convert_fp16(src: Path, dst: Path, calibration: Sequence[Floats] = ()) -> dict[str, int]:
    """Every float tensor in float16; pixels go in and embeddings come out as float32.

    Args:
        src: float32 graph.
        dst: file to write.
        calibration: pixel_values (b, 3, s, s); values beyond float16 are looked for on FP16_PICTURES of them, and with
            none in the weights alone.

    Returns:
        Type → number of tensors, read back from the file.

    Raises:
        ExportError: weights or values are beyond float16's 65,504, which would become infinity; the message names
            the blocks.
    """
    looked_at = calibration[:: max(1, len(calibration) // FP16_PICTURES)][:FP16_PICTURES]
    if found := too_large(src, looked_at, FP16_MAX):
        worst = "; ".join(f"{name} reaches {value:,.0f}" for name, value in found[:4])
        raise ExportError(f"{src}: {worst}, float16 ends at {FP16_MAX:,.0f}", "export int8 or w8 instead")
    graph = open_graph(src)
    for tensor in _float_tensors(graph.model.graph):
        tensor.CopyFrom(numpy_helper.from_array(_to_fp16(src, tensor.name, numpy_helper.to_array(tensor)), tensor.name))
    for name, weight in graph.weights.items():
        if weight.dtype == np.float32:
            read = functools.partial(_read_fp16, src, name, weight)
            graph.weights[name] = Weight(weight.shape, np.dtype(np.float16), read)
    for value in graph.model.graph.value_info:
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for node in graph.model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.FLOAT16
    _cast_at_the_borders(graph.model.graph)
    write_graph(graph, dst)
    return _check(dst, "float16")


def quantize_vision_int8(src: Path, dst: Path, calibration: Sequence[Floats] = ()) -> dict[str, int]:
    """Dynamic int8 of every matrix product: weights per channel, signed; activations are quantised as they come.

    The nodes are those of ONNX Runtime's `quantize_dynamic(per_channel=True, weight_type=QInt8)` for MatMul; a column's
    step is larger than there where `_channel_scales` needs it. Convolutions stay float: as ConvInteger the patch
    embedding is slower and less exact.

    Returns:
        Type → number of tensors, read back from the file.
    """
    graph = open_graph(src)
    nodes: list[onnx.NodeProto] = []
    inputs: set[str] = set()  # activations that are quantised already: queries, keys and values share one
    for node in graph.model.graph.node:
        weight = _matrix(graph, node)
        if weight is None:
            nodes.append(node)
            continue
        x, w, y = node.input[0], node.input[1], node.output[0]
        if x not in inputs:
            inputs.add(x)
            outputs = [f"{x}_quantized", f"{x}_scale", f"{x}_zero_point"]
            nodes.append(helper.make_node("DynamicQuantizeLinear", [x], outputs, f"{x}_quantize"))
        numbers = [f"{x}_quantized", f"{w}_quantized", f"{x}_zero_point", f"{w}_zero_point"]
        nodes += [
            helper.make_node("Mul", [f"{x}_scale", f"{w}_scale"], [f"{y}_scale"], f"{y}_scales"),
            helper.make_node("MatMulInteger", numbers, [f"{y}_integer"], f"{y}_matmul"),
            helper.make_node("Cast", [f"{y}_integer"], [f"{y}_cast"], f"{y}_to_float", to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [f"{y}_cast", f"{y}_scale"], [y], f"{y}_rescale"),
        ]
        scale = _channel_scales(weight.read())
        graph.weights[f"{w}_quantized"] = Weight(
            weight.shape, np.dtype(np.int8), functools.partial(_read_int8, weight, scale)
        )
        graph.add_all({f"{w}_scale": scale, f"{w}_zero_point": np.zeros(len(scale), np.int8)})
    return _write(graph, nodes, dst, "int8")


def _channel_scales(weight: Floats) -> Floats:
    """Step of a symmetric 8-bit code per column of (k, n); 1 for a column of zeros.

    On x86 without VNNI, ONNX Runtime adds two products of neighbours (rows 2i and 2i + 1) in 16 bits, which saturate:
    no two such codes may add up to more than PAIR_MAX, else the answer depends on the processor.
    """
    even = len(weight) // 2 * 2  # the last of an odd number of rows is paired with zero
    pairs = np.abs(weight[0:even:2] + weight[1:even:2]).max(axis=0, initial=0)
    largest = np.abs(weight).max(axis=0)
    # Rounding adds half a unit to each code: two that are PAIR_MAX - 0.5 together stay below PAIR_MAX + 1.
    step = np.maximum(2 * largest / 254, pairs / (PAIR_MAX - 0.5))
    scale: Floats = np.where(largest > 0, step, 1).astype(np.float32)
    return scale


def _read_int8(weight: Weight, scale: Floats) -> npt.NDArray[np.int8]:
    return np.clip(np.round(weight.read() / scale), -127, 127).astype(np.int8)


def quantize_vision_w8(src: Path, dst: Path, calibration: Sequence[Floats] = ()) -> dict[str, int]:
    """8-bit weights in blocks of 32 with float activations: MatMulNBits instead of every MatMul with a constant."""
    return _matmul_nbits(src, dst, bits=8)


def quantize_vision_w4(src: Path, dst: Path, calibration: Sequence[Floats] = ()) -> dict[str, int]:
    """4-bit weights in blocks of 32 with float activations: MatMulNBits instead of every MatMul with a constant."""
    return _matmul_nbits(src, dst, bits=4)


def quantize_vision_qdq(src: Path, dst: Path, calibration: Sequence[Floats] = ()) -> dict[str, int]:
    """Static int8 as QuantizeLinear/DequantizeLinear pairs, the form that NPU compilers read.

    Weights per channel, signed; activations per tensor, with the ranges that the calibration pictures reach. Every
    operator is quantised, not the matrix products alone: an operator left in float splits the graph that an NPU takes.
    Steps of weights are those of `_channel_scales`, since a CPU runs this form by the same kernels as int8.

    Args:
        src: float32 graph.
        dst: file to write.
        calibration: pixel_values (b, 3, s, s) of real pictures.

    Raises:
        UsageError: no calibration pictures.
    """
    if not calibration:
        raise UsageError(f"{dst.name}: qdq needs calibration pictures", "give some; calibration.samples makes them")
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data

    ranges = {name: tuple(map(np.float32, pair)) for name, pair in extrema(src, calibration).items()}
    with new_file(dst) as temporary, onnx_io.quiet(), tempfile.TemporaryDirectory(dir=dst.parent, prefix=".q-") as room:
        cache, link = Path(room) / "ranges.json", Path(room) / "fp32.onnx"
        save_tensors_data(
            TensorsData(CalibrationMethod.MinMax, ranges), cache
        )  # its own calibrator takes far more memory
        if not onnx_io.parts(src):  # a link to external data is not followed
            link.symlink_to(src.resolve())
        try:
            quantize_static(
                link if link.is_symlink() else onnx.load(src),
                temporary,
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                calibration_cache_path=cache,
                extra_options={"TensorQuantOverrides": _weight_steps(src)},
            )
        except DecodeError as error:  # its copies are written without a look at the disk, then read back
            if is_full(dst, needed=src.stat().st_size):
                raise no_space(dst) from error
            raise ExportError(f"{src}: not a valid graph ({error})", "export again") from error
    return _check(dst, "int8")


def _weight_steps(src: Path) -> dict[str, list[dict[str, Any]]]:
    """ONNX Runtime's TensorQuantOverrides: weight → step of each channel."""
    graph, steps = open_graph(src), dict[str, list[dict[str, Any]]]()
    for node in graph.model.graph.node:
        if (weight := _matrix(graph, node)) is not None:
            scales, axis = _channel_scales(weight.read()), 1
        elif node.op_type == "Conv" and (weight := graph.weights.get(node.input[1])) is not None:
            kernel = weight.read()  # (n, channels, h, w); a CPU multiplies it in the order h, w, channels
            scales, axis = _channel_scales(np.moveaxis(kernel, (0, 1), (-1, -2)).reshape(-1, len(kernel))), 0
        else:
            continue
        steps[node.input[1]] = [{"axis": axis, "scale": scale, "zero_point": 0} for scale in scales]
    return steps


# Precision → how its file is made from the float32 graph; None is that graph itself.
VISION_PRECISIONS: dict[str, Converter | None] = {
    "fp32": None,
    "fp16": convert_fp16,
    "int8": quantize_vision_int8,
    "w8": quantize_vision_w8,
    "w4": quantize_vision_w4,
    "qdq": quantize_vision_qdq,
}
CALIBRATED = ("fp16", "qdq")  # these look at pictures: fp16 for overflow, qdq for ranges


def _matmul_nbits(src: Path, dst: Path, bits: int) -> dict[str, int]:
    """As ONNX Runtime's MatMulNBitsQuantizer with its own rounding, one matrix at a time."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    quantizer = DefaultWeightOnlyQuantizer(
        DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, accuracy_level=ACCURACY_LEVEL, bits=bits)
    )
    graph = open_graph(src)
    nodes: list[onnx.NodeProto] = []
    for node in graph.model.graph.node:
        weight = _matrix(graph, node)
        if weight is None:
            nodes.append(node)
            continue
        name = node.input[1]
        packed, scales, zero_points = quantizer.qbits_block_quant(np.ascontiguousarray(weight.read()))
        graph.add_all({f"{name}_w{bits}": packed, f"{name}_scales": scales, f"{name}_zero_points": zero_points})
        rows, columns = weight.shape
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                [node.input[0], f"{name}_w{bits}", f"{name}_scales", f"{name}_zero_points"],
                list(node.output),
                f"{node.name}_w{bits}",
                domain="com.microsoft",
                K=rows,
                N=columns,
                bits=bits,
                block_size=BLOCK,
                accuracy_level=ACCURACY_LEVEL,
            )
        )
    graph.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return _write(graph, nodes, dst, "uint8")


def _matrix(graph: LazyGraph, node: onnx.NodeProto) -> Weight | None:
    """The constant float matrix that a MatMul multiplies with; none for other nodes."""
    weight = graph.weights.get(node.input[1]) if node.op_type == "MatMul" else None
    return weight if weight is not None and len(weight.shape) == 2 and weight.dtype == np.float32 else None


def _write(graph: LazyGraph, nodes: list[onnx.NodeProto], dst: Path, wanted: str) -> dict[str, int]:
    """Write the graph with other nodes, without the weights that these don't use."""
    del graph.model.graph.node[:]
    graph.model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    graph.weights = {name: weight for name, weight in graph.weights.items() if name in used}
    write_graph(graph, dst)
    return _check(dst, wanted)


def _check(dst: Path, wanted: str) -> dict[str, int]:
    types = onnx_io.tensor_types(dst)
    if not types.get(wanted):
        raise ExportError(f"{dst}: no tensor became {wanted}", "report this with the checkpoint's config.json")
    return types


def _to_fp16(src: Path, name: str, values: Any) -> npt.NDArray[np.float16]:
    if np.abs(values[np.isfinite(values)]).max(initial=0) > FP16_MAX:
        raise ExportError(f"{src}: {name} is beyond float16's {FP16_MAX:,.0f}", "export int8 or w8 instead")
    return np.asarray(values, dtype=np.float16)


def _read_fp16(src: Path, name: str, weight: Weight) -> npt.NDArray[np.float16]:
    return _to_fp16(src, name, weight.read())


def _float_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            yield tensor
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_type == onnx.TensorProto.FLOAT:
                yield attribute.t


def _cast_at_the_borders(graph: onnx.GraphProto) -> None:
    """Float32 inputs and outputs around a float16 graph."""
    nodes = list(graph.node)
    names = {value.name for value in (*graph.input, *graph.output)}
    for node in nodes:
        for field in (node.input, node.output):
            for index, name in enumerate(field):
                if name in names:
                    field[index] = f"{name}_fp16"
    first = [_cast(value.name, f"{value.name}_fp16", onnx.TensorProto.FLOAT16) for value in graph.input]
    last = [_cast(f"{value.name}_fp16", value.name, onnx.TensorProto.FLOAT) for value in graph.output]
    del graph.node[:]
    graph.node.extend([*first, *nodes, *last])


def _cast(source: str, target: str, kind: int) -> Any:
    return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=kind)

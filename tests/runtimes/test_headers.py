"""Headers that end a process or reach for other files are refused before native code sees them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tinyllava_edge.errors import BundleError
from tinyllava_edge.runtimes.headers import check_gguf, check_onnx
from tinyllava_edge.runtimes.llama import Llama

from .conftest import Pair


@pytest.fixture
def gguf(siglip: Pair) -> bytes:
    return (siglip.bundle / "llm-f16.gguf").read_bytes()


def set_number(data: bytes, key: str, value: int) -> bytes:
    """Overwrite a u32 of the metadata."""
    place = data.index(key.encode()) + len(key) + 4
    return data[:place] + struct.pack("<I", value) + data[place + 4 :]


def a_token_twice(data: bytes) -> bytes:
    """llama.cpp asserts that all token texts differ."""
    one = struct.pack("<Q", 1)
    return data.replace(one + b"!", one + b"#", 1)


BAD = {
    "magic": (lambda d: b"GGML" + d[4:], "starts with"),
    "version": (lambda d: d[:4] + struct.pack("<I", 99) + d[8:], "version 99"),
    "pairs": (lambda d: d[:16] + struct.pack("<Q", 1 << 60) + d[24:], "metadata entries"),
    "architecture": (lambda d: d.replace(b"\0llama", b"\0mamba", 1), "architecture"),
    "layers": (lambda d: set_number(d, "llama.block_count", 0), "block_count is 0"),
    "many layers": (lambda d: set_number(d, "llama.block_count", 100_000), "block_count is 100000"),
    "heads": (lambda d: set_number(d, "llama.attention.head_count", 0), "head_count is 0"),
    "odd heads": (lambda d: set_number(d, "llama.attention.head_count", 3), "don't divide"),
    "width": (lambda d: set_number(d, "llama.embedding_length", 0), "embedding_length is 0"),
    "context": (lambda d: set_number(d, "llama.context_length", 0), "context_length is 0"),
    "rotation": (lambda d: set_number(d, "llama.rope.dimension_count", 4096), "dimension_count is 4096"),
    "epsilon": (lambda d: set_number(d, "layer_norm_rms_epsilon", 0xBF800000), "epsilon is -1.0"),
    "same tokens": (a_token_twice, "two tokens have the same text"),
}


@pytest.mark.parametrize("name", BAD)
def test_gguf(gguf: bytes, tmp_path: Path, name: str) -> None:
    change, message = BAD[name]
    path = tmp_path / "llm.gguf"
    changed = change(gguf)
    assert changed != gguf
    path.write_bytes(changed)
    with pytest.raises(BundleError, match=message) as caught:
        Llama(path, n_ctx=256, n_threads=1)
    assert "llm.gguf" in caught.value.message and "\n" not in caught.value.message


def test_gguf_as_written(siglip: Pair) -> None:
    pairs = check_gguf(siglip.bundle / "llm-f16.gguf")
    assert pairs["general.architecture"] == b"llama" and len(pairs["tokenizer.ggml.tokens"]) == 1088


def test_gguf_cut_anywhere(gguf: bytes, tmp_path: Path) -> None:
    """Cut inside the header: always an error of ours."""
    path = tmp_path / "llm.gguf"
    header = gguf.index(b"token_embd.weight") - 8
    for length in [*range(1, 64), *range(64, header, 997)]:
        path.write_bytes(gguf[:length])
        with pytest.raises(BundleError, match="llm.gguf"):
            check_gguf(path)


def small_onnx(path: Path, *, nested: bool) -> None:
    """A graph that adds a constant, as an initializer or inside a node's attribute, kept in another file."""
    value = numpy_helper.from_array(np.ones(400, np.float32), "w")
    value.ClearField("raw_data")
    value.data_location = TensorProto.EXTERNAL
    value.external_data.add(key="location", value="weights.bin")
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    if nested:
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=value))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [400]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [] if nested else [value])
    path.write_bytes(helper.make_model(graph).SerializeToString())


@pytest.mark.parametrize("nested", [False, True])
def test_onnx_with_weights_elsewhere(tmp_path: Path, nested: bool) -> None:
    path = tmp_path / "vision.onnx"
    small_onnx(path, nested=nested)
    (tmp_path / "weights.bin").write_bytes(np.ones(400, np.float32).tobytes())
    with pytest.raises(BundleError, match=r"vision\.onnx: refers to weights in another file"):
        check_onnx(path)


def test_onnx_as_written(siglip: Pair, tmp_path: Path) -> None:
    for name in ("preprocess.onnx", "vision-fp32.onnx"):
        check_onnx(siglip.bundle / name)
    whole = (siglip.bundle / "vision-fp32.onnx").read_bytes()
    assert onnx.load_from_string(whole).graph.initializer
    path = tmp_path / "vision.onnx"
    for length in (1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BundleError, match=r"vision\.onnx: truncated or not an ONNX file"):
            check_onnx(path)

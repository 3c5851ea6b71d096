"""Headers that end a process or reach for other files are refused before native code sees them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tinyllava_edge.errors import BundleError
from tinyllava_edge.runtimes.headers import check_gguf, check_onnx, gguf_shards
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


def as_array(data: bytes, key: str) -> bytes:
    """Turn a u32 into an array of four u32, as llama.cpp takes for a number per layer."""
    place = data.index(key.encode() + struct.pack("<I", 4)) + len(key)
    value = data[place + 4 : place + 8]
    return data[:place] + struct.pack("<IIQ", 9, 4, 4) + 4 * value + data[place + 8 :]


TENSOR = struct.pack("<Q", 17) + b"token_embd.weight"


def set_tensor(data: bytes, offset: int, form: str, value: int) -> bytes:
    """Overwrite a number behind the embedding's name: rank, sizes, type, place."""
    place = data.index(TENSOR) + len(TENSOR) + offset
    return data[:place] + struct.pack(form, value) + data[place + struct.calcsize(form) :]


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
    "heads in an array": (lambda d: as_array(d, "llama.attention.head_count"), "head_count is 4"),
    "values": (lambda d: set_number(d, "llama.attention.value_length", 32), "64 key and 32 value channels"),
    "half rotation": (lambda d: set_number(d, "llama.rope.dimension_count", 32), "32 of them rotated"),
    "tensors": (lambda d: d[:8] + struct.pack("<Q", 1 << 60) + d[16:], "1152921504606846976 tensors"),
    "rank": (lambda d: set_tensor(d, 0, "<I", 5), "has 5 dimensions"),
    "no rank": (lambda d: set_tensor(d, 0, "<I", 0), "has 0 dimensions"),
    "huge size": (lambda d: set_tensor(d, 4, "<Q", 1 << 62), "is .4611686018427387904, 1088. of type 1"),
    "no size": (lambda d: set_tensor(d, 4, "<Q", 0), "is .0, 1088. of type 1"),
    "tensor type": (lambda d: set_tensor(d, 20, "<I", 9999), "of type 9999"),
    "tensor place": (lambda d: set_tensor(d, 24, "<Q", 1 << 50), "beyond the end"),
    "tensor name": (lambda d: d.replace(TENSOR, struct.pack("<Q", 1 << 40) + TENSOR[8:]), "runs past the end"),
    "same names": (lambda d: d.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"), "two tensors are called"),
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


@pytest.fixture
def shards(siglip: Pair, tmp_path: Path) -> list[Path]:
    """The tiny language model in three shards."""
    from tinyllava_edge import checkpoint
    from tinyllava_edge.export.gguf_shards import shards_of
    from tinyllava_edge.export.llm import export_llm

    source = checkpoint.llm_source(siglip.checkpoint)
    export_llm(source, tmp_path / "llm.gguf", "f16", max_shard_bytes=1_300_000)
    return shards_of(tmp_path / "llm.gguf")


def test_gguf_in_shards(shards: list[Path]) -> None:
    """All are looked at, from the first one's name; llama.cpp loads them so."""
    pairs = check_gguf(shards[0])
    assert pairs["split.count"] == len(shards) == 3 and gguf_shards(shards[0], pairs) == shards
    model = Llama(shards[0], n_ctx=256, n_threads=1)
    assert model.n_embd == 256
    model.close()


CHANGED_SHARDS = {
    "second first": (lambda s: s[1], None, "not the first of 3 shards"),
    "other name": (lambda s: s[0].rename(s[0].with_name("llm.gguf")), None, "not the first of 3 shards"),
    "missing": (lambda s: s[2].unlink(), 0, "00003-of-00003.gguf: missing"),
    "swapped": (lambda s: s[1].write_bytes(s[2].read_bytes()), 0, "00002-of-00003.*not shard 2 of 3"),
    "again": (lambda s: s[2].write_bytes(renumbered(s[1], 2)), 0, "00003-of-00003.*is in another shard too"),
    "number's type": (lambda s: s[1].write_bytes(retyped(s[1])), 0, "split.no is of type 3"),
    "count": (lambda s: s[0].write_bytes(more_tensors(s[0])), 0, "99 tensors announced, 21 in its shards"),
    "cut": (lambda s: s[1].write_bytes(s[1].read_bytes()[:90]), 0, "00002-of-00003.gguf: .*past the end"),
}


def after(data: bytes, key: bytes) -> int:
    return data.index(struct.pack("<Q", len(key)) + key) + 8 + len(key)


def renumbered(path: Path, number: int) -> bytes:
    data = path.read_bytes()
    place = after(data, b"split.no") + 4
    return data[:place] + struct.pack("<H", number) + data[place + 2 :]


def retyped(path: Path) -> bytes:
    data = path.read_bytes()
    place = after(data, b"split.no")
    return data[:place] + struct.pack("<I", 3) + data[place + 4 :]


def more_tensors(path: Path) -> bytes:
    data = path.read_bytes()
    place = after(data, b"split.tensors.count") + 4
    return data[:place] + struct.pack("<I", 99) + data[place + 4 :]


@pytest.mark.parametrize("name", CHANGED_SHARDS)
def test_shards_that_do_not_belong_together(shards: list[Path], name: str) -> None:
    """llama.cpp would end the process, or load something else."""
    change, opened, message = CHANGED_SHARDS[name]
    path = change(shards)
    with pytest.raises(BundleError, match=message):
        Llama(path if opened is None else shards[opened], n_ctx=256, n_threads=1)


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

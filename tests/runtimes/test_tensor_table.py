"""Types of single tensors, from headers: equal to what onnx and gguf read from the same files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyllava_edge.errors import BundleError
from tinyllava_edge.runtimes.tensor_table import GGML_TYPES, tensor_table


def test_type_numbers() -> None:
    import gguf

    assert {kind.value: kind.name.lower() for kind in gguf.GGMLQuantizationType}.items() >= GGML_TYPES.items()


def test_gguf(tiny_bundle: Path) -> None:
    import gguf

    for name in ("llm-f16.gguf", "llm-q4_k_m.gguf"):
        reader = gguf.GGUFReader(tiny_bundle / name)
        assert tensor_table(tiny_bundle / name) == {t.name: t.tensor_type.name.lower() for t in reader.tensors}
    table = tensor_table(tiny_bundle / "llm-q4_k_m.gguf")
    assert {"q4_k", "q6_k", "f32"} == set(table.values())


def test_onnx(tiny_bundle: Path) -> None:
    """A quantised weight has its plain name, so both files list the same weights; helpers and shapes are left out."""
    import onnx

    plain, int8 = (tensor_table(tiny_bundle / f"vision-{kind}.onnx") for kind in ("fp32", "int8"))
    assert set(plain) == set(int8) and set(plain.values()) == {"float"}
    graph = onnx.load(tiny_bundle / "vision-fp32.onnx").graph
    floats = [t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.dims]
    assert list(plain) == floats
    graph = onnx.load(tiny_bundle / "vision-int8.onnx").graph
    quantised = {t.name.removesuffix("_quantized") for t in graph.initializer if t.name.endswith("_quantized")}
    assert {name for name, kind in int8.items() if kind == "int8"} == quantised and len(quantised) == 14


def test_packed(tiny_bundle: Path, tmp_path: Path) -> None:
    from tinyllava_edge.export.vision_quantize import quantize_vision_w4

    source = tiny_bundle / "vision-fp32.onnx"
    quantize_vision_w4(source, tmp_path / "w4.onnx")
    table, plain = tensor_table(tmp_path / "w4.onnx"), tensor_table(source)
    assert set(table) == set(plain) and list(table.values()).count("w4") == 14


def test_damaged(tiny_bundle: Path, tmp_path: Path) -> None:
    for name in ("vision-fp32.onnx", "llm-f16.gguf"):
        whole = (tiny_bundle / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 3] if name.endswith("onnx") else whole[:600])
        with pytest.raises(BundleError, match=name):
            tensor_table(tmp_path / name)

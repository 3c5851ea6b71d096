"""Sizes from an ONNX graph, read without the onnx package, against that package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinyllava_edge.bundle import Bundle, read_bundle
from tinyllava_edge.errors import BundleError
from tinyllava_edge.runtimes.onnx_sizes import onnx_sizes


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return read_bundle(tiny_bundle)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_towers_weights(bundle: Bundle, precision: str) -> None:
    import onnx

    path = next(bundle.path(file) for file in bundle.files if file.precision == precision)
    model = onnx.load(path)
    total = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)
    sizes = onnx_sizes(path)
    assert (sizes.weights, sizes.inline) == (total, total)
    tokens, heads = bundle.spec.feature_tokens, 6
    scores = 4 * heads * tokens**2
    inner = next(max(t.dims) for t in model.graph.initializer if "mlp.fc1" in t.name and len(t.dims) == 2)
    assert sizes.largest == max(scores, 4 * tokens * inner)


def test_other_precisions_weights(bundle: Bundle, tmp_path: Path) -> None:
    """float16 is computed in float32 on x86; w4 keeps its scales twice and sums beside them; parts are mapped."""
    import onnx

    from tinyllava_edge.export.vision_quantize import convert_fp16, quantize_vision_w4

    source = next(bundle.path(file) for file in bundle.files if file.precision == "fp32")
    whole = onnx_sizes(source)
    convert_fp16(source, tmp_path / "fp16.onnx")
    half = onnx_sizes(tmp_path / "fp16.onnx")
    assert half.weights == pytest.approx(whole.weights, rel=0.01)
    assert half.inline == pytest.approx(whole.inline / 2, rel=0.01)
    quantize_vision_w4(source, tmp_path / "w4.onnx")
    quarter = onnx_sizes(tmp_path / "w4.onnx")
    scales = [t for t in onnx.load(tmp_path / "w4.onnx").graph.initializer if t.name.endswith("_scales")]
    assert quarter.weights - quarter.inline == 2 * sum(4 * int(np.prod(t.dims)) for t in scales) > 0
    model = onnx.load(source)
    onnx.save(model, tmp_path / "apart.onnx", save_as_external_data=True, location="apart.data", size_threshold=1024)
    apart = onnx_sizes(tmp_path / "apart.onnx")
    assert apart.weights == whole.weights
    assert apart.inline < 0.1 * whole.inline


@pytest.mark.parametrize("cut", [0, 100, 5000])
def test_a_damaged_graph_is_an_error_of_ours(bundle: Bundle, tmp_path: Path, cut: int) -> None:
    source = next(bundle.path(file) for file in bundle.files if file.precision == "int8")
    (tmp_path / "cut.onnx").write_bytes(source.read_bytes()[:cut])
    with pytest.raises(BundleError, match="cut.onnx"):
        onnx_sizes(tmp_path / "cut.onnx")

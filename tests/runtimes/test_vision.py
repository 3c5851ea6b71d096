"""The two ONNX graphs as the device runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinyllava_edge.bundle import open_bundle
from tinyllava_edge.errors import EngineError
from tinyllava_edge.runtimes.vision import Vision

from .conftest import Pair, picture


@pytest.fixture(scope="module")
def vision(siglip: Pair) -> Vision:
    paths = (siglip.bundle / "preprocess.onnx", siglip.bundle / "vision-fp32.onnx")
    return Vision(*paths, open_bundle(siglip.bundle).spec, n_threads=1)


def test_shapes(vision: Vision) -> None:
    pixels = vision.pixel_values(picture(0, 100, 37))
    embeds, features = vision.encode(pixels)
    assert pixels.shape == (3, 64, 64) and embeds.shape == (64, 256) and features.shape == (64, 192)
    assert {array.dtype for array in (pixels, embeds, features)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(vision.embed(pixels), embeds)
    assert vision.providers == ["CPUExecutionProvider"]


def test_layout_of_the_pixels(vision: Vision) -> None:
    """Channel, row and column keep their places, and level 255 becomes 1 with mean and deviation 0.5."""
    rgb = np.zeros((64, 64, 3), np.uint8)
    rgb[5, 40, 2] = 255
    pixels = vision.pixel_values(rgb)
    assert pixels[2, 5, 40] == pytest.approx(1) and pixels[0, 5, 40] == pytest.approx(-1)
    assert (pixels > 0).sum() == 1


def test_pixels_of_another_size(vision: Vision) -> None:
    with pytest.raises(EngineError, match=r"pixel_values of shape \(3, 32, 32\)"):
        vision.embed(np.zeros((3, 32, 32), np.float32))


def test_graphs_the_wrong_way_round(siglip: Pair) -> None:
    paths = (siglip.bundle / "vision-fp32.onnx", siglip.bundle / "preprocess.onnx")
    with pytest.raises(EngineError, match=r"vision-fp32\.onnx: has \['pixel_values'\], \['image'\] expected"):
        Vision(*paths, open_bundle(siglip.bundle).spec, n_threads=1)


def test_failure_while_running(siglip: Pair, tmp_path: Path) -> None:
    """A graph whose sizes are known only when it runs: stopping or a wrong shape is an error that names the file."""
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Constant", [], ["all"], value_ints=[-1]),
        helper.make_node("Constant", [], ["zero"], value_ints=[0]),
        helper.make_node("Constant", [], ["three"], value_ints=[3]),
        helper.make_node("Reshape", ["pixel_values", "all"], ["flat"]),
        helper.make_node("Slice", ["flat", "zero", "three"], ["numbers"]),
        helper.make_node("Cast", ["numbers"], ["shape"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["pixel_values", "shape"], ["image_embeds"]),
        helper.make_node("Identity", ["image_embeds"], ["image_features"]),
    ]
    outputs = [value(name, TensorProto.FLOAT, ["b", "t", "d"]) for name in ("image_embeds", "image_features")]
    graph = helper.make_graph(nodes, "g", [value("pixel_values", TensorProto.FLOAT, ["b", 3, 64, 64])], outputs)
    path = tmp_path / "vision-fp32.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    vision = Vision(siglip.bundle / "preprocess.onnx", path, open_bundle(siglip.bundle).spec, n_threads=1)
    pixels = np.zeros((3, 64, 64), np.float32)
    for numbers, message in (([7, 7, 7], "ONNX Runtime stopped"), ([3, 64, 64], r"came out as float32 \(3, 64, 64\)")):
        pixels.flat[:3] = numbers
        with pytest.raises(EngineError, match=rf"vision-fp32\.onnx: .*{message}") as caught:
            vision.embed(pixels)
        assert "\n" not in caught.value.message

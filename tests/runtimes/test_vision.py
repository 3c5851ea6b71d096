"""The two ONNX graphs as the device runs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.errors import BundleError, EngineError
from tinyllava_edge.runtimes.vision import Vision

from .conftest import Pair, picture


@pytest.fixture(scope="module")
def vision(siglip: Pair) -> Vision:
    paths = (siglip.bundle / "preprocess.onnx", siglip.bundle / "vision-fp32.onnx")
    return Vision(*paths, read_bundle(siglip.bundle).spec, n_threads=1)


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
        Vision(*paths, read_bundle(siglip.bundle).spec, n_threads=1)


def test_failure_while_running(siglip: Pair, tmp_path: Path) -> None:
    """A graph whose sizes are known only when it runs: stopping or a wrong shape is an error that names the file."""
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
    vision = Vision(siglip.bundle / "preprocess.onnx", path, read_bundle(siglip.bundle).spec, n_threads=1)
    pixels = np.zeros((3, 64, 64), np.float32)
    for numbers, message in (([7, 7, 7], "ONNX Runtime stopped"), ([3, 64, 64], r"came out as float32 \(3, 64, 64\)")):
        pixels.flat[:3] = numbers
        with pytest.raises(EngineError, match=rf"vision-fp32\.onnx: .*{message}") as caught:
            vision.embed(pixels)
        assert "\n" not in caught.value.message


@pytest.fixture
def apart(siglip: Pair, tmp_path: Path) -> Path:
    """The float32 graph with its weights in a file beside it."""
    path = tmp_path / "vision-fp32.onnx"
    model = onnx.load(siglip.bundle / "vision-fp32.onnx")
    onnx.save(model, path, save_as_external_data=True, location="vision-fp32.onnx.data", size_threshold=1024)
    return path


def open_apart(siglip: Pair, path: Path, parts: tuple[str, ...] = ("vision-fp32.onnx.data",)) -> Vision:
    spec = read_bundle(siglip.bundle).spec
    return Vision(siglip.bundle / "preprocess.onnx", path, spec, n_threads=1, parts=parts)


def test_weights_beside_the_graph(siglip: Pair, vision: Vision, apart: Path) -> None:
    """Read when the bundle lists the file, refused when it does not."""
    pixels = vision.pixel_values(picture(0))
    np.testing.assert_array_equal(open_apart(siglip, apart).embed(pixels), vision.embed(pixels))
    for parts in ((), ("other.data",)):
        with pytest.raises(BundleError, match=r"vision-fp32\.onnx: refers to weights in another file"):
            open_apart(siglip, apart, parts)


def moved(key: str, value: str) -> Callable[[onnx.TensorProto], None]:
    def change(tensor: onnx.TensorProto) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data} | {key: value}
        del tensor.external_data[:]
        for name, text in entries.items():
            tensor.external_data.add(key=name, value=text)

    return change


HOSTILE = {
    "outside": (moved("location", "../vision-fp32.onnx.data"), "another file"),
    "absolute": (moved("location", "/etc/passwd"), "another file"),
    "not listed": (moved("location", "secret.data"), "another file"),
    "no name": (moved("location", ""), "another file"),
    "beyond": (moved("offset", "99999999"), "shorter than"),
    "huge": (moved("length", "9" * 30), "shorter than"),
    "negative": (moved("offset", "-4096"), "weights at '-4096'"),
    "not a number": (moved("length", "many"), "'many' bytes"),
    "twice": (lambda tensor: tensor.external_data.add(key="location", value="secret.data"), "given twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_weights_elsewhere(siglip: Pair, apart: Path, name: str) -> None:
    """A place that is not inside a listed file of the same directory is refused before ONNX Runtime opens it."""
    change, message = HOSTILE[name]
    (apart.parent / "secret.data").write_bytes(b"x" * 10_000_000)
    model = onnx.load(apart, load_external_data=False)
    change(next(tensor for tensor in model.graph.initializer if tensor.external_data))
    apart.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=message) as caught:
        open_apart(siglip, apart)
    assert "\n" not in caught.value.message


def test_a_part_that_is_missing_or_a_link(siglip: Pair, apart: Path, tmp_path: Path) -> None:
    data = tmp_path / "vision-fp32.onnx.data"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    data.rename(elsewhere / "weights")
    with pytest.raises(BundleError, match=r"vision-fp32\.onnx\.data: missing"):
        open_apart(siglip, apart)
    data.symlink_to(elsewhere / "weights")
    with pytest.raises(BundleError, match="a link out of its directory"):
        open_apart(siglip, apart)


def test_a_resampler_gives_fewer_tokens_than_the_tower(tmp_path: Path, siglip: Pair) -> None:
    """Features keep the tower's count while the embeddings have the spec's."""
    import dataclasses

    from onnx import TensorProto, helper, numpy_helper

    value = helper.make_tensor_value_info
    tensors = [
        numpy_helper.from_array(np.zeros(shape, np.float32), name)
        for name, shape in (("image_embeds", (1, 7, 256)), ("image_features", (1, 64, 192)))
    ]
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in tensors]
    outputs = [value(tensor.name, TensorProto.FLOAT, tensor.dims) for tensor in tensors]
    graph = helper.make_graph(nodes, "g", [value("pixel_values", TensorProto.FLOAT, [1, 3, 64, 64])], outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), tmp_path / "v.onnx")
    spec = read_bundle(siglip.bundle).spec
    resampled = dataclasses.replace(spec, connector="resampler", visual_tokens=7)
    vision = Vision(siglip.bundle / "preprocess.onnx", tmp_path / "v.onnx", resampled, n_threads=1)
    embeds, features = vision.encode(np.zeros((3, 64, 64), np.float32))
    assert embeds.shape == (7, 256) and features.shape == (64, 192)
    with pytest.raises(EngineError, match="expected"):
        Vision(siglip.bundle / "preprocess.onnx", tmp_path / "v.onnx", spec, n_threads=1)

"""Every precision of the vision graph: against ONNX Runtime's own quantisers, and on the trained tower's pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from tinyllava_edge import spec
from tinyllava_edge.errors import ExportError, UsageError
from tinyllava_edge.export import calibration, lazy_graph, onnx_io, ranges, vision_report
from tinyllava_edge.export.verify_pictures import default_cases
from tinyllava_edge.export.vision import export_vision_fp32
from tinyllava_edge.export.vision_quantize import CALIBRATED, PAIR_MAX, VISION_PRECISIONS
from tinyllava_edge.model import TinyLlava, build_model
from tinyllava_edge.spec import ModelSpec

from .vision_models import TEXT, make, pixels, run

Arrays = dict[str, npt.NDArray[np.generic]]


@pytest.fixture(scope="module")
def trained() -> tuple[TinyLlava, ModelSpec]:
    """The shipped tower with a random connector."""
    from transformers import SiglipVisionModel

    root = Path(spec.__file__).parent / "nano/siglip"
    tower = SiglipVisionModel.from_pretrained(root, dtype=torch.float32)
    made = spec.model_spec(spec.DEFAULT_VARIANT)
    torch.manual_seed(0)
    model = build_model(made, tower.config.to_dict(), TEXT, 1023).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model, made


@pytest.fixture(scope="module")
def files(trained: tuple[TinyLlava, ModelSpec], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Precision → file of the shipped tower, calibrated on the default pictures."""
    root = tmp_path_factory.mktemp("precisions")
    paths = {name: root / f"vision-{name}.onnx" for name in VISION_PRECISIONS}
    export_vision_fp32(*trained, paths["fp32"])
    batches = [sample.pixel_values for sample in calibration.samples(trained[1])]
    for name, convert in VISION_PRECISIONS.items():
        if convert is not None:
            convert(paths["fp32"], paths[name], batches if name in CALIBRATED else ())
    assert sorted(p.name for p in root.iterdir()) == sorted(p.name for p in paths.values())
    return paths


def initialisers(path: Path) -> Arrays:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


# Precision → lowest cosine of any token and largest size beside float32; three to five times what was measured.
LIMITS = {
    "fp32": (1 - 1e-9, 1.0),
    "fp16": (1 - 1e-5, 0.51),
    "int8": (0.997, 0.31),
    "w8": (0.998, 0.34),
    "w4": (0.93, 0.22),
    "qdq": (0.96, 0.30),
}


def test_the_report_on_real_pictures(trained: tuple[TinyLlava, ModelSpec], files: dict[str, Path]) -> None:
    """The trained tower on pictures that calibration did not see: within LIMITS of torch; sizes are the files' own."""
    seen = calibration.samples(trained[1], [(case.name, case.picture) for case in default_cases(8)])
    reports = vision_report.vision_report(vision_report.eager(trained[0]), files, seen)
    assert [report.precision for report in reports] == list(LIMITS)
    for report in reports:
        cosine, size = LIMITS[report.precision]
        assert report.bytes == files[report.precision].stat().st_size
        assert report.bytes <= size * reports[0].bytes and report.cosine_min > cosine, report.line()
        assert [p.picture for p in report.pictures] == [sample.name for sample in seen]
        assert report.cosine_min <= report.cosine_mean and report.max_abs == max(p.max_abs for p in report.pictures)
        assert report.to_dict()["pictures"][0]["picture"] == "test-0.png" and "MB" in report.line()
    assert reports[0].relative < 1e-5 < reports[1].relative


def test_a_wrong_graph_shows(trained: tuple[TinyLlava, ModelSpec], files: dict[str, Path], tmp_path: Path) -> None:
    """erf instead of tanh GELU is seen in float32: the limit of 1e-5 is passed. And NaN is an error, not a number."""
    model = onnx.load(files["fp32"])
    gelus = [node for node in model.graph.node if node.op_type == "Gelu"]
    forms = [a.s for node in gelus for a in node.attribute if a.name == "approximate"]
    assert forms.count(b"tanh") == 4 and len(gelus) == 5  # the connector's is the erf form
    for node in gelus:
        del node.attribute[:]
    onnx.save(model, tmp_path / "erf.onnx")
    seen = calibration.samples(trained[1], calibration.default_pictures(1, 1))
    (report,) = vision_report.vision_report(files["fp32"], {"fp32": tmp_path / "erf.onnx"}, seen)
    assert report.relative > 1e-5
    bias = next(t for t in model.graph.initializer if t.name == "connector.linear_2.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(256, np.nan, np.float32), bias.name))
    onnx.save(model, tmp_path / "nan.onnx")
    with pytest.raises(ExportError, match=r"nan\.onnx: train-0\.png gives \(1, 64, 256\), 16384 values not finite"):
        vision_report.vision_report(files["fp32"], {"fp32": tmp_path / "nan.onnx"}, seen)
    with pytest.raises(ExportError, match="without pictures"):
        vision_report.vision_report(files["fp32"], {}, [])


@pytest.mark.parametrize("name", ["fp16", "int8", "w8", "w4", "qdq"])
def test_tanh_survives(files: dict[str, Path], name: str) -> None:
    """No converter fuses or replaces the activation: four tanh forms and the connector's erf form."""
    gelus = [node for node in onnx.load(files[name]).graph.node if node.op_type == "Gelu"]
    forms = [a.s for node in gelus for a in node.attribute if a.name == "approximate"]
    assert forms.count(b"tanh") == 4 and len(gelus) == 5


def pair_sums(codes: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    """Largest |sum| of two neighbouring codes of each column, in the order in which a CPU multiplies them."""
    matrix = np.moveaxis(codes, (0, 1), (-1, -2)).reshape(-1, len(codes)) if codes.ndim == 4 else codes
    even = len(matrix) // 2 * 2
    wide = matrix[:even].astype(np.int64)
    found: npt.NDArray[np.int64] = np.abs(wide[::2] + wide[1::2]).max(axis=0)
    return found


def codes_of(path: Path) -> Arrays:
    """Name → int8 codes of every matrix and kernel that a product reads."""
    return {
        name: value for name, value in initialisers(path).items() if value.dtype == np.int8 and value.ndim in (2, 4)
    }


def compare_steps(ours: Arrays, wanted: Arrays, name: str) -> int:
    """Codes of a column are ONNX Runtime's, or the step is larger and theirs would have come to 127 in some pair.

    Returns how many columns have a larger step.
    """
    stem, channels = name.removesuffix("_quantized"), 1 if wanted[name].ndim == 2 else 0
    ratio = ours[f"{stem}_scale"] / wanted[f"{stem}_scale"]
    assert ratio.size == wanted[name].shape[channels] and ratio.min() > 1 - 1e-6 and ratio.max() < 2.01
    larger = ratio > 1 + 1e-6
    equal = np.flatnonzero(~larger)
    np.testing.assert_array_equal(ours[name].take(equal, channels), wanted[name].take(equal, channels))
    assert (pair_sums(wanted[name])[larger] >= 127).all() and pair_sums(ours[name]).max() <= PAIR_MAX, name
    return int(larger.sum())


def test_int8_is_onnxruntimes_but_for_pairs(files: dict[str, Path], tmp_path: Path) -> None:
    """Nodes are quantize_dynamic's: with our codes and steps in its file, the output is ours, to 1e-6 of its largest.

    Codes and steps are its own in every column but those whose pairs would saturate; these have a larger step, and
    codes that are the float32 weight to half of it.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    theirs = tmp_path / "theirs.onnx"
    with onnx_io.quiet():
        quantize_dynamic(
            files["fp32"], theirs, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8
        )
    ours, wanted, floats = initialisers(files["int8"]), initialisers(theirs), initialisers(files["fp32"])
    int8 = {name: value for name, value in wanted.items() if value.dtype == np.int8}
    assert len(int8) == 2 * (4 * 6 + 2) == sum(value.dtype == np.int8 for value in ours.values())
    larger = total = 0
    for name, value in int8.items():
        if name.endswith("_zero_point"):
            np.testing.assert_array_equal(ours[name], value)
            continue
        stem = name.removesuffix("_quantized")
        larger, total = larger + compare_steps(ours, wanted, name), total + value.shape[1]
        step = ours[f"{stem}_scale"]
        assert (np.abs(ours[name] * step - floats[stem]) <= 0.501 * step).all()
    assert 0 < larger < total
    model = onnx.load(theirs)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(ours[tensor.name], tensor.name))
    onnx.save(model, theirs)
    for got, value in zip(run(files["int8"], pixels(2)), run(theirs, pixels(2)), strict=True):
        np.testing.assert_allclose(got, value, rtol=0, atol=1e-6 * np.abs(value).max())
    assert not any(node.op_type == "ConvInteger" for node in onnx.load(files["int8"]).graph.node)


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_int8_products_are_exact(tmp_path: Path, rows: int) -> None:
    """Columns of large neighbours of one sign, odd K, activations at 255: integers equal numpy's, to the bit.

    Can fail on x86 without VNNI only; there it does when steps are quantize_dynamic's.
    """
    generator = np.random.default_rng(0)
    weight = generator.uniform(0.9, 1, (75, 48)).astype(np.float32)
    weight[:, 8:16] *= -1
    weight[::2, 16:24] *= -1
    weight[1::2, 24:32] *= 0.6
    weight[:, 32:40] = generator.standard_normal((75, 8))
    weight[:73, 40:48] *= 0.01
    value_info, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "one",
        [value_info("x", kind, ["rows", 75])],
        [value_info("y", kind, ["rows", 48])],
        [numpy_helper.from_array(weight, "w")],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "fp32.onnx")
    convert = VISION_PRECISIONS["int8"]
    assert convert is not None
    convert(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", ())
    model = onnx.load(tmp_path / "int8.onnx")
    for name, kind in (("x_quantized", onnx.TensorProto.UINT8), ("x_zero_point", onnx.TensorProto.UINT8)):
        model.graph.output.append(value_info(name, kind, None))
    model.graph.output.append(value_info("y_integer", onnx.TensorProto.INT32, None))
    onnx.save(model, tmp_path / "seen.onnx")
    x = generator.uniform(-0.1, 1, (rows, 75)).astype(np.float32)
    x[0] = 1
    x[-1, -1] = -0.1  # keeps the range, hence the zero point
    session = ort.InferenceSession(tmp_path / "seen.onnx", providers=["CPUExecutionProvider"])
    numbers, zero, got = session.run(["x_quantized", "x_zero_point", "y_integer"], {"x": x})
    codes = codes_of(tmp_path / "int8.onnx")["w_quantized"].astype(np.int64)
    np.testing.assert_array_equal(got, (numbers.astype(np.int64) - zero) @ codes)
    assert numbers.max() == 255 and zero > 0 and pair_sums(codes).max() == PAIR_MAX


@pytest.mark.parametrize(("family", "name"), [("clip", "int8"), ("siglip", "qdq")])
def test_every_processor_answers_alike(tmp_path: Path, family: str, name: str) -> None:
    """A tower with weights of one sign: ONNX Runtime's exact kernels give the same bits as its fast ones, and no pair
    of codes passes the bound. On x86 without VNNI the bits differ when steps are ONNX Runtime's."""
    model, made = make(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.abs_().mul_(0.1).add_(0.05)
    export_vision_fp32(model, made, tmp_path / "fp32.onnx")
    convert, path = VISION_PRECISIONS[name], tmp_path / f"{name}.onnx"
    assert convert is not None
    convert(tmp_path / "fp32.onnx", path, [pixels(1).numpy()])
    answers = []
    for precision in ("0", "1"):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.x64quantprecision", precision)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        answers.append(session.run(["image_embeds", "image_features"], {"pixel_values": pixels(2).numpy()}))
    for fast, exact in zip(*answers, strict=True):
        np.testing.assert_array_equal(fast, exact)
    sums = {key: pair_sums(value).max() for key, value in codes_of(path).items()}
    nodes = [node for node in onnx.load(path).graph.node if node.op_type in ("MatMulInteger", "MatMul", "Conv")]
    read = [node for node in nodes if node.input[1].endswith(("_quantized", "weight_DequantizeLinear_Output"))]
    assert len(sums) == len(read) and min(sums.values()) > 120 and max(sums.values()) <= PAIR_MAX, sums


@pytest.mark.parametrize(("name", "bits"), [("w8", 8), ("w4", 4)])
def test_nbits_are_onnxruntimes(files: dict[str, Path], tmp_path: Path, name: str, bits: int) -> None:
    """Packed weights, scales and zero points equal MatMulNBitsQuantizer's, bit for bit; and so does the output."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with onnx_io.quiet():
        quantizer = MatMulNBitsQuantizer(onnx.load(files["fp32"]), bits=bits, block_size=32, accuracy_level=4)
        quantizer.process()
    onnx.save(quantizer.model.model, tmp_path / "theirs.onnx")
    ours, wanted = initialisers(files[name]), initialisers(tmp_path / "theirs.onnx")
    nodes = [node for node in onnx.load(files[name]).graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 4 * 6 + 2
    for node in nodes:
        stem = node.input[1].removesuffix(f"_w{bits}")
        np.testing.assert_array_equal(ours[node.input[1]], wanted[f"{stem}_Q{bits}"])
        np.testing.assert_array_equal(ours[f"{stem}_scales"].ravel(), wanted[f"{stem}_scales"].ravel())
        np.testing.assert_array_equal(ours[f"{stem}_zero_points"].ravel(), wanted[f"{stem}_zero_points"].ravel())
    for got, value in zip(run(files[name], pixels(2)), run(tmp_path / "theirs.onnx", pixels(2)), strict=True):
        np.testing.assert_array_equal(got, value)


def test_fp16(files: dict[str, Path]) -> None:
    """No float32 tensor is left, and the borders are float32."""
    model = onnx.load(files["fp16"])
    assert onnx_io.tensor_types(files["fp16"]).keys() == {"float16", "int64"}
    borders = [*model.graph.input, *model.graph.output]
    assert {value.type.tensor_type.elem_type for value in borders} == {onnx.TensorProto.FLOAT}
    onnx.checker.check_model(model, full_check=True)


class Reader:
    """Batches as ONNX Runtime's own calibrator asks for them."""

    def __init__(self, batches: Iterator[dict[str, npt.NDArray[np.float32]]]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        return next(self.batches, None)


def test_qdq(files: dict[str, Path], tmp_path: Path) -> None:
    """Every operator reads and gives quantised values, weights per channel, with the ranges that quantize_static finds
    by itself (scales to 1e-4); weights are its own but for pairs. Without pictures it is refused."""
    from onnxruntime.quantization import QuantType, quantize_static

    graph = onnx.load(files["qdq"]).graph
    read = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    given = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    for node in graph.node:
        if node.op_type in ("MatMul", "Conv", "Add", "Mul", "LayerNormalization", "Softmax", "Gelu", "Transpose"):
            assert node.input[0] in read and node.output[0] in given, node.name
    pictures = calibration.samples(spec.model_spec(spec.DEFAULT_VARIANT))
    reader = iter([{"pixel_values": sample.pixel_values} for sample in pictures])
    theirs = tmp_path / "theirs.onnx"
    with onnx_io.quiet():
        quantize_static(files["fp32"], theirs, Reader(reader), per_channel=True, activation_type=QuantType.QUInt8)
    ours, wanted = initialisers(files["qdq"]), initialisers(theirs)
    theirs.unlink()
    assert ours.keys() == wanted.keys()
    weights = [name for name, value in wanted.items() if value.dtype == np.int8 and value.ndim > 1]
    assert len(weights) == 4 * 6 + 2 + 1 and sum(compare_steps(ours, wanted, name) for name in weights) > 0
    compared = {*weights, *(f"{name.removesuffix('_quantized')}_scale" for name in weights)}
    for name in [name for name, value in wanted.items() if value.dtype == np.int32 and f"{name}_scale" in wanted]:
        steps = ours[f"{name}_scale"]  # a bias has its input's step times its weight's
        difference = ours[name] * steps - wanted[name] * wanted[f"{name}_scale"]
        assert (np.abs(difference) <= 1.01 * steps + 1e-4 * np.abs(ours[name] * steps)).all(), name
        compared |= {name, f"{name}_scale"}
    for name in sorted(wanted.keys() - compared):  # an activation's zero point may round the other way
        value = wanted[name]
        np.testing.assert_allclose(ours[name].astype(float), value.astype(float), rtol=1e-4, atol=1.01, err_msg=name)
        if value.dtype == np.float32:
            np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    scales = initialisers(files["qdq"])["layers.0.mlp.fc1.weight_scale"]
    assert scales.size == 512
    with pytest.raises(UsageError, match=r"qdq\.onnx: qdq needs calibration pictures"):
        VISION_PRECISIONS["qdq"](files["fp32"], tmp_path / "qdq.onnx", ())  # type: ignore[misc]
    assert not list(tmp_path.iterdir())


def test_fp16_overflow_is_named(tmp_path: Path) -> None:
    """A block whose values pass 65,504 on a picture, or a weight that does: an error with its name, and no file."""
    model, made = make("siglip")
    picture = pixels(1).numpy()
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[1].mlp.fc2.bias[3] = 60000.0
        model.model.vision_tower.encoder.layers[1].mlp.fc1.bias[:] = 3e4
    export_vision_fp32(model, made, tmp_path / "fp32.onnx")
    convert = VISION_PRECISIONS["fp16"]
    assert convert is not None
    with pytest.raises(ExportError, match=r"layers\.1 reaches [\d,]+"):
        convert(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx", [picture])
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight[0, 0] = 1e6
    export_vision_fp32(model, made, tmp_path / "fp32.onnx")
    with pytest.raises(ExportError, match=r"connector\.linear_1\.weight is beyond float16"):
        convert(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx", ())
    assert [p.name for p in tmp_path.iterdir()] == ["fp32.onnx"]


def test_magnitudes(tmp_path: Path) -> None:
    """The largest value of a layer's output is what torch computes, to 1e-5; names follow the layers."""
    model, made = make("siglip")
    export_vision_fp32(model, made, tmp_path / "fp32.onnx")
    found = ranges.magnitudes(tmp_path / "fp32.onnx", [pixels(1).numpy(), pixels(2).numpy()])
    assert list(dict.fromkeys(name for name, _ in found)) == ["embeddings", "layers.0", "layers.1", "connector"]
    with torch.no_grad():
        states = model.model.vision_tower(pixels(2), output_hidden_states=True).hidden_states
    assert [value for name, value in found if name == "embeddings"][-1] == pytest.approx(
        float(states[0].abs().max()), rel=1e-5
    )


def test_external_data(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph beyond one file's limit, here set low, and everything made from it: equal values to the bit."""
    monkeypatch.setattr(lazy_graph, "MAX_BYTES", 1 << 20)
    path = tmp_path / "vision.onnx"
    lazy_graph.write_graph(lazy_graph.open_graph(files["fp32"]), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vision.onnx", "vision.onnx.data"]
    assert path.stat().st_size < 200_000 and onnx_io.parts(path) == (tmp_path / "vision.onnx.data",)
    assert onnx_io.tensor_types(path) == onnx_io.tensor_types(files["fp32"])
    batches = [pixels(1).numpy()]
    for name, convert in VISION_PRECISIONS.items():
        made = path if convert is None else tmp_path / f"{name}.onnx"
        if convert is not None:
            convert(path, made, batches)
            wanted = tmp_path / f"{name}-single.onnx"
            convert(files["fp32"], wanted, batches)
        else:
            wanted = files[name]
        for got, value in zip(run(made, pixels(2)), run(wanted, pixels(2)), strict=True):
            np.testing.assert_array_equal(got, value)
        assert onnx_io.total_bytes(made) == sum(p.stat().st_size for p in tmp_path.glob(f"{made.name}*"))
    onnx_io.remove(path)
    assert not list(tmp_path.glob("vision*"))


def test_files_as_onnx_reads_them(files: dict[str, Path], tmp_path: Path) -> None:
    """What we write field by field, the onnx package reads, checks and writes again; damage is one error."""
    onnx.checker.check_model(onnx.load(files["fp32"]), full_check=True)
    again = lazy_graph.from_model(onnx.load(files["w4"]))
    lazy_graph.write_graph(again, tmp_path / "again.onnx")
    ours, wanted = initialisers(tmp_path / "again.onnx"), initialisers(files["w4"])
    assert ours.keys() == wanted.keys() and all((ours[name] == wanted[name]).all() for name in wanted)
    whole = files["fp32"].read_bytes()
    for size in (1, 100, 5000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.onnx").write_bytes(whole[:size])
        with pytest.raises(ExportError, match=r"cut\.onnx"):
            onnx_io.tensor_types(tmp_path / "cut.onnx")

"""`.ort` files: equal to their .onnx in ONNX Runtime, small, without traces of this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from tinyllava_edge.errors import ExportError, StorageError
from tinyllava_edge.export import onnx_io
from tinyllava_edge.export.mobile import ort_format
from tinyllava_edge.export.mobile.parity import Expected
from tinyllava_edge.export.preprocess import write_preprocess
from tinyllava_edge.export.vision import VISION_PRECISIONS, export_vision_fp32

from .samples import FAMILIES, tower, with_erf_gelu


@pytest.fixture(params=FAMILIES, scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Expected]:
    """Preprocessing and every vision precision as ONNX, and what the model makes of the pictures."""
    model, spec, wanted = tower(request.param)
    root = tmp_path_factory.mktemp("onnx")
    write_preprocess(spec, root / "preprocess.onnx")
    graphs = {name: root / f"vision-{name}.onnx" for name in VISION_PRECISIONS}
    export_vision_fp32(model, spec, graphs["fp32"])
    for name, convert in VISION_PRECISIONS.items():
        if convert is not None:
            convert(graphs["fp32"], graphs[name], [sample.pixel_values for sample in wanted.samples])
    return {"preprocess": root / "preprocess.onnx", **graphs}, wanted


def test_every_precision(made: tuple[dict[str, Path], Expected], tmp_path: Path) -> None:
    """Equal to the last bit, float32 to the checkpoint as well; within 15 % of the .onnx's size; no stray files."""
    graphs, wanted = made
    before = os.environ.get("ORT_CONVERT_ONNX_MODELS_TO_ORT_OPTIMIZATION_LEVEL")
    found = ort_format.convert(graphs, tmp_path)
    assert os.environ.get("ORT_CONVERT_ONNX_MODELS_TO_ORT_OPTIMIZATION_LEVEL") == before
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"{p.stem}.ort" for p in graphs.values()),
        ort_format.CONFIG,
    }
    assert ort_format.check_preprocess(graphs["preprocess"], found["preprocess"], wanted)["equal"] is True
    for name in VISION_PRECISIONS:
        figures = ort_format.check_graph(graphs[name], found[name], name, wanted)
        assert figures["onnx"]["image_embeds"]["max_abs"] == figures["onnx"]["image_features"]["max_abs"] == 0, name
        assert ("relative_allowed" in figures["checkpoint"]) == (name == "fp32")
        assert found[name].read_bytes()[4:8] == b"ORTM"  # the format's identifier
        assert found[name].stat().st_size < 1.15 * graphs[name].stat().st_size, name
    assert figures["checkpoint"]["image_embeds"]["relative"] > 1e-3  # the last one is quantised: the figures see it


def test_config(made: tuple[dict[str, Path], Expected], tmp_path: Path) -> None:
    """Operators with their types for a minimal build; file names, but no directory of this machine."""
    graphs, _wanted = made
    ort_format.convert({"preprocess": graphs["preprocess"], "int8": graphs["int8"]}, tmp_path)
    text = (tmp_path / ort_format.CONFIG).read_text(encoding="utf-8")
    assert "# - preprocess.ort\n# - vision-int8.ort\n" in text and text.endswith("\n")
    assert "DynamicQuantizeMatMul" in text and 'Resize{"inputs": {"0": ["uint8_t"]}}' in text
    assert "MatMulNBits" not in text  # of a precision that wasn't asked for
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        assert str(tmp_path).encode() not in data and str(graphs["int8"].parent).encode() not in data


def test_another_graph_is_refused(made: tuple[dict[str, Path], Expected], tmp_path: Path) -> None:
    """The .ort of a model with erf-GELU beside the right .onnx; pixels that differ by one level."""
    graphs, wanted = made
    family = wanted.spec.vision_family
    model, spec, _ = tower(family)
    shutil.copyfile(graphs["preprocess"], tmp_path / "preprocess.onnx")
    export_vision_fp32(with_erf_gelu(model), spec, tmp_path / "vision.onnx")
    proto = onnx.load(graphs["preprocess"])
    scale = next(t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.dims)
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * 1.001, scale.name))
    onnx.save(proto, tmp_path / "preprocess.onnx")
    found = ort_format.convert({"p": tmp_path / "preprocess.onnx", "v": tmp_path / "vision.onnx"}, tmp_path)
    with pytest.raises(ExportError, match=r"vision.ort: image_embeds differs from vision-fp32.onnx by a relative"):
        ort_format.check_graph(graphs["fp32"], found["v"], "fp32", wanted)
    with pytest.raises(ExportError, match="image_embeds differs from the checkpoint"):
        ort_format.check_graph(tmp_path / "vision.onnx", found["v"], "fp32", wanted)
    with pytest.raises(ExportError, match=r"preprocess.ort: noise-\d+x\d+ differs from preprocess.onnx by"):
        ort_format.check_preprocess(graphs["preprocess"], found["p"], wanted)


def test_weights_beside_the_graph(made: tuple[dict[str, Path], Expected], tmp_path: Path) -> None:
    """A graph that keeps its weights in a file of their own becomes one .ort."""
    graphs, wanted = made
    source = tmp_path / "given" / "vision.onnx"
    source.parent.mkdir()
    options = {"save_as_external_data": True, "location": "vision.onnx.data", "size_threshold": 1024}
    onnx.save(onnx.load(graphs["fp32"]), source, **options)
    assert onnx_io.parts(source)
    found = ort_format.convert({"fp32": source}, tmp_path)
    assert found["fp32"].stat().st_size > 3e6
    ort_format.check_graph(graphs["fp32"], found["fp32"], "fp32", wanted)


def test_what_cannot_be_converted(made: tuple[dict[str, Path], Expected], tmp_path: Path) -> None:
    """An operator that nobody knows: an ExportError that names the file; nothing stays behind."""
    proto = onnx.load(made[0]["preprocess"])
    proto.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(proto, tmp_path / "bad.onnx")
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(ExportError, match=r"bad.onnx: not converted to ORT format \(.*NoSuchOperator"):
        ort_format.convert({"bad": tmp_path / "bad.onnx"}, folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("kibibytes", [1000, 5000])
def test_a_full_disk(kibibytes: int, made: tuple[dict[str, Path], Expected], small_disk: Callable[[int], Path]) -> None:
    """Full while the graph is copied, and while the engine writes: the same error, and nothing stays behind."""
    folder = small_disk(kibibytes)
    with pytest.raises(StorageError, match="no space left"):
        ort_format.convert({"fp32": made[0]["fp32"]}, folder)
    assert not list(folder.iterdir())

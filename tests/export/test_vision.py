"""The vision graph against Hugging Face's tower and stock Llava; tolerances are relative to the largest value."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from tinyllava_edge import checkpoint
from tinyllava_edge.connectors import CONNECTORS, MIXED
from tinyllava_edge.errors import ExportError
from tinyllava_edge.export import vision
from tinyllava_edge.spec import named_tokens

from .vision_models import QUERIES, REDUCERS, TOWERS, eager, error, make, pixels, run

BOTH = ["tiny_checkpoint", "tiny_checkpoint_clip"]
TOLERANCE = 1e-5  # float32, of the largest absolute value


@pytest.fixture(params=BOTH, scope="module")
def loaded(request: pytest.FixtureRequest) -> checkpoint.Checkpoint:
    return checkpoint.load(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def path(loaded: checkpoint.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 graph, alone in its directory."""
    path = tmp_path_factory.mktemp("vision") / "vision.onnx"
    assert set(vision.export_vision_fp32(loaded.model, loaded.spec, path)) == {"float", "int64"}
    assert [p.name for p in path.parent.iterdir()] == ["vision.onnx"]
    return path


@pytest.mark.parametrize("layer", [-1, -2, -3, -4, 1])
def test_features_are_the_hidden_states(loaded: checkpoint.Checkpoint, layer: int) -> None:
    """Bit for bit hidden_states[layer], without post-norm; both select strategies."""
    given = pixels(2)
    with torch.no_grad():
        states = loaded.model.model.vision_tower(given, output_hidden_states=True).hidden_states
        for strategy, first in (("full", 0), ("default", 1)):
            spec = dataclasses.replace(loaded.spec, feature_layer=layer, select_strategy=strategy)
            assert torch.equal(vision.VisionGraph(loaded.model, spec)(given)[1], states[layer][:, first:])


def test_file_equals_stock_llava(loaded: checkpoint.Checkpoint, path: Path) -> None:
    """ONNX Runtime on the file equals stock transformers; a neighbouring layer or the post-norm would show."""
    from transformers import LlavaForConditionalGeneration

    stock = LlavaForConditionalGeneration.from_pretrained(loaded.root, dtype=torch.float32).eval().model
    first = {"full": 0, "default": 1}[loaded.spec.select_strategy]
    for batch in (1, 2, 5):
        given = pixels(batch)
        with torch.no_grad():
            out: Any = stock.vision_tower(given, output_hidden_states=True)
            embeds = torch.stack(list(stock.get_image_features(given).pooler_output))
            normed = stock.vision_tower.post_layernorm(out.hidden_states[-2])[:, first:]
        got_embeds, got_features = run(path, given)
        assert error(got_embeds, embeds) < TOLERANCE
        assert error(got_features, out.hidden_states[-2][:, first:]) < TOLERANCE
        for wrong in (out.hidden_states[-1][:, first:], out.hidden_states[-3][:, first:], normed):
            assert error(got_features, wrong) > 1000 * TOLERANCE


def test_file_holds_what_is_needed(loaded: checkpoint.Checkpoint, path: Path) -> None:
    """Two layers of three, no post-norm, no pooling head; no traces of the machine it was made on."""
    graph = onnx.load(path).graph
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    assert len(norms) == 2 * 2 + (loaded.spec.vision_family == "clip")
    kept = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
    needed = sum(p.numel() for p in vision.VisionGraph(loaded.model, loaded.spec).parameters())
    assert abs(kept - needed) < 64  # a few scalars come on top
    data = path.read_bytes()
    for trace in (b".py", b"stack_trace", str(Path(__file__).parents[2]).encode()):
        assert trace not in data


def test_factory_siglip_drops_its_first_patch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """`default` on SigLIP: 63 tokens of 64, as TinyLLaVA Factory trains."""
    loaded = checkpoint.load(tiny_checkpoint)
    spec = dataclasses.replace(loaded.spec, select_strategy="default", visual_tokens=63)
    vision.export_vision_fp32(loaded.model, spec, tmp_path / "vision.onnx")
    with torch.no_grad():
        states = loaded.model.model.vision_tower(pixels(1), output_hidden_states=True).hidden_states
    assert error(run(tmp_path / "vision.onnx", pixels(1))[1], states[-2][:, 1:]) < TOLERANCE


@pytest.mark.parametrize("family", TOWERS)
def test_towers(family: str, tmp_path: Path) -> None:
    """Every family at batches 1 and 3: within 1e-5 of the torch model; positions are a constant of the graph."""
    model, spec = make(family)
    path = tmp_path / "vision.onnx"
    vision.export_vision_fp32(model, spec, path)
    for batch in (1, 3):
        for got, wanted in zip(run(path, pixels(batch)), eager(model, pixels(batch)), strict=True):
            assert error(got, wanted) < TOLERANCE
    graph = onnx.load(path).graph
    assert not [node for node in graph.node if node.op_type in ("Resize", "Gather", "Gemm")]
    towers = 2 if family.startswith("mof") else 1
    assert sum(node.op_type == "Conv" for node in graph.node) == towers  # patches are never quantised
    assert not any("layers.2." in tensor.name for tensor in graph.initializer)


@pytest.mark.parametrize("connector", [*CONNECTORS, *REDUCERS])
def test_connectors(connector: str, tmp_path: Path) -> None:
    """Every connector of the table: within 1e-5 of the torch model; as many tokens as queries, or as the name says."""
    model, spec = make("mof" if connector in MIXED else "siglip", connector)
    path = tmp_path / "vision.onnx"
    vision.export_vision_fp32(model, spec, path)
    for batch in (1, 3):
        found = run(path, pixels(batch))
        for got, wanted in zip(found, eager(model, pixels(batch)), strict=True):
            assert error(got, wanted) < TOLERANCE
    tokens = QUERIES if connector == "resampler" else named_tokens(connector) or spec.feature_tokens
    assert found[0].shape[1] == tokens
    assert found[1].shape == (3, spec.feature_tokens, 192)
    assert not [node for node in onnx.load(path).graph.node if node.op_type in ("GatherND", "Gather", "Where")]


@pytest.mark.parametrize("connector", [*REDUCERS, *MIXED])
def test_connectors_in_static_graphs(connector: str, tmp_path: Path) -> None:
    """Fewer tokens don't split the graph: one CoreML partition, says ONNX Runtime, and no shape arithmetic."""
    from onnxruntime.tools.mobile_helpers import usability_checker
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo

    model, spec = make("mof" if connector in MIXED else "siglip", connector)
    path = tmp_path / "vision.onnx"
    vision.export_vision_fp32(model, spec, path, static=True)
    shaped = ModelProtoWithShapeInfo(path).model_with_shape_info
    partitions = usability_checker.check_coreml_partitions(shaped, True, "coreml_supported_mlprogram_ops.md")
    assert partitions.num_partitions == 1 and partitions.num_supported_nodes == partitions.num_nodes
    assert not [node for node in onnx.load(path).graph.node if node.op_type == "Shape"]


def test_real_options(tmp_path: Path) -> None:
    """so400m's heads of 72, its feed-forward that no block size divides, and patches that leave a rest: within 1e-5."""
    from tinyllava_edge.spec import VISION_BACKBONES

    config = {**VISION_BACKBONES["Sig"].config, "hidden_size": 144, "num_attention_heads": 2, "intermediate_size": 538}
    TOWERS["so400m"] = {**config, "image_size": 90, "num_hidden_layers": 4}
    try:
        model, spec = make("so400m")
    finally:
        del TOWERS["so400m"]
    spec = dataclasses.replace(spec, vision_family="siglip", image_size=90, patch_size=14, visual_tokens=36)
    vision.export_vision_fp32(model, spec, tmp_path / "vision.onnx")
    given = torch.randn(1, 3, 90, 90)
    for got, wanted in zip(run(tmp_path / "vision.onnx", given), eager(model, given), strict=True):
        assert error(got, wanted) < TOLERANCE
    graph = onnx.load(tmp_path / "vision.onnx").graph
    assert sum(node.op_type == "Gelu" for node in graph.node) == 3 + 1  # three layers of four, and the connector


def test_static(loaded: checkpoint.Checkpoint, path: Path, tmp_path: Path) -> None:
    """Batch 1 in every shape, no shape arithmetic left, equal values; one CoreML partition, says ONNX Runtime."""
    from onnxruntime.tools.mobile_helpers import usability_checker
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo

    fixed = tmp_path / "vision.onnx"
    vision.export_vision_fp32(loaded.model, loaded.spec, fixed, static=True)
    session = ort.InferenceSession(fixed)
    values = [*session.get_inputs(), *session.get_outputs()]
    assert all(isinstance(size, int) for value in values for size in value.shape) and values[0].shape[0] == 1
    assert not [node for node in onnx.load(fixed).graph.node if node.op_type in ("Shape", "Gather", "Resize")]
    for got, wanted in zip(run(fixed, pixels(1)), run(path, pixels(1)), strict=True):
        assert error(got, torch.from_numpy(wanted)) < TOLERANCE
    shaped = ModelProtoWithShapeInfo(fixed).model_with_shape_info
    partitions = usability_checker.check_coreml_partitions(shaped, True, "coreml_supported_mlprogram_ops.md")
    assert partitions.num_partitions == 1 and partitions.num_supported_nodes == partitions.num_nodes
    with pytest.raises(Exception, match=r"[Gg]ot|[Ii]nvalid"):
        run(fixed, pixels(2))


def test_refusals(loaded: checkpoint.Checkpoint, tmp_path: Path) -> None:
    """A spec that contradicts the tower is refused before anything is written."""
    cases = [
        ({"visual_tokens": 65}, "spec says"),
        ({"embedding_dim": 128}, "spec says"),
        ({"feature_layer": -5}, "feature_layer -5"),
        ({"feature_layer": 4}, "feature_layer 4"),
        ({"vision_family": "dino"}, "dino"),
    ]
    for change, message in cases:
        with pytest.raises(ExportError, match=message):
            vision.export_vision_fp32(
                loaded.model, dataclasses.replace(loaded.spec, **change), tmp_path / "vision.onnx"
            )
    assert not list(tmp_path.iterdir())

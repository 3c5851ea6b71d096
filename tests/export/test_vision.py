"""The vision graph against Hugging Face's tower and stock Llava; tolerances are relative to the largest value."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch

from tinyllava_edge import checkpoint
from tinyllava_edge.errors import ExportError
from tinyllava_edge.export import vision

BOTH = ["tiny_checkpoint", "tiny_checkpoint_clip"]
TOLERANCE = 1e-5  # float32, of the largest absolute value


def pixels(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def run(path: Path, given: torch.Tensor) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    embeds, features = ort.InferenceSession(path).run(
        ["image_embeds", "image_features"], {"pixel_values": given.numpy()}
    )
    return embeds, features


def error(got: npt.NDArray[np.float32], wanted: torch.Tensor) -> float:
    assert got.shape == tuple(wanted.shape)
    return float(np.abs(got - wanted.numpy()).max() / wanted.abs().max())


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


def test_int8(path: Path, tmp_path: Path) -> None:
    """Every linear layer's weights int8, the patch convolution float; cosine per token >= 0.99 on random weights."""
    types = vision.quantize_vision_int8(path, tmp_path / "int8.onnx")
    assert len(list(tmp_path.iterdir())) == len(list(path.parent.iterdir())) == 1
    graph = onnx.load(tmp_path / "int8.onnx").graph
    linear = 2 * 6 + 2  # q, k, v, out, fc1, fc2 of two layers; two of the connector
    assert types["int8"] == 2 * linear  # each with its zero point
    by_name = {tensor.name: tensor for tensor in graph.initializer}
    scales = [
        by_name[name]
        for node in graph.node
        if node.op_type == "Mul"
        for name in node.input
        if name.endswith("_scale") and name in by_name
    ]
    assert scales and all(np.prod(scale.dims) > 1 for scale in scales)  # per channel
    assert sum(node.op_type == "Conv" for node in graph.node) == 1
    assert not [node for node in graph.node if node.op_type == "ConvInteger"]
    assert (tmp_path / "int8.onnx").stat().st_size < 0.4 * path.stat().st_size
    for got, wanted in zip(run(tmp_path / "int8.onnx", pixels(3)), run(path, pixels(3)), strict=True):
        cosine = (got * wanted).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert cosine.min() > 0.99


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

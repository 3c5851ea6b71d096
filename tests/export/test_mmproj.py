"""mmproj GGUFs of tiny random towers: what is written, what is refused, and what stock llama.cpp computes from them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from tinyllava_edge import checkpoint
from tinyllava_edge.checkpoint import Checkpoint
from tinyllava_edge.connectors import MlpConnector
from tinyllava_edge.errors import ExportError, StorageError
from tinyllava_edge.export import mmproj
from tinyllava_edge.export.mmproj import export_mmproj, mmproj_name, unpacked
from tinyllava_edge.runtimes.mmproj_header import read_mmproj_header
from tinyllava_edge.spec import ModelSpec


@pytest.fixture(scope="module")
def siglip(tiny_checkpoint: Path) -> Checkpoint:
    return checkpoint.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def clip(tiny_checkpoint_clip: Path) -> Checkpoint:
    return checkpoint.load(tiny_checkpoint_clip)


def field(path: Path, key: str) -> Any:
    return gguf.GGUFReader(path).fields[key].contents()


@pytest.mark.parametrize(("feature_layer", "layers"), [(-2, 2), (-1, 3), (-3, 1), (2, 2), (3, 3)])
def test_cut_at_the_feature_layer(siglip: Checkpoint, tmp_path: Path, feature_layer: int, layers: int) -> None:
    """llama.cpp stops at `feature_layer`, or else one layer before `block_count`: both say where the tower ends."""
    path = tmp_path / "mmproj.gguf"
    export_mmproj(siglip.model, replace(siglip.spec, feature_layer=feature_layer), path)
    assert field(path, "clip.vision.block_count") == layers
    assert field(path, "clip.vision.feature_layer") == [layers]
    names = [tensor.name for tensor in gguf.GGUFReader(path).tensors]
    assert {int(name.split(".")[2]) for name in names if name.startswith("v.blk.")} == set(range(layers))
    assert not any("post_ln" in name or "head" in name for name in names)


def test_keys(siglip: Checkpoint, clip: Checkpoint, tmp_path: Path) -> None:
    """What differs between the two families; and only a model that stretches its pictures asks for an overview."""
    for loaded, gelu, epsilon in ((siglip, True, 1e-6), (clip, False, 1e-5)):
        path = tmp_path / loaded.spec.vision_family
        export_mmproj(loaded.model, loaded.spec, path)
        fields = gguf.GGUFReader(path).fields
        assert field(path, "general.architecture") == "clip"
        assert field(path, "general.type") == "mmproj"
        assert field(path, "clip.use_gelu") is gelu
        assert field(path, "clip.vision.attention.layer_norm_epsilon") == pytest.approx(epsilon)
        assert field(path, "clip.vision.image_mean") == pytest.approx(list(loaded.spec.image_mean))
        assert field(path, "clip.vision.image_std") == pytest.approx(list(loaded.spec.image_std))
        assert ("clip.vision.image_grid_pinpoints" in fields) is (loaded.spec.image_policy == "warp")
        assert ("tinyllava_edge.clip_workaround" in fields) is (loaded is clip)


@pytest.mark.parametrize(
    ("float_type", "kinds"),
    [
        ("f32", {"f32": 39}),
        ("f16", {"f32": 25, "f16": 14}),
        ("bf16", {"f32": 25, "bf16": 14}),
        ("q8_0", {"q8_0": 14, "f32": 25}),
    ],
)
def test_types(siglip: Checkpoint, tmp_path: Path, float_type: str, kinds: dict[str, int]) -> None:
    """Matrices get the type asked for; vectors, patch and position embeddings stay float32. Values as in the model."""
    path = tmp_path / "mmproj.gguf"
    assert export_mmproj(siglip.model, siglip.spec, path, float_type) == kinds
    wanted = siglip.model.model.vision_tower.encoder.layers[1].mlp.fc2.weight.detach().numpy()
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "v.blk.1.ffn_down.weight")
    found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    rounding = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 2**-7}[float_type]  # of the largest value
    assert np.abs(found - wanted).max() <= rounding * np.abs(wanted).max()


def odd_model() -> tuple[Any, ModelSpec]:
    """Inner width 80, no multiple of 32; 45 pixels a side, no multiple of the patches' 14 (as 384 is none either)."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        image_size=45, patch_size=14, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=2
    )
    model = SimpleNamespace(vision_tower=SiglipVisionModel(config).eval(), multi_modal_projector=MlpConnector(64, 256))
    with torch.no_grad():
        for part in (model.vision_tower, model.multi_modal_projector):
            for parameter in part.parameters():
                parameter.copy_(
                    torch.randn_like(parameter) * (1.0 if parameter.ndim == 1 else 2 * parameter[0].numel() ** -0.5)
                )
    spec = ModelSpec(
        name="odd",
        vision_family="siglip",
        llm_family="llama",
        image_size=45,
        patch_size=14,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        image_policy="warp",
        pad_color=(127, 127, 127),
        feature_layer=-2,
        select_strategy="full",
        visual_tokens=9,
        embedding_dim=256,
        connector="mlp2x_gelu",
        template="llama",
        max_length=512,
        compat="native",
    )
    return SimpleNamespace(model=model, config=SimpleNamespace(vision_config=config)), spec


def test_rows_that_no_block_fits(tmp_path: Path) -> None:
    """q8_0 packs 32 columns: the matrices 80 wide stay f16, and the file itself tells which."""
    model, spec = odd_model()
    path = tmp_path / "mmproj.gguf"
    assert export_mmproj(model, spec, path, "q8_0") == {"f32": 25, "q8_0": 12, "f16": 2}
    assert unpacked(path) == ["v.blk.0.ffn_down.weight", "v.blk.1.ffn_down.weight"]
    header = read_mmproj_header(path)
    assert (header.patches, header.width, header.tower_width) == (9, 256, 64)


def test_workaround_turns_the_positions(clip: Checkpoint, tmp_path: Path) -> None:
    """Rows 1..n, then row 0; nothing else changes but the key that says so."""
    plain, turned = tmp_path / "plain", tmp_path / "turned"
    export_mmproj(clip.model, clip.spec, plain)
    export_mmproj(clip.model, clip.spec, turned, clip_workaround=True)
    assert field(plain, "tinyllava_edge.clip_workaround") is False
    assert field(turned, "tinyllava_edge.clip_workaround") is True
    pairs = zip(gguf.GGUFReader(plain).tensors, gguf.GGUFReader(turned).tensors, strict=True)
    changed = {a.name for a, b in pairs if not np.array_equal(a.data, b.data)}
    assert changed == {"v.position_embd.weight"}
    weights = clip.model.model.vision_tower.embeddings.position_embedding.weight.detach().numpy()
    found = next(t for t in gguf.GGUFReader(turned).tensors if t.name == "v.position_embd.weight").data
    assert np.array_equal(found, np.concatenate([weights[1:], weights[:1]]))


def test_file_name() -> None:
    """PocketPal's pattern, and llama-server's prefix."""
    name = mmproj_name("TinyLLaVA-base-Sig-TL", "q8_0")
    assert re.search(r"[-_.]*mmproj[-_.].+\.gguf$", name, re.IGNORECASE)
    assert name.startswith("mmproj")
    assert mmproj_name("../my model", "f16") == "mmproj-my-model-f16.gguf"


def refused(loaded: Checkpoint, tmp_path: Path, spec: ModelSpec | None = None, **options: Any) -> str:
    with pytest.raises(ExportError) as caught:
        export_mmproj(loaded.model, spec or loaded.spec, tmp_path / "mmproj.gguf", **options)
    assert list(tmp_path.iterdir()) == []
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("connector", "reason"),
    [
        ("identity", "without a connector"),
        ("linear", "GELU after the first layer"),
        ("mlp3x_gelu", "two linear layers"),
        ("resampler", "no graph"),
        ("pixelshuffle-16", "other models' graphs"),
        ("ldpv2-144", "24 x 24"),
        ("avgpool-16", "other models' graphs"),
        ("qformer-32", "Q-Former"),
        ("something", "no graph"),
    ],
)
def test_connectors_without_a_graph(siglip: Checkpoint, tmp_path: Path, connector: str, reason: str) -> None:
    assert reason in refused(siglip, tmp_path, replace(siglip.spec, connector=connector))


def test_refusals(siglip: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each names what stock llama.cpp lacks, and nothing is left on the disk."""
    spec, config = siglip.spec, siglip.model.config.vision_config
    assert "dinov2" in refused(siglip, tmp_path, replace(spec, vision_family="dinov2"))
    assert "no layer" in refused(siglip, tmp_path, replace(spec, feature_layer=0))
    assert "feature_layer 9" in refused(siglip, tmp_path, replace(spec, feature_layer=9))
    assert "workaround" in refused(siglip, tmp_path, clip_workaround=True)
    assert "q4_k_m" in refused(siglip, tmp_path, float_type="q4_k_m")
    with monkeypatch.context() as patch:
        patch.setattr(config, "hidden_act", "gelu")  # erf
        assert "hidden_act" in refused(siglip, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(config, "intermediate_size", config.hidden_size)
        assert "swap" in refused(siglip, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(siglip.model.config, "projector_hidden_act", "relu")
        assert "relu" in refused(siglip, tmp_path)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (1e6, "float16")])
def test_values_that_would_be_lost(siglip: Checkpoint, tmp_path: Path, value: float, word: str) -> None:
    weight = siglip.model.model.multi_modal_projector.linear_2.weight
    before = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = value
    try:
        assert word in refused(siglip, tmp_path)
        if value == 1e6:
            export_mmproj(siglip.model, siglip.spec, tmp_path / "wide.gguf", "bf16")
    finally:
        with torch.no_grad():
            weight[0, 0] = before


def test_unknown_tensor(siglip: Checkpoint, tmp_path: Path) -> None:
    """A tower with parts that the file has no place for must not lose them silently."""
    siglip.model.model.vision_tower.register_parameter("extra", torch.nn.Parameter(torch.ones(2)))
    try:
        assert "extra" in refused(siglip, tmp_path)
    finally:
        del siglip.model.model.vision_tower._parameters["extra"]


def test_full_disk(siglip: Checkpoint, small_disk: Callable[[int], Path]) -> None:
    place = small_disk(512)
    with pytest.raises(StorageError):
        export_mmproj(siglip.model, siglip.spec, place / "mmproj.gguf", "f32")
    assert list(place.iterdir()) == []


def test_progress(siglip: Checkpoint, tmp_path: Path) -> None:
    told: list[str] = []
    mmproj.export_mmproj(siglip.model, siglip.spec, tmp_path / "mmproj.gguf", progress=told.append)
    assert told[-1] == "mmproj: tensor 39 of 39"

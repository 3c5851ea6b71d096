"""A mixture of two towers along the whole road: backbones, a step, checkpoint, bundle, device; and what it can't be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.benchmarks.work import vision_work
from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.errors import CheckpointError, ExportError
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.export.verify import verify
from tinyllava_edge.runtimes.edge import open_edge
from tinyllava_edge.runtimes.reference import open_reference
from tinyllava_edge.train.backbones import init_checkpoint
from tinyllava_edge.train.compose import spec_of

from ..train.parts import write_llm, write_tower

PICTURE = np.random.default_rng(1).integers(0, 256, (64, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP and DINOv2 with Llama, joined by an MLP each."""
    at = tmp_path_factory.mktemp("mixture")
    towers = [write_tower(at / name, name) for name in ("clip", "dinov2")]
    llm = write_llm(at / "llm", "llama")
    spec = spec_of(towers, llm, name="mixture")
    assert (spec.vision_family, spec.connector, spec.select_strategy) == ("mof", "mof_mlp", "full")
    assert (spec.visual_tokens, spec.feature_tokens, spec.image_policy, spec.patches) == (128, 128, "crop", 64)
    init_checkpoint(spec, at / "start", vision_dir=towers, llm_dir=llm)
    return at / "start"


def test_the_backbones_arrive(root: Path) -> None:
    from safetensors.torch import load_file
    from transformers import CLIPVisionModel, Dinov2Model

    loaded = checkpoints.load(root)
    for part, kind, name in (("first", CLIPVisionModel, "clip"), ("second", Dinov2Model, "dinov2")):
        released = kind.from_pretrained(root.parent / name).state_dict()
        ours = getattr(loaded.model.model.vision_tower, part).state_dict()
        assert released.keys() == ours.keys() and all(torch.equal(ours[key], released[key]) for key in released)
    parts, _ = checkpoints.load_vision(root)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(parts.tower_features(pixels), loaded.model.tower_features(pixels))
    names = load_file(root / "model.safetensors")
    assert any(".multi_modal_projector.second.linear_1." in name for name in names)


def by_hand(loaded: checkpoints.Checkpoint) -> int:
    """Operations for a picture: patches, two layers in each tower without its class token, both MLPs."""
    tower, total = loaded.model.model.vision_tower, 0
    for part in (tower.first, tower.second):
        convolution = next(m for m in part.modules() if isinstance(m, torch.nn.Conv2d))
        total += 2 * 64 * convolution.weight.numel()
        stack = part.encoder.layers if part is tower.first else part.encoder.layer
        for layer in list(stack)[:2]:
            total += sum(2 * 64 * p.numel() for p in layer.parameters() if p.ndim == 2) + 4 * 64**2 * 192
    connector = loaded.model.model.multi_modal_projector
    return total + sum(2 * 64 * p.numel() for p in connector.parameters() if p.ndim == 2)


def test_the_device_gives_the_references_answer(root: Path, tmp_path: Path) -> None:
    """float32: embeddings within 1e-4, logits within 1e-3, the same words; int8 and fp16 near; verified."""
    bundle = export_bundle(root, tmp_path / "bundle", llm=("f32",), vision=("fp32", "int8", "fp16"))
    wanted = open_reference(root, n_threads=1).probe(PICTURE, "what color is it?")
    with open_edge(bundle.root, "fp32+f32", allow_unverified=True, n_threads=1) as edge:
        got = edge.probe(PICTURE, "what color is it?")
        other = edge.probe(255 - PICTURE, "what color is it?")
    assert got.image_embeds.shape == (128, 256) and got.image_features.shape == (128, 192)
    assert np.abs(got.image_embeds - wanted.image_embeds).max() < 1e-4 * np.abs(wanted.image_embeds).max()
    assert np.abs(got.first_logits - wanted.first_logits).max() < 1e-3 < np.abs(wanted.first_logits).max()
    assert got.answer.token_ids == wanted.answer.token_ids and got.answer.n_image_tokens == 128
    assert np.abs(other.image_embeds - got.image_embeds).max() > 0.01
    for name, least in (("int8", 0.98), ("fp16", 0.9999)):
        with open_edge(bundle.root, f"{name}+f32", allow_unverified=True, n_threads=1) as edge:
            a, b = edge.probe(PICTURE, "what?").image_embeds.ravel(), wanted.image_embeds.ravel()
        assert float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) > least, name
    work = vision_work(bundle.root / "vision-fp32.onnx", bundle.spec)
    assert work == {"float": by_hand(checkpoints.load(root)), "int8": 0}
    assert verify(bundle.root, root, builds=["fp32+f32"], n_threads=1).passed
    opened = read_bundle(bundle.root)
    opened.require_verified(opened.build("fp32+f32"))


def test_what_a_mixture_cannot_be(root: Path, tmp_path: Path) -> None:
    """No mmproj, with the reason; damaged descriptions are refused before anything is written."""
    with pytest.raises(ExportError, match="no Llava graph for a mixture of two towers"):
        export_bundle(root, tmp_path / "bundle", llm=("f32",), vision=("fp32",), mmproj=("f16",))
    config, spec = (json.loads((root / name).read_text()) for name in ("config.json", "model_spec.json"))
    tower = config["vision_config"]

    def changed(part: str, value: object) -> dict[str, object]:
        return {**config, "vision_config": {**tower, part: value}}

    cases = [
        ("config.json", changed("second", {"model_type": "resnet"}), "config.json: .*vision tower 'resnet'"),
        ("config.json", changed("second", 3), "second is a int"),
        ("config.json", changed("second", tower), "second is a mixture itself"),
        ("config.json", changed("first", {**tower["first"], "hidden_size": 1 << 40}), "hidden_size"),
        ("config.json", changed("first", {**tower["first"], "num_hidden_layers": 2}), "num_hidden_layers 2 and 3"),
        ("model_spec.json", {**spec, "select_strategy": "default"}, "no class tokens"),
    ]
    for name, value, message in cases:
        damaged = Path(shutil.copytree(root, tmp_path / "damaged", dirs_exist_ok=True))
        (damaged / name).write_text(json.dumps(value))
        with pytest.raises(CheckpointError, match=message):
            export_bundle(damaged, tmp_path / "bundle", llm=("f32",), vision=("fp32",))
    assert not (tmp_path / "bundle").exists()


def test_dinov2_with_a_gated_mlp(tmp_path: Path) -> None:
    """Its file joins two matrices that the model keeps apart: tower and language model are read tensor by tensor."""
    at = tmp_path
    tower = write_tower(at / "giant", "dinov2", use_swiglu_ffn=True)
    llm = write_llm(at / "llm", "llama")
    init_checkpoint(spec_of(tower, llm), at / "start", vision_dir=tower, llm_dir=llm)
    loaded, (parts, _) = checkpoints.load(at / "start"), checkpoints.load_vision(at / "start")
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(parts.tower_features(pixels), loaded.model.tower_features(pixels))
    assert checkpoints.llm_source(at / "start").infos

"""Connectors that give fewer tokens, along the whole road: checkpoint, bundle, device runtime, verify."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tinyllava_edge import checkpoint, spec
from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.errors import CheckpointError
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.export.verify import verify
from tinyllava_edge.model import build_model
from tinyllava_edge.runtimes.edge import open_edge
from tinyllava_edge.runtimes.reference import open_reference

from ..conftest import make_tokenizer

# Connector → tower. CLIP's class token is dropped; 9 and 25 don't divide the grid of 8 x 8.
ROADS = {
    "pixelshuffle-16": "NanoSig",
    "ldpv2-16": "NanoC",
    "ldpv2-25": "NanoSig",
    "avgpool-4": "NanoSig",
    "avgpool-9": "NanoC",
    "qformer-7": "NanoSig",
}
QFORMER = {"num_layers": 3, "hidden_size": 96, "num_heads": 4}


def make(out: Path, connector: str) -> Path:
    """A tiny checkpoint with every parameter randomised, as conftest's, with another connector."""
    torch.manual_seed(0)
    vision, tokens = ROADS[connector], int(connector.rpartition("-")[2])
    made = spec.model_spec(f"TinyLLaVA-base-{vision}-Nano")
    made = dataclasses.replace(made, connector=connector, visual_tokens=tokens)
    tower = {**spec.VISION_BACKBONES[vision].config, "num_hidden_layers": 3}
    text = {**spec.LLM_BACKBONES["Nano"].config, "num_hidden_layers": 2}
    model = build_model(made, tower, text, 1023, QFORMER if connector.startswith("qformer") else None)
    tokenizer = make_tokenizer()
    checkpoint.add_image_token(model, tokenizer)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = (0.5 if "embed" in key else 1.5) / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2
            centre = 1 if "norm" in key.lower() and key.endswith("weight") else 0
            parameter.copy_(centre + scale * torch.randn_like(parameter))
    checkpoint.save(model.eval(), tokenizer, made, out)
    return out


@pytest.mark.parametrize("connector", ROADS)
def test_the_road(connector: str, tmp_path: Path) -> None:
    """Loaded as saved; the device gives the reference's embeddings (1e-4), logits (1e-3) and words; int8 is near."""
    root = make(tmp_path / "checkpoint", connector)
    loaded, tokens = checkpoint.load(root), int(connector.rpartition("-")[2])
    parts, found = checkpoint.load_vision(root)
    assert (loaded.spec.connector, loaded.spec.visual_tokens, found) == (connector, tokens, loaded.spec)
    for key, tensor in loaded.model.model.multi_modal_projector.state_dict().items():
        assert torch.equal(tensor, parts.model.multi_modal_projector.state_dict()[key]), key
    bundle = export_bundle(root, tmp_path / "bundle", llm=("f32",), vision=("fp32", "int8"))
    assert bundle.spec == loaded.spec
    reference = open_reference(root, n_threads=1)
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    wanted = reference.probe(picture, "what color is it?")
    with open_edge(bundle.root, "fp32+f32", allow_unverified=True, n_threads=1) as edge:
        got = edge.probe(picture, "what color is it?")
        text_only = edge.answer(None, "what color is it?", max_tokens=1)
        other = edge.probe(255 - picture, "what color is it?")
    assert got.image_embeds.shape == (tokens, 256) and got.image_features.shape == (64, 192)
    assert np.abs(got.image_embeds - wanted.image_embeds).max() < 1e-4 * np.abs(wanted.image_embeds).max()
    assert np.abs(got.first_logits - wanted.first_logits).max() < 1e-3 < np.abs(got.first_logits).max()
    assert (got.answer.text, got.answer.token_ids) == (wanted.answer.text, wanted.answer.token_ids)
    assert got.answer.n_image_tokens == tokens > text_only.n_image_tokens == 0
    assert np.abs(other.first_logits - got.first_logits).max() > 0.1  # the picture matters
    with open_edge(bundle.root, "int8+f32", allow_unverified=True, n_threads=1) as edge:
        a, b = edge.probe(picture, "what?").image_embeds.ravel(), wanted.image_embeds.ravel()
    assert float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) > 0.98


def test_verify_stamps_it(tmp_path: Path) -> None:
    """All stages of a verified build, the spec's fields included."""
    root = make(tmp_path / "checkpoint", "ldpv2-25")
    bundle = export_bundle(root, tmp_path / "bundle", llm=("f32",), vision=("fp32",))
    assert verify(bundle.root, root, builds=["fp32+f32"], n_threads=1).passed
    opened = read_bundle(bundle.root)
    opened.require_verified(opened.build("fp32+f32"))


def test_damaged_descriptions(tmp_path: Path) -> None:
    """A grid that isn't the tower's, or a count that isn't the connector's: refused before anything is written."""
    root = make(tmp_path / "checkpoint", "avgpool-4")
    config, written = (json.loads((root / name).read_text()) for name in ("config.json", "model_spec.json"))
    cases = [
        ("config.json", {**config, "feature_tokens": 63}, "first patch|63 tower tokens"),
        ("config.json", {**config, "feature_tokens": "64"}, "feature_tokens=64"),
        ("config.json", {key: value for key, value in config.items() if key != "feature_tokens"}, "nobody said"),
        ("config.json", {**config, "feature_tokens": 36}, "made for 6 x 6 patches, and the tower gives 64 tokens"),
        ("config.json", {**config, "connector": "avgpool-5"}, "can't become 5 tokens"),
        ("model_spec.json", {**written, "visual_tokens": 9}, "visual_tokens=9 with the connector 'avgpool-4'"),
    ]
    for name, value, message in cases:
        damaged = Path(shutil.copytree(root, tmp_path / "damaged", dirs_exist_ok=True))
        (damaged / name).write_text(json.dumps(value))
        with pytest.raises(CheckpointError, match=message):
            export_bundle(damaged, tmp_path / "bundle", llm=("f32",), vision=("fp32",))
    assert not (tmp_path / "bundle").exists()

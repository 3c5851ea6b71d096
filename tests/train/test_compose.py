"""Any tower, two towers and any causal language model: spec, first checkpoint, a step, saved, loaded, exported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.checkpoint import Checkpoint
from tinyllava_edge.errors import CheckpointError, ExportError, UsageError
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.export.decoder import check_architecture
from tinyllava_edge.export.llm import export_llm
from tinyllava_edge.runtimes.edge import open_edge
from tinyllava_edge.runtimes.llama import Llama
from tinyllava_edge.runtimes.reference import open_reference
from tinyllava_edge.spec import ModelSpec, model_spec
from tinyllava_edge.towers import FAMILIES
from tinyllava_edge.train.backbones import init_checkpoint
from tinyllava_edge.train.compose import spec_of
from tinyllava_edge.train.dataset import prepare
from tinyllava_edge.train.objective import Objective
from tinyllava_edge.train.parts import freeze
from tinyllava_edge.train.recipes import StageRecipe
from tinyllava_edge.weights import open_weights

from .conftest import Files
from .parts import LLMS, OTHERS, TOWERS, write_llm, write_tower

STAGE = StageRecipe("finetune", "model", "full", 1e-3, 4, tower="from-0", precision="fp32")
PICTURE = np.random.default_rng(1).integers(0, 256, (64, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tower(tmp_path_factory.mktemp("tower") / "siglip", "siglip")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llm(tmp_path_factory.mktemp("llm") / "llama", "llama")


def prompt(loaded: Checkpoint) -> torch.Tensor:
    """Ids with the picture's slots in front, (1, n)."""
    words = loaded.tokenizer("what color is the shape?", add_special_tokens=False).input_ids
    return torch.tensor([[loaded.model.config.image_token_id] * loaded.spec.visual_tokens + words])


def logits(loaded: Checkpoint) -> torch.Tensor:
    """What the whole model of transformers says, (1, n, vocabulary)."""
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return loaded.model(input_ids=prompt(loaded), pixel_values=pixels).logits


def stepped(root: Path, files: Files, out: Path) -> Checkpoint:
    """The checkpoint after one step on everything that it can train, saved and loaded again with equal logits."""
    start = checkpoints.load(root)
    data = prepare(start, STAGE, files.qa, files.images)
    freeze(start.model, STAGE)
    objective = Objective(start.model).train()
    before = {name: p.detach().clone() for name, p in start.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in start.model.parameters() if p.requires_grad], 1e-3)
    objective(**data.batch(data.packs[:2]))["loss"].backward()
    optimizer.step()
    after = dict(start.model.named_parameters())
    still = [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    assert not still
    tied = bool(start.model.config.tie_word_embeddings)
    assert (start.model.lm_head.weight is start.model.get_input_embeddings().weight) == tied
    checkpoints.save(start.model.eval(), start.tokenizer, start.spec, out)
    loaded = checkpoints.load(out)
    assert (loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight) == tied
    assert any(name.endswith("lm_head.weight") for name in open_weights(out).infos) != tied
    assert torch.equal(logits(loaded), logits(start))
    return loaded


def made(out: Path, vision: Any, llm: Path, **options: Any) -> ModelSpec:
    spec = spec_of(vision, llm, **options)
    init_checkpoint(spec, out, vision_dir=vision, llm_dir=llm)
    return spec


@pytest.mark.parametrize("name", TOWERS)
def test_towers(name: str, llama: Path, files: Files, tmp_path: Path) -> None:
    """Numbers from the tower's own files; the checkpoint's tower is the release's; it trains, is saved and loaded."""
    from transformers import AutoModel

    tower = write_tower(tmp_path / "a", name)
    spec = made(tmp_path / "start", tower, llama, name=name)
    kind = TOWERS[name][0]
    assert spec.vision_family == FAMILIES[kind] and (spec.image_size, spec.patch_size) == (64, 8)
    assert (spec.visual_tokens, spec.feature_tokens, spec.template, spec.max_length) == (64, 64, "llama", 2048)
    crop = kind in ("clip_vision_model", "dinov2", "dinov2_with_registers")
    assert spec.image_policy == ("crop" if crop else "warp")
    assert spec.crop_resize == (72 if name == "dinov2" else 0)
    assert spec.resample == ("bilinear" if name.startswith("siglip2") else "bicubic")
    loaded = checkpoints.load(tmp_path / "start")
    released = AutoModel.from_pretrained(tower, dtype=torch.float32)
    for key, tensor in released.state_dict().items():
        assert torch.equal(loaded.model.model.vision_tower.state_dict()[key], tensor), key
    stepped(tmp_path / "start", files, tmp_path / "next")
    parts, _ = checkpoints.load_vision(tmp_path / "next")
    assert parts.tower_features(torch.zeros(1, 3, 64, 64)).shape == (1, 64, 192)


def test_registers_are_dropped(llama: Path, tmp_path: Path) -> None:
    """Patches alone of Hugging Face's hidden_states[-2]: neither class token nor registers."""
    from transformers import Dinov2WithRegistersModel

    tower = write_tower(tmp_path / "a", "dinov2_registers")
    made(tmp_path / "start", tower, llama)
    loaded, own = checkpoints.load(tmp_path / "start"), Dinov2WithRegistersModel.from_pretrained(tower).eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = own(pixels, output_hidden_states=True).hidden_states[-2]
        assert wanted.shape[1] == 1 + 4 + 64
        torch.testing.assert_close(loaded.model.tower_features(pixels), wanted[:, 5:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LLMS)
def test_language_models(name: str, siglip: Path, files: Files, tmp_path: Path) -> None:
    """Every family: tied heads stay tied; the trained model's GGUF gives torch's logits after a picture (1e-4)."""
    llm = write_llm(tmp_path / "llm", name)
    spec = made(tmp_path / "start", siglip, llm)
    assert spec.template == {"phi": "phi", "stablelm": "phi", "llama": "llama", "gemma": "gemma"}.get(
        name, "qwen2_base"
    )
    loaded = stepped(tmp_path / "start", files, tmp_path / "next")
    assert loaded.tokenizer.pad_token_id is not None and loaded.tokenizer.eos_token is not None
    assert (loaded.model.lm_head.bias is not None) == (name == "phi")
    export_llm(checkpoints.llm_source(tmp_path / "next"), tmp_path / "llm.gguf", "f32")
    with torch.no_grad():
        features = loaded.model.tower_features(torch.randn(1, 3, 64, 64))
        embeds = loaded.model.embed(prompt(loaded), features)
        hidden = loaded.model.model.language_model(inputs_embeds=embeds).last_hidden_state
        wanted = loaded.model.lm_head(hidden[:, -1]).numpy()
    native = Llama(tmp_path / "llm.gguf", n_ctx=256, n_threads=1)
    try:
        got = native.decode_embeddings(embeds[0].numpy(), 0, wanted=[embeds.shape[1] - 1])
    finally:
        native.close()
    tolerance = 5e-3 if name in ("phi", "gemma") else 1e-4  # ggml's tanh-GELU is a float16 table
    np.testing.assert_allclose(got, wanted, atol=tolerance * np.abs(wanted).max(), rtol=0)


def test_gemma_on_the_device(siglip: Path, tmp_path: Path) -> None:
    """Text embeddings are scaled, the picture's are not: reference and device agree on logits (1e-2) and words."""
    llm = write_llm(tmp_path / "llm", "gemma")
    made(tmp_path / "start", siglip, llm)
    bundle = export_bundle(tmp_path / "start", tmp_path / "bundle", llm=("f32",), vision=("fp32",))
    wanted = open_reference(tmp_path / "start", n_threads=1).probe(PICTURE, "what color is it?")
    with open_edge(bundle.root, "fp32+f32", allow_unverified=True, n_threads=1) as edge:
        got = edge.probe(PICTURE, "what color is it?")
    assert np.abs(got.first_logits - wanted.first_logits).max() < 1e-2 < np.abs(wanted.first_logits).max() / 10
    assert got.answer.token_ids == wanted.answer.token_ids


@pytest.mark.parametrize("name", OTHERS)
def test_any_causal_language_model(name: str, siglip: Path, files: Files, tmp_path: Path) -> None:
    """Other architectures of transformers train and are saved; the files for devices are refused by name."""
    llm = write_llm(tmp_path / "llm", name)
    if name != "gemma3_text":
        with pytest.raises(UsageError, match=f"no template is known for {name}") as caught:
            spec_of(siglip, llm)
        assert "phi" in caught.value.hint
    made(tmp_path / "start", siglip, llm, template="phi")
    loaded = stepped(tmp_path / "start", files, tmp_path / "next")
    assert loaded.model.config.tie_word_embeddings == (name in ("gpt2", "gemma3_text"))
    with pytest.raises(ExportError, match=f"no GGUF form for language model '{name}'"):
        export_bundle(tmp_path / "next", tmp_path / "bundle", llm=("f32",), vision=("fp32",))
    with pytest.raises(ExportError, match=f"no ONNX decoder for language models of type '{name}'"):
        check_architecture(tmp_path / "next", loaded.model.config.text_config)


def test_a_language_model_that_does_more_than_its_head(siglip: Path, tmp_path: Path) -> None:
    """Gemma 2 caps its logits, Granite scales them: Llava would lose that, so they are refused."""
    for name in ("gemma2", "granite"):
        fields = {"intermediate_size": 512, "num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 64}
        fields |= {"logits_scaling": 4.0} if name == "granite" else {"final_logit_softcapping": 1.0}
        llm = write_llm(tmp_path / name, name, **fields)
        spec = spec_of(siglip, llm, template="phi")
        with pytest.raises(CheckpointError, match=f"{name} computes more than its head"):
            init_checkpoint(spec, tmp_path / "start", vision_dir=siglip, llm_dir=llm)


MISLED: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 1, "n_head": 4},
    "gptj": {"n_layer": 1, "rotary_dim": 32},
    "mamba": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize(("name", "fields"), MISLED.items())
def test_a_language_model_that_packs_would_mislead(
    name: str, fields: dict[str, Any], siglip: Path, tmp_path: Path
) -> None:
    """ALiBi counts places, a state space reads all, eager attention adds a mask up: turns would see each other."""
    llm = write_llm(tmp_path / name, name, **fields)
    with pytest.raises(CheckpointError, match=f"{name} (doesn't keep to|can't run on embeddings)"):
        init_checkpoint(spec_of(siglip, llm, template="phi"), tmp_path / "start", vision_dir=siglip, llm_dir=llm)


def test_template_by_the_tokenizers_end(siglip: Path, tmp_path: Path) -> None:
    """Qwen2's base and instruct releases differ in the end-of-sequence token, and so do Llama's kin."""
    llm = write_llm(tmp_path / "llm", "qwen2")
    settings = json.loads((llm / "tokenizer_config.json").read_text())
    (llm / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|im_end|>"}))
    assert spec_of(siglip, llm).template == "qwen2_instruct"
    (llm / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<tool_call>"}))
    with pytest.raises(UsageError, match="ends with '<tool_call>'") as caught:
        spec_of(siglip, llm)
    assert "qwen2_base, qwen2_instruct" in caught.value.hint
    with pytest.raises(UsageError, match="for stage 1 only"):
        spec_of(siglip, llm, template="pretrain")


def test_lengths(siglip: Path, llama: Path, tmp_path: Path) -> None:
    """Rotary models go on past their positions, and their files say how far; tables don't."""
    assert model_spec("TinyLLaVA-share-Sig-Phi").max_length == 3072
    assert model_spec("TinyLLaVA-base-Sig-Phi").max_length == 2048
    assert model_spec("TinyLLaVA-base-Sig-Phi", 1024).max_length == 1024
    phi, gpt2 = write_llm(tmp_path / "phi", "phi"), write_llm(tmp_path / "gpt2", "gpt2")
    assert spec_of(siglip, phi).max_length == 2048 and spec_of(siglip, gpt2, template="phi").max_length == 256
    spec = made(tmp_path / "long", siglip, phi, max_length=3072)
    assert spec.max_length == 3072
    with pytest.raises(UsageError, match="gpt2 has a table of 256 positions"):
        spec_of(siglip, gpt2, template="phi", max_length=257)
    with pytest.raises(CheckpointError, match="has 256 positions, .* needs 3072"):
        init_checkpoint(dataclasses.replace(spec, llm_family="gpt2"), tmp_path / "x", vision_dir=siglip, llm_dir=gpt2)


def test_phi_at_3072_positions(siglip: Path, tmp_path: Path) -> None:
    """A Phi of 2,048 positions: torch and llama.cpp agree at position 3,071, and the GGUF says 3,072."""
    from tinyllava_edge.runtimes.gguf_front import opened, read_front

    phi = write_llm(tmp_path / "phi", "phi", num_hidden_layers=1)
    made(tmp_path / "long", siglip, phi, max_length=3072)
    loaded = checkpoints.load(tmp_path / "long")
    assert loaded.model.config.text_config.max_position_embeddings == 3072
    export_llm(checkpoints.llm_source(tmp_path / "long"), tmp_path / "llm.gguf", "f32")
    ids = np.random.default_rng(0).integers(3, 400, 3072)
    with torch.no_grad():
        wanted = loaded.model.model.language_model(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[:, -1]
        wanted = loaded.model.lm_head(wanted).numpy()
    native = Llama(tmp_path / "llm.gguf", n_ctx=3072, n_threads=1)
    try:
        got = native.decode_tokens(ids.tolist(), range(3072), wanted=[3071])
    finally:
        native.close()
    np.testing.assert_allclose(got, wanted, atol=1e-2, rtol=0)
    with opened(tmp_path / "llm.gguf") as data:
        assert read_front(data).pairs["phi2.context_length"] == 3072


def test_what_does_not_fit(siglip: Path, llama: Path, tmp_path: Path) -> None:
    """Each refusal names the directory and the value, and nothing is written."""
    dino = write_tower(tmp_path / "dino", "dinov2")
    wide = write_tower(tmp_path / "wide", "clip", patch_size=16)
    deep = write_tower(tmp_path / "deep", "clip", num_hidden_layers=2)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    cases: list[tuple[Any, Path, dict[str, Any], str]] = [
        (bare, llama, {}, "vision tower 'resnet'"),
        (siglip, bare, {}, "is no plain language model"),
        (tmp_path, llama, {}, "no config.json here"),
        ([siglip, wide], llama, {}, "a side of 4 and 8"),
        (siglip, llama, {"image_size": 128}, "takes pictures of 64 pixels, not of 128"),
        (siglip, llama, {"connector": "mlp"}, "unknown connector"),
        (siglip, llama, {"template": "vicuna"}, "unknown template"),
        (siglip, llama, {"select_strategy": "patch"}, "select strategy 'patch'"),
        (siglip, llama, {"image_policy": "square"}, "image policy 'square'"),
        ([siglip] * 3, llama, {}, "3 vision towers"),
        ([siglip, dino], llama, {"select_strategy": "default"}, "a mixture, which has no class tokens"),
    ]
    for vision, llm, options, message in cases:
        with pytest.raises((CheckpointError, UsageError), match=message):
            spec_of(vision, llm, **options)
    for vision, options, message in [
        ([deep, dino], {}, "num_hidden_layers 2 and 3"),
        (siglip, {"connector": "mof_mlp"}, "mof_mlp"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            made(tmp_path / "start", vision, llama, **options)
    assert not (tmp_path / "start").exists()
    assert spec_of(dino, llama, image_size=128).visual_tokens == 256  # its positions are interpolated
    padded = spec_of(dino, llama, image_policy="pad")
    assert (padded.image_policy, padded.crop_resize, padded.pad_color) == ("pad", 0, (123, 116, 103))

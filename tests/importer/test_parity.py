"""Every layout × language model × tower: the imported model equals the written-out one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import releases
import torch

from tinyllava_edge import checkpoint
from tinyllava_edge.importer.run import ImportResult, import_checkpoint

LLMS = ("llama", "stablelm", "phi", "qwen2", "gemma")
TOWERS = ("clip", "siglip")
AT = 3  # the picture's place among the ids
Logits = Callable[..., torch.Tensor]


def check(
    result: ImportResult, model: releases.Parts, logits: Logits, *, drop_first: bool, old: bool | None = None
) -> None:
    """Ours equals the reference to 1e-5, and so does stock Llava where it can represent the model."""
    from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

    torch.manual_seed(3)
    loaded = checkpoint.load(result.out)
    spec = loaded.spec
    assert spec.visual_tokens == 16 - (drop_first and spec.vision_family == "siglip")
    pixels = torch.randn(1, 3, spec.image_size, spec.image_size)
    ids = torch.randint(3, 500, (1, 9))
    old = result.layout != "llava" if old is None else old
    old_gemma = old and model.text["model_type"] == "gemma"
    wanted = releases.expected(model, ids, pixels, drop_first=drop_first, at=AT, old_gemma=old_gemma)
    assert wanted.std() > 0.3
    assert old_gemma == any("Gemma's image embeddings were scaled" in note for note in result.notes)
    got = logits(loaded.model, ids, pixels, AT, spec.visual_tokens)
    rows = wanted.shape[-1]
    torch.testing.assert_close(got[..., :rows], wanted, atol=1e-5, rtol=0)
    biased = model.text["model_type"] == "phi"
    if result.layout != "llava":
        assert torch.equal(got[..., rows:], torch.full_like(got[..., rows:], -1e4 if biased else 0.0))
    if biased:
        with pytest.raises(ValueError, match="tinyllava_edge"):
            AutoModelForImageTextToText.from_pretrained(result.out)
        return
    stock, info = LlavaForConditionalGeneration.from_pretrained(result.out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    torch.testing.assert_close(logits(stock.eval(), ids, pixels, AT, spec.visual_tokens), got, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("llm", LLMS)
def test_factory(llm: str, tower: str, tmp_path: Path, tokenizer_dir: Path, logits: Logits) -> None:
    """(A) Float32, 1e-5; 728-like tokens for SigLIP; main's prompts; the length from the configuration."""
    model = releases.parts(llm, tower)
    source = releases.write_factory(tmp_path / "source", model)
    result = import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir)
    check(result, model, logits, drop_first=True)
    spec = result.spec
    assert (spec.compat, spec.select_strategy, spec.feature_layer, spec.max_length) == ("factory", "default", -2, 3072)
    assert spec.image_policy == {"clip": "crop", "siglip": "warp"}[tower]
    templates = {"llama": "llama", "phi": "phi", "stablelm": "phi", "gemma": "gemma", "qwen2": "qwen2_base"}
    assert spec.template == templates[llm]
    assert any("buffers" in note for note in result.notes)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("llm", LLMS)
def test_components(llm: str, tower: str, tmp_path: Path, tokenizer_dir: Path, logits: Logits) -> None:
    """(B) Float32, 1e-5."""
    model = releases.parts(llm, tower)
    source = releases.write_components(tmp_path / "source", model)
    result = import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir)
    check(result, model, logits, drop_first=True)
    assert result.layout == "components"


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("llm", LLMS)
def test_lora(llm: str, tower: str, tmp_path: Path, tokenizer_dir: Path, logits: Logits) -> None:
    """(C) Float32, 1e-5 against PEFT's own merge."""
    before = releases.parts(llm, tower)
    source, model = releases.write_lora(tmp_path / "source", before)
    result = import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir)
    check(result, model, logits, drop_first=True)
    assert result.layout == "lora"


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("llm", tuple(releases.LEGACY))
def test_legacy(llm: str, tower: str, tmp_path: Path, tokenizer_dir: Path, logits: Logits) -> None:
    """(D) Float32, 1e-5; every SigLIP patch, from a tower without its last layer; pad with the mean's colour."""
    model = releases.parts(llm, tower)
    source = releases.write_legacy(tmp_path / "source", model)
    vision = releases.write_vision_dir(tmp_path / "vision", model)
    result = import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir, vision=vision)
    check(result, model, logits, drop_first=tower == "clip")
    spec = result.spec
    assert (spec.compat, spec.image_policy, spec.max_length) == ("legacy", "pad", 3072)
    assert (spec.feature_layer, spec.select_strategy) == {"siglip": (-1, "full"), "clip": (-2, "default")}[tower]
    assert spec.pad_color == {"siglip": (127, 127, 127), "clip": (122, 116, 104)}[tower]


@pytest.mark.parametrize("nesting", ["old", "new", "five"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("llm", [llm for llm in LLMS if llm != "phi"])
def test_llava(llm: str, tower: str, nesting: str, tmp_path: Path, image_tokenizer_dir: Path, logits: Logits) -> None:
    """(E) Float32, 1e-5; the image token and its row are kept."""
    model = releases.parts(llm, tower)
    strategy = {"clip": "default", "siglip": "full"}[tower]
    source = releases.write_llava(tmp_path / "source", model, nesting=nesting, image_id=520, strategy=strategy)
    result = import_checkpoint(source, tmp_path / "out", tokenizer=image_tokenizer_dir)
    check(result, model, logits, drop_first=strategy == "default")
    assert (result.spec.compat, result.spec.select_strategy) == ("native", strategy)
    assert checkpoint.load_config(result.out).image_token_id == 520


@pytest.mark.parametrize(("version", "old"), [("4.40.1", True), ("5.3.0", True), ("5.4.0", False), ("5.23.0", False)])
def test_llava_gemma_scale_follows_the_version(
    version: str, old: bool, tmp_path: Path, image_tokenizer_dir: Path, logits: Logits
) -> None:
    """transformers 5.4 stopped scaling Gemma's image embeddings: 1e-5 either way."""
    model = releases.parts("gemma", "siglip")
    source = releases.write_llava(
        tmp_path / "source", model, nesting="new", image_id=520, strategy="full", version=version
    )
    result = import_checkpoint(source, tmp_path / "out", tokenizer=image_tokenizer_dir)
    check(result, model, logits, drop_first=False, old=old)


def test_untied_qwen2(tmp_path: Path, tokenizer_dir: Path, logits: Logits) -> None:
    """Qwen2 beyond 0.5 B has a head of its own: 1e-5."""
    model = releases.parts("qwen2", "siglip", tied=False)
    source = releases.write_factory(tmp_path / "source", model)
    check(import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir), model, logits, drop_first=True)


def test_parts_without_the_whole(tmp_path: Path, tokenizer_dir: Path) -> None:
    """load_vision and llm_source give the whole model's tensors, bit for bit, from shards too."""
    model = releases.parts("gemma", "siglip")
    source = releases.write_factory(tmp_path / "source", model)
    result = import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir, shard_bytes=400_000)
    assert len(list(result.out.glob("model-*.safetensors"))) > 2
    vision, spec = checkpoint.load_vision(result.out)
    assert spec == result.spec
    for name, tensor in model.tower.state_dict().items():
        assert torch.equal(tensor, vision.model.vision_tower.state_dict()[name]), name
    assert torch.equal(vision.model.multi_modal_projector.linear_2.weight, model.connector[2].weight * 16)  # width 256
    llm = checkpoint.llm_source(result.out)
    assert set(llm.infos) == set(releases.llm_state(model))  # the tied head is in neither
    for name, tensor in releases.llm_state(model).items():
        assert torch.equal(llm.get(name)[: tensor.shape[0]], tensor), name


# Connectors and towers beyond the matrix


def connector(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A random connector and its tensors under Factory's names, without the prefix."""
    from tinyllava_edge.connectors import ResamplerConnector

    linear = torch.nn.Linear(64, 256)
    made = {
        "linear": linear,
        "mlp1x_gelu": torch.nn.Sequential(linear),
        "mlp3x_gelu": torch.nn.Sequential(
            linear,
            torch.nn.GELU(),
            torch.nn.Linear(256, 256),
            torch.nn.GELU(),
            torch.nn.Linear(256, 256),
        ),
        "resampler": ResamplerConnector(64, 256, 5, 2),
    }[name]
    releases.randomise(made)
    return made.eval(), {key: tensor.detach().clone() for key, tensor in made.named_parameters()}


@pytest.mark.parametrize("name", ["linear", "mlp1x_gelu", "mlp3x_gelu", "resampler"])
def test_connectors(name: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    """Image embeddings equal the connector on the tower's features (1e-5); stock Llava refuses the checkpoint."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForImageTextToText

    model = releases.parts("llama", "siglip")
    source = releases.write_factory(tmp_path / "source", model)
    module, tensors = connector(name)
    state = {k: v for k, v in load_file(source / "model.safetensors").items() if not k.startswith("connector.")}
    state |= {f"connector._connector.{key}": tensor for key, tensor in tensors.items()}
    save_file(state, source / "model.safetensors")
    options = {"num_queries": 5, "num_resampler_layers": 2}  # Factory writes them whatever the connector
    releases.write_json(source / "config.json", releases.factory_config(model, connector_type=name, **options))
    result = import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir)
    assert (result.spec.connector, result.spec.visual_tokens) == (name, 5 if name == "resampler" else 15)
    loaded = checkpoint.load(result.out).model
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        features = model.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        got = loaded.model.multi_modal_projector(loaded.tower_features(pixels))
        torch.testing.assert_close(got, module(features), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="tinyllava_edge"):
        AutoModelForImageTextToText.from_pretrained(result.out)


def test_dinov2(tmp_path: Path, tokenizer_dir: Path, image_tokenizer_dir: Path) -> None:
    """DINOv2, whose pictures are smaller than its position table: image embeddings to 1e-5, size from the processor."""
    from dataclasses import replace

    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModel

    model = releases.parts("llama", "siglip")
    vision = {"model_type": "dinov2", "image_size": 70, "patch_size": 14, "mlp_ratio": 2, "hidden_size": 64}
    vision |= {"num_hidden_layers": 3, "num_attention_heads": 2}
    tower = AutoModel.from_config(AutoConfig.for_model(**vision)).eval()
    releases.randomise(tower)
    source = releases.write_factory(tmp_path / "source", replace(model, vision=vision))
    state = {k: v for k, v in load_file(source / "model.safetensors").items() if not k.startswith("vision_tower.")}
    state |= {f"vision_tower._vision_tower.{key}": tensor.detach() for key, tensor in tower.named_parameters()}
    save_file(state, source / "model.safetensors")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True}
    releases.write_json(source / "preprocessor_config.json", {**sizes, "image_mean": [0.485, 0.456, 0.406]})
    result = import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir)
    spec = result.spec
    assert (spec.vision_family, spec.image_size, spec.crop_resize, spec.visual_tokens) == ("dinov2", 28, 32, 4)
    loaded, _ = checkpoint.load_vision(result.out)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        got = loaded.model.multi_modal_projector(loaded.tower_features(pixels))
        torch.testing.assert_close(got, model.connector(features), atol=1e-5, rtol=0)
    assert checkpoint.image_processor(spec).crop_size["height"] == 28

"""Checkpoints survive a round trip, equal stock Llava, and refuse damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tinyllava_edge import checkpoint
from tinyllava_edge.errors import CheckpointError, StorageError


def inputs(loaded: checkpoint.Checkpoint) -> dict[str, torch.Tensor]:
    """One picture between two stretches of text: ids (1, n), pixels (1, 3, s, s)."""
    torch.manual_seed(1)
    slots = [loaded.model.config.image_token_id] * loaded.spec.visual_tokens
    ids = torch.tensor([[1, 30, 40, *slots, 50, 60, 70]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, loaded.spec.image_size, loaded.spec.image_size)}


@pytest.mark.parametrize("which", ["tiny_checkpoint", "tiny_checkpoint_clip"])
def test_equals_stock_llava(which: str, request: pytest.FixtureRequest) -> None:
    """Stock transformers loads our files and gives the same logits (fp32, 1e-5); own splice gives them too."""
    from transformers import LlavaForConditionalGeneration

    root = request.getfixturevalue(which)
    loaded = checkpoint.load(root)
    stock, info = LlavaForConditionalGeneration.from_pretrained(root, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    given = inputs(loaded)
    with torch.no_grad():
        ours = loaded.model(**given).logits
        theirs = stock.eval()(**given).logits
        embeds = loaded.model.embed(given["input_ids"], loaded.model.tower_features(given["pixel_values"]))
        spliced = loaded.model(inputs_embeds=embeds).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours, spliced, atol=1e-5, rtol=0)
    assert ours.std() > 0.5  # random, but not degenerate


def test_round_trip_keeps_every_tensor(tiny_checkpoint: Path, tmp_path: Path) -> None:
    loaded = checkpoint.load(tiny_checkpoint)
    checkpoint.save(loaded.model, loaded.tokenizer, loaded.spec, tmp_path / "again")
    again = checkpoint.load(tmp_path / "again")
    assert again.spec == loaded.spec
    for key, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[key]), key
    with pytest.raises(StorageError, match="exists already"):
        checkpoint.save(loaded.model, loaded.tokenizer, loaded.spec, tmp_path / "again")


def test_parts_alone(tiny_checkpoint: Path) -> None:
    """Tower and connector without the language model, and the language model's tensors by name: bit for bit."""
    whole = checkpoint.load(tiny_checkpoint).model
    vision, spec = checkpoint.load_vision(tiny_checkpoint)
    assert spec == checkpoint.load_spec(tiny_checkpoint)
    pixels = torch.randn(2, 3, spec.image_size, spec.image_size)
    with torch.no_grad():
        wanted = whole.model.multi_modal_projector(whole.tower_features(pixels))
        assert torch.equal(vision.model.multi_modal_projector(vision.tower_features(pixels)), wanted)
    assert not list(vision.model.language_model.parameters()) and not hasattr(vision, "lm_head")
    llm = checkpoint.llm_source(tiny_checkpoint)
    names = {f"model.{name}": tensor for name, tensor in whole.model.language_model.state_dict().items()}
    names["lm_head.weight"] = whole.lm_head.weight
    assert set(llm.infos) == set(names) and llm.config.model_type == "llama"
    for name, tensor in names.items():
        assert torch.equal(llm.get(name), tensor) and llm.infos[name].shape == tuple(tensor.shape), name


def test_other_programs_know_the_architecture(tiny_checkpoint: Path) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llava", ["LlavaForConditionalGeneration"])


@pytest.mark.parametrize(
    ("family", "policy", "resize", "kind"),
    [
        ("siglip2", "warp", 0, "SiglipImageProcessor"),
        ("dinov2", "crop", 80, "BitImageProcessor"),
        ("clip", "crop", 0, "CLIPImageProcessor"),
    ],
)
def test_processors(family: str, policy: str, resize: int, kind: str, tiny_checkpoint: Path) -> None:
    """Each family's processor takes the numbers of the spec; `crop` brings the shortest edge to crop_resize first."""
    import dataclasses

    from PIL import Image

    spec = checkpoint.load_spec(tiny_checkpoint)
    spec = dataclasses.replace(spec, vision_family=family, image_policy=policy, crop_resize=resize)
    config = checkpoint.processor_config(spec)
    assert config["image_processor_type"] == kind
    assert config["size"].get("shortest_edge") == ({"warp": None, "crop": resize or 64}[policy])
    picture = Image.new("RGB", (90, 50), (255, 0, 0))
    pixels = checkpoint.image_processor(spec)(picture, return_tensors="pt")["pixel_values"]
    assert tuple(pixels.shape) == (1, 3, 64, 64)
    assert pixels[0, 0].min() == pixels[0, 0].max() == pytest.approx((1 - spec.image_mean[0]) / spec.image_std[0])


@pytest.mark.parametrize(
    "change",
    [
        {"text_config": 3},
        {"vision_config": {"model_type": "siglip_vision_model", "hidden_size": "192"}},
        {"text_config": {"model_type": "qwen2", "num_hidden_layers": 1 << 40}},
        {"text_config": {"model_type": "no such model"}},
        {"connector": "no such connector"},
        {"vision_feature_layer": "last"},
    ],
)
def test_hostile_configuration(change: dict[str, object], tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Wrong types and sizes beyond any model: one error that names the file, before memory is asked for."""
    root = damaged(tiny_checkpoint, tmp_path / "hostile")
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, **change}))
    for opening in (checkpoint.load, checkpoint.load_vision, checkpoint.llm_source):
        with pytest.raises(CheckpointError, match="hostile") as caught:
            opening(root)
        assert "\n" not in str(caught.value)


def damaged(tiny: Path, out: Path) -> Path:
    shutil.copytree(tiny, out)
    return out


def test_damage_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Each damage gives one error that names the place."""
    cut = damaged(tiny_checkpoint, tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cut"):
        checkpoint.load(cut)

    lying = damaged(tiny_checkpoint, tmp_path / "lying")
    (lying / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
    with pytest.raises(CheckpointError, match="lying"):
        checkpoint.load(lying)

    renamed = damaged(tiny_checkpoint, tmp_path / "renamed")
    (renamed / "model.safetensors").write_bytes(data.replace(b"layers.0.mlp.gate_proj", b"layers.0.mlp.gate_prok", 1))
    with pytest.raises(CheckpointError, match="gate_pro"):
        checkpoint.load(renamed)

    typed = damaged(tiny_checkpoint, tmp_path / "typed")
    spec = json.loads((typed / "model_spec.json").read_text())
    (typed / "model_spec.json").write_text(json.dumps({**spec, "image_size": "64"}))
    with pytest.raises(CheckpointError, match="image_size"):
        checkpoint.load(typed)

    absent = damaged(tiny_checkpoint, tmp_path / "absent")
    (absent / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        checkpoint.load(absent)
    with pytest.raises(CheckpointError, match="no such directory"):
        checkpoint.load(tmp_path / "nowhere")

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

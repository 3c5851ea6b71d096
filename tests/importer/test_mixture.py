"""TinyLLaVA Factory's mixtures of CLIP and DINOv2: names, tokens and logits; written out by hand from its layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import releases
import torch
from safetensors.torch import save_file
from torch import nn

from tinyllava_edge import checkpoint
from tinyllava_edge.errors import CheckpointError
from tinyllava_edge.importer.run import import_checkpoint

DINO = {
    "model_type": "dinov2",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 42,  # positions of 6 x 6 patches for a picture of 4 x 4
    "patch_size": 7,
    "mlp_ratio": 2,
}
OLD = {".q_proj.": ".attention.query.", ".k_proj.": ".attention.key.", ".v_proj.": ".attention.value."}
OLD |= {".o_proj.": ".output.dense."}  # names that transformers 4.40 gives DINOv2's tensors


def mlp() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256))
    releases.randomise(made)
    return made


def write(out: Path, model: releases.Parts, dino: nn.Module, connectors: dict[str, nn.Module], **changes: Any) -> Path:
    state = {f"language_model.{name}": tensor for name, tensor in releases.llm_state(model).items()}
    state |= {f"vision_tower._vision_tower.clip.{k}": tensor for k, tensor in releases.tower_state(model).items()}
    for name, parameter in dino.named_parameters():
        for new, old in OLD.items():
            name = name.replace(new, old)
        state[f"vision_tower._vision_tower.dinov2.{name}"] = parameter.detach().clone()
    for part, connector in connectors.items():
        state |= {f"connector._connector.{part}.{k}": p.detach().clone() for k, p in connector.named_parameters()}
    mixed = {"connector_type": "mof_mlp", "vision_model_name_or_path2": "somewhere/dino"}
    releases.write_json(out / "config.json", releases.factory_config(model, **{**mixed, **changes}))
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("llm", ["llama", "gemma"])
def test_parity(llm: str, tmp_path: Path, tokenizer_dir: Path, logits: Callable[..., torch.Tensor]) -> None:
    """Float32, 1e-5; patches of both in turn, no class tokens; Gemma's scale of its time in both MLPs."""
    from transformers import AutoConfig, AutoModel

    model = releases.parts(llm, "clip")
    torch.manual_seed(1)
    dino = AutoModel.from_config(AutoConfig.for_model(**DINO)).eval()
    releases.randomise(dino)
    connectors = {"clip": mlp(), "dinov2": mlp()}
    source = write(tmp_path / "source", model, dino, connectors)
    releases.write_json(tmp_path / "dino" / "config.json", DINO)
    with pytest.raises(CheckpointError, match="tower 'somewhere/dino' isn't known") as caught:
        import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir)
    assert "--vision2 DIR" in caught.value.hint
    result = import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir, vision2=tmp_path / "dino")
    loaded, spec = checkpoint.load(result.out), result.spec
    assert (spec.vision_family, spec.connector, spec.select_strategy) == ("mof", "mof_mlp", "full")
    assert (spec.visual_tokens, spec.feature_tokens, spec.image_policy, spec.compat) == (32, 32, "crop", "factory")
    pixels, ids = torch.randn(1, 3, 28, 28), torch.randint(3, 500, (1, 9))
    picture = torch.empty(1, 32, 256)
    with torch.no_grad():
        for start, (part, tower) in enumerate((("clip", model.tower), ("dinov2", dino))):
            features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            picture[:, start::2] = connectors[part](features)
        if llm == "gemma":
            picture = picture * 16
        words = model.llm.get_input_embeddings()(ids)
        wanted = model.llm(inputs_embeds=torch.cat((words[:, :3], picture, words[:, 3:]), dim=1)).logits
    got = logits(loaded.model, ids, pixels, 3, 32)
    torch.testing.assert_close(got[..., : wanted.shape[-1]], wanted, atol=1e-5, rtol=0)
    parts, _ = checkpoint.load_vision(result.out)
    with torch.no_grad():
        assert torch.equal(parts.tower_features(pixels), loaded.model.tower_features(pixels))


def test_refusals(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Class tokens in a mixture, and a mixture with another connector."""
    model = releases.parts("llama", "clip")
    releases.write_json(tmp_path / "dino" / "config.json", DINO)
    cases = [
        ({"vision_feature_select_strategy": "cls_patch"}, "'cls_patch' of a mixture"),
        ({"vision_model_name_or_path2": ""}, "with connector 'mof_mlp'"),
        ({"connector_type": "linear"}, "'somewhere/dino' with connector 'linear'"),
    ]
    for number, (change, message) in enumerate(cases):
        source = write(tmp_path / str(number), model, mlp(), {}, **change)
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(source, tmp_path / "out", tokenizer=tokenizer_dir, vision2=tmp_path / "dino")

"""Towers and the own architecture name: SigLIP 2 and DINOv2 against the Hugging Face classes, stock Llava's refusal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinyllava_edge import spec
from tinyllava_edge.errors import CheckpointError
from tinyllava_edge.model import (
    MODEL_TYPE,
    TinyLlava,
    TinyLlavaConfig,
    build_model,
    is_dead,
    needs_own_type,
    tower_layer,
)
from tinyllava_edge.towers import MOF_TYPE

TEXT = {**spec.LLM_BACKBONES["Nano"].config, "num_hidden_layers": 1}
SIGLIP = {**spec.VISION_BACKBONES["NanoSig"].config, "num_hidden_layers": 3}
SIGLIP2 = {
    "model_type": "siglip2_vision_model",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "patch_size": 8,
    "num_patches": 36,  # a 6 x 6 table, resized to the picture's 8 x 8
}
DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "patch_size": 8,
    "image_size": 48,  # positions of 6 x 6 patches, interpolated to the picture's 8 x 8
    "mlp_ratio": 3,
}
CLIP = {**spec.VISION_BACKBONES["NanoC"].config, "num_hidden_layers": 3}
MOF = {"model_type": MOF_TYPE, "first": CLIP, "second": DINOV2}
BASE = spec.model_spec("TinyLLaVA-base-NanoSig-Nano")
OPTIONS = {
    "resampler": {"num_queries": 5, "num_layers": 1},
    "qformer-5": {"num_layers": 2, "hidden_size": 64, "num_heads": 2},
}


def built(tower: dict[str, Any], text: dict[str, Any] | None = None, **change: Any) -> TinyLlava:
    torch.manual_seed(0)
    options = OPTIONS.get(str(change.get("connector")))
    model = build_model(dataclasses.replace(BASE, **change), tower, text or TEXT, 1023, options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1) * 0.3)
    return model


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def test_siglip2_on_square_pictures() -> None:
    """Features equal those of the Hugging Face class fed patches, mask and shapes as its own processor makes them."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    model = built(SIGLIP2, vision_family="siglip2")
    own = Siglip2VisionModel(Siglip2VisionConfig(**{k: v for k, v in SIGLIP2.items() if k != "model_type"})).eval()
    own.load_state_dict(model.model.vision_tower.state_dict())
    given = pixels()
    patches = torch.from_numpy(np.stack([convert_image_to_patches(picture.numpy(), 8) for picture in given]))
    with torch.no_grad():
        wanted = own(
            patches,
            pixel_attention_mask=torch.ones(2, 64),
            spatial_shapes=torch.tensor([[8, 8], [8, 8]]),
            output_hidden_states=True,
        ).hidden_states
        got = model.tower_features(given)
    assert len(wanted) == 4 and model.config.vision_config.image_size == 64
    torch.testing.assert_close(got, wanted[-2], rtol=0, atol=1e-5)
    assert float((got - wanted[-1]).abs().max()) > 0.01


def test_dinov2_drops_its_class_token() -> None:
    """Features are hidden_states[-2][:, 1:] of the Hugging Face class, at a size other than the configuration's."""
    from transformers import Dinov2Config, Dinov2Model

    model = built(DINOV2, vision_family="dinov2", select_strategy="default")
    own = Dinov2Model(Dinov2Config(**{k: v for k, v in DINOV2.items() if k != "model_type"})).eval()
    own.load_state_dict(model.model.vision_tower.state_dict())
    with torch.no_grad():
        wanted = own(pixels(), output_hidden_states=True).hidden_states[-2][:, 1:]
        got = model.tower_features(pixels())
    assert got.shape == (2, 64, 192)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_stock_llava_runs_dinov2(tmp_path: Path) -> None:
    """An MLP connector and a head without bias: stock transformers loads it and answers the same."""
    from transformers import LlavaForConditionalGeneration

    model = built(DINOV2, vision_family="dinov2", select_strategy="default")
    model.save_pretrained(tmp_path)
    stock, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    ids = torch.cat([torch.full((2, 64), 1023), torch.arange(8).repeat(2, 1)], dim=1)
    with torch.no_grad():
        wanted = model(input_ids=ids, pixel_values=pixels()).logits
        got = stock.eval()(input_ids=ids, pixel_values=pixels()).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


OWN = {
    "siglip2": (SIGLIP2, None, {"vision_family": "siglip2"}),
    "linear": (SIGLIP, None, {"connector": "linear"}),
    "mlp3x_gelu": (SIGLIP, None, {"connector": "mlp3x_gelu"}),
    "resampler": (SIGLIP, None, {"connector": "resampler", "visual_tokens": 5}),
    "qformer-5": (SIGLIP, None, {"connector": "qformer-5", "visual_tokens": 5}),
    "pixelshuffle-16": (SIGLIP, None, {"connector": "pixelshuffle-16", "visual_tokens": 16}),
    "avgpool-9": (SIGLIP2, None, {"vision_family": "siglip2", "connector": "avgpool-9", "visual_tokens": 9}),
    # Its configuration names another size than the picture's, so its grid must be written down.
    "ldpv2-16": (
        DINOV2,
        None,
        {"vision_family": "dinov2", "select_strategy": "default", "connector": "ldpv2-16", "visual_tokens": 16},
    ),
    "phi": (SIGLIP, {**spec.LLM_BACKBONES["Phi"].config, "hidden_size": 256, "num_hidden_layers": 1}, {}),
    "head_bias": (SIGLIP, {**TEXT, "head_bias": True}, {}),
    "mof_mlp": (MOF, None, {"vision_family": "mof", "connector": "mof_mlp", "visual_tokens": 128}),
    "registers": (
        {**DINOV2, "model_type": "dinov2_with_registers", "num_register_tokens": 3},
        None,
        {"vision_family": "dinov2_registers", "select_strategy": "default"},
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_own_name_where_stock_llava_would_be_wrong(name: str, tmp_path: Path) -> None:
    """Our model type, which stock transformers refuses; loaded again by us with equal image embeddings."""
    from transformers import AutoConfig

    tower, text, change = OWN[name]
    if text is not None:
        text = {
            **text,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 1024,
        }
    model = built(tower, text, **change)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == MODEL_TYPE and written["architectures"] == ["TinyLlava"]
    with pytest.raises(ValueError, match=MODEL_TYPE):
        AutoConfig.from_pretrained(tmp_path)
    config = TinyLlavaConfig.from_pretrained(tmp_path)
    again, info = TinyLlava.from_pretrained(tmp_path, config=config, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        wanted = model.model.multi_modal_projector(model.tower_features(pixels()))
        got = again.eval().model.multi_modal_projector(again.tower_features(pixels()))
    assert torch.equal(got, wanted) and wanted.shape == (2, change.get("visual_tokens", 64), 256)
    assert (again.lm_head.bias is not None) == (name in ("phi", "head_bias"))


@pytest.mark.parametrize("name", ["pixelshuffle-16", "ldpv2-16", "avgpool-16", "qformer-5"])
def test_counted_connectors_learn(name: str) -> None:
    """One step of the whole model: loss over the answer, a gradient for every connector parameter, fewer positions."""
    tokens = int(name.rpartition("-")[2])
    model = built(SIGLIP, connector=name, visual_tokens=tokens).train()
    assert (model.config.feature_tokens, model.config.image_seq_length) == (64, tokens)
    ids = torch.cat([torch.full((2, tokens), 1023), torch.arange(8).repeat(2, 1)], dim=1)
    labels = ids.masked_fill(ids == 1023, -100)
    out = model(input_ids=ids, pixel_values=pixels(), labels=labels)
    out.loss.backward()
    assert out.logits.shape == (2, tokens + 8, 1024)
    for key, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, key


def test_a_name_that_contradicts_its_spec(tmp_path: Path) -> None:
    """The visual tokens in the connector's name are those of the spec, in memory and on the disk."""
    with pytest.raises(CheckpointError, match=r"visual_tokens=64 with the connector 'avgpool-16'"):
        built(SIGLIP, connector="avgpool-16")
    with pytest.raises(CheckpointError, match="the first patch is dropped|63 tower tokens"):
        built(SIGLIP, connector="avgpool-16", visual_tokens=16, select_strategy="default")
    with pytest.raises(CheckpointError, match="65 tower tokens"):
        built(DINOV2, vision_family="dinov2", connector="avgpool-16", visual_tokens=16)


def test_a_mixture_interleaves_its_towers() -> None:
    """Token 2k is patch k of CLIP's hidden_states[-2], token 2k + 1 that of DINOv2's; no class token of either."""
    from transformers import AutoConfig, AutoModel

    model = built(MOF, vision_family="mof", connector="mof_mlp", visual_tokens=128)
    with torch.no_grad():
        got = model.tower_features(pixels())
        for start, (part, config) in enumerate((("first", CLIP), ("second", DINOV2))):
            own = AutoModel.from_config(AutoConfig.for_model(**config)).eval()
            own.load_state_dict(getattr(model.model.vision_tower, part).state_dict())
            wanted = own(pixels(), output_hidden_states=True).hidden_states[-2][:, 1:]
            torch.testing.assert_close(got[:, start::2], wanted, rtol=0, atol=1e-5)
        embeds = torch.stack(list(model.get_image_features(pixels()).pooler_output))  # transformers' own way
        torch.testing.assert_close(embeds, model.model.multi_modal_projector(got), rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match="connector 'mof_mlp' with a siglip tower"):
        built(SIGLIP, connector="mof_mlp")
    with pytest.raises(CheckpointError, match="hidden_size 192 and 96"):
        built({**MOF, "second": {**DINOV2, "hidden_size": 96}}, vision_family="mof", visual_tokens=128)
    with pytest.raises(CheckpointError, match="second is a mixture itself"):
        built({**MOF, "second": MOF}, vision_family="mof", visual_tokens=128)


def test_needs_own_type() -> None:
    from transformers import AutoConfig

    llama, phi = (AutoConfig.for_model(**spec.LLM_BACKBONES[name].config) for name in ("TL", "Phi"))
    assert not needs_own_type("mlp2x_gelu", "siglip", llama)
    assert not needs_own_type("mlp2x_gelu", "dinov2", llama)
    assert needs_own_type("mlp2x_gelu", "siglip", phi)
    assert needs_own_type("linear", "siglip", llama)
    assert needs_own_type("avgpool-16", "siglip", llama)
    assert needs_own_type("mlp2x_gelu", "siglip2", llama)
    assert needs_own_type("mlp2x_gelu", "siglip2_vision_model", llama)


@pytest.mark.parametrize(
    ("tower", "family"),
    [
        (SIGLIP, "siglip"),
        (SIGLIP2, "siglip2"),
        (DINOV2, "dinov2"),
        (OWN["registers"][0], "dinov2_registers"),
        (MOF, "mof"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_dead_parameters_have_no_gradient(tower: dict[str, Any], family: str) -> None:
    """is_dead says exactly what autograd says of each tower parameter, for two feature layers."""
    for layer in (-2, -3):
        model = built(tower, vision_family=family, feature_layer=layer)
        model.tower_features(pixels()).sum().backward()
        for name, parameter in model.named_parameters():
            if ".vision_tower." in name:
                assert is_dead(name, layer, 3) == (parameter.grad is None), name
    assert tower_layer("model.vision_tower.encoder.layer.2.mlp.fc1.weight") == 2
    assert tower_layer("model.vision_tower.encoder.layers.11.mlp.fc1.weight") == 11
    assert tower_layer("model.vision_tower.layernorm.weight") is None

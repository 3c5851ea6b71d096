"""Directories of tiny towers and language models as their releases look, every parameter randomised."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from tinyllava_edge.tokenizer_files import fast_tokenizer

from .. import tiny_tokenizers as tokenizers
from ..export.llm_models import MODELS, randomise

SIZES = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6}
PLAIN = {**SIZES, "intermediate_size": 512, "patch_size": 8}
# model_type, its own fields, and what preprocessor_config.json says; none: there is no such file
TOWERS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "clip": ("clip_vision_model", {**PLAIN, "image_size": 64}, None),
    "siglip": ("siglip_vision_model", {**PLAIN, "image_size": 64}, {"size": {"height": 64, "width": 64}}),
    "siglip2-fixed": (
        "siglip_vision_model",
        {**PLAIN, "image_size": 64},
        {"size": {"height": 64, "width": 64}, "resample": 2},
    ),
    "siglip2": ("siglip2_vision_model", {**PLAIN, "num_patches": 64}, {"max_num_patches": 256, "patch_size": 8}),
    "dinov2": (
        "dinov2",
        {**SIZES, "patch_size": 8, "image_size": 48, "mlp_ratio": 3},
        {"size": {"shortest_edge": 72}, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}},
    ),
    "dinov2_registers": (
        "dinov2_with_registers",
        {**SIZES, "patch_size": 8, "image_size": 64, "mlp_ratio": 3, "num_register_tokens": 4},
        {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}},
    ),
}
# llm_models' entry and the writer of the tokenizer's files
LLMS: dict[str, tuple[str, Any]] = {
    "llama": ("llama", lambda out: tokenizers.write_llama(out, legacy=False)),
    "phi": ("phi", tokenizers.write_phi),
    "stablelm": ("stablelm", tokenizers.write_qwen2),
    "gemma": ("gemma", tokenizers.write_gemma),
    "qwen2": ("qwen2", tokenizers.write_qwen2),
    "qwen2-tied": ("qwen2", tokenizers.write_qwen2),
    "qwen3-tied": ("qwen3-tied", tokenizers.write_qwen2),
}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt_neox": {"intermediate_size": 512, "num_hidden_layers": 2},
    "olmo2": {"intermediate_size": 512, "num_hidden_layers": 2, "num_key_value_heads": 2},
    "gpt2": {"n_layer": 2, "tie_word_embeddings": True, "n_positions": 256, "hidden_size": 256},
    "gemma3_text": {"intermediate_size": 512, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 64},
}


def write_tower(out: Path, name: str, **changes: Any) -> Path:
    """A tower's directory."""
    from transformers import AutoConfig, AutoModel

    kind, fields, processor = TOWERS[name]
    torch.manual_seed(len(name))
    tower = AutoModel.from_config(AutoConfig.for_model(kind, **{**fields, **changes}))
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.08 + (parameter.ndim == 1) * 0.3)
    tower.save_pretrained(out)
    if processor is not None:
        (out / "preprocessor_config.json").write_text(json.dumps(processor))
    return out


def write_llm(out: Path, name: str, **changes: Any) -> Path:
    """A language model's directory with as many rows as its tokenizer has tokens, so that `<image>` needs another."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if name in LLMS:
        key, write = LLMS[name]
        config = {**copy.deepcopy(MODELS[key]), **({"tie_word_embeddings": True} if name == "qwen2-tied" else {})}
    else:
        write = tokenizers.write_phi
        config = {"model_type": name, "hidden_size": 256, "num_attention_heads": 4, **OTHERS.get(name, {})}
    write(out)
    rows = max(fast_tokenizer(out).get_vocab().values()) + 1
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{**config, "vocab_size": rows, **special, **changes})
    )
    randomise(model, config["model_type"])
    model.save_pretrained(out)
    return out

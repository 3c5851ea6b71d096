"""Tiny language models of every architecture that has a GGUF form, every parameter randomised."""

from __future__ import annotations

from typing import Any

from tinyllava_edge.spec import LLM_BACKBONES

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1088,
}
NANO = {**LLM_BACKBONES["Nano"].config, **SMALL}
HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
MODELS: dict[str, dict[str, Any]] = {
    "llama": NANO,
    "llama-tied": {**NANO, "tie_word_embeddings": True},
    "llama-bias-narrow-heads": {**NANO, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "llama-linear-rope": {**NANO, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama-llama3-rope": {
        **NANO,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {
        "model_type": "qwen2",
        **SMALL,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen2-yarn": {
        "model_type": "qwen2",
        **SMALL,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen3": {"model_type": "qwen3", **SMALL, "num_key_value_heads": 2, "head_dim": 128},
    "qwen3-tied": {
        "model_type": "qwen3",
        **SMALL,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "gemma": {
        "model_type": "gemma",
        **SMALL,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "tie_word_embeddings": True,
    },
    "phi": {
        **LLM_BACKBONES["Phi"].config,
        **SMALL,
        "num_key_value_heads": 4,
        "intermediate_size": 1024,
        "rope_parameters": HALF_ROPE,
    },
    "stablelm": {**LLM_BACKBONES["SLM"].config, **SMALL, "num_key_value_heads": 2},
    "stablelm-parallel": {
        **LLM_BACKBONES["SLM"].config,
        **SMALL,
        "num_key_value_heads": 4,
        "use_qkv_bias": False,
        "use_parallel_residual": True,
    },
}


def randomise(model: Any, model_type: str) -> None:
    """Weights that give logits a spread near one; norms near one, which Gemma stores as zero."""
    import torch

    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                size = 0.5 if "embed" in name else 1.5
                parameter.copy_(torch.randn_like(parameter) * size / parameter.shape[-1] ** 0.5)
            else:
                centre = "norm" in name and name.endswith("weight") and model_type != "gemma"
                parameter.copy_(0.2 * torch.randn_like(parameter) + centre)

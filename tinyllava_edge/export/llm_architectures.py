"""How each Hugging Face language model is told to llama.cpp: architecture, keys, row order, and what it can't compute.

Keys and tensors equal those of llama.cpp's own converter; tests/export/test_converter_oracle.py states the differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import torch

from ..errors import ExportError

_NO_SCALING = ("default",)
_SCALING = ("default", "linear", "yarn")


@dataclass(frozen=True)
class Architecture:
    """One Hugging Face architecture in llama.cpp's terms."""

    gguf_arch: gguf.MODEL_ARCH
    """llama.cpp's architecture"""
    activation: str
    """the only `hidden_act` that llama.cpp's graph computes"""
    head: str
    """`optional`: without one the embedding is read again; `own`: always stored; `tied`: never stored"""
    rms_norm: bool = True
    """root-mean-square norms; otherwise layer norms"""
    rope_types: tuple[str, ...] = _SCALING
    """`rope_type`s that llama.cpp computes for this architecture"""
    partial_rotary: bool = False
    """whether a part of each head's channels may stay unrotated"""
    permute_rotary: bool = False
    """whether llama.cpp rotates neighbouring channels (Llama) where Hugging Face rotates the two halves of a head"""
    norm_offset: float = 0.0
    """added to every norm's weight: Gemma stores the difference from one"""
    refused: tuple[str, ...] = ()
    """settings that llama.cpp's graph lacks; they must be off"""
    write_keys: Callable[[gguf.GGUFWriter, Any], None] | None = None
    """adds keys that no other architecture has"""


def _stablelm_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_parallel_residual(bool(config.use_parallel_residual))


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        gguf.MODEL_ARCH.LLAMA, "silu", "optional", rope_types=(*_SCALING, "llama3"), permute_rotary=True
    ),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, "silu", "optional"),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, "silu", "optional", refused=("attention_bias",)),
    "gemma": Architecture(
        gguf.MODEL_ARCH.GEMMA,
        "gelu_pytorch_tanh",
        "tied",
        rope_types=_NO_SCALING,
        norm_offset=1.0,
        refused=("attention_bias", "use_bidirectional_attention"),
    ),
    "phi": Architecture(
        gguf.MODEL_ARCH.PHI2,
        "gelu_new",
        "own",
        rms_norm=False,
        rope_types=_NO_SCALING,
        partial_rotary=True,
        refused=("qk_layernorm",),
    ),
    "stablelm": Architecture(
        gguf.MODEL_ARCH.STABLELM,
        "silu",
        "own",
        rms_norm=False,
        rope_types=_NO_SCALING,
        partial_rotary=True,
        refused=("qk_layernorm",),
        write_keys=_stablelm_keys,
    ),
}


def architecture_of(config: Any) -> Architecture:
    """The architecture of a text configuration.

    Raises:
        ExportError: an architecture, activation, rope or attention that llama.cpp would compute otherwise.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ExportError(f"no GGUF form for language model {kind!r}", f"known: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[kind]
    if config.hidden_act != architecture.activation:
        raise ExportError(
            f"{kind}: hidden_act {config.hidden_act!r}, llama.cpp computes {architecture.activation!r}",
            "export a model with that activation",
        )
    rope = config.rope_parameters
    if rope["rope_type"] not in architecture.rope_types:
        raise ExportError(
            f"{kind}: rope_type {rope['rope_type']!r} has no GGUF form",
            f"llama.cpp computes: {', '.join(architecture.rope_types)}",
        )
    if not architecture.partial_rotary and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError(f"{kind}: partial_rotary_factor has no GGUF form", "export a model that rotates whole heads")
    for name in architecture.refused:
        if getattr(config, name, None):
            raise ExportError(f"{kind}: {name} has no GGUF form", "export a model without it")
    if any(layer != "full_attention" for layer in getattr(config, "layer_types", None) or ()):
        raise ExportError(f"{kind}: sliding attention has no GGUF form", "set use_sliding_window to false")
    return architecture


def head_size(config: Any) -> int:
    """Channels of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def write_shape(writer: gguf.GGUFWriter, architecture: Architecture, config: Any, rows: int) -> None:
    """Add the keys that the decoder is built from; `rows` is the embedding's number of rows."""
    heads, head_dim = config.num_attention_heads, head_size(config)
    writer.add_vocab_size(rows)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    if getattr(config, "head_dim", None) is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture.rms_norm:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_eps)
    _write_rope(writer, config, head_dim)
    if architecture.write_keys is not None:
        architecture.write_keys(writer, config)


def _write_rope(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> None:
    rope = config.rope_parameters
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                add(rope[name])


def rope_factors(config: Any) -> torch.Tensor | None:
    """Llama 3's divisors of the rotary frequencies, float32 (head_dim / 2,); None for other ropes.

    Long wavelengths are slowed by `factor`, short ones stay, those between are blended.
    """
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    size = head_size(config)
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    wavelengths = 2 * math.pi / frequencies
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    blend = (context / wavelengths - low) / (high - low)
    factors = 1 / ((1 - blend) / rope["factor"] + blend)
    factors = torch.where(wavelengths < context / high, torch.ones_like(factors), factors)
    return torch.where(wavelengths > context / low, torch.full_like(factors, rope["factor"]), factors)


def interleave_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from (half, pair) to (pair, half) order: (heads * dim, …) → the same shape."""
    dim = rows.shape[0] // heads
    return rows.reshape(heads, 2, dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

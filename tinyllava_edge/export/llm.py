"""The language model → one GGUF: token embedding, decoder, head, tokenizer and chat template.

Tensors are converted and written one at a time, so the file costs no second copy of the model in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from ..checkpoint import Checkpoint
from ..errors import ExportError
from ..files import is_full, new_file, no_space
from ..prompt import get_template
from .chat_template import chat_template
from .tokenizer import check_tokenizer, read_vocabulary, write_vocabulary

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Architecture:
    """How one Hugging Face architecture is told to llama.cpp."""

    gguf_arch: gguf.MODEL_ARCH
    """llama.cpp's architecture"""
    activation: str
    """the only `hidden_act` that llama.cpp's graph computes"""
    write_keys: Callable[[gguf.GGUFWriter, Any], None]
    """adds the architecture's own keys"""
    permute_rotary: bool = False
    """whether llama.cpp rotates neighbouring channels (Llama) where Hugging Face rotates the two halves of a head"""


def _rms_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _phi_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_layer_norm_eps(config.layer_norm_eps)
    if getattr(config, "qk_layernorm", False):
        raise ExportError(f"{config.model_type}: qk_layernorm has no GGUF form", "export a model without it")


def _stablelm_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    _phi_keys(writer, config)
    writer.add_parallel_residual(bool(config.use_parallel_residual))


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, "silu", _rms_keys, permute_rotary=True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, "silu", _rms_keys),
    "phi": Architecture(gguf.MODEL_ARCH.PHI2, "gelu_new", _phi_keys),
    "stablelm": Architecture(gguf.MODEL_ARCH.STABLELM, "silu", _stablelm_keys),
}
FLOAT_TYPES = {
    "f32": (torch.float32, gguf.LlamaFileType.ALL_F32),
    "f16": (torch.float16, gguf.LlamaFileType.MOSTLY_F16),
}


def export_llm(
    checkpoint: Checkpoint, target: Path, float_type: str = "f16", progress: Progress | None = None
) -> dict[str, int]:
    """Write the GGUF and prove its tokenizer.

    Args:
        checkpoint: loaded checkpoint.
        target: file to write, whole or not at all.
        float_type: `f16` or `f32`; vectors (norms, biases) are always float32.
        progress: told each step.

    Returns:
        Tensor type → number of tensors, read back from the file.

    Raises:
        ExportError: an architecture, activation, rope or tokenizer without a GGUF form; a weight that is not finite.
        StorageError: the disk is full.
    """
    config = checkpoint.model.config.text_config
    architecture = _architecture(config)
    dtype, file_type = FLOAT_TYPES[float_type]
    template = get_template(checkpoint.spec.template)
    vocabulary = read_vocabulary(checkpoint.tokenizer, checkpoint.model.get_input_embeddings().weight.shape[0])
    with new_file(target) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[architecture.gguf_arch])
        try:
            writer.add_type("model")
            writer.add_name(checkpoint.spec.name)
            writer.add_file_type(file_type)
            _write_shape(writer, config, len(vocabulary.tokens))
            architecture.write_keys(writer, config)
            write_vocabulary(writer, vocabulary, checkpoint.tokenizer, template.end_of_turn)
            if not template.caption_only:
                writer.add_chat_template(
                    chat_template(template, checkpoint.tokenizer.bos_token if vocabulary.add_bos else "")
                )
            _write_tensors(writer, checkpoint, architecture, dtype, progress)
        except OSError as error:
            if error.errno is None and is_full(target):  # numpy's own words for a short write
                raise no_space(target) from error
            raise
        finally:
            writer.close()
        check_tokenizer(temporary, checkpoint.tokenizer)
    return tensor_types(target)


def tensor_types(path: Path) -> dict[str, int]:
    """Tensor type, in lower case → number of tensors, read from a GGUF; most frequent first."""
    counts: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = tensor.tensor_type.name.lower()
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _architecture(config: Any) -> Architecture:
    if config.model_type not in ARCHITECTURES:
        raise ExportError(
            f"no GGUF form for language model {config.model_type!r}", f"known: {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[config.model_type]
    rope = config.rope_parameters
    if config.hidden_act != architecture.activation:
        raise ExportError(
            f"{config.model_type}: hidden_act {config.hidden_act!r}, llama.cpp computes {architecture.activation!r}",
            "export a model with that activation",
        )
    if rope["rope_type"] != "default":
        raise ExportError(
            f"{config.model_type}: rope_type {rope['rope_type']!r} has no GGUF form here", "use default rope"
        )
    return architecture


def _write_shape(writer: gguf.GGUFWriter, config: Any, rows: int) -> None:
    """The keys that every architecture has."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(rows)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    if head_dim * heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _parameters(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in a stand-alone language model, tensor; a tied head is left out: llama.cpp reads the embedding again."""
    model = checkpoint.model
    for name, parameter in model.model.language_model.named_parameters():
        yield f"model.{name}", parameter.detach()
    tied = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    for name, parameter in model.lm_head.named_parameters():
        if not (tied and name == "weight"):
            yield f"lm_head.{name}", parameter.detach()


def _write_tensors(
    writer: gguf.GGUFWriter,
    checkpoint: Checkpoint,
    architecture: Architecture,
    dtype: torch.dtype,
    progress: Progress | None,
) -> None:
    """Announce every tensor, then convert and write them in the same order."""
    config = checkpoint.model.config.text_config
    names = gguf.get_tensor_name_map(architecture.gguf_arch, config.num_hidden_layers)
    plan: list[tuple[str, str, torch.Tensor, torch.dtype]] = []
    for name, tensor in _parameters(checkpoint):
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise ExportError(
                f"{config.model_type}: tensor {name} has no GGUF name", "export a model of the stock architecture"
            )
        kind = dtype if tensor.ndim > 1 else torch.float32
        plan.append((name, mapped, tensor, kind))
        writer.add_tensor_info(mapped, tuple(tensor.shape), _numpy_dtype(kind), tensor.numel() * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, (name, _mapped, tensor, kind) in enumerate(plan, 1):
        writer.write_tensor_data(_convert(name, tensor, kind, architecture, config))
        if progress:
            progress(f"language model: tensor {done} of {len(plan)}")


def _convert(name: str, tensor: torch.Tensor, kind: torch.dtype, architecture: Architecture, config: Any) -> Any:
    """One tensor in the file's type and llama.cpp's row order. Raises ExportError where a value is lost."""
    if not torch.isfinite(tensor).all():
        raise ExportError(f"tensor {name} holds NaN or infinity", "train again from the last good checkpoint")
    converted = tensor.to(kind)
    if not torch.isfinite(converted).all():
        raise ExportError(f"tensor {name} reaches {tensor.abs().max():.3g}, beyond float16", "export with --llm f32")
    if architecture.permute_rotary:
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        if part in heads:
            converted = _interleave_halves(converted, heads[part])
    return np.ascontiguousarray(converted.numpy())


def _interleave_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from (half, pair) to (pair, half) order: (heads * dim, …) → the same shape."""
    dim = rows.shape[0] // heads
    return rows.reshape(heads, 2, dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _numpy_dtype(kind: torch.dtype) -> np.dtype[Any]:
    return np.dtype({torch.float16: np.float16, torch.float32: np.float32}[kind])

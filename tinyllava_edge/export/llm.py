"""The language model → GGUF: token embedding, decoder, head, tokenizer and chat template, in one file or in shards.

Tensors are read, converted and written one at a time, so the model is never in memory whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import gguf
import torch

from ..checkpoint import Checkpoint
from ..errors import ExportError
from ..prompt import get_template
from ..spec import ModelSpec
from ..weights import TensorInfo
from .chat_template import chat_template
from .gguf_header import read_shards
from .gguf_shards import new_gguf, shards_of
from .llm_architectures import Architecture, architecture_of, interleave_halves, rope_factors, write_shape
from .tokenizer import check_tokenizer, read_vocabulary, write_vocabulary

Progress = Callable[[str], None]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROPE = "rope_freqs.weight"
BLOCK_BYTES = 16 << 20  # of float32, read and converted together


class LlmTensors(Protocol):
    """What export_llm reads: checkpoint.LlmSource, or a loaded model behind `in_memory`."""

    @property
    def config(self) -> Any:
        """transformers configuration of the language model"""

    @property
    def tokenizer(self) -> Any:
        """transformers fast tokenizer"""

    @property
    def spec(self) -> ModelSpec:
        """how the model must be fed"""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """stand-alone name (`model.layers.0…`, `lm_head.weight`) → header; a tied head is left out"""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of one tensor in its type on disk."""


@dataclass(frozen=True)
class FloatType:
    """A float type that a GGUF's matrices are written in; vectors are always float32."""

    dtype: torch.dtype
    """type to convert to"""
    tensor_type: gguf.GGMLQuantizationType
    """the same in a tensor's header"""
    file_type: gguf.LlamaFileType
    """the same in `general.file_type`"""


FLOAT_TYPES = {
    "f32": FloatType(torch.float32, gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bf16": FloatType(torch.bfloat16, gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": FloatType(torch.float16, gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
}


@dataclass(frozen=True)
class _Planned:
    """One tensor to write."""

    source: str
    """name in the language model; empty for Llama 3's rope factors"""
    name: str
    """name in the GGUF"""
    shape: tuple[int, ...]
    """sizes, outermost first"""
    kind: FloatType
    """type to write"""


def export_llm(
    source: LlmTensors | Checkpoint,
    target: Path,
    float_type: str = "f16",
    *,
    max_shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Write the GGUF and prove its tokenizer.

    Args:
        source: checkpoint.LlmSource, read tensor by tensor, or a loaded checkpoint.
        target: file to write, whole or not at all; with shards `name.gguf` becomes `name-00001-of-0000N.gguf` and so
            on, see gguf_shards.shards_of.
        float_type: key of FLOAT_TYPES; vectors and norms are always float32.
        max_shard_bytes: most tensor bytes per file; a larger model is split as llama.cpp expects, at least one tensor
            per file. One file by default.
        progress: told each step.

    Returns:
        Tensor type → number of tensors, read back from the file.

    Raises:
        ExportError: an architecture, activation, rope or tokenizer without a GGUF form; a weight that is not finite.
        StorageError: the disk is full.
    """
    if isinstance(source, Checkpoint):
        source = in_memory(source)
    with new_gguf(target) as temporary:
        _write(source, temporary, float_type, max_shard_bytes or 0, progress)
        check_tokenizer(shards_of(temporary)[0], source.tokenizer)
    return tensor_types(target)


def export_llm_shell(source: LlmTensors, target: Path, float_type: str = "f16") -> None:
    """The file that `export_llm` would write with a hole in the weights' place, which takes no room on most disks.

    For who asks about sizes and types before the long work: no weight is read, and the tokenizer isn't proved.

    Raises:
        ExportError: as export_llm, but for what the weights' values decide.
        StorageError: the disk is full.
    """
    with new_gguf(target) as temporary:
        plan = _write(source, temporary, float_type, 0, None, shell=True)
        os.truncate(temporary, padded(temporary.stat().st_size) + sum(padded(_bytes(item)) for item in plan))


def _write(
    source: LlmTensors,
    target: Path,
    float_type: str,
    max_shard_bytes: int,
    progress: Progress | None,
    *,
    shell: bool = False,
) -> list[_Planned]:
    """Metadata, tensor table and, unless it is a shell, tensors."""
    config, kind = source.config, FLOAT_TYPES[float_type]
    architecture = architecture_of(config)
    plan = _plan(source, architecture, kind)
    template = get_template(source.spec.template)
    vocabulary = read_vocabulary(source.tokenizer, source.infos[EMBEDDING].shape[0])
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture.gguf_arch], split_max_size=max_shard_bytes)
    try:
        writer.add_type("model")
        writer.add_name(source.spec.name)
        writer.add_file_type(kind.file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_shape(writer, architecture, config, len(vocabulary.tokens))
        write_vocabulary(writer, vocabulary, source.tokenizer, template.end_of_turn)
        if not template.caption_only:
            bos = source.tokenizer.bos_token if vocabulary.add_bos else ""
            writer.add_chat_template(chat_template(template, bos, first_space=vocabulary.first_space))
        _announce(writer, plan)
        if not shell:
            _write_tensors(writer, source, architecture, plan, progress)
    finally:
        writer.close()
    return plan


def padded(size: int) -> int:
    """A size up to where the next tensor may begin."""
    return -(-size // gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT


def _bytes(item: _Planned) -> int:
    return math.prod(item.shape) * item.kind.dtype.itemsize


def tensor_types(path: Path) -> dict[str, int]:
    """Tensor type, in lower case → number of tensors, read from a GGUF and its shards; most frequent first."""
    counts: dict[str, int] = {}
    for tensor in read_shards(path).tensors.values():
        counts[tensor.type] = counts.get(tensor.type, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class _Loaded:
    """A loaded model's language model as LlmTensors."""

    config: Any
    """transformers configuration of the language model"""
    tokenizer: Any
    """transformers fast tokenizer"""
    spec: ModelSpec
    """how the model must be fed"""
    tensors: Mapping[str, torch.Tensor]
    """stand-alone name → parameter"""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Stand-alone name → shape and type."""
        return {name: TensorInfo(tuple(t.shape), t.dtype, Path()) for name, t in self.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of one parameter."""
        return self.tensors[name][start:stop]


def in_memory(checkpoint: Checkpoint) -> LlmTensors:
    """A loaded checkpoint's language model under the names that it has when it stands alone; no tied head."""
    model = checkpoint.model
    tensors = {f"model.{name}": p.detach() for name, p in model.model.language_model.named_parameters()}
    tied = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    for name, parameter in model.lm_head.named_parameters():
        if not (tied and name == "weight"):
            tensors[f"lm_head.{name}"] = parameter.detach()
    return _Loaded(model.config.text_config, checkpoint.tokenizer, checkpoint.spec, tensors)


def _plan(source: LlmTensors, architecture: Architecture, kind: FloatType) -> list[_Planned]:
    """Every tensor with its name and type in the GGUF, in the source's order."""
    config = source.config
    names = gguf.get_tensor_name_map(architecture.gguf_arch, config.num_hidden_layers)
    if architecture.head == "tied" and HEAD in source.infos:
        raise ExportError(
            f"{config.model_type}: a head of its own has no GGUF form", "export a model with tied embeddings"
        )
    factors, plan = rope_factors(config), []
    if factors is not None:
        plan.append(_Planned("", _ROPE, tuple(factors.shape), FLOAT_TYPES["f32"]))
    for name, info in source.infos.items():
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise ExportError(
                f"{config.model_type}: tensor {name} has no GGUF name", "export a model of the stock architecture"
            )
        matrix = len(info.shape) > 1 and mapped.endswith(".weight") and not mapped.endswith("_norm.weight")
        plan.append(_Planned(name, mapped, info.shape, kind if matrix else FLOAT_TYPES["f32"]))
    if architecture.head == "own" and HEAD not in source.infos:
        plan.append(_Planned(EMBEDDING, "output.weight", source.infos[EMBEDDING].shape, kind))
    return plan


def _announce(writer: gguf.GGUFWriter, plan: Sequence[_Planned]) -> None:
    """Write the metadata and the table of all tensors."""
    for item in plan:
        first = torch.zeros((), dtype=item.kind.dtype)
        writer.add_tensor_info(
            item.name, item.shape, _numpy(first).dtype, _bytes(item), raw_dtype=item.kind.tensor_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _write_tensors(
    writer: gguf.GGUFWriter,
    source: LlmTensors,
    architecture: Architecture,
    plan: list[_Planned],
    progress: Progress | None,
) -> None:
    """Convert and write every tensor in the order in which they were announced."""
    for done, item in enumerate(plan, 1):
        writer.write_tensor_data(cast(Any, _Streamed(source, architecture, item)))
        if progress:
            progress(f"language model: tensor {done} of {len(plan)}")


class _Streamed:
    """A tensor that is read, checked, converted and written a few rows at a time: the part of an array that GGUFWriter
    asks for."""

    def __init__(self, source: LlmTensors, architecture: Architecture, item: _Planned) -> None:
        self._source, self._architecture, self._item = source, architecture, item
        self.nbytes = _bytes(item)

    def tofile(self, file: Any) -> None:
        """Write every value behind what the file holds already."""
        for part in self._parts():
            _check_values(self._source.spec.name, self._item, part)
            _numpy(_convert(self._item, part, self._architecture, self._source.config)).tofile(file)

    def _parts(self) -> Iterator[torch.Tensor]:
        name, shape = self._item.source, self._item.shape
        if not name:
            factors = rope_factors(self._source.config)
            yield torch.empty(0) if factors is None else factors
            return
        whole = len(shape) < 2 or _rotated(self._item, self._architecture)  # rows of those change places
        step = shape[0] if whole else max(1, BLOCK_BYTES // (math.prod(shape[1:]) * 4))
        for start in range(0, shape[0], step):
            yield self._source.rows(name, start, start + step)


def _rotated(item: _Planned, architecture: Architecture) -> bool:
    """Whether the tensor's rows are permuted for llama.cpp's rotation."""
    return architecture.permute_rotary and item.source.split(".")[-2] in ("q_proj", "k_proj")


def _convert(item: _Planned, tensor: torch.Tensor, architecture: Architecture, config: Any) -> torch.Tensor:
    """One tensor in the file's type and llama.cpp's row order."""
    if architecture.norm_offset and item.name.endswith("_norm.weight"):
        tensor = tensor.float() + architecture.norm_offset
    converted = tensor.to(item.kind.dtype)
    if item.source and _rotated(item, architecture):
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        converted = interleave_halves(converted, heads[item.source.split(".")[-2]])
    return converted


def _check_values(model: str, item: _Planned, tensor: torch.Tensor) -> None:
    """Raise ExportError for NaN, infinity, and values beyond the type to write. One pass, no copy."""
    low, high = (float(end) for end in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ExportError(
            f"{model}: tensor {item.source} holds NaN or infinity", "train again from the last good checkpoint"
        )
    largest = max(-low, high)
    if not torch.isfinite(torch.tensor(largest, dtype=torch.float64).to(item.kind.dtype)):
        kind = str(item.kind.dtype).removeprefix("torch.")
        raise ExportError(
            f"{model}: tensor {item.source} reaches {largest:.3g}, beyond {kind}", "export with --llm bf16 or f32"
        )


def _numpy(tensor: torch.Tensor) -> Any:
    """As a numpy array; bfloat16, which numpy lacks, as its bits."""
    whole = tensor.contiguous()
    return whole.view(torch.uint16).numpy() if whole.dtype == torch.bfloat16 else whole.numpy()

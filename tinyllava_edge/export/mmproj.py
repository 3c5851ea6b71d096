"""Vision tower + connector → one mmproj GGUF, which stock llama.cpp programs load beside the language model.

Two facts of llama.cpp's graph for Llava (tools/mtmd/models/llava.cpp) decide what is written. It runs one layer fewer
than `block_count` unless `clip.vision.feature_layer` names the layer to stop at, so the cut tower is written with
`block_count` = `feature_layer` = number of layers that are left. And it applies a post-norm wherever the file holds
one, so the file holds none: Llava's features are taken before it.

A third one (mtmd-image.cpp) serves models that stretch pictures to a square. mtmd keeps the aspect and pads, unless the
file lists resolutions to cut tiles for; then it first stretches the picture for an overview. With 0 x 0 as the only
resolution there are no tiles, so the overview, stretched as Pillow does it, is all that the tower sees.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from ..errors import ExportError
from ..files import is_full, new_file, no_space
from ..spec import ModelSpec, named_tokens
from .gguf_header import read_header
from .llm import tensor_types
from .vision import layers_used

Progress = Callable[[str], None]
KEY_WORKAROUND = "tinyllava_edge.clip_workaround"
WARP_PINPOINTS = (0, 0)  # see above: the overview, and no tiles
_Q8_BLOCK = 32

# Name → type of the matrices, and the number that the file states. Vectors are always float32.
MMPROJ_TYPES: dict[str, tuple[gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
ACTIVATIONS = {
    "gelu_pytorch_tanh": True,
    "quick_gelu": False,
}  # hidden_act → clip.use_gelu (llama.cpp's is the tanh form)
_CONNECTOR = "mlp2x_gelu"
_LACKS = {
    "identity": "has no way without a connector",
    "linear": "always applies a GELU after the first layer",
    "mlp1x_gelu": "always applies a GELU after the first layer",
    "mlp3x_gelu": "knows two linear layers",
    "mlp4x_gelu": "knows two linear layers",
    "mof_mlp": "reads one tower",
    "resampler": "has no graph for this resampler",
    "pixelshuffle": "shuffles pixels in other models' graphs only",
    "ldpv2": "pools 24 x 24 patches to 144 tokens, whatever the file says",
    "avgpool": "pools in other models' graphs only",
    "qformer": "has no graph for a Q-Former",
}
_BLOCK = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file."""

    name: str
    """name in the file"""
    source: torch.Tensor
    """the model's own tensor, nothing copied"""
    kind: gguf.GGMLQuantizationType
    """type in the file"""
    permute: bool = False
    """whether the first row moves to the end: the workaround for CLIP"""


def mmproj_name(name: str, float_type: str) -> str:
    """File name that llama-server, Ollama, LM Studio and PocketPal recognise: `mmproj-{name}-{type}.gguf`."""
    return f"mmproj-{plain_name(name)}-{float_type}.gguf"


def embedding_scale(spec: ModelSpec) -> float:
    """Image embeddings in the file over the model's own.

    llama.cpp's Gemma multiplies them by the root of its width, as it does tokens; Hugging Face's only tokens.
    """
    return float(spec.embedding_dim**-0.5) if spec.llm_family == "gemma" else 1.0


def plain_name(name: str) -> str:
    """A model's name as it may stand in a file name, a folder's or an Ollama tag."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def export_mmproj(
    model: Any,
    spec: ModelSpec,
    target: Path,
    float_type: str = "f16",
    *,
    clip_workaround: bool = False,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Write tower and connector for stock llama.cpp.

    llama.cpp 0c1e57098 (in llama-cpp-python 0.3.36) computes SigLIP rightly. It gives a CLIP tower's patches their
    neighbours' positions, loses the first patch and passes the class token on in its place (ggml-org/llama.cpp#25814).

    Args:
        model: anything with `model.vision_tower`, `model.multi_modal_projector` and `config`, as TinyLlava has them.
        spec: the checkpoint's spec; every `feature_layer` is cut exactly.
        target: file to write, whole or not at all; see mmproj_name.
        float_type: key of MMPROJ_TYPES. `q8_0` packs matrices in blocks of 32 columns; those of other widths stay f16.
        clip_workaround: CLIP only: turn the position embeddings by one row, so that the llama.cpp named above gives
            every patch but the first its right embedding, one row early. On a mended llama.cpp it does harm, so the
            file says that it was done (KEY_WORKAROUND).
        progress: told each step.

    Returns:
        Tensor type → number of tensors, read back from the file.

    Raises:
        ExportError: a tower, connector or activation that stock llama.cpp can't compute; a weight that is not finite
            or beyond float16; an unknown type.
        StorageError: the disk is full.
    """
    if float_type not in MMPROJ_TYPES:
        raise ExportError(f"unknown mmproj type {float_type!r}", f"known: {', '.join(MMPROJ_TYPES)}")
    layers = check_model(model.config, spec, clip_workaround)
    kind, file_type = MMPROJ_TYPES[float_type]
    entries = list(_entries(model, spec, layers, kind, clip_workaround))
    with new_file(target) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ])
        try:
            writer.add_file_type(file_type)
            _write_keys(writer, model, spec, layers)
            if spec.vision_family == "clip":
                writer.add_bool(KEY_WORKAROUND, clip_workaround)
            for entry in entries:
                block, size = gguf.GGML_QUANT_SIZES[entry.kind]
                writer.add_tensor_info(
                    entry.name,
                    tuple(entry.source.shape),
                    np.dtype(np.float32),  # any but uint8: the shape given is in values, not in bytes
                    entry.source.numel() // block * size,
                    raw_dtype=entry.kind,
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, entry in enumerate(entries, 1):
                writer.write_tensor_data(_convert(entry))
                if progress:
                    progress(f"mmproj: tensor {done} of {len(entries)}")
        except OSError as error:
            if error.errno is None and is_full(target):  # numpy's own words for a short write
                raise no_space(target) from error
            raise
        finally:
            writer.close()
    return tensor_types(target)


def unpacked(path: Path) -> list[str]:
    """Matrices of a q8_0 file that stayed float because their rows are no multiple of 32 wide, as the file has them."""
    tensors = read_header(path).tensors.items()
    return [name for name, tensor in tensors if tensor.type == "f16" and tensor.shape[0] % _Q8_BLOCK]


def check_model(config: Any, spec: ModelSpec, clip_workaround: bool) -> int:
    """Refuse what stock llama.cpp would compute wrongly or not at all. Returns the number of layers below the cut.

    Args:
        config: TinyLlava's configuration.
        spec: the checkpoint's spec.
        clip_workaround: see export_mmproj.

    Raises:
        ExportError: a tower, connector or activation that stock llama.cpp can't compute.
    """
    if spec.vision_family not in ("clip", "siglip"):
        tower = "a mixture of two towers" if spec.vision_family == "mof" else f"a {spec.vision_family} tower"
        raise ExportError(
            f"{spec.name}: stock llama.cpp has no Llava graph for {tower}",
            "use the ONNX vision graph with the text GGUF; known here: clip, siglip",
        )
    if spec.connector != _CONNECTOR:
        stem = spec.connector if named_tokens(spec.connector) is None else spec.connector.rpartition("-")[0]
        reason = _LACKS.get(stem, "has no graph for it")
        raise ExportError(
            f"{spec.name}: connector {spec.connector!r}: stock llama.cpp {reason}",
            f"use the ONNX vision graph with the text GGUF; known here: {_CONNECTOR}",
        )
    if clip_workaround and spec.vision_family != "clip":
        raise ExportError(f"{spec.name}: the CLIP workaround on a {spec.vision_family} tower", "leave it out")
    tower = config.vision_config
    if tower.hidden_act not in ACTIVATIONS:
        raise ExportError(
            f"{spec.name}: the tower's hidden_act {tower.hidden_act!r} has no form in stock llama.cpp",
            f"known: {', '.join(ACTIVATIONS)}",
        )
    if tower.intermediate_size == tower.hidden_size:
        raise ExportError(
            f"{spec.name}: intermediate_size equals hidden_size ({tower.hidden_size}): stock llama.cpp would swap the "
            "two feed-forward matrices",
            "use the ONNX vision graph with the text GGUF",
        )
    if getattr(config, "projector_hidden_act", "gelu") not in ("gelu", "gelu_pytorch_tanh"):
        raise ExportError(
            f"{spec.name}: the connector's activation {config.projector_hidden_act!r} is not GELU",
            "use the ONNX vision graph with the text GGUF",
        )
    used = layers_used(spec, int(tower.num_hidden_layers))
    if used < 1:
        raise ExportError(
            f"{spec.name}: feature_layer {spec.feature_layer} leaves no layer of the tower", "use the ONNX vision graph"
        )
    return used


def _write_keys(writer: gguf.GGUFWriter, model: Any, spec: ModelSpec, layers: int) -> None:
    """What clip_model_loader::load_hparams reads for projector type `mlp`."""
    config = model.config.vision_config
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(spec.name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(spec.image_size)
    writer.add_vision_patch_size(spec.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_projection_dim(spec.embedding_dim)
    writer.add_vision_block_count(layers)
    writer.add_array("clip.vision.feature_layer", [layers])
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_image_mean(list(spec.image_mean))
    writer.add_vision_image_std(list(spec.image_std))
    writer.add_vision_use_gelu(ACTIVATIONS[config.hidden_act])
    if spec.image_policy == "warp":
        writer.add_array("clip.vision.image_grid_pinpoints", list(WARP_PINPOINTS))


def _entries(
    model: Any, spec: ModelSpec, layers: int, kind: gguf.GGMLQuantizationType, permute: bool
) -> Iterator[_Entry]:
    """Every tensor that reaches the features, in the file's order. Raises ExportError for one that has no place."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)  # transformers before 5 wraps the tower once more
    f32 = gguf.GGMLQuantizationType.F32
    places = {
        "embeddings.patch_embedding.weight": ("v.patch_embd.weight", f32),  # its type is also the pixels' type
        "embeddings.patch_embedding.bias": ("v.patch_embd.bias", f32),
        "embeddings.position_embedding.weight": ("v.position_embd.weight", f32),
        "embeddings.class_embedding": ("v.class_embd", f32),
        "pre_layrnorm.weight": ("v.pre_ln.weight", f32),
        "pre_layrnorm.bias": ("v.pre_ln.bias", f32),
    }
    for name, tensor in tower.named_parameters():
        if name in places:
            yield _Entry(places[name][0], tensor.detach(), places[name][1], permute and "position" in name)
            continue
        parts = name.split(".")
        if parts[:2] == ["encoder", "layers"]:
            block, part, last = int(parts[2]), ".".join(parts[3:-1]), parts[-1]
            if block >= layers:
                continue
            if part in _BLOCK:
                yield _Entry(f"v.blk.{block}.{_BLOCK[part]}.{last}", tensor.detach(), _kind(tensor, kind))
                continue
        elif parts[0] in ("post_layernorm", "head"):
            continue
        raise ExportError(
            f"{spec.name}: tower tensor {name} has no place in an mmproj file", "use the ONNX vision graph"
        )
    scale = embedding_scale(spec)
    for name, tensor in model.model.multi_modal_projector.named_parameters():
        layer, last = name.split(".")
        tensor = tensor if layer == "linear_1" else tensor * scale
        yield _Entry(f"mm.{ {'linear_1': 0, 'linear_2': 2}[layer] }.{last}", tensor.detach(), _kind(tensor, kind))


def _kind(tensor: torch.Tensor, kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    if tensor.ndim < 2:
        return gguf.GGMLQuantizationType.F32
    if kind == gguf.GGMLQuantizationType.Q8_0 and tensor.shape[-1] % _Q8_BLOCK:
        return gguf.GGMLQuantizationType.F16
    return kind


def _convert(entry: _Entry) -> Any:
    """One tensor as it stands in the file. Raises ExportError where a value is lost."""
    tensor = entry.source
    if not torch.isfinite(tensor).all():
        raise ExportError(f"tensor {entry.name} holds NaN or infinity", "train again from the last good checkpoint")
    values = tensor.to(torch.float32).numpy()
    if entry.permute:
        values = np.roll(values, -1, axis=0)
    values = np.ascontiguousarray(values)
    if entry.kind == gguf.GGMLQuantizationType.F16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise ExportError(
            f"tensor {entry.name} reaches {np.abs(values).max():.3g}, beyond float16",
            "export the mmproj as bf16 or f32",
        )
    return gguf.quants.quantize(values, entry.kind)

"""What a checkpoint's files will take in memory, before any of them is written: from shapes and types alone.

The language model's types are llama.cpp's own choice, told in a dry run on a GGUF with a hole in the weights' place; so
its sizes are those of the file to come. A vision graph's sizes are counted on a model without weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn
from transformers import LlavaConfig

from ..checkpoint import LlmSource, quiet
from ..model import TinyLlava, is_dead
from ..runtimes.gguf_front import TensorEntry, opened, read_front
from ..runtimes.gguf_sizes import GgufSizes, gguf_sizes, repacked_bytes
from ..runtimes.onnx_sizes import OnnxSizes
from ..spec import ModelSpec
from .decoder import BLOCK, DECODER_PRECISIONS
from .gguf_header import matrices, read_header
from .imatrix import Imatrix
from .lazy_graph import MAX_BYTES
from .llm import EMBEDDING, FLOAT_TYPES, HEAD, export_llm_shell, padded
from .mmproj import MMPROJ_TYPES
from .quantize import planned_types
from .web import WEB_PRECISIONS

_WEIGHT_ONLY = {"w8": 8, "w4": 4}
_PER_CHANNEL = ("int8", "qdq")
_STEP = 4  # bytes of a float32 scale


class LlmSizes:
    """Sizes of a checkpoint's language model in any type; what is asked for twice is computed once."""

    def __init__(
        self, source: LlmSource, base: str, folder: Path, system_info: bytes, overrides: Mapping[str, str] | None = None
    ) -> None:
        """Nothing is written yet.

        Args:
            source: the checkpoint's language model.
            base: key of FLOAT_TYPES that quantised files are made from.
            folder: an existing directory for files without weights, whose owner removes it.
            system_info: llama.cpp's words on the device's processor.
            overrides: see quantize_gguf.
        """
        self._source, self._base, self._folder, self._info = source, base, folder, system_info
        self._overrides = dict(overrides or {})
        self._shell = functools.cache(self._write_shell)
        self.sizes = functools.cache(self._sizes)

    def _write_shell(self, float_type: str) -> Path:
        path = self._folder / f"{float_type}.gguf"
        export_llm_shell(self._source, path, float_type)
        return path

    def _sizes(self, name: str, has_imatrix: bool = False) -> GgufSizes:
        """Sizes of the file that `name`, a key of LLM_TYPES, gives. Raises what planned_types raises."""
        if name in FLOAT_TYPES:
            return gguf_sizes(self._shell(name), self._info)
        shell = self._shell(self._base)
        matrix = _even_imatrix(shell) if has_imatrix else None
        types = planned_types(shell, name, imatrix=matrix, overrides=self._overrides)
        with opened(shell) as data:
            front = read_front(data)
        tensors = {key: _entry(entry, types[key]) for key, entry in front.tensors.items()}
        mapped = front.start + sum(padded(size) for _, size in tensors.values())
        return GgufSizes(
            **{**vars(gguf_sizes(shell)), "mapped": mapped, "repacked": repacked_bytes(tensors, self._info)}
        )


def _entry(entry: TensorEntry, kind: str) -> tuple[TensorEntry, int]:
    """A tensor in another type, and its bytes."""
    chosen = gguf.GGMLQuantizationType[kind.upper()]
    block, block_bytes = gguf.GGML_QUANT_SIZES[chosen]
    return TensorEntry(chosen.value, entry.sizes, entry.offset), math.prod(entry.sizes) // block * block_bytes


def _even_imatrix(path: Path) -> Imatrix:
    """A matrix in which every channel counts the same: what types are chosen depends on there being one."""
    found = {name: tensor.shape[0] for name, tensor in matrices(read_header(path)).items()}
    return Imatrix({name: np.ones(width, np.float32) for name, width in found.items()}, dict.fromkeys(found, 1))


class VisionSizes:
    """Sizes of a checkpoint's vision graph in any precision, and of its mmproj."""

    def __init__(self, config: LlavaConfig, spec: ModelSpec, *, float16: bool = False) -> None:
        """Build tower and connector without weights.

        Args:
            config: the checkpoint's configuration, which a model could be built from.
            spec: how the model must be fed.
            float16: whether the device runs the graph where there are float16 kernels.
        """
        self._float16 = float16
        with quiet(), torch.device("meta"):
            model = TinyLlava(config)
        self._products: list[tuple[int, int]] = []  # (rows, columns) of each product
        self._rest = self._largest = 0  # values of all other weights, and of the largest value between nodes
        for part in _towers(model.model.vision_tower):
            layer, layers, count = spec.feature_layer, part.config.num_hidden_layers, _tokens(part, spec)
            alive = [item for item in _parameters(part) if not is_dead(f".vision_tower.{item[0]}", layer, layers)]
            self._add(alive, count, part.config.num_attention_heads * count)
        connector = list(_parameters(model.model.multi_modal_projector))
        self._add(connector, max(spec.feature_tokens, spec.visual_tokens), 0)

    def _add(self, parameters: Sequence[tuple[str, type, torch.Tensor]], count: int, scores: int) -> None:
        """Count a part's weights; `count` positions, each with so many attention scores."""
        for name, kind, parameter in parameters:
            patches = "patch_embedding" in name  # SigLIP 2's product, which is a convolution in the graph
            if kind is nn.Linear and parameter.ndim == 2 and not patches:
                self._products.append((parameter.shape[1], parameter.shape[0]))
            else:
                self._rest += parameter.numel()
            if kind in (nn.Linear, nn.Conv2d):
                self._largest = max(self._largest, parameter.shape[0] * count, scores * count)

    @property
    def weights(self) -> int:
        """Weights that the graph holds."""
        return self._rest + sum(rows * columns for rows, columns in self._products)

    def file_bytes(self, precision: str) -> int:
        """Weights in the graph's file, or beside it."""
        return self._bytes(precision)[0]

    def sizes(self, precision: str) -> OnnxSizes:
        """Sizes of the graph in a precision, a key of VISION_PRECISIONS."""
        file, kept = self._bytes(precision)
        value = 2 if precision == "fp16" and self._float16 else 4
        return OnnxSizes(kept, file if file < MAX_BYTES else 0, value * self._largest)

    def _bytes(self, precision: str) -> tuple[int, int]:
        """In the file, and in memory."""
        file = kept = 4 * self._rest
        if precision == "fp16":
            return 2 * self.weights, (2 if self._float16 else 4) * self.weights
        for rows, columns in self._products:
            if precision in _PER_CHANNEL:
                coded, more = rows * columns + (_STEP + 1) * columns, 0
            elif precision in _WEIGHT_ONLY:
                blocks = columns * -(-rows // BLOCK)
                # a zero point and a scale for each block; of scales a kernel keeps two copies, see onnx_sizes
                coded = blocks * (BLOCK + 1) * _WEIGHT_ONLY[precision] // 8 + _STEP * blocks
                more = 2 * _STEP * blocks
            else:
                coded, more = 4 * rows * columns, 0
            file, kept = file + coded, kept + coded + more
        return file, kept

    def mmproj(self, name: str) -> OnnxSizes:
        """Sizes of the mmproj in a type, a key of MMPROJ_TYPES; a type's blocks are taken to fit every matrix."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[MMPROJ_TYPES[name][0]]
        products = sum(rows * columns for rows, columns in self._products)
        return OnnxSizes(4 * self._rest + products * block_bytes // block, 0, 4 * self._largest)


def _towers(tower: Any) -> list[Any]:
    """The towers of a mixture, or the one."""
    return [tower.first, tower.second] if hasattr(tower, "second") else [tower]


def _tokens(tower: Any, spec: ModelSpec) -> int:
    """Positions in a tower: patches, class token, registers."""
    side = spec.image_size // int(tower.config.patch_size)
    extra = any("class_embedding" in name or "cls_token" in name for name, _ in tower.named_parameters())
    return side * side + extra + int(getattr(tower.config, "num_register_tokens", 0) or 0)


def _parameters(module: nn.Module) -> Iterator[tuple[str, type, torch.Tensor]]:
    """Name, kind of the owner, and parameter."""
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            yield f"{path}.{name}", type(owner), parameter


def web_bytes(llm: GgufSizes, source: LlmSource, vision: VisionSizes, precision: str) -> int:
    """Weights of the three graphs for browsers, within some percent: which matrices stay at 8 bits is the builder's."""
    chosen, decoder = WEB_PRECISIONS[precision], DECODER_PRECISIONS[precision]
    bits = 16 if decoder.values == "FLOAT16" else 32
    angles = max(source.config.max_position_embeddings, source.spec.max_length) * llm.head_widths[0]
    total = vision.file_bytes(chosen.vision) + angles * bits / 8  # tables of cosines and sines
    for name, info in source.infos.items():
        count = math.prod(info.shape)
        if name == EMBEDDING:
            total += {"float32": 4.0, "float16": 2.0, "int4": 0.5 + _STEP / BLOCK}[chosen.table] * count
        if name != EMBEDDING or HEAD not in source.infos:
            packed = len(info.shape) > 1 and decoder.weights != decoder.values
            total += count * (_packed_bits(name, llm.layers, decoder.weights, bits) if packed else bits) / 8
    return round(total)


def _packed_bits(name: str, layers: int, weights: str, scale: int) -> float:
    """Bits per weight of a matrix in blocks, scales included: see decoder.MIXED."""
    parts = name.split(".")
    layer = int(parts[2]) if len(parts) > 2 and parts[2].isdigit() else None
    if weights == "INT8" or layer is None:  # the head keeps 8 bits
        return 8 + scale / BLOCK
    more = layer < layers / 8 or layer >= 7 * layers / 8 or (layer - round(layers / 8)) % 3 == 2
    kept = any(part in name for part in ("q_proj", "k_proj", "v_proj", "down_proj", "fc2"))
    return (8 if more and kept else 4) + scale / BLOCK

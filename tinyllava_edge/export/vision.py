"""Vision tower + connector → one ONNX graph: what the decoder reads, and nothing that it doesn't.

Legend: b pictures, s side in pixels, n tower positions, t tokens kept, v tower width, d language-model width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnxscript.optimizer import optimize_ir
from torch import nn

from ..errors import ExportError
from ..spec import ModelSpec
from ..towers import FAMILIES, TOWERS
from ..towers.mof import interleave
from . import onnx_io
from .lazy_graph import INLINE_BYTES, LazyGraph, Weight, write_graph
from .vision_quantize import CALIBRATED, VISION_PRECISIONS, quantize_vision_int8

__all__ = [
    "CALIBRATED",
    "VISION_PRECISIONS",
    "VisionGraph",
    "export_vision_fp32",
    "layers_used",
    "quantize_vision_int8",
]

OPSET = 20  # the first with a native Gelu, tanh form included
IR_VERSION = 10
INPUTS = ("pixel_values",)
OUTPUTS = ("image_embeds", "image_features")


class ClipEmbeddings(nn.Module):
    """CLIP's class token, patches and positions, and the norm before the first layer."""

    def __init__(self, tower: Any, _side: int) -> None:
        super().__init__()
        self.embeddings, self.pre_norm = tower.embeddings, tower.pre_layrnorm

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(b, 3, s, s) → (b, n, v)."""
        return self.pre_norm(self.embeddings(pixel_values))


class Siglip2Embeddings(nn.Module):
    """SigLIP 2's patches as the convolution that they are, and its positions resized to the square once."""

    positions: torch.Tensor

    def __init__(self, tower: Any, side: int) -> None:
        super().__init__()
        old = tower.embeddings
        patch = int(tower.config.patch_size)
        linear, table, grid = old.patch_embedding, old.position_embedding.weight, side // patch
        self.patches = nn.Conv2d(3, linear.out_features, patch, patch)
        self.patches.weight = nn.Parameter(linear.weight.reshape(-1, patch, patch, 3).permute(0, 3, 1, 2).contiguous())
        self.patches.bias = linear.bias
        square = table.reshape(old.position_embedding_size, old.position_embedding_size, -1)
        shapes = torch.tensor([[grid, grid]])
        self.register_buffer("positions", old.resize_positional_embeddings(square, shapes, max_length=grid * grid))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(b, 3, s, s) → (b, n, v)."""
        return self.patches(pixel_values).flatten(2).transpose(1, 2) + self.positions


class Dinov2Embeddings(nn.Module):
    """DINOv2's class token, registers if it has them, and patches; its positions interpolated to the square once."""

    positions: torch.Tensor

    def __init__(self, tower: Any, side: int) -> None:
        super().__init__()
        old = tower.embeddings
        self.projection = old.patch_embeddings.projection
        self.cls_token = old.cls_token
        tokens = (side // int(self.projection.stride[0])) ** 2 + 1
        like = torch.empty(1, tokens, old.cls_token.shape[-1])
        self.register_buffer("positions", old.interpolate_pos_encoding(like, side, side))
        self.register_tokens = getattr(old, "register_tokens", None)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(b, 3, s, s) → (b, n, v)."""
        patches = self.projection(pixel_values).flatten(2).transpose(1, 2)
        batch = patches.shape[0]
        if self.register_tokens is None:
            return torch.cat((self.cls_token.expand(batch, -1, -1), patches), dim=1) + self.positions
        first = (self.cls_token + self.positions[:, :1]).expand(batch, -1, -1)
        registers = self.register_tokens.expand(batch, -1, -1)
        return torch.cat((first, registers, patches + self.positions[:, 1:]), dim=1)


EMBEDDINGS: dict[str, Callable[[Any, int], nn.Module]] = {
    "clip": ClipEmbeddings,
    "siglip": lambda tower, _side: tower.embeddings,
    "siglip2": Siglip2Embeddings,
    "dinov2": Dinov2Embeddings,
    "dinov2_registers": Dinov2Embeddings,
}


class TowerGraph(nn.Module):
    """f of Eq. 1, cut at the feature layer: later layers, post-norm and pooling head are left out."""

    def __init__(self, tower: Any, family: str, spec: ModelSpec, first_kept: int) -> None:
        """Share a tower's modules; raises ExportError for one that has no graph, or for a layer that isn't there."""
        super().__init__()
        if family not in EMBEDDINGS:
            raise ExportError(f"{spec.name}: no graph for vision family {family!r}", f"known: {', '.join(EMBEDDINGS)}")
        encoder = tower.encoder
        layers = list(encoder.layers if hasattr(encoder, "layers") else encoder.layer)  # DINOv2 says `layer`
        with torch.no_grad():
            self.embeddings = EMBEDDINGS[family](tower, spec.image_size)
        self.layers = nn.ModuleList(layers[: layers_used(spec, len(layers))])
        self.first_kept = first_kept
        self.registers = int(getattr(tower.config, "num_register_tokens", 0))

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(b, 3, s, s) → what `hidden_states[feature_layer]` holds from the first token that is kept, (b, t, v)."""
        hidden = self.embeddings(pixel_values)  # (b, n, v)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None)  # (b, n, v)
        if self.registers and not self.first_kept:
            return torch.cat((hidden[:, :1], hidden[:, 1 + self.registers :]), dim=1)  # (b, t, v)
        return hidden[:, self.first_kept + self.registers :]  # (b, t, v)


class VisionGraph(TowerGraph):
    """f and P of Eq. 1. The features are those of `tower_features` of the torch model."""

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        """Share the modules of a TinyLlava model. Raises ExportError for a tower or layer that has no graph."""
        kept = {"full": 0, "default": 1}[spec.select_strategy]
        super().__init__(model.model.vision_tower, spec.vision_family, spec, kept)
        self.connector = model.model.multi_modal_projector

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, 3, s, s) → image embeddings (b, t, d) and the tower features (b, t, v) that they were made from."""
        features = self.features(pixel_values)
        return self.connector(features), features


class MixtureGraph(nn.Module):
    """VisionGraph of a mixture: both towers without their class tokens, their tokens in turn."""

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        super().__init__()
        tower = model.model.vision_tower
        parts = [(part, FAMILIES[part.config.model_type]) for part in (tower.first, tower.second)]
        self.first, self.second = (
            TowerGraph(part, family, spec, int(TOWERS[family].class_token)) for part, family in parts
        )
        self.connector = model.model.multi_modal_projector

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, 3, s, s) → image embeddings (b, 2t, d) and the tower features (b, 2t, v) that they were made from."""
        features = interleave(self.first.features(pixel_values), self.second.features(pixel_values))
        return self.connector(features), features


def vision_graph(model: Any, spec: ModelSpec) -> nn.Module:
    """The graph of a model's tower or towers, in eval mode. Raises ExportError for one that has none."""
    kind = MixtureGraph if spec.vision_family == "mof" else VisionGraph
    return kind(model, spec).eval()


def layers_used(spec: ModelSpec, layers: int) -> int:
    """Encoder layers below the feature layer: `hidden_states` holds the embeddings, then one entry per layer.

    Raises:
        ExportError: the index lies outside `hidden_states`.
    """
    index = spec.feature_layer + layers + 1 if spec.feature_layer < 0 else spec.feature_layer
    if not 0 <= index <= layers:
        raise ExportError(
            f"{spec.name}: feature_layer {spec.feature_layer} of a tower with {layers} layers",
            f"give one in {-layers - 1}..{layers} in model_spec.json",
        )
    return index


def export_vision_fp32(model: Any, spec: ModelSpec, target: Path, *, static: bool = False) -> dict[str, int]:
    """Write the graph in float32: one file, above 2 GB with its weights in `<name>.data`.

    Args:
        model: TinyLlava in float32 and eval mode; only `model.vision_tower` and `model.multi_modal_projector` are used.
        spec: the checkpoint's spec.
        target: file to write, whole or not at all.
        static: fix the batch to 1, so that every shape is known: what CoreML and NPUs ask for.

    Returns:
        Type → number of tensors, read back from the file.

    Raises:
        ExportError: the tower can't be exported, or its shapes differ from what the spec promises.
    """
    graph = vision_graph(model, spec)
    batch = 1 if static else 2  # a dynamic batch of 1 would be taken for a constant
    pixels = torch.zeros(batch, 3, spec.image_size, spec.image_size)
    with torch.no_grad():
        shape = tuple(graph(pixels)[0].shape)
    if shape != (batch, spec.visual_tokens, spec.embedding_dim):
        raise ExportError(
            f"{spec.name}: the tower gives {shape[1:]} embeddings, "
            f"the spec says ({spec.visual_tokens}, {spec.embedding_dim})",
            "correct visual_tokens, embedding_dim or select_strategy in model_spec.json",
        )
    try:
        with onnx_io.quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph,
                (pixels,),
                input_names=INPUTS,
                output_names=OUTPUTS,
                opset_version=OPSET,
                dynamic_shapes=None if static else ({0: torch.export.Dim("batch")},),
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            if program is not None:  # the exporter's own optimiser would hold every transposed weight in memory
                optimize_ir(program.model, should_fold=lambda node: False if _is_weight_transpose(node) else None)
    except Exception as error:  # the exporter wraps whatever failed inside it
        reason = str(error).strip().splitlines()
        raise ExportError(
            f"{spec.name}: the vision graph can't be exported ({reason[0] if reason else error!r})"
        ) from error
    if program is None:
        raise ExportError(f"{spec.name}: the vision graph can't be exported")
    write_graph(_lazy(program.model), target)
    return onnx_io.tensor_types(target)


def _is_weight_transpose(node: Any) -> bool:
    return node.op_type == "Transpose" and node.inputs[0] is not None and node.inputs[0].is_initializer()


def _lazy(model: Any) -> LazyGraph:
    """The exporter's graph. Its parameters stay in the torch model; those of linear layers are transposed when read."""
    values = {name: value.const_value for name, value in model.graph.initializers.items()}
    tensors = {name: tensor for name, tensor in values.items() if tensor.nbytes >= INLINE_BYTES}
    for name in tensors:
        model.graph.initializers.pop(name)
    proto = onnx_ir.to_proto(model)
    _forget_sources(proto)
    proto.ir_version = IR_VERSION
    proto.producer_name, proto.producer_version = "tinyllava_edge", ""
    graph = LazyGraph(proto)
    uses = Counter(name for node in proto.graph.node for name in node.input)
    renamed = {value.name: name for value, name in zip(proto.graph.output, OUTPUTS, strict=True)}
    for node in list(proto.graph.node):
        source = node.input[0] if node.input else ""
        if source not in tensors:
            continue
        if node.op_type == "Transpose":
            weight = _weight(tensors[source], tuple(node.attribute[0].ints))
        elif node.op_type == "Gather" and node.input[1] in values:  # positions, looked up by numbers that never change
            weight = _rows(tensors[source], values[node.input[1]])
        else:
            continue
        name = renamed[node.output[0]] = source if uses[source] == 1 else node.output[0]
        graph.weights[name] = weight
        proto.graph.node.remove(node)
    for node in proto.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for value in (*proto.graph.output, *proto.graph.value_info):
        value.name = renamed.get(value.name, value.name)
    used = {name for node in proto.graph.node for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for name, tensor in tensors.items():
        if name in used and name not in graph.weights:
            graph.weights[name] = _weight(tensor, tuple(range(len(tensor.shape))))
    return graph


def _weight(tensor: Any, axes: tuple[int, ...]) -> Weight:
    shape = tuple(int(tensor.shape[axis]) for axis in axes)
    return Weight(shape, np.dtype(tensor.dtype.numpy()), lambda: tensor.numpy().transpose(axes))


def _rows(table: Any, numbers: Any) -> Weight:
    rows = numbers.numpy()
    shape = (*rows.shape, *(int(size) for size in table.shape[1:]))
    return Weight(shape, np.dtype(table.dtype.numpy()), lambda: table.numpy()[rows])


def _forget_sources(proto: onnx.ModelProto) -> None:
    """Drop what the exporter notes about itself: stack traces with this machine's paths, module names, versions."""
    del proto.metadata_props[:]
    graphs = [proto.graph, *proto.functions]
    for graph in graphs:
        del graph.metadata_props[:]
        graph.doc_string = ""
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
        for value in graph.value_info:
            del value.metadata_props[:]
    for value in [*proto.graph.input, *proto.graph.output, *proto.graph.initializer]:
        del value.metadata_props[:]
        value.doc_string = ""

"""Vision tower + connector → one ONNX graph: what the decoder reads, and nothing that it doesn't.

Legend: b pictures, s side in pixels, n tower positions, t tokens kept, v tower width, d language-model width.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from ..errors import ExportError
from ..files import is_full, new_file, no_space
from ..spec import ModelSpec
from . import onnx_io

OPSET = 20  # the first with a native Gelu, tanh form included
IR_VERSION = 10
INPUTS = ("pixel_values",)
OUTPUTS = ("image_embeds", "image_features")
FAMILIES = ("clip", "siglip")


class VisionGraph(nn.Module):
    """f and P of Eq. 1, cut at the feature layer: later layers, post-norm and pooling head are left out.

    The features equal `hidden_states[feature_layer]` of the Hugging Face tower, its first token dropped where the
    select strategy is `default`.
    """

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        """Share the modules of a TinyLlava model. Raises ExportError for a tower or layer that has no graph."""
        super().__init__()
        if spec.vision_family not in FAMILIES:
            raise ExportError(
                f"{spec.name}: no graph for vision family {spec.vision_family!r}", f"known: {', '.join(FAMILIES)}"
            )
        tower = model.model.vision_tower
        layers = list(tower.encoder.layers)
        self.embeddings = tower.embeddings
        self.pre_norm = tower.pre_layrnorm if spec.vision_family == "clip" else nn.Identity()
        self.layers = nn.ModuleList(layers[: layers_used(spec, len(layers))])
        self.first_kept = {"full": 0, "default": 1}[spec.select_strategy]
        self.connector = model.model.multi_modal_projector

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, 3, s, s) → image embeddings (b, t, d) and the tower features (b, t, v) that they were made from."""
        hidden = self.pre_norm(self.embeddings(pixel_values))  # (b, n, v)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None)  # (b, n, v)
        features = hidden[:, self.first_kept :]  # (b, t, v)
        return self.connector(features), features


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


def export_vision_fp32(model: Any, spec: ModelSpec, target: Path) -> dict[str, int]:
    """Write the graph in float32: one file, dynamic batch.

    Args:
        model: TinyLlava in float32 and eval mode.
        spec: the checkpoint's spec.
        target: file to write, whole or not at all.

    Returns:
        Type → number of tensors, read back from the file.

    Raises:
        ExportError: the tower can't be exported, or its shapes differ from what the spec promises.
    """
    graph = VisionGraph(model, spec).eval()
    pixels = torch.zeros(2, 3, spec.image_size, spec.image_size)  # a batch of 1 would be taken for a constant
    with torch.no_grad():
        shape = tuple(graph(pixels)[0].shape)
    if shape != (2, spec.visual_tokens, spec.embedding_dim):
        raise ExportError(
            f"{spec.name}: the tower gives {shape[1:]} embeddings, "
            f"the spec says ({spec.visual_tokens}, {spec.embedding_dim})",
            "correct visual_tokens, embedding_dim or select_strategy in model_spec.json",
        )
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph,
                (pixels,),
                input_names=INPUTS,
                output_names=OUTPUTS,
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever failed inside it
        reason = str(error).strip().splitlines()
        raise ExportError(
            f"{spec.name}: the vision graph can't be exported ({reason[0] if reason else error!r})"
        ) from error
    if program is None:
        raise ExportError(f"{spec.name}: the vision graph can't be exported")
    proto = program.model_proto
    del program
    _forget_sources(proto)
    proto.ir_version = IR_VERSION
    proto.producer_name, proto.producer_version = "tinyllava_edge", ""
    onnx_io.save(proto, target)
    return onnx_io.tensor_types(target)


def quantize_vision_int8(src: Path, dst: Path) -> dict[str, int]:
    """Dynamic int8 of every matrix product: weights per channel, signed; activations are quantised as they come.

    Convolutions stay float: as ConvInteger the patch embedding is slower and less exact.

    Returns:
        Type → number of tensors, read back from the file.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with new_file(dst) as temporary, _quiet(), tempfile.TemporaryDirectory(dir=dst.parent, prefix=".quant-") as room:
        link = Path(room) / "fp32.onnx"  # the quantiser writes a second copy beside its source
        link.symlink_to(src.resolve())
        try:
            quantize_dynamic(
                link, temporary, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
            )
        except DecodeError as error:  # that copy is written without a look at the disk, then read back
            if is_full(dst, needed=src.stat().st_size):
                raise no_space(dst) from error
            raise ExportError(f"{src}: not a valid graph ({error})", "export again") from error
    types = onnx_io.tensor_types(dst)
    if not types.get("int8"):
        raise ExportError(f"{dst}: no tensor became int8", "report this with the checkpoint's config.json")
    return types


# Precision → how its file is made from the float32 graph; None is that graph itself.
VISION_PRECISIONS: dict[str, Callable[[Path, Path], dict[str, int]] | None] = {
    "fp32": None,
    "int8": quantize_vision_int8,
}


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' advice off the screen, and off stdout in any case: stdout is data."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

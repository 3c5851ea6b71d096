"""Language model → ONNX decoder that takes `inputs_embeds` and keeps its keys and values outside: for browsers and
devices that have ONNX Runtime only.

The graph is built by onnxruntime-genai's model builder, part by part from the checkpoint's own tensors: nothing is
copied to a second directory, and nothing is looked up on a hub.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from .. import checkpoint
from ..errors import CheckpointError, DependencyError, ExportError, UsageError
from . import onnx_io
from .nbits import quantize_matmuls
from .onnx_parts import save_parts

BLOCK = 32  # weights that share one scale in the 4- and 8-bit forms
# The head keeps 8 bits in the 4-bit forms, and so do Q/K/V and down projections of the first and last layers and every
# third between, much as in llama.cpp's q4_k_m: on the trained nano model the error of the logits halves.
MIXED = "mixed_layers:int8,last_matmul:int8"


@dataclass(frozen=True)
class DecoderPrecision:
    """One numeric form of the decoder."""

    suffix: str
    """what transformers.js puts behind `decoder_model_merged` for this dtype"""
    weights: str
    """onnx_ir.DataType of the matrices"""
    values: str
    """onnx_ir.DataType of activations, keys and values; embeddings and logits are float32 in every form"""


# Keys are transformers.js's own names of its `dtype` option.
DECODER_PRECISIONS: dict[str, DecoderPrecision] = {
    "fp32": DecoderPrecision("", "FLOAT", "FLOAT"),
    "fp16": DecoderPrecision("_fp16", "FLOAT16", "FLOAT16"),
    "q8": DecoderPrecision("_quantized", "INT8", "FLOAT"),
    "q4": DecoderPrecision("_q4", "INT4", "FLOAT"),
    "q4f16": DecoderPrecision("_q4f16", "INT4", "FLOAT16"),
}

# model_type → module and class of the builder. StableLM is Llama with LayerNorm, see `_decoder_class`.
BUILDERS: dict[str, tuple[str, str]] = {
    "llama": ("builders.llama", "LlamaModel"),
    "phi": ("builders.phi", "PhiModel"),
    "stablelm": ("builders.llama", "LlamaModel"),
    "qwen2": ("builders.qwen", "QwenModel"),
    "qwen3": ("builders.qwen", "Qwen3Model"),
    "gemma": ("builders.gemma", "GemmaModel"),
}
_REFUSED = ("qk_layernorm", "use_parallel_residual")  # variants that the builder would leave out without a word
_ROTARY = ("default", "llama3")  # what equals transformers; linear and yarn come out wrong, without a word too
_FULL_LAYER_NORM = ("phi", "stablelm")


def export_decoder(root: Path, out_dir: Path, precision: str = "fp32") -> list[Path]:
    """Write `decoder_model_merged*.onnx` of a checkpoint.

    Inputs: `inputs_embeds` float32 (b, n, h), `attention_mask` int64 (b, past + n), `past_key_values.{i}.key|value`
    (b, kv heads, past, head size). Outputs: `logits` float32 (b, n, vocab), `present.{i}.key|value`. Positions run on
    from the mask; padding on the left isn't supported. The sizes of a head are fixed numbers, because transformers.js
    makes the first, empty cache from the graph's own shapes.

    Args:
        root: checkpoint directory.
        out_dir: directory to write to; it is made if absent. Use files.new_directory to write it whole or not at all.
        precision: key of DECODER_PRECISIONS.

    Returns:
        The graph, then its weight parts, if any.

    Raises:
        UsageError: unknown precision.
        DependencyError: onnxruntime-genai isn't installed.
        CheckpointError: the checkpoint can't be read.
        ExportError: the language model has no such form.
    """
    if precision not in DECODER_PRECISIONS:
        raise UsageError(f"unknown decoder precision {precision!r}", f"known: {', '.join(DECODER_PRECISIONS)}")
    chosen = DECODER_PRECISIONS[precision]
    source = checkpoint.llm_source(root)
    check_architecture(root, source.config)
    target = out_dir / f"decoder_model_merged{chosen.suffix}.onnx"
    out_dir.mkdir(parents=True, exist_ok=True)
    with onnx_io.quiet(), contextlib.redirect_stdout(io.StringIO()), checkpoint.quiet(), torch.no_grad():
        try:
            graph = _build(_stand_alone(source), source.spec.max_length, chosen)
        # the builder has no errors of its own: a part that it doesn't know shows as any of these
        except (ValueError, NotImplementedError, AttributeError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ExportError(
                f"{root}: no {precision} decoder could be built ({type(error).__name__}: {reason})",
                "export the language model as GGUF instead",
            ) from error
        return [target, *save_parts(graph, target)]


def check_architecture(root: Path, config: Any) -> None:
    """Raises ExportError for a language model that the builder doesn't know, or knows only in another variant."""
    if config.model_type not in BUILDERS:
        raise ExportError(
            f"{root}: no ONNX decoder for language models of type {config.model_type!r}",
            f"known: {', '.join(BUILDERS)}; export GGUF instead",
        )
    for name in _REFUSED:
        if getattr(config, name, False):
            raise ExportError(f"{root}: no ONNX decoder with {name}", "export the language model as GGUF instead")
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary not in _ROTARY:
        raise ExportError(
            f"{root}: no ONNX decoder with rotary positions of type {rotary!r}",
            f"known: {', '.join(_ROTARY)}; export GGUF instead",
        )


def _stand_alone(source: checkpoint.LlmSource) -> Any:
    """The language model as its own Hugging Face class, on tensors that stay in the files until they are read."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    found = model.load_state_dict({name: source.get(name) for name in source.infos}, assign=True, strict=False)
    if model.config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    empty = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if empty or found.unexpected_keys:
        raise CheckpointError(
            f"{source.root}: language model lacks {empty[:8]} and has unknown {found.unexpected_keys[:8]}",
            "copy the whole checkpoint again",
        )
    return model.eval()


def _build(model: Any, positions: int, precision: DecoderPrecision) -> ir.Model:
    """The graph, its float weights still lazy."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if config.model_type in _FULL_LAYER_NORM:
        config.rms_norm_eps = config.layer_norm_eps  # the only epsilon that the builder reads
    # Cosines are tabulated; Hugging Face computes them as it goes and so runs past max_position_embeddings.
    config.max_position_embeddings = max(config.max_position_embeddings, positions)
    values, weights = ir.DataType[precision.values], ir.DataType[precision.weights]
    # 16-bit grouped-query attention is offered for WebGPU only, where such a graph belongs.
    provider = "cpu" if values == ir.DataType.FLOAT else "webgpu"
    options: dict[str, Any] = {
        "exclude_embeds": True,
        "shared_embeddings": False,
        "fuse_qk_norm_gqa": False,  # the fused form runs on GPUs only
        "hf_remote": False,
        "hf_token": False,
        "block_size": BLOCK,
    }
    if weights == ir.DataType.INT4:
        options["matmul_mixed_precision"] = MIXED
    decoder = _decoder_class(model)(config, values, weights, provider, "", options)
    decoder.make_model("")
    graph: ir.Model = decoder.model
    if weights != values:
        default, changed = weights.bitwidth, decoder.int4_customized_weight_config
        quantize_matmuls(graph, lambda name: changed.get(name, {}).get("bits", default), BLOCK)
    graph.graph.sort()
    if values != ir.DataType.FLOAT:
        _take_float32(graph, "inputs_embeds", values)
    graph.producer_name, graph.producer_version = "tinyllava_edge", ""
    return graph


def _decoder_class(model: Any) -> type:
    """The builder of a model, with what it would guess or fetch replaced by what is known here."""
    module, name = BUILDERS[model.config.model_type]
    base = getattr(_import_builder(module), name)
    layer_norm, head = model.config.model_type == "stablelm", model.get_output_embeddings()

    class Decoder(base):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, *rest: Any) -> None:
            super().__init__(config, *rest)
            if layer_norm:
                self.layernorm_attrs["simple"] = False
            for names, side in ((self.input_shapes, "past_key_values"), (self.output_shapes, "present")):
                for part in ("key", "value"):
                    names[f"{side}.{part}"][-1] = self.head_size
            self.input_shapes["inputs_embeds"][-1] = self.hidden_size
            self.output_types["logits"] = ir.DataType.FLOAT

        def load_weights(self, input_path: str) -> Any:
            return model

        def has_lm_head(self, module: Any) -> bool:
            return module is head  # and not any matrix that happens to be as wide as the vocabulary

    return Decoder


def _import_builder(module: str) -> Any:
    """A module of the builder. Its package puts itself on sys.path to be found; it is taken off again."""
    before = list(sys.path)
    try:
        importlib.import_module("onnxruntime_genai.models")
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"the ONNX decoder needs the package onnxruntime-genai ({error})", "pip install 'tinyllava-edge[decoder]'"
        ) from error
    finally:
        sys.path[:] = before


def _take_float32(model: ir.Model, name: str, inner: ir.DataType) -> None:
    """Make an input float32 and cast it inside, so that any embed_tokens fits any decoder."""
    (given,) = [value for value in model.graph.inputs if value.name == name]
    cast = ir.node("Cast", [given], {"to": inner}, name=f"/{name}/Cast")
    cast.outputs[0].name = f"{name}_cast"
    cast.outputs[0].dtype, cast.outputs[0].shape = inner, given.shape
    for use in list(given.uses()):
        if use.node is not cast:
            use.node.replace_input_with(use.idx, cast.outputs[0])
    given.dtype = ir.DataType.FLOAT
    model.graph.insert_before(model.graph[0], cast)

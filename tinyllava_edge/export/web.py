"""A checkpoint in the layout that transformers.js reads: three ONNX graphs, their configuration and the tokenizer.

onnx/vision_encoder*.onnx          pixel_values → image_features (what the decoder reads in the picture's place)
onnx/embed_tokens*.onnx            input_ids → inputs_embeds
onnx/decoder_model_merged*.onnx    inputs_embeds, attention_mask, cache → logits, cache
config.json, generation_config.json, preprocessor_config.json, processor_config.json, tokenizer*.json

Read against transformers.js 4.3.1, whose class for all of this is LlavaForConditionalGeneration.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from .. import checkpoint
from ..errors import DependencyError, ExportError, UsageError
from ..files import new_directory, write_json, write_text
from ..prompt import IMAGE_MARKER, get_template
from ..spec import ModelSpec
from ..tokenizer_sections import FIRST, SectionTokenizer, space_prefix
from . import onnx_io
from .chat_template import chat_template
from .decoder import DECODER_PRECISIONS, check_architecture, export_decoder
from .embed_tokens import export_embed_tokens
from .onnx_parts import save_parts
from .vision import VISION_PRECISIONS, export_vision_fp32

Progress = Callable[[str], None]


@dataclass(frozen=True)
class WebPrecision:
    """What one value of transformers.js's `dtype` means for the three graphs."""

    vision: str
    """key of VISION_PRECISIONS; weight-only forms, because dynamic int8 comes out wrong on WebGPU"""
    table: str
    """form of the embedding table: one of embed_tokens.TABLES"""


# Keys as in DECODER_PRECISIONS, which also holds the file names' suffixes.
WEB_PRECISIONS: dict[str, WebPrecision] = {
    "fp32": WebPrecision("fp32", "float32"),
    "fp16": WebPrecision("fp16", "float16"),
    "q8": WebPrecision("w8", "float16"),
    "q4": WebPrecision("w4", "int4"),
    "q4f16": WebPrecision("w4", "int4"),
}
DEFAULT_WEB = ("q4",)


def export_web(
    root: Path,
    out_dir: Path,
    precisions: Sequence[str] = DEFAULT_WEB,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the whole layout into a directory of its own, whole or not at all; see `write_web`.

    Raises:
        StorageError: `out_dir` exists and `force` is off, or the disk is full.
    """
    check_precisions(precisions)
    with new_directory(out_dir, force=force, ours="config.json") as temporary:
        written = write_web(root, temporary, precisions, progress=progress)
        relative = [path.relative_to(temporary) for path in written]
    return [out_dir / path for path in relative]


def write_web(
    root: Path,
    out_dir: Path,
    precisions: Sequence[str] = DEFAULT_WEB,
    *,
    vision_fp32: Path | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the layout below a directory that is being filled, e.g. `web/` in a bundle.

    Args:
        root: checkpoint directory.
        out_dir: directory to write to; it is made if absent.
        precisions: keys of WEB_PRECISIONS. The first becomes the default that `from_pretrained` loads.
        vision_fp32: float32 vision graph of this checkpoint, to be spared the export of another.
        progress: told each step.

    Returns:
        Files written, in a fixed order.

    Raises:
        UsageError: unknown precision, or none.
        DependencyError: onnxruntime-genai isn't installed.
        CheckpointError: the checkpoint can't be read.
        ExportError: a part has no such form.
    """
    check_precisions(precisions)
    precisions = tuple(dict.fromkeys(precisions))
    tell = progress or (lambda _text: None)
    source = checkpoint.llm_source(root)
    check_architecture(root, source.config)
    if source.spec.image_policy == "pad":
        tell("web: transformers.js can't pad pictures to a square; feed pixel_values made by preprocess.onnx")
    onnx = out_dir / "onnx"
    onnx.mkdir(parents=True, exist_ok=True)
    graphs: list[list[Path]] = []
    base = vision_fp32 or onnx / ".vision.onnx"
    if vision_fp32 is None:
        tell("web: vision graph")
        model, spec = checkpoint.load_vision(root)
        export_vision_fp32(model, spec, base)
        del model
        gc.collect()  # modules refer to each other: without this the tower stays until Python next looks
    for name in precisions:
        tell(f"web: {name}")
        suffix = DECODER_PRECISIONS[name].suffix
        graphs.append(_write_vision(base, onnx / f"vision_encoder{suffix}.onnx", WEB_PRECISIONS[name].vision))
        target = onnx / f"embed_tokens{suffix}.onnx"
        graphs.append(export_embed_tokens(source, target, WEB_PRECISIONS[name].table))
        graphs.append(export_decoder(root, onnx, name))
    if vision_fp32 is None:
        onnx_io.remove(base)
    written = [path for files in graphs for path in files]
    for name, value in _configs(source, precisions, graphs).items():
        write_json(out_dir / name, value)
        written.append(out_dir / name)
    tokenizer = out_dir / "tokenizer.json"
    write_text(tokenizer, _tokenizer_json(source))
    return [*written, tokenizer]


def check_precisions(precisions: Sequence[str]) -> None:
    """Raises UsageError for an unknown name or none, and DependencyError if the decoder's builder is missing."""
    from importlib.util import find_spec

    unknown = [name for name in precisions if name not in WEB_PRECISIONS]
    if unknown or not precisions:
        raise UsageError(
            f"unknown web precision {unknown[0]!r}" if unknown else "no web precision asked for",
            f"known: {', '.join(WEB_PRECISIONS)}",
        )
    if find_spec("onnxruntime_genai") is None:
        raise DependencyError(
            "the ONNX decoder needs the package onnxruntime-genai", "pip install 'tinyllava-edge[decoder]'"
        )


def image_tokens_added(spec: ModelSpec) -> int:
    """`num_additional_image_tokens` with which LlavaProcessor's count, (size // patch)² + this, is the model's own.

    Negative where the model gives fewer embeddings than the picture has patches: a dropped first patch, a resampler.
    """
    return spec.visual_tokens - (spec.image_size // spec.patch_size) ** 2


def _write_vision(base: Path, target: Path, precision: str) -> list[Path]:
    """A precision of the vision graph under transformers.js's names: the embeddings are its `image_features`."""
    convert = VISION_PRECISIONS[precision]
    made = base if convert is None else target.with_name(f".{target.name}")
    try:
        if convert is not None:
            convert(base, made, ())
        model = ir.load(made)
        outputs = {value.name: value for value in model.graph.outputs}
        if set(outputs) != {"image_embeds", "image_features"}:
            raise ExportError(f"{base}: gives {sorted(map(str, outputs))}, not a vision graph of ours", "export again")
        model.graph.outputs[:] = [outputs["image_embeds"]]
        outputs["image_features"].name = "tower_features"
        outputs["image_embeds"].name = "image_features"
        return [target, *save_parts(model, target)]
    finally:
        if convert is not None:
            onnx_io.remove(made)


def _tokenizer_json(source: checkpoint.LlmSource) -> str:
    """The checkpoint's file. Where a space goes in front only of what starts a chunk, the chat template adds it.

    tokenizer.json has no word for that place: its `Prepend` would add the space behind end-of-turn marks too.
    """
    if space_prefix(source.tokenizer) != FIRST:
        return (source.root / "tokenizer.json").read_text(encoding="utf-8")
    bare: str = SectionTokenizer(source.tokenizer).bare.to_str(pretty=True)
    return bare


def _configs(
    source: checkpoint.LlmSource, precisions: Sequence[str], graphs: Sequence[Sequence[Path]]
) -> dict[str, dict[str, Any]]:
    """File name → JSON of everything but the tokenizer's own file."""
    root, spec, tokenizer = source.root, source.spec, source.tokenizer
    template = get_template(spec.template)
    config = json.loads(checkpoint.load_config(root).to_json_string(use_diff=False))
    config |= {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": int(tokenizer.convert_tokens_to_ids(IMAGE_MARKER)),
        "transformers.js_config": {
            "dtype": precisions[0],
            "use_external_data_format": {files[0].name: len(files) - 1 for files in graphs},
            "kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"},
        },
        # for programs that prepare pixels themselves; transformers.js can't pad to a square
        "tinyllava_edge": {"image_policy": spec.image_policy, "pad_color": list(spec.pad_color)},
    }
    end = tokenizer.convert_tokens_to_ids(template.end_of_turn) if template.end_of_turn else None
    stops = list(dict.fromkeys(int(id_) for id_ in (end, tokenizer.eos_token_id) if id_ is not None))
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stops,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
        "do_sample": False,
    }
    settings = json.loads((root / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": spec.max_length}
    first_space = space_prefix(tokenizer) == FIRST
    if first_space:
        settings.pop("legacy", None)  # it speaks of the space that tokenizer.json no longer adds
    if not template.caption_only:  # without the first token: the tokenizer adds it to the rendered text
        settings["chat_template"] = chat_template(template, "", first_space=first_space)
    added = image_tokens_added(spec)
    return {
        "config.json": config,
        "generation_config.json": generation,
        "preprocessor_config.json": {**checkpoint.processor_config(spec), "processor_class": "LlavaProcessor"},
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE_MARKER,
            "patch_size": spec.patch_size,
            "num_additional_image_tokens": added,
            "vision_feature_select_strategy": "full",  # the Python class takes one more off for `default`, this one not
        },
        "tokenizer_config.json": settings,
    }

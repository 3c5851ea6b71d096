"""A checkpoint: Hugging Face Llava directory, safetensors only, plus `model_spec.json`, tokenizer and image processor.

config.json, model.safetensors, generation_config.json   as `save_pretrained` writes them
tokenizer.json, tokenizer_config.json                    fast tokenizer with `<image>` as a special token
preprocessor_config.json                                 numbers of the image processor
model_spec.json                                          how the model must be fed (spec.ModelSpec)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint_spec import SPEC_FILE, load_spec
from .errors import CheckpointError
from .files import new_directory, write_json
from .model import TinyLlava
from .prompt import IMAGE_MARKER
from .spec import ModelSpec

PROCESSORS = {"siglip": "SiglipImageProcessorPil", "clip": "CLIPImageProcessorPil"}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint, model in float32 and eval mode."""

    root: Path
    """directory"""
    model: TinyLlava
    """the model"""
    tokenizer: Any
    """transformers fast tokenizer"""
    spec: ModelSpec
    """how the model must be fed"""


def save(model: TinyLlava, tokenizer: Any, spec: ModelSpec, out: Path, *, force: bool = False) -> None:
    """Write a checkpoint directory, whole or not at all. Raises StorageError if `out` exists and `force` is off."""
    with new_directory(out, force=force) as temporary:
        with quiet():
            model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "preprocessor_config.json", processor_config(spec))
        write_json(temporary / SPEC_FILE, spec.to_dict())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars from transformers: files on this disk load in an instant."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


def load(root: str | Path) -> Checkpoint:
    """Load a checkpoint offline, in float32, eval mode.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors are missing, left over or of another shape.
    """
    root = Path(root)
    spec = load_spec(root)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if name == "model.safetensors" and (root / "model.safetensors.index.json").is_file():
            continue
        if not (root / name).is_file():
            raise CheckpointError(f"{root / name}: missing", "copy the whole checkpoint again")
    model = _load_model(root)
    tokenizer = load_tokenizer(root)
    return Checkpoint(root, model, tokenizer, spec)


def _load_model(root: Path) -> TinyLlava:
    import torch
    from safetensors import SafetensorError

    try:
        with quiet():
            model, info = TinyLlava.from_pretrained(
                root, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{root}: can't be loaded ({str(error).splitlines()[0]})", "copy the whole checkpoint again"
        ) from error
    wrong = {
        key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(wrong.values()):
        listed = "; ".join(f"{key}: {', '.join(names[:8])}" for key, names in wrong.items() if names)
        raise CheckpointError(f"{root}: tensors don't match config.json: {listed}", "copy the whole checkpoint again")
    return model.eval()


def load_tokenizer(root: Path) -> Any:
    """The fast tokenizer, straight from tokenizer.json. Raises CheckpointError if it lacks the image token."""
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(root, local_files_only=True)
    except Exception as error:  # the Rust tokenizer raises bare Exception on a damaged file
        raise CheckpointError(f"{root / 'tokenizer.json'}: can't be read ({error})", "restore the file") from error
    if tokenizer.convert_tokens_to_ids(IMAGE_MARKER) in (None, tokenizer.unk_token_id):
        raise CheckpointError(f"{root / 'tokenizer.json'}: has no {IMAGE_MARKER} token", "restore the file")
    return tokenizer


def image_processor(spec: ModelSpec) -> Any:
    """The Hugging Face processor (Pillow backend) that the reference feeds the tower with."""
    import transformers

    settings = processor_config(spec)
    del settings["image_processor_type"]
    return getattr(transformers, PROCESSORS[spec.vision_family])(**settings)


def processor_config(spec: ModelSpec) -> dict[str, Any]:
    """preprocessor_config.json of a spec. `pad` pads before the processor runs, so it warps a square afterwards."""
    side = spec.image_size
    crop = spec.image_policy == "crop"
    return {
        "image_processor_type": PROCESSORS[spec.vision_family].removesuffix("Pil"),
        "do_resize": True,
        "size": {"shortest_edge": side} if crop else {"height": side, "width": side},
        "resample": 3,  # bicubic
        "do_center_crop": crop,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.image_mean),
        "image_std": list(spec.image_std),
        "do_convert_rgb": True,
    }


def add_image_token(model: TinyLlava, tokenizer: Any) -> None:
    """Give `<image>` a token of its own and grow the embeddings to a multiple of 64, as Hugging Face's Llava files do.

    The new head rows are zero: their logit is 0 until trained, and they are never targets.
    """
    import torch

    tokenizer.add_tokens([IMAGE_MARKER], special_tokens=True)
    image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_MARKER))
    old = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > old:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[old:].zero_()
            model.get_output_embeddings().weight[old:].zero_()
    model.config.image_token_index = image_token_id
    model.config.image_token_id = image_token_id

"""A checkpoint: Hugging Face Llava directory, safetensors only, plus `model_spec.json`, tokenizer and image processor.

config.json, model.safetensors, generation_config.json   as `save_pretrained` writes them
tokenizer.json, tokenizer_config.json                    fast tokenizer with `<image>` as a special token
preprocessor_config.json                                 numbers of the image processor
model_spec.json                                          how the model must be fed (spec.ModelSpec)
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlavaConfig

from .checkpoint_spec import SPEC_FILE, load_spec, read_json
from .errors import CheckpointError
from .files import new_directory, write_json
from .llava_config import MODEL_TYPE, TinyLlavaConfig
from .prompt import IMAGE_MARKER
from .spec import FILTERS, ModelSpec
from .tensor_names import CONNECTOR, HEAD, TOWER, halves, in_memory, stand_alone
from .towers import TOWERS
from .weights import INDEX, SINGLE, TensorInfo, Weights, open_weights

if TYPE_CHECKING:
    from .model import TinyLlava

# Largest values that are believed; a hostile file could ask for any amount of memory.
SIZES = {
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 10,
    "num_key_value_heads": 1 << 10,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 24,
    "image_size": 1 << 12,
    "patch_size": 1 << 12,
    "num_channels": 16,
    "num_patches": 1 << 16,
}


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
    with new_directory(out, force=force, ours="config.json") as temporary:
        with quiet(), contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's import, if it is installed, talks
            model.save_pretrained(temporary, safe_serialization=True)
        config = read_json(temporary / "config.json")
        if config["model_type"] != MODEL_TYPE:  # transformers writes our class's name, which other programs don't know
            write_json(temporary / "config.json", {**config, "architectures": ["LlavaForConditionalGeneration"]})
        save_tokenizer(tokenizer, temporary)
        write_json(temporary / "preprocessor_config.json", processor_config(spec))
        write_json(temporary / SPEC_FILE, spec.to_dict())


def save_tokenizer(tokenizer: Any, out: Path) -> None:
    """tokenizer.json and its settings, under the class name that transformers before 5 knows too."""
    tokenizer.save_pretrained(out)
    settings = out / "tokenizer_config.json"
    value = read_json(settings)
    if value.get("tokenizer_class") == "TokenizersBackend":
        write_json(settings, {**value, "tokenizer_class": "PreTrainedTokenizerFast"})


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
    for name in ("config.json", SINGLE, "tokenizer.json"):
        if name == SINGLE and (root / INDEX).is_file():
            continue
        if not (root / name).is_file():
            raise CheckpointError(f"{root / name}: missing", "copy the whole checkpoint again")
    model = _load_model(root)
    tokenizer = load_tokenizer(root)
    return Checkpoint(root, model, tokenizer, spec)


def load_config(root: Path) -> LlavaConfig:
    """config.json under its own class. Raises CheckpointError that names the file."""
    path = root / "config.json"
    value = read_json(path)
    check_sizes(path, value)
    classes = {"llava": LlavaConfig, MODEL_TYPE: TinyLlavaConfig}
    kind = value.get("model_type")
    if not isinstance(kind, str) or kind not in classes:
        raise CheckpointError(f"{path}: model_type {str(kind)[:40]!r}; known: {', '.join(classes)}", "import the model")
    config_class = classes[kind]
    try:
        config: LlavaConfig = config_class.from_dict(value)
        sizes = (config.vision_config.hidden_size, config.text_config.hidden_size, config.text_config.vocab_size)
    except Exception as error:  # each sub-configuration's validation raises its own
        raise CheckpointError(f"{path}: not a Llava configuration ({line(error)})", "restore the file") from error
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise CheckpointError(f"{path}: widths are {sizes}", "restore the file")
    return config


def check_sizes(path: Path, value: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a size that is no integer or beyond any real model, before memory is asked for it."""
    for part in ("text_config", "vision_config", "first", "second"):
        inner = value.get(part)
        if isinstance(inner, Mapping):
            check_sizes(path, inner)
        elif inner is not None:
            raise CheckpointError(f"{path}: {part} is a {type(inner).__name__}, not an object", "restore the file")
    for key, limit in SIZES.items():
        size = value.get(key)
        if size is not None and (type(size) is not int or not 0 < size <= limit):
            raise CheckpointError(f"{path}: {key} {str(size)[:40]!r} is not in 1..{limit}", "restore the file")
    rope = value.get("rope_parameters")
    numbers = {**value, **rope} if isinstance(rope, Mapping) else value
    for key in ("rope_theta", "rms_norm_eps", "layer_norm_eps"):
        number = numbers.get(key, 1)
        if type(number) not in (int, float) or not 0 < number < math.inf:
            raise CheckpointError(f"{path}: {key} {str(number)[:40]!r} is not a positive number", "restore the file")


def load_vision(root: Path) -> tuple[TinyLlava, ModelSpec]:
    """Tower and connector alone, float32, eval mode, read tensor by tensor: the language model is never in memory.

    Returns:
        A TinyLlava with an empty `model.language_model` and no `lm_head`; `model.vision_tower`,
        `model.multi_modal_projector`, `tower_features` and `config` are as after `load`. And the spec.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors are missing, left over or of another shape.
    """
    from transformers.initialization import no_init_weights

    from .model import TinyLlava, build_tower

    spec, config = load_spec(root), load_config(root)
    with building(root), torch.device("meta"):
        model = TinyLlava(config)
    model.model.language_model = torch.nn.Module()
    del model.lm_head
    # On the CPU for its buffers, which no file holds; without initial values, whose memory would be touched.
    with building(root), no_init_weights():
        model.model.vision_tower = build_tower(config.vision_config)
    weights = open_weights(root)
    tensors: dict[str, torch.Tensor] = {}
    for name in weights.infos:
        ours = in_memory(name)
        if ours is None:
            raise CheckpointError(f"{root}: tensor {name} belongs to no part of the model", "import the model again")
        if ours.startswith((TOWER, CONNECTOR)):
            tensors |= _in_parts(ours, weights.get(name).float())
    check_tensors(root, {name: tuple(t.shape) for name, t in tensors.items()}, shapes(model))
    model.load_state_dict(tensors, assign=True, strict=False)
    return model.eval().requires_grad_(False), spec


def _in_parts(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """In-memory name → tensor of one tensor of a file: two where the file joins what the model keeps apart."""
    pair = halves(name)
    if pair is None or tensor.shape[0] % 2:
        return {name: tensor}
    return dict(zip(pair, tensor.chunk(2), strict=True))


def _half(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0] // 2, *shape[1:]) if shape else shape


@dataclass(frozen=True)
class LlmSource:
    """The language model of a checkpoint as if it stood alone; a weights.TensorSource."""

    root: Path
    """directory of the checkpoint"""
    config: Any
    """transformers configuration of the language model"""
    tokenizer: Any
    """transformers fast tokenizer"""
    spec: ModelSpec
    """how the model must be fed"""
    infos: Mapping[str, TensorInfo]
    """stand-alone name (`model.layers.0…`, `lm_head.weight`) → header; a tied head is left out"""
    names: Mapping[str, str]
    """stand-alone name → name in the files"""
    weights: Weights
    """the checkpoint's files"""

    def get(self, name: str) -> torch.Tensor:
        """One tensor in its type on disk. Raises CheckpointError."""
        return self.weights.get(self.names.get(name, name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of one tensor."""
        return self.weights.rows(self.names.get(name, name), start, stop)


def llm_source(root: Path) -> LlmSource:
    """Open the language model of a checkpoint without loading it.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors are missing, left over or of another shape.
    """
    from .model import TinyLlava

    spec, config, weights = load_spec(root), load_config(root), open_weights(root)
    with building(root), torch.device("meta"):
        model = TinyLlava(config)
    ours = {name: in_memory(name) or name for name in weights.infos}
    found: dict[str, tuple[int, ...]] = {}
    for name, info in weights.infos.items():
        pair = halves(ours[name])
        found |= {ours[name]: info.shape} if pair is None else dict.fromkeys(pair, _half(info.shape))
    check_tensors(root, found, shapes(model))
    tied = bool(config.tie_word_embeddings)
    names = {
        alone: name
        for name in weights.infos
        if (alone := stand_alone(ours[name])) and not (tied and alone == f"{HEAD}weight")
    }
    infos = {alone: weights.infos[name] for alone, name in names.items()}
    return LlmSource(root, config.text_config, load_tokenizer(root), spec, infos, names, weights)


def shapes(model: TinyLlava) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that a file of this model holds; a tied head is left out."""
    tied = f"{HEAD}weight" if model.config.tie_word_embeddings else ""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != tied}


def check_tensors(
    where: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], hint: str = ""
) -> None:
    """Raises CheckpointError that lists what is missing, left over or of another shape; a tied head may be there."""
    left = [name for name in found if name not in expected and name != f"{HEAD}weight"]
    wrong = [
        f"{name} {list(found[name])} for {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    lists = {"missing": [name for name in expected if name not in found], "left over": left, "wrong shape": wrong}
    if any(lists.values()):
        listed = "; ".join(f"{kind}: {_some(names)}" for kind, names in lists.items() if names)
        raise CheckpointError(
            f"{where}: tensors don't match the configuration: {listed}", hint or "copy the whole checkpoint again"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


@contextlib.contextmanager
def building(root: Path) -> Iterator[None]:
    """Turn whatever a nonsensical configuration makes transformers raise into one error."""
    try:
        with quiet():
            yield
    except CheckpointError as error:
        if str(root) in error.message:
            raise
        raise CheckpointError(f"{root / 'config.json'}: {error.message}", error.hint) from error
    except Exception as error:
        raise CheckpointError(
            f"{root / 'config.json'}: no model can be built from it ({line(error)})", "restore the file"
        ) from error


def line(error: Exception) -> str:
    """First line of what a library says, short enough for one of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _load_model(root: Path) -> TinyLlava:
    from safetensors import SafetensorError

    from .model import TinyLlava

    config = load_config(root)
    open_weights(root)  # headers that lie, and an index that leaves the directory: transformers would follow it
    try:
        with quiet():
            model, info = TinyLlava.from_pretrained(
                root,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except CheckpointError as error:
        raise CheckpointError(f"{root / 'config.json'}: {error.message}", error.hint) from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{root}: can't be loaded ({line(error)})", "copy the whole checkpoint again") from error
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
    return getattr(transformers, TOWERS[spec.vision_family].processor)(**settings)


def processor_config(spec: ModelSpec) -> dict[str, Any]:
    """preprocessor_config.json of a spec. `pad` pads before the processor runs, so it warps a square afterwards."""
    side = spec.image_size
    crop = spec.image_policy == "crop"
    return {
        "image_processor_type": TOWERS[spec.vision_family].processor.removesuffix("Pil"),
        "do_resize": True,
        "size": {"shortest_edge": spec.crop_resize or side} if crop else {"height": side, "width": side},
        "resample": FILTERS[spec.resample],
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
    tokenizer.add_tokens([IMAGE_MARKER], special_tokens=True)
    image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_MARKER))
    old = model.get_input_embeddings().weight.shape[0]
    needed = max(tokenizer.get_vocab().values()) + 1  # ids may have holes
    if needed > old:
        model.resize_token_embeddings(needed, pad_to_multiple_of=64, mean_resizing=False)
        with torch.no_grad():
            head = model.get_output_embeddings()
            for tensor in (model.get_input_embeddings().weight, head.weight, head.bias):
                if tensor is not None:
                    tensor[old:].zero_()
    model.config.image_token_index = image_token_id
    model.config.image_token_id = image_token_id

"""Any tower or two, and any causal language model → the spec of a new model, from what their own files say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import check_sizes, line
from ..checkpoint_spec import read_json
from ..errors import CheckpointError, UsageError
from ..image_numbers import find_processor, image_numbers, integer
from ..prompt import TEMPLATES, get_template
from ..spec import POLICIES, STRATEGIES, ModelSpec
from ..tokenizer_files import fast_tokenizer
from ..towers import CONTAINERS, FAMILIES, TOWERS, find_tower

MAX_LENGTH = 3072  # positions of a new model, where its language model has as many: what the share recipe trains with
_HUGGING_FACE = "give a Hugging Face model directory"

# model_type → templates that upstream trains it with, and their kin: the words are the same in all, the token that
# ends a turn is not. Of several the one is taken that ends with the tokenizer's own end-of-sequence token.
LLM_TEMPLATES: dict[str, tuple[str, ...]] = {
    "llama": ("llama", "phi", "qwen2_instruct", "llama3", "llama3_instruct"),
    "phi": ("phi",),
    "stablelm": ("phi",),
    "gemma": ("gemma",),
    "gemma2": ("gemma",),
    "gemma3_text": ("gemma",),
    "qwen2": ("qwen2_base", "qwen2_instruct"),
    "qwen3": ("qwen2_base", "qwen2_instruct"),
}


@dataclass(frozen=True)
class TowerParts:
    """What a new model's tower is made of."""

    family: str
    """key of TOWERS; `mof` for two directories"""
    configs: tuple[Any, ...]
    """transformers configuration of each directory's picture tower"""
    directories: tuple[Path, ...]
    """Hugging Face directories, the one whose numbers prepare the pictures first"""


def spec_of(
    vision_dir: Path | Sequence[Path],
    llm_dir: Path,
    *,
    connector: str = "",
    template: str = "",
    name: str = "",
    select_strategy: str = "",
    feature_layer: int = -2,
    image_policy: str = "",
    image_size: int = 0,
    max_length: int = 0,
    connector_options: Mapping[str, int] | None = None,
) -> ModelSpec:
    """The spec of a new model, for `init_checkpoint`. Nothing is told by a path or by a part of a name.

    Args:
        vision_dir: Hugging Face directory of the tower; two for a mixture of towers.
        llm_dir: Hugging Face directory of the language model and its tokenizer.
        connector: whole name; empty takes mlp2x_gelu, and mof_mlp for a mixture.
        template: key of prompt.TEMPLATES; empty takes the one of LLM_TEMPLATES.
        name: label of the model; empty joins the directories' names.
        select_strategy: `default` drops the first token; empty drops a class token and keeps every patch.
        feature_layer: index into the tower's hidden states.
        image_policy: `warp`, `crop` or `pad`; empty takes what preprocessor_config.json does.
        image_size: side of the square input in pixels, for towers that resize their positions; 0 takes the file's own.
        max_length: longest sequence, picture included; 0 takes the language model's positions, at most 3,072. More than
            its positions is for rotary ones only: TinyLLaVA's share models run Phi-2's 2,048 to 3,072.
        connector_options: as `build_connector`.

    Raises:
        CheckpointError: a directory that can't be read, or parts that don't fit.
        UsageError: no template for the language model, or a value out of range.
    """
    from ..connectors import connector_tokens

    tower, text = read_towers(vision_dir), read_llm(llm_dir)
    entry, vision = TOWERS[tower.family], tower.configs[0]
    where = tower.directories[0] / "config.json"
    numbers = _numbers(tower, image_size, image_policy)
    strategy = select_strategy or ("default" if entry.class_token else "full")
    if strategy not in STRATEGIES:
        raise UsageError(f"select strategy {strategy!r}", f"known: {', '.join(STRATEGIES)}")
    patch = integer(where, "patch_size", vision.patch_size)
    features = entry.tokens_per_patch * (numbers["image_size"] // patch) ** 2
    features += entry.class_token - (strategy == "default")
    kind = connector or ("mof_mlp" if tower.family == "mof" else "mlp2x_gelu")
    mean = numbers["image_mean"]
    spec = ModelSpec(
        name=name or "-".join(path.resolve().name for path in (*tower.directories, llm_dir)),
        vision_family=tower.family,
        llm_family=text.model_type,
        patch_size=patch,
        pad_color=(int(255 * mean[0]), int(255 * mean[1]), int(255 * mean[2])),
        feature_layer=feature_layer,
        select_strategy=strategy,
        visual_tokens=connector_tokens(kind, features, connector_options),
        embedding_dim=integer(llm_dir / "config.json", "hidden_size", text.hidden_size),
        connector=kind,
        template=template_of(llm_dir, text.model_type, template),
        max_length=_length(llm_dir, text, max_length),
        compat="native",
        **numbers,
    )
    return ModelSpec.from_dict(spec.to_dict(), str(where))


def read_towers(vision_dir: Path | Sequence[Path]) -> TowerParts:
    """Configurations of one tower's directory, or of two for a mixture. Raises CheckpointError."""
    directories = (vision_dir,) if isinstance(vision_dir, Path) else tuple(vision_dir)
    if len(directories) not in (1, 2):
        raise UsageError(f"{len(directories)} vision towers", "give one directory, or two for a mixture")
    configs = []
    for directory in directories:
        config = _read(directory)
        if config.model_type in CONTAINERS:
            config = config.vision_config
        try:
            find_tower(config.model_type)
        except CheckpointError as error:
            raise CheckpointError(f"{directory / 'config.json'}: {error.message}", error.hint) from error
        configs.append(config)
    family = "mof" if len(configs) == 2 else FAMILIES[configs[0].model_type]
    return TowerParts(family, tuple(configs), directories)


def read_llm(llm_dir: Path) -> Any:
    """transformers configuration of a language model's directory. Raises CheckpointError."""
    config = _read(llm_dir)
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise CheckpointError(
            f"{llm_dir / 'config.json'}: {config.model_type} is no plain language model",
            "give the directory of a causal language model, text alone",
        )
    return config


def template_of(llm_dir: Path, model_type: str, template: str = "") -> str:
    """The conversation template of a language model; its end-of-turn token must be the tokenizer's.

    Args:
        llm_dir: directory with the tokenizer.
        model_type: the language model's.
        template: key of prompt.TEMPLATES that is asked for, or nothing.

    Raises:
        UsageError: none fits, and none was named.
    """
    if template:
        if get_template(template).caption_only:
            raise UsageError(f"template {template!r} is for stage 1 only", "name a conversation template")
        return template
    known = LLM_TEMPLATES.get(model_type, ())
    if len(known) == 1:
        return known[0]
    tokenizer = fast_tokenizer(llm_dir)
    ends = {name: TEMPLATES[name].end_of_turn for name in known}
    found = next((name for name, end in ends.items() if end == tokenizer.eos_token), "")
    if not found:
        vocabulary = tokenizer.get_vocab()
        fitting = [name for name, item in TEMPLATES.items() if item.end_of_turn and item.end_of_turn in vocabulary]
        raise UsageError(
            f"{llm_dir}: no template is known for {model_type} whose tokenizer ends with {tokenizer.eos_token!r}",
            f"choose one with --template; its vocabulary has the end of: {', '.join(fitting) or 'none'}",
        )
    return found


def _numbers(tower: TowerParts, image_size: int, image_policy: str) -> dict[str, Any]:
    """The spec's fields about pictures: of the first tower's processor, as upstream prepares a mixture's."""
    family, config, directory = FAMILIES[tower.configs[0].model_type], tower.configs[0], tower.directories[0]
    given = {"image_size": getattr(config, "image_size", None)}
    if given["image_size"] is None:  # NaFlex: the square that its table of positions is made for
        given["image_size"] = math.isqrt(int(config.num_patches)) * int(config.patch_size)
    numbers = image_numbers(find_processor(directory), given, family)
    fixed = [
        (path, part.image_size)
        for path, part in zip(tower.directories, tower.configs, strict=True)
        if find_tower(part.model_type).fixed_positions
    ]
    if image_size:
        numbers |= {"image_size": integer(directory, "image size", image_size), "crop_resize": 0}
    for path, size in fixed:
        if numbers["image_size"] != size:
            raise CheckpointError(
                f"{path}: takes pictures of {size} pixels, not of {numbers['image_size']}",
                "its positions are fixed: choose that size, or another tower",
            )
    grids = {numbers["image_size"] // int(part.patch_size) for part in tower.configs}
    if len(grids) > 1:
        raise CheckpointError(
            f"{tower.directories[1]}: cuts a picture into other patches than {tower.directories[0]}: a side of "
            f"{' and '.join(map(str, sorted(grids)))}",
            "mix towers with patches of one size",
        )
    if image_policy:
        if image_policy not in POLICIES:
            raise UsageError(f"image policy {image_policy!r}", f"known: {', '.join(POLICIES)}")
        resize = numbers["crop_resize"] if image_policy == "crop" else 0
        numbers |= {"image_policy": image_policy, "crop_resize": resize}
    if numbers["image_policy"] == "pad":
        numbers["crop_resize"] = 0
    return numbers


def _length(llm_dir: Path, text: Any, asked: int) -> int:
    own = getattr(text, "max_position_embeddings", None)
    own = own if isinstance(own, int) and own > 0 else None
    if not asked:
        return min(own or MAX_LENGTH, MAX_LENGTH)
    if asked < 0:
        raise UsageError(f"max_length {asked}", "give a number of positions")
    if own is not None and asked > own and not is_rotary(text):
        raise UsageError(
            f"{llm_dir}: max_length {asked}, and {text.model_type} has a table of {own} positions",
            "stay within it; only rotary positions go on",
        )
    return asked


def is_rotary(text: Any) -> bool:
    """Whether positions are plain rotary ones, which are computed for any number."""
    rope = getattr(text, "rope_parameters", None)
    return isinstance(rope, Mapping) and rope.get("rope_type") == "default"


def _read(directory: Path) -> Any:
    """A directory's configuration in its own class of transformers."""
    from transformers import AutoConfig

    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: no config.json here", _HUGGING_FACE)
    check_sizes(path, read_json(path))
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each class validates with errors of its own
        raise CheckpointError(f"{path}: not a known configuration ({line(error)})", _HUGGING_FACE) from error

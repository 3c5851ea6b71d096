"""Backbones → the checkpoint that training starts from: pretrained tower and language model, a random connector."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint as checkpoints
from ..errors import CheckpointError, StorageError, UsageError
from ..importer.vocabulary import generation
from ..model import TinyLlava, build_model
from ..prompt import get_template
from ..spec import LLM_BACKBONES, VISION_BACKBONES, ModelSpec, model_spec
from ..spec import variant as find_variant
from ..tokenizer_files import complete_special_tokens, fast_tokenizer
from ..towers import MOF_TYPE, find_tower
from .check_llm import check_forward
from .compose import TowerParts, is_rotary, read_llm, read_towers

PACKAGE = Path(__file__).resolve().parent.parent


def init_checkpoint(
    variant: str | ModelSpec,
    out: Path,
    *,
    vision_dir: Path | Sequence[Path] | None = None,
    llm_dir: Path | None = None,
    connector_options: Mapping[str, int] | None = None,
    max_length: int = 0,
    seed: int = 0,
    force: bool = False,
) -> None:
    """Write the untrained checkpoint of a variant, or of a spec of one's own (`compose.spec_of`).

    Args:
        variant: name as in Table A1, a nano variant's, or a whole spec, which needs both directories.
        vision_dir: Hugging Face directory of the tower, or of both towers of a mixture; the shipped nano tower by
            default.
        llm_dir: Hugging Face directory of the language model and its tokenizer; the shipped nano one by default.
        connector_options: as `build_connector`.
        max_length: longest sequence, picture included, in place of the spec's own; 0 keeps that.
        seed: of the connector's random weights.
        force: replace `out` if it exists.

    Raises:
        UsageError: unknown variant, or a backbone that does not come with the package and was not given.
        CheckpointError: a backbone is missing, incomplete, or not the variant's.
        StorageError: `out` exists.
    """
    if out.exists() and not force:
        raise StorageError(f"{out} exists already", "name another place with -o, or replace it with --force")
    vision_id = llm_id = ""
    if isinstance(variant, ModelSpec):
        spec = dataclasses.replace(variant, max_length=max_length) if max_length else variant
    else:
        chosen, spec = find_variant(variant), model_spec(variant, max_length)
        vision_id, llm_id = VISION_BACKBONES[chosen.vision].hub_id, LLM_BACKBONES[chosen.llm].hub_id
    given = [vision_dir] if vision_dir is None or isinstance(vision_dir, Path) else vision_dir
    tower_dirs = [backbone_directory(path, vision_id, "--vision") for path in given]
    text_dir = backbone_directory(llm_dir, llm_id, "--llm")
    towers, text = read_towers(tower_dirs), read_llm(text_dir)
    _check(spec, towers, text, text_dir)
    with torch.random.fork_rng(devices=[]), checkpoints.quiet():
        tokenizer = fast_tokenizer(text_dir)
        _check_end(spec, tokenizer, text_dir)
        parts = [
            _load(find_tower(c.model_type).model_class, path)
            for c, path in zip(towers.configs, tower_dirs, strict=True)
        ]
        llm = _load("AutoModelForCausalLM", text_dir)
        check_forward(llm, text_dir)
        torch.manual_seed(seed)
        model = build_model(
            spec,
            tower_config([part.config for part in parts]),
            _text_config(llm, spec),
            llm.config.vocab_size - 1,
            connector_options,
        )
        _copy(model, parts, llm)
        complete_special_tokens(tokenizer, get_template(spec.template).end_of_turn)
        checkpoints.add_image_token(model, tokenizer)
        model.generation_config.update(**generation(model.config.text_config.to_dict(), tokenizer, spec.template))
    checkpoints.save(model.eval(), tokenizer, spec, out, force=force)


def backbone_directory(given: Path | None, hub_id: str, flag: str) -> Path:
    """The directory that was given, or the shipped one of a nano id. Raises CheckpointError or UsageError."""
    if given is not None:
        if not (given / "config.json").is_file():
            raise CheckpointError(f"{given}: no config.json here", f"give {flag} a Hugging Face model directory")
        return given
    if not hub_id.startswith("nano/"):
        raise UsageError(
            f"the weights of {hub_id} are not part of this package",
            f"download them and name their directory with {flag}",
        )
    path = PACKAGE / hub_id
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: the shipped backbone is missing", "install the package again")
    return path


def _load(kind: str, path: Path) -> Any:
    """A transformers class by name, from local safetensors in float32."""
    import transformers

    try:
        model, info = getattr(transformers, kind).from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
            use_safetensors=True,
        )
    except Exception as error:  # transformers and safetensors each raise their own
        raise CheckpointError(
            f"{path}: {kind} can't load it ({_line(error)})", "give a whole safetensors model"
        ) from error
    if info.get("missing_keys"):
        raise CheckpointError(f"{path}: lacks {sorted(info['missing_keys'])[0]}", "give a whole safetensors model")
    return model


def _check(spec: ModelSpec, towers: TowerParts, text: Any, text_dir: Path) -> None:
    """Raise CheckpointError unless the directories hold what the spec says."""
    first, tower_dir = towers.configs[0], towers.directories[0]
    wanted = [
        (tower_dir, "model_type", towers.family, spec.vision_family),
        (tower_dir, "patch_size", first.patch_size, spec.patch_size),
        (text_dir, "model_type", text.model_type, spec.llm_family),
        (text_dir, "hidden_size", text.hidden_size, spec.embedding_dim),
    ]
    if find_tower(first.model_type).fixed_positions:
        wanted.insert(1, (tower_dir, "image_size", first.image_size, spec.image_size))
    for path, key, found, expected in wanted:
        if found != expected:
            raise CheckpointError(
                f"{path}: {key} is {found}, {spec.name} needs {expected}", "give the variant's own backbone"
            )
    own = getattr(text, "max_position_embeddings", None)
    if isinstance(own, int) and spec.max_length > own and not is_rotary(text):
        raise CheckpointError(
            f"{text_dir}: has {own} positions, {spec.name} needs {spec.max_length}", "choose a shorter max_length"
        )


def _check_end(spec: ModelSpec, tokenizer: Any, text_dir: Path) -> None:
    end = get_template(spec.template).end_of_turn
    if end not in tokenizer.get_vocab():
        raise CheckpointError(f"{text_dir}: the tokenizer has no {end!r} token", f"template {spec.template} needs it")


def tower_config(towers: Sequence[Any]) -> dict[str, Any]:
    """Configuration of the model's tower: a tower's own, or a mixture's."""
    configs = [config.to_dict() for config in towers]
    if len(configs) == 1:
        return dict(configs[0])
    return {"model_type": MOF_TYPE, "first": configs[0], "second": configs[1]}


def _text_config(llm: Any, spec: ModelSpec) -> dict[str, Any]:
    """The language model's configuration, with what the class doesn't tell: a head's bias, positions that are used."""
    config = dict(llm.config.to_dict())
    if llm.get_output_embeddings().bias is not None:
        config["head_bias"] = True
    if is_rotary(llm.config):  # so that every file made from it says how far the model was trained
        config["max_position_embeddings"] = max(config["max_position_embeddings"], spec.max_length)
    return config


def _copy(model: TinyLlava, towers: Sequence[Any], llm: Any) -> None:
    """The backbones' tensors into the model; every one must find its place."""
    own = model.model.vision_tower
    for module, tower in zip([own] if len(towers) == 1 else [own.first, own.second], towers, strict=True):
        module.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(llm.get_decoder().state_dict())
    model.lm_head.load_state_dict(llm.get_output_embeddings().state_dict())


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

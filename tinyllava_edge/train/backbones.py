"""Backbones → the checkpoint that training starts from: pretrained tower and language model, a random connector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint as checkpoints
from ..errors import CheckpointError, StorageError, UsageError
from ..model import TinyLlava, build_model
from ..prompt import get_template
from ..spec import LLM_BACKBONES, VISION_BACKBONES, ModelSpec, model_spec
from ..spec import variant as find_variant
from ..tokenizer_files import fast_tokenizer

TOWERS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
PACKAGE = Path(__file__).resolve().parent.parent


def init_checkpoint(
    variant: str | ModelSpec,
    out: Path,
    *,
    vision_dir: Path | None = None,
    llm_dir: Path | None = None,
    connector_options: Mapping[str, int] | None = None,
    seed: int = 0,
    force: bool = False,
) -> None:
    """Write the untrained checkpoint of a variant, or of a spec of one's own.

    Args:
        variant: name as in Table A1, a nano variant's, or a whole spec, which needs both directories.
        vision_dir: Hugging Face directory of the tower; the shipped nano tower by default.
        llm_dir: Hugging Face directory of the language model and its tokenizer; the shipped nano one by default.
        connector_options: as `build_connector`.
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
        spec = variant
    else:
        chosen, spec = find_variant(variant), model_spec(variant)
        vision_id, llm_id = VISION_BACKBONES[chosen.vision].hub_id, LLM_BACKBONES[chosen.llm].hub_id
    tower_dir = _directory(vision_dir, vision_id, "--vision")
    text_dir = _directory(llm_dir, llm_id, "--llm")
    with torch.random.fork_rng(devices=[]), checkpoints.quiet():
        tower = _load(TOWERS[spec.vision_family], tower_dir)
        llm = _load("AutoModelForCausalLM", text_dir)
        tokenizer = fast_tokenizer(text_dir)
        _check(spec, tower, llm, tokenizer, tower_dir, text_dir)
        torch.manual_seed(seed)
        model = build_model(
            spec, tower.config.to_dict(), llm.config.to_dict(), llm.config.vocab_size - 1, connector_options
        )
        _copy(model, tower, llm)
        checkpoints.add_image_token(model, tokenizer)
    checkpoints.save(model.eval(), tokenizer, spec, out, force=force)


def _directory(given: Path | None, hub_id: str, flag: str) -> Path:
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


def _check(spec: ModelSpec, tower: Any, llm: Any, tokenizer: Any, tower_dir: Path, text_dir: Path) -> None:
    vision, text = tower.config, llm.config
    wanted = (
        (tower_dir, "model_type", vision.model_type.removesuffix("_vision_model"), spec.vision_family),
        (tower_dir, "image_size", vision.image_size, spec.image_size),
        (tower_dir, "patch_size", vision.patch_size, spec.patch_size),
        (text_dir, "model_type", text.model_type, spec.llm_family),
        (text_dir, "hidden_size", text.hidden_size, spec.embedding_dim),
    )
    for path, key, found, expected in wanted:
        if found != expected:
            raise CheckpointError(
                f"{path}: {key} is {found}, {spec.name} needs {expected}", "give the variant's own backbone"
            )
    end = get_template(spec.template).end_of_turn
    if end not in tokenizer.get_vocab():
        raise CheckpointError(f"{text_dir}: the tokenizer has no {end!r} token", f"template {spec.template} needs it")


def _copy(model: TinyLlava, tower: Any, llm: Any) -> None:
    """The backbones' tensors into the model; every one must find its place."""
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(llm.get_decoder().state_dict())
    model.lm_head.load_state_dict(llm.get_output_embeddings().state_dict())


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

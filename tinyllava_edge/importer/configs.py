"""Configurations of the two backbones, from the source or a directory that a flag names; all values checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..checkpoint import check_sizes, line
from ..checkpoint_spec import read_json
from ..errors import CheckpointError
from ..spec import VISION_BACKBONES
from ..towers import CONTAINERS, FAMILIES, MOF_TYPE
from .layouts import Source

# Default template by language model. Whether a Qwen2 was trained with the base or the instruct format can't be told
# from its files; Factory's released ones use the base format.
TEMPLATES = {
    "llama": "llama",
    "phi": "phi",
    "stablelm": "phi",
    "gemma": "gemma",
    "qwen2": "qwen2_base",
    "qwen3": "qwen2_instruct",
}
KNOWN_TOWERS: dict[str, Mapping[str, Any]] = {
    **{VISION_BACKBONES[abbr].hub_id: VISION_BACKBONES[abbr].config for abbr in ("C", "Sig")},
    **{f"bczhou/TinyLLaVA-{size}-SigLIP": VISION_BACKBONES["Sig"].config for size in ("3.1B", "2.0B", "1.5B")},
}
# DINOv2-L, which Factory's mixtures pair with CLIP-L: their files don't hold its configuration.
KNOWN_TOWERS["facebook/dinov2-large"] = {
    "model_type": "dinov2",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 518,
    "patch_size": 14,
    "mlp_ratio": 4,
}
# Names that older configurations give to fields of today's classes.
RENAMED = {
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "partial_rotary_factor": "partial_rotary_factor",
    "rope_pct": "partial_rotary_factor",
    "norm_eps": "layer_norm_eps",
}
_BOOKKEEPING = ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", "name_or_path")


def text_config(source: Source, llm: Path | None) -> dict[str, Any]:
    """Whole configuration of the language model, `model_type` included.

    Args:
        source: the opened model.
        llm: Hugging Face directory of the language model, used instead of what the source says.

    Raises:
        CheckpointError: there is none, or one that can't be imported.
    """
    where = (llm or source.root) / "config.json"
    given = read_json(where) if llm else source.text
    if given is None:
        raise CheckpointError(
            f"{where}: no text_config", "name a directory with the language model's config.json: --llm DIR"
        )
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where}: text_config is a {type(given).__name__}", "restore the file")
    given = given.get("text_config", given) if llm else given
    kind = str(given.get("model_type"))
    if kind not in TEMPLATES:
        raise CheckpointError(
            f"{where}: language model {kind[:40]!r} can't be imported", f"known: {', '.join(TEMPLATES)}"
        )
    return _whole(where, kind, given)


def vision_config(source: Source, vision: Path | None, vision2: Path | None = None) -> dict[str, Any]:
    """Whole configuration of the tower, or of a mixture's two; `model_type` included.

    Args:
        source: the opened model.
        vision: Hugging Face directory of the tower, used instead of what the source says.
        vision2: the same of a mixture's second tower, whose configuration the source does not hold.

    Raises:
        CheckpointError: there is none, or one that can't be imported.
    """
    where = (vision or source.root) / "config.json"
    given: Any = read_json(where) if vision else source.vision
    if given is None:
        given = KNOWN_TOWERS.get(source.vision_id)
    first = _tower(where, given, source.vision_id, "--vision")
    if not source.vision_id2:
        return first
    where = (vision2 or source.root) / "config.json"
    known: Any = read_json(where) if vision2 else KNOWN_TOWERS.get(source.vision_id2)
    return {"model_type": MOF_TYPE, "first": first, "second": _tower(where, known, source.vision_id2, "--vision2")}


def _tower(where: Path, given: Any, published: str, flag: str) -> dict[str, Any]:
    """Whole configuration of one tower. Raises CheckpointError."""
    if given is None:
        raise CheckpointError(
            f"{where}: no vision_config, and tower {published[:80]!r} isn't known",
            f"name a directory with the tower's config.json: {flag} DIR",
        )
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where}: vision_config is a {type(given).__name__}", "restore the file")
    kind = str(given.get("model_type"))
    if kind in CONTAINERS:
        inner = given.get("vision_config")
        if not isinstance(inner, Mapping):
            raise CheckpointError(f"{where}: no vision_config inside", "give the picture tower's config.json")
        given = {"model_type": CONTAINERS[kind], **inner}
        kind = str(given["model_type"])
    if kind not in FAMILIES or kind == MOF_TYPE:
        known = ", ".join(name for name in FAMILIES if name != MOF_TYPE)
        raise CheckpointError(f"{where}: vision tower {kind[:40]!r} can't be imported", f"known: {known}")
    return _whole(where, kind, given)


def _whole(where: Path, kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with its class's defaults filled in (files hold only what differs), foreign keys left out."""
    check_sizes(where, given)
    try:
        known = set(AutoConfig.for_model(kind).to_dict()) - set(_BOOKKEEPING)
        clean = {key: value for key, value in given.items() if key in known}
        for old, new in RENAMED.items():
            if old in given and given[old] is not None and (new in known or new in RENAMED):
                clean.setdefault(new, given[old])
        clean.pop("model_type", None)
        config = AutoConfig.for_model(kind, **clean)
        whole = config.to_dict()
    except Exception as error:  # the classes validate with errors of their own
        raise CheckpointError(f"{where}: not a {kind} configuration ({line(error)})", "restore the file") from error
    return {key: value for key, value in whole.items() if key not in _BOOKKEEPING} | {"model_type": kind}

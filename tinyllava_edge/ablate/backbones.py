"""A cell's spec: what its tower, language model and connector say about how the model must be fed."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import sha256_tree
from ..spec import LLM_BACKBONES, VISION_BACKBONES, ModelSpec
from ..towers import TOWERS
from .grid import Backbone, Cell


def cell_spec(cell: Cell) -> ModelSpec:
    """The spec of a cell's model, named `tower.llm.connector`; sizes are those of the backbones' directories.

    Raises:
        CheckpointError: a configuration that can't be read or lacks a size.
    """
    from ..connectors import connector_tokens

    vision, llm = VISION_BACKBONES[cell.tower.like], LLM_BACKBONES[cell.llm.like]
    tower, text = vision_config(cell.tower), text_config(cell.llm)
    size, patch, width = (
        _size(config, key, backbone.path)
        for config, key, backbone in (
            (tower, "image_size", cell.tower),
            (tower, "patch_size", cell.tower),
            (text, "hidden_size", cell.llm),
        )
    )
    patches = (size // patch) ** 2
    tokens = connector_tokens(cell.connector.kind, patches, cell.connector.options)
    return ModelSpec(
        name=f"{cell.tower.name}.{cell.llm.name}.{cell.connector.name}",
        vision_family=vision.family,
        llm_family=str(text["model_type"]),
        image_size=size,
        patch_size=patch,
        image_mean=vision.image_mean,
        image_std=vision.image_std,
        image_policy=vision.image_policy,
        pad_color=(int(255 * vision.image_mean[0]), int(255 * vision.image_mean[1]), int(255 * vision.image_mean[2])),
        feature_layer=-2,
        select_strategy="default" if TOWERS[vision.family].class_token else "full",
        visual_tokens=tokens,
        embedding_dim=width,
        connector=cell.connector.kind,
        template=llm.template,
        max_length=2048,
        compat="native",
    )


def vision_config(tower: Backbone) -> dict[str, Any]:
    """The tower's configuration; what its directory leaves out is as in the backbone that it is like."""
    found = _config(tower.path)
    inner = found.get("vision_config", found)
    return {**VISION_BACKBONES[tower.like].config, **(inner if isinstance(inner, dict) else {})}


def text_config(llm: Backbone) -> dict[str, Any]:
    """The language model's configuration; what its directory leaves out is as in the backbone that it is like."""
    return {**LLM_BACKBONES[llm.like].config, **_config(llm.path)}


@functools.cache
def tree_sha256(path: Path) -> str:
    """Hash of a backbone's files, once per process."""
    return sha256_tree(path)


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: can't be read ({error})", "give a Hugging Face model directory") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: no JSON object", "give a Hugging Face model directory")
    return found


def _size(config: dict[str, Any], key: str, path: Path) -> int:
    if type(config.get(key)) is not int or not 1 <= config[key] <= 65536:
        raise CheckpointError(f"{path}: {key} = {config.get(key)!r}", "give a whole Hugging Face model directory")
    return int(config[key])

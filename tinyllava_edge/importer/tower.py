"""The tower's tensors: those of --vision where the source has none, and dead ones that may be missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..tensor_names import TOWER
from ..towers import MOF_TYPE, find_tower
from .layouts import BUFFERS, Source, tower_name
from .lazy import Lazy, Tensors, lazy
from .pickled import has_weights, open_any

# Parts of a two-tower model that a picture tower's directory may hold besides the tower.
_OTHER_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")


def with_tower(source: Source, vision: Path | None) -> tuple[Source, list[str]]:
    """The source with the tower of --vision, where its own files hold none. Raises CheckpointError."""
    if any(name.startswith(TOWER) for name in source.tensors):
        return source, []
    if vision is None or not has_weights(vision):
        raise CheckpointError(
            f"{vision or source.root}: holds no vision tower's weights",
            f"name a directory with {source.vision_id[:80] or 'the tower'}: --vision DIR",
        )
    tower: Tensors = {}
    for name, tensor in lazy(open_any(vision)).items():
        if not name.startswith(_OTHER_TOWER) and not name.endswith(BUFFERS):
            tower[tower_name(name)] = tensor
    return dataclasses.replace(source, tensors={**source.tensors, **tower}), [f"tower read from {vision.name}"]


def dead_parts(
    tensors: Tensors, vision: Mapping[str, Any], prefix: str = TOWER
) -> tuple[Tensors, dict[str, Any], list[str]]:
    """What the features never reach may be missing: SigLIP's pooling head is switched off, a last norm made neutral."""
    tower, notes, filled = dict(vision), [], dict(tensors)
    kind = vision["model_type"]
    if kind == MOF_TYPE:
        for part in ("first", "second"):
            filled, tower[part], told = dead_parts(filled, vision[part], f"{TOWER}{part}.")
            notes += told
        return filled, tower, notes
    headless = not any(name.startswith(f"{prefix}head.") for name in tensors)
    if headless and find_tower(kind).pooling_head:
        tower["vision_use_head"] = False
        notes.append("tower without its pooling head, which nothing reads")
    norm = find_tower(kind).last_norm
    absent = [part for part in ("weight", "bias") if f"{prefix}{norm}.{part}" not in tensors]
    if len(absent) == 2:
        sample = next(tensor for name, tensor in tensors.items() if name.startswith(TOWER))
        for part, value in (("weight", 1.0), ("bias", 0.0)):
            filled[f"{prefix}{norm}.{part}"] = _constant(sample, int(vision["hidden_size"]), value)
        notes.append("tower without its last norm, which nothing reads: a neutral one is written")
    return filled, tower, notes


def _constant(like: Lazy, width: int, value: float) -> Lazy:
    return Lazy("(neutral)", like.file, (width,), like.dtype, lambda: torch.full((width,), value, dtype=like.dtype))

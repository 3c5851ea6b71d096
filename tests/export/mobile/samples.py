"""Tiny towers for the mobile forms, their expected outputs, and a model whose activation is another one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from tinyllava_edge.export.mobile.parity import Expected, expected
from tinyllava_edge.spec import ModelSpec

from ..vision_models import make

FAMILIES = ("siglip", "clip")  # tanh-GELU and QuickGELU


def pictures() -> list[tuple[str, Any]]:
    """Three noise pictures of several sizes, one wider and one higher than the tower's 64."""
    random = np.random.default_rng(5)
    sizes = ((64, 64), (48, 131), (150, 97))
    return [(f"noise-{h}x{w}", random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def tower(family: str) -> tuple[Any, ModelSpec, Expected]:
    """A random model, its spec, and what it makes of `pictures`."""
    model, spec = make(family)
    return model, spec, expected(model, spec, pictures())


def with_erf_gelu(model: Any) -> Any:
    """The same weights with erf-GELU in every tower layer: what some converters make of tanh-GELU."""
    changed = copy.deepcopy(model)
    for layer in changed.model.vision_tower.encoder.layers:
        layer.mlp.activation_fn = torch.nn.GELU()
    return changed


def still(spec: ModelSpec) -> torch.Tensor:
    """What a static graph is traced with."""
    return torch.zeros(1, 3, spec.image_size, spec.image_size)

"""Our own model type, apart from the model: who reads a configuration shouldn't load every class of transformers."""

from __future__ import annotations

from typing import Any

from transformers import LlavaConfig

from .towers import MOF_TYPE

MODEL_TYPE = "tinyllava_edge"  # written only when stock Llava can't represent the model


class TinyLlavaConfig(LlavaConfig):
    """Llava's configuration under our own model type, so that stock Llava refuses what it would answer wrongly."""

    model_type = MODEL_TYPE

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config: Any = tower_config(self.vision_config)
        super().__post_init__(**kwargs)


def tower_config(given: Any) -> Any:
    """A mixture's configuration as an object, which transformers' own table doesn't know; others as they are."""
    if not isinstance(given, dict) or given.get("model_type") != MOF_TYPE:
        return given
    from .towers.mof_config import MofConfig

    return MofConfig(**{key: value for key, value in given.items() if key != "model_type"})

"""Our own model type, apart from the model: who reads a configuration shouldn't load every class of transformers."""

from __future__ import annotations

from transformers import LlavaConfig

MODEL_TYPE = "tinyllava_edge"  # written only when stock Llava can't represent the model


class TinyLlavaConfig(LlavaConfig):
    """Llava's configuration under our own model type, so that stock Llava refuses what it would answer wrongly."""

    model_type = MODEL_TYPE

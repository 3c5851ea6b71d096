"""Vision tower + connector + language model (paper §3.1), as a Hugging Face Llava model.

Legend: b pictures, p patches kept, v tower width, h language-model width, n positions.

The class is transformers' own, so `from_pretrained`, `generate` and Trainer know it. What it adds: connectors from a
table, and an output head that keeps its bias (Phi-2), which stock Llava drops with no more than a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from .errors import CheckpointError, UsageError
from .spec import LLM_BACKBONES, VISION_BACKBONES, ModelSpec, variant

MODEL_TYPE = "tinyllava_edge"  # written only when stock Llava can't represent the model


class MlpConnector(nn.Module):
    """Two linear layers with exact GELU between them (paper §4.1.1); names as in Llava's own projector."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, text_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(text_width, text_width)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """(b, p, v) → (b, p, h)."""
        return self.linear_2(self.act(self.linear_1(image_features)))


CONNECTORS: dict[str, Callable[[int, int], nn.Module]] = {"mlp2x_gelu": MlpConnector}


class TinyLlavaConfig(LlavaConfig):
    """Llava's configuration under our own model type, so that stock Llava refuses what it would answer wrongly."""

    model_type = MODEL_TYPE


class TinyLlava(LlavaForConditionalGeneration):
    """Llava with a connector from CONNECTORS and a head that may have a bias."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        name = getattr(config, "connector", "mlp2x_gelu")
        if name not in CONNECTORS:
            raise CheckpointError(f"unknown connector {name!r}", f"known: {', '.join(CONNECTORS)}")
        vision, text = config.vision_config.hidden_size, config.text_config.hidden_size
        self.model.multi_modal_projector = CONNECTORS[name](vision, text)
        if needs_own_type(config.text_config):
            self.lm_head = nn.Linear(text, config.text_config.vocab_size, bias=True)
        self.post_init()

    def tower_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Selected tower features V of Eq. 1, before the connector: (b, 3, s, s) → (b, p, v)."""
        out = self.model.vision_tower(pixel_values, output_hidden_states=True)
        hidden = out.hidden_states[self.config.vision_feature_layer]
        return hidden[:, 1:] if self.config.vision_feature_select_strategy == "default" else hidden

    def embed(self, input_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        """Text embeddings with P(V) written into the image slots: (b, n), (b, p, v) → (b, n, h).

        Raises:
            CheckpointError: the number of image slots differs from the number of image embeddings.
        """
        slots = input_ids == self.config.image_token_id  # (b, n)
        embeds = self.get_input_embeddings()(input_ids)  # (b, n, h)
        if image_features is None:
            return embeds
        image_embeds = self.model.multi_modal_projector(image_features).to(embeds.dtype)  # (b, p, h)
        if int(slots.sum()) != image_embeds.shape[0] * image_embeds.shape[1]:
            raise CheckpointError(f"{int(slots.sum())} image slots for {image_embeds.shape[:2]} image embeddings")
        return embeds.masked_scatter(slots.unsqueeze(-1), image_embeds)


def needs_own_type(text_config: Any) -> bool:
    """Whether stock Llava would lose part of this language model: a biased head (Phi)."""
    return text_config.model_type == "phi"


def build_config(
    spec: ModelSpec, vision_config: Mapping[str, Any], text_config: Mapping[str, Any], image_token_id: int
) -> LlavaConfig:
    """Llava configuration of a spec and two backbone configurations."""
    text = AutoConfig.for_model(**text_config)
    config_class = TinyLlavaConfig if needs_own_type(text) else LlavaConfig
    config = config_class(
        vision_config=AutoConfig.for_model(**vision_config),
        text_config=text,
        image_token_index=image_token_id,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=spec.select_strategy,
        vision_feature_layer=spec.feature_layer,
        image_seq_length=spec.visual_tokens,
        tie_word_embeddings=bool(text_config.get("tie_word_embeddings", False)),
    )
    if spec.connector != "mlp2x_gelu":
        config.connector = spec.connector
    return config


def build_model(
    spec: ModelSpec, vision_config: Mapping[str, Any], text_config: Mapping[str, Any], image_token_id: int
) -> TinyLlava:
    """A model with random float32 weights on the default device (`torch.device("meta")` to count only)."""
    model = TinyLlava(build_config(spec, vision_config, text_config, image_token_id))
    model.config.architectures = [
        "TinyLlava" if needs_own_type(model.config.text_config) else "LlavaForConditionalGeneration"
    ]
    return model


def count_parameters(name: str) -> dict[str, int]:
    """Exact parameter counts of a variant, from its architecture on the meta device.

    Returns:
        `parameters`: the whole model; `parameters_exported`: without the tower's dead last layer(s), post-norm and
        pooling head, which the feature layer -2 never reaches.

    Raises:
        UsageError: unknown variant.
    """
    from .spec import model_spec

    chosen = variant(name)
    vision, llm = VISION_BACKBONES.get(chosen.vision), LLM_BACKBONES.get(chosen.llm)
    if vision is None or llm is None:
        raise UsageError(f"{name}: unknown backbone {chosen.vision} or {chosen.llm}")
    spec = model_spec(name)
    with torch.device("meta"):
        model = build_model(spec, vision.config, llm.config, int(llm.config["vocab_size"]) - 1)
    parameters = {key: tensor.numel() for key, tensor in model.named_parameters()}
    dead = sum(
        n for key, n in parameters.items() if is_dead(key, spec.feature_layer, int(vision.config["num_hidden_layers"]))
    )
    total = sum(parameters.values())
    return {"parameters": total, "parameters_exported": total - dead}


def is_dead(key: str, feature_layer: int, layers: int) -> bool:
    """Whether a tower parameter never reaches the features that the connector reads."""
    if ".vision_tower." not in key:
        return False
    if ".post_layernorm." in key or ".head." in key:
        return True
    parts = key.split(".")
    if "layers" not in parts:
        return False
    index = int(parts[parts.index("layers") + 1])
    used = feature_layer + layers + 1 if feature_layer < 0 else feature_layer
    return index >= used

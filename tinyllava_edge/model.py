"""Vision tower + connector + language model (paper §3.1), as a Hugging Face Llava model.

Legend: b pictures, p patches kept, v tower width, h language-model width, n positions.

The class is transformers' own, so `from_pretrained`, `generate` and Trainer know it. What it adds: connectors and
towers from tables, and an output head that keeps its bias (Phi-2), which stock Llava drops with no more than a warning.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, LlavaConfig, LlavaForConditionalGeneration

from .connectors import CONNECTORS, MIXED, DeepMlpConnector, MlpConnector, ResamplerConnector, build_connector
from .errors import CheckpointError, UsageError
from .llava_config import MODEL_TYPE, TinyLlavaConfig, tower_config
from .spec import LLM_BACKBONES, VISION_BACKBONES, ModelSpec, named_tokens, variant
from .towers import TOWERS, find_tower

__all__ = [
    "CONNECTORS",
    "MODEL_TYPE",
    "DeepMlpConnector",
    "MlpConnector",
    "ResamplerConnector",
    "TinyLlava",
    "TinyLlavaConfig",
    "build_config",
    "build_connector",
    "build_model",
    "build_tower",
    "count_parameters",
    "has_head_bias",
    "is_dead",
    "needs_own_type",
    "tower_layer",
]

STOCK_CONNECTOR = "mlp2x_gelu"


class TinyLlava(LlavaForConditionalGeneration):
    """Llava with a connector from the table and a head that may have a bias."""

    def __init__(self, config: Any) -> None:
        tower = config.vision_config
        own = find_tower(tower.model_type).build is not None
        if own:  # stock Llava builds the tower by transformers' table: give it one that is there
            config.vision_config = getattr(tower, "first", tower)
        super().__init__(config)
        config.vision_config = tower
        vision, text = tower.hidden_size, config.text_config.hidden_size
        self.model.multi_modal_projector = build_connector(
            getattr(config, "connector", STOCK_CONNECTOR),
            vision,
            text,
            getattr(config, "connector_options", None),
            getattr(config, "feature_tokens", None),
        )
        if own:
            self.model.vision_tower = build_tower(tower)
        if has_head_bias(config.text_config):
            self.lm_head = nn.Linear(text, config.text_config.vocab_size, bias=True)
        self.post_init()

    def post_init(self) -> None:
        """As the base class, once it knows where the language model keeps its embedding: `embed_tokens`, `wte` …"""
        text = self.model.language_model
        name = next(name for name, module in text.named_modules() if module is text.get_input_embeddings())
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{name}.weight"}
        super().post_init()

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


def build_tower(vision_config: Any) -> nn.Module:
    """The tower of a configuration with random weights, taking (b, 3, s, s) whatever its family."""
    build = find_tower(vision_config.model_type).build
    tower: nn.Module = AutoModel.from_config(vision_config) if build is None else build(vision_config)
    return tower


def has_head_bias(text_config: Any) -> bool:
    """Whether the output head has a bias, which stock Llava would drop: Phi's has, others say `head_bias`."""
    return bool(text_config.model_type == "phi" or getattr(text_config, "head_bias", False))


def needs_own_type(connector: str, vision_family: str, text_config: Any) -> bool:
    """Whether stock Llava can't represent the model, so that the checkpoint must carry our own architecture name.

    Args:
        connector: whole name, as `build_connector` knows it.
        vision_family: `ModelSpec.vision_family`, or the `model_type` of the tower's configuration.
        text_config: the language model's configuration.
    """
    tower = TOWERS.get(vision_family) or find_tower(vision_family)
    return connector != STOCK_CONNECTOR or not tower.stock or has_head_bias(text_config)


def build_config(
    spec: ModelSpec,
    vision_config: Mapping[str, Any],
    text_config: Mapping[str, Any],
    image_token_id: int,
    connector_options: Mapping[str, int] | None = None,
) -> LlavaConfig:
    """Llava configuration of a spec and two backbone configurations; `connector_options` as `build_connector`.

    Raises:
        CheckpointError: the spec's visual tokens aren't those that its connector's name ends in.
    """
    if named_tokens(spec.connector) not in (None, spec.visual_tokens):
        raise CheckpointError(f"{spec.name}: visual_tokens={spec.visual_tokens} with the connector {spec.connector!r}")
    if spec.connector in MIXED and spec.vision_family != "mof":
        raise CheckpointError(
            f"{spec.name}: connector {spec.connector!r} with a {spec.vision_family} tower", "it joins a mixture of two"
        )
    text = AutoConfig.for_model(**copy.deepcopy(dict(text_config)))  # transformers writes into what it is given
    given = copy.deepcopy(dict(vision_config))
    vision = tower_config(given)
    vision = AutoConfig.for_model(**given) if vision is given else vision
    own = needs_own_type(spec.connector, vision.model_type, text)
    if getattr(vision, "image_size", None) is None:
        vision.image_size = spec.image_size  # NaFlex configurations know no size
    config = (TinyLlavaConfig if own else LlavaConfig)(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=spec.select_strategy,
        vision_feature_layer=spec.feature_layer,
        image_seq_length=spec.visual_tokens,
        tie_word_embeddings=bool(text_config.get("tie_word_embeddings", False)),
        architectures=["TinyLlava" if own else "LlavaForConditionalGeneration"],
    )
    if spec.connector != STOCK_CONNECTOR:
        config.connector = spec.connector
    if named_tokens(spec.connector) is not None:  # a grid that is reduced must be known, and DINOv2's can't be derived
        config.feature_tokens = spec.feature_tokens
    if connector_options:
        config.connector_options = dict(connector_options)
    return config


def build_model(
    spec: ModelSpec,
    vision_config: Mapping[str, Any],
    text_config: Mapping[str, Any],
    image_token_id: int,
    connector_options: Mapping[str, int] | None = None,
) -> TinyLlava:
    """A model with random float32 weights on the default device (`torch.device("meta")` to count only)."""
    return TinyLlava(build_config(spec, vision_config, text_config, image_token_id, connector_options))


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
    """Whether a tower parameter never reaches the features that the connector reads.

    Dead are the layers from the feature layer on, the last norm, the pooling head and DINOv2's mask token.
    """
    if ".vision_tower." not in key:
        return False
    if any(part in key for part in (".post_layernorm.", ".layernorm.", ".head.", ".mask_token")):
        return True
    index = tower_layer(key)
    used = feature_layer + layers + 1 if feature_layer < 0 else feature_layer
    return index is not None and index >= used


def tower_layer(key: str) -> int | None:
    """Encoder layer that a tower's parameter belongs to; none for embeddings, norms and heads."""
    parts = key.split(".")
    for name in ("layers", "layer"):  # DINOv2 says `layer`
        if name in parts[:-1] and parts[parts.index(name) + 1].isdigit():
            return int(parts[parts.index(name) + 1])
    return None

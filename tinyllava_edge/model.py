"""Vision tower + connector + language model (paper §3.1), as a Hugging Face Llava model.

Legend: b pictures, p patches kept, v tower width, h language-model width, n positions.

The class is transformers' own, so `from_pretrained`, `generate` and Trainer know it. What it adds: connectors from a
table, SigLIP 2's NaFlex towers at one square size, and an output head that keeps its bias (Phi-2), which stock Llava
drops with no more than a warning. Towers: CLIP, SigLIP (SigLIP 2's fixed-resolution checkpoints are plain SigLIP
configurations), SigLIP 2 NaFlex, DINOv2.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, LlavaConfig, LlavaForConditionalGeneration, Siglip2VisionModel

from .connectors import CONNECTORS, DeepMlpConnector, MlpConnector, ResamplerConnector, build_connector
from .errors import CheckpointError, UsageError
from .llava_config import MODEL_TYPE, TinyLlavaConfig
from .spec import LLM_BACKBONES, VISION_BACKBONES, ModelSpec, named_tokens, variant

__all__ = [
    "CONNECTORS",
    "MODEL_TYPE",
    "DeepMlpConnector",
    "MlpConnector",
    "ResamplerConnector",
    "SquareSiglip2",
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
SIGLIP2_TYPE = "siglip2_vision_model"


class SquareSiglip2(Siglip2VisionModel):
    """SigLIP 2's NaFlex tower fed whole square pictures, as every other tower is.

    Equal to the Hugging Face class given the same picture's patches, a mask of ones and the square's patch counts.
    The position embeddings are resized to that grid, as the class does.
    """

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """(b, 3, s, s) → the class's output; `hidden_states` holds (b, p, v)."""
        side = int(self.config.patch_size)
        rows, columns = pixel_values.shape[2] // side, pixel_values.shape[3] // side
        patches = pixel_values.unflatten(3, (columns, side)).unflatten(
            2, (rows, side)
        )  # (b, 3, rows, side, cols, side)
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (b, p, side · side · 3)
        shapes = torch.tensor([[rows, columns]] * len(patches), dtype=torch.long, device=patches.device)
        return super().forward(patches, pixel_attention_mask=None, spatial_shapes=shapes, **kwargs)


class TinyLlava(LlavaForConditionalGeneration):
    """Llava with a connector from the table and a head that may have a bias."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        vision, text = config.vision_config.hidden_size, config.text_config.hidden_size
        self.model.multi_modal_projector = build_connector(
            getattr(config, "connector", STOCK_CONNECTOR),
            vision,
            text,
            getattr(config, "connector_options", None),
            getattr(config, "feature_tokens", None),
        )
        if config.vision_config.model_type == SIGLIP2_TYPE:
            self.model.vision_tower = build_tower(config.vision_config)
        if has_head_bias(config.text_config):
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


def build_tower(vision_config: Any) -> nn.Module:
    """The tower of a configuration with random weights, taking (b, 3, s, s) whatever its family."""
    if vision_config.model_type == SIGLIP2_TYPE:
        return SquareSiglip2._from_config(vision_config)
    tower: nn.Module = AutoModel.from_config(vision_config)
    return tower


def has_head_bias(text_config: Any) -> bool:
    """Whether the language model's output head has a bias, which stock Llava would drop (Phi)."""
    return bool(text_config.model_type == "phi")


def needs_own_type(connector: str, vision_family: str, text_config: Any) -> bool:
    """Whether stock Llava can't represent the model, so that the checkpoint must carry our own architecture name.

    Args:
        connector: whole name, as `build_connector` knows it.
        vision_family: `ModelSpec.vision_family`, or the `model_type` of the tower's configuration.
        text_config: the language model's configuration.
    """
    return connector != STOCK_CONNECTOR or vision_family in ("siglip2", SIGLIP2_TYPE) or has_head_bias(text_config)


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
    text = AutoConfig.for_model(**copy.deepcopy(dict(text_config)))  # transformers writes into what it is given
    own = needs_own_type(spec.connector, spec.vision_family, text)
    vision = AutoConfig.for_model(**vision_config)
    if spec.vision_family == "siglip2":
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
    if any(part in key for part in (".post_layernorm.", ".vision_tower.layernorm.", ".head.", ".mask_token")):
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

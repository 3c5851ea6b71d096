"""Connectors P of Eq. 1, by exact name: what turns tower features into the language model's embeddings.

Legend: b pictures, p tower tokens, q queries, k keys, v tower width, h language-model width, a heads, c head width.

Parameter names are those of the released checkpoints without their prefix: Llava's for `mlp2x_gelu`, TinyLLaVA
Factory's for `linear` and `resampler`, and Factory's behind `layers.` for the other MLPs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .errors import CheckpointError

ConnectorBuilder = Callable[[int, int, Mapping[str, int]], nn.Module]
QUERIES, RESAMPLER_LAYERS = 128, 3  # Factory's defaults
HEADS, HEAD_WIDTH = 8, 64  # of the resampler, whatever the model's width
_LIMITS = {"num_queries": 65536, "num_layers": 64}


class MlpConnector(nn.Module):
    """Two linear layers with exact GELU between them (paper §4.1.1); names as in Llava's own projector."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, text_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(text_width, text_width)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """(b, p, v) → (b, p, h)."""
        embeds: torch.Tensor = self.linear_2(self.act(self.linear_1(image_features)))
        return embeds


class DeepMlpConnector(nn.Module):
    """Any number of linear layers with exact GELU between them; the first one changes the width."""

    def __init__(self, vision_width: int, text_width: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(vision_width, text_width)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(text_width, text_width)]
        self.layers = nn.Sequential(*layers)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """(b, p, v) → (b, p, h)."""
        embeds: torch.Tensor = self.layers(image_features)
        return embeds


class PerceiverAttention(nn.Module):
    """Latents ask the picture and themselves: queries from the latents, keys from both, each behind its own norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = HEADS * HEAD_WIDTH
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, media: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """(b, p, h), (b, q, h) → (b, q, h)."""
        latents = self.norm_latents(latents)
        both = torch.cat((self.norm_media(media), latents), dim=1)  # (b, k = p + q, h)
        query = self.to_q(latents)
        key, value = self.to_kv(both).chunk(2, dim=-1)
        query, key, value = (x.unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2) for x in (query, key, value))
        out = functional.scaled_dot_product_attention(query, key, value)  # (b, a, q, c)
        answers: torch.Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return answers


class ResamplerConnector(nn.Module):
    """TinyLLaVA Factory's Perceiver resampler: a fixed number of learnt queries instead of one embedding per patch."""

    def __init__(self, vision_width: int, text_width: int, queries: int, depth: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(queries, text_width))
        self.linear = nn.Linear(vision_width, text_width)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(text_width), _feed_forward(text_width)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(text_width)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """(b, p, v) → (b, q, h)."""
        media = self.linear(image_features)
        latents: torch.Tensor = self.latents.expand(media.shape[0], -1, -1)
        for layer in self.layers:
            attention, feed_forward = layer.children()
            latents = latents + attention(media, latents)
            latents = latents + feed_forward(latents)
        embeds: torch.Tensor = self.norm(latents)
        return embeds


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width, bias=False),
        nn.GELU(),
        nn.Linear(4 * width, width, bias=False),
    )


def _identity(vision_width: int, text_width: int, _options: Mapping[str, int]) -> nn.Module:
    if vision_width != text_width:
        raise CheckpointError(
            f"connector identity between widths {vision_width} and {text_width}", "it needs equal widths; use linear"
        )
    return nn.Identity()


def _linear(vision_width: int, text_width: int, _options: Mapping[str, int]) -> nn.Module:
    return nn.Linear(vision_width, text_width)


def _mlp(depth: int) -> ConnectorBuilder:
    return lambda vision_width, text_width, _options: DeepMlpConnector(vision_width, text_width, depth)


def _mlp2(vision_width: int, text_width: int, _options: Mapping[str, int]) -> nn.Module:
    return MlpConnector(vision_width, text_width)


def _resampler(vision_width: int, text_width: int, options: Mapping[str, int]) -> nn.Module:
    return ResamplerConnector(
        vision_width, text_width, options.get("num_queries", QUERIES), options.get("num_layers", RESAMPLER_LAYERS)
    )


CONNECTORS: dict[str, ConnectorBuilder] = {
    "identity": _identity,
    "linear": _linear,
    "mlp1x_gelu": _mlp(1),
    "mlp2x_gelu": _mlp2,
    "mlp3x_gelu": _mlp(3),
    "mlp4x_gelu": _mlp(4),
    "resampler": _resampler,
}
OPTIONS: dict[str, tuple[str, ...]] = {"resampler": ("num_queries", "num_layers")}


def build_connector(name: Any, vision_width: int, text_width: int, options: Any = None) -> nn.Module:
    """A connector with random weights.

    Args:
        name: key of CONNECTORS.
        vision_width: width of the tower's features.
        text_width: hidden size of the language model.
        options: `connector_options` of config.json; the resampler's `num_queries` and `num_layers`.

    Raises:
        CheckpointError: unknown name or option, an option out of range, or widths that the connector can't join.
    """
    if not isinstance(name, str) or name not in CONNECTORS:
        raise CheckpointError(f"unknown connector {str(name)[:80]!r}", f"known: {', '.join(CONNECTORS)}")
    options = {} if options is None else options
    known = OPTIONS.get(name, ())
    if not isinstance(options, Mapping) or any(key not in known for key in options):
        raise CheckpointError(
            f"connector {name}: options {str(options)[:80]}", f"known: {', '.join(known) or 'none for this connector'}"
        )
    for key, value in options.items():
        if type(value) is not int or not 1 <= value <= _LIMITS[key]:
            raise CheckpointError(f"connector {name}: {key}={str(value)[:80]} is not in 1..{_LIMITS[key]}")
    return CONNECTORS[name](vision_width, text_width, options)

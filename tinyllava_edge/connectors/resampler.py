"""TinyLLaVA Factory's Perceiver resampler; parameter names are those of its checkpoints.

Legend: b pictures, p tower tokens, q queries, k keys, v tower width, h language-model width, a heads, c head width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .base import Sizes

QUERIES, RESAMPLER_LAYERS = 128, 3  # Factory's defaults
HEADS, HEAD_WIDTH = 8, 64  # whatever the model's width
OPTIONS = {"num_queries": 65536, "num_layers": 64}


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


def resampler(sizes: Sizes) -> nn.Module:
    """Options `num_queries` and `num_layers`."""
    queries = sizes.options.get("num_queries", QUERIES)
    layers = sizes.options.get("num_layers", RESAMPLER_LAYERS)
    return ResamplerConnector(sizes.vision_width, sizes.text_width, queries, layers)

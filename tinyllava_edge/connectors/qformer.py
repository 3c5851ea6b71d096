"""BLIP-2's Q-Former (arXiv 2301.12597, §3.1) from transformers: learnt queries ask the picture, then a linear layer.

Every second layer, the first included, has cross-attention to the tower's features; the feed-forward is four times as
wide as the queries. Parameter names are those of transformers' BLIP-2 checkpoints, and so are the default sizes.

Legend: b pictures, p tower tokens, q queries, v tower width, d the queries' width, h language-model width.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import CheckpointError
from .base import Sizes

LAYERS, WIDTH, HEADS = 12, 768, 12  # BLIP-2's, which are BERT-base's
OPTIONS = {"num_layers": 64, "hidden_size": 8192, "num_heads": 128}


class QFormerConnector(nn.Module):
    """Queries without text; any number of tower tokens."""

    def __init__(
        self,
        vision_width: int,
        text_width: int,
        queries: int,
        layers: int = LAYERS,
        width: int = WIDTH,
        heads: int = HEADS,
    ) -> None:
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        config = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            encoder_hidden_size=vision_width,
        )
        self.query_tokens = nn.Parameter(torch.randn(1, queries, width) * config.initializer_range)
        self.qformer = Blip2QFormerModel._from_config(config)
        self.language_projection = nn.Linear(width, text_width)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """(b, p, v) → (b, q, h)."""
        queries = self.query_tokens.expand(image_features.shape[0], -1, -1)  # (b, q, d)
        hidden = self.qformer.dropout(self.qformer.layernorm(queries))
        # Not the model's own forward: it makes a mask of ones and minus 3e38, which float16 can't hold.
        answers = self.qformer.encoder(
            hidden, encoder_hidden_states=image_features, query_length=queries.shape[1]
        ).last_hidden_state  # (b, q, d)
        embeds: torch.Tensor = self.language_projection(answers)
        return embeds


def qformer(sizes: Sizes) -> nn.Module:
    """`qformer-N`: N queries; options `num_layers`, `hidden_size` (the queries' width) and `num_heads`."""
    layers, width, heads = (
        sizes.options.get(key, default)
        for key, default in (("num_layers", LAYERS), ("hidden_size", WIDTH), ("num_heads", HEADS))
    )
    if width % heads:
        raise CheckpointError(f"connector {sizes.name}: hidden_size {width} is no multiple of num_heads {heads}")
    return QFormerConnector(sizes.vision_width, sizes.text_width, sizes.tokens, layers, width, heads)

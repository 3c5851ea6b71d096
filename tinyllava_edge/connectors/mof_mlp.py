"""One MLP for each tower of a mixture. Legend: b pictures, p tokens of both towers, v and h widths of tower and LLM."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import CheckpointError
from .base import Sizes
from .mlp import MlpConnector


class MofMlpConnector(nn.Module):
    """Tokens 0, 2, 4 … through one two-layer MLP, tokens 1, 3, 5 … through another; their order stays.

    As TinyLLaVA Factory's `mof_mlp`, whose two parts are named `clip` and `dinov2`.
    """

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.first = MlpConnector(vision_width, text_width)
        self.second = MlpConnector(vision_width, text_width)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """(b, p, v) → (b, p, h). Raises CheckpointError for an odd p."""
        b, p, v = image_features.shape
        if p % 2:
            raise CheckpointError(f"connector mof_mlp: {p} tower tokens are no pairs", "it joins a mixture of two")
        pairs = image_features.reshape(b, p // 2, 2 * v)  # (b, p / 2, 2v)
        embeds = torch.cat((self.first(pairs[..., :v]), self.second(pairs[..., v:])), dim=-1)  # (b, p / 2, 2h)
        return embeds.reshape(b, p, -1)


def mof_mlp(sizes: Sizes) -> nn.Module:
    """Factory's connector of its mixture of features."""
    return MofMlpConnector(sizes.vision_width, sizes.text_width)

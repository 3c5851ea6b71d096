"""Average pooling, then an MLP: DeCo (arXiv 2405.20985), which pools patches adaptively before the projector.

Parameter names are those of Llava's own projector, so the MLP of a model without pooling fits. Gemma 3 pools in the
same place, with a norm and one matrix after it.

Legend: b pictures, n patches along a side, m embeddings along a side, v tower width, h language-model width.
"""

from __future__ import annotations

import torch
from torch import nn

from .base import Sizes, average, grids


class AvgPoolConnector(nn.Module):
    """The mean of each window of patches, then two linear layers with exact GELU between them."""

    def __init__(self, vision_width: int, text_width: int, n: int, m: int) -> None:
        super().__init__()
        self.n, self.m = n, m
        self.linear_1 = nn.Linear(vision_width, text_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(text_width, text_width)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """(b, n · n, v) → (b, m · m, h). Raises CheckpointError for another number of tokens."""
        pooled = average(image_features, self.n, self.m)  # (b, m · m, v)
        embeds: torch.Tensor = self.linear_2(self.act(self.linear_1(pooled)))
        return embeds


def avgpool(sizes: Sizes) -> nn.Module:
    """`avgpool-N`: N any square up to the grid's own."""
    return AvgPoolConnector(sizes.vision_width, sizes.text_width, *grids(sizes, whole=False))

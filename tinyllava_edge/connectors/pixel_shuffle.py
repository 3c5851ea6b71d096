"""Pixel shuffle: r x r neighbouring patches become one, their features side by side, then an MLP.

As InternVL 1.5 (arXiv 2404.16821, §3.1) and transformers' InternVL have it, parameter names included: a norm over the
joined features, then two linear layers with exact GELU between them. The order of the joined features, rows before
columns, is that of Idefics3 and SmolVLM too, whose connector has one bias-free linear layer instead of the MLP.

Legend: b pictures, n patches along a side, m embeddings along a side, r = n / m, v tower width, h LLM width.
"""

from __future__ import annotations

import torch
from torch import nn

from .base import Sizes, check_grid, grids


class PixelShuffleConnector(nn.Module):
    """Space to depth by r, then norm and MLP."""

    def __init__(self, vision_width: int, text_width: int, n: int, m: int) -> None:
        super().__init__()
        self.n, self.m, self.r = n, m, n // m
        self.layer_norm = nn.LayerNorm(vision_width * self.r**2)
        self.linear_1 = nn.Linear(vision_width * self.r**2, text_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(text_width, text_width)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """(b, n · n, v) → (b, m · m, h). Raises CheckpointError for another number of tokens."""
        check_grid(image_features, self.n)
        n, m, r, v = self.n, self.m, self.r, image_features.shape[-1]
        x = image_features.reshape(-1, n, m, r * v)  # neighbours in a row
        x = x.transpose(1, 2).reshape(-1, m, m, r * r * v)  # neighbours in a column; columns come first here
        x = x.transpose(1, 2).flatten(1, 2)  # (b, m · m, r · r · v)
        embeds: torch.Tensor = self.linear_2(self.act(self.linear_1(self.layer_norm(x))))
        return embeds


def pixel_shuffle(sizes: Sizes) -> nn.Module:
    """`pixelshuffle-N`: the side of N must divide the grid's."""
    return PixelShuffleConnector(sizes.vision_width, sizes.text_width, *grids(sizes, whole=True))

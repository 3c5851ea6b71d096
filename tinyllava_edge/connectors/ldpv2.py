"""LDPv2, the lightweight downsample projector of MobileVLM V2 (arXiv 2402.03766, §3.3).

Two pointwise layers with exact GELU between them, adaptive average pooling to a fixed grid, then the generator of
positions: a depthwise 3 x 3 convolution with padding 1, added to its own input. MobileVLM V2 pools 24 x 24 patches to
12 x 12, which is `ldpv2-144`. Parameter names are those of its checkpoints behind `mm_projector.`.

Legend: b pictures, n patches along a side, m embeddings along a side, v tower width, h language-model width.
"""

from __future__ import annotations

import torch
from torch import nn

from .base import Sizes, average, grids


class LdpV2Connector(nn.Module):
    """MLP on every patch, pooling, positions from the neighbours."""

    def __init__(self, vision_width: int, text_width: int, n: int, m: int) -> None:
        super().__init__()
        self.n, self.m = n, m
        layers = nn.Sequential(nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width))
        convolution = nn.Conv2d(text_width, text_width, 3, padding=1, groups=text_width)
        self.mlp = nn.ModuleDict({"mlp": layers})  # mlp.mlp.0, mlp.mlp.2 and peg.peg.0, as upstream nests them
        self.peg = nn.ModuleDict({"peg": nn.Sequential(convolution)})

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """(b, n · n, v) → (b, m · m, h). Raises CheckpointError for another number of tokens."""
        x = average(self.mlp["mlp"](image_features), self.n, self.m)  # (b, m · m, h)
        grid = x.transpose(1, 2).reshape(-1, x.shape[2], self.m, self.m)  # (b, h, m, m)
        grid = grid + self.peg["peg"](grid)
        embeds: torch.Tensor = grid.flatten(2).transpose(1, 2)
        return embeds


def ldpv2(sizes: Sizes) -> nn.Module:
    """`ldpv2-N`: N any square up to the grid's own."""
    return LdpV2Connector(sizes.vision_width, sizes.text_width, *grids(sizes, whole=False))

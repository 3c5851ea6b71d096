"""Linear layers with exact GELU between them. Legend: b pictures, p tower tokens, v and h widths of tower and LLM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .base import Sizes


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


def mlp2(sizes: Sizes) -> nn.Module:
    """The paper's connector."""
    return MlpConnector(sizes.vision_width, sizes.text_width)


def mlp(depth: int) -> Callable[[Sizes], nn.Module]:
    """Builder of an MLP with so many linear layers."""
    return lambda sizes: DeepMlpConnector(sizes.vision_width, sizes.text_width, depth)

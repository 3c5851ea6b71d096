"""No connector, and a single linear layer; names as in TinyLLaVA Factory."""

from __future__ import annotations

from torch import nn

from ..errors import CheckpointError
from .base import Sizes


def identity(sizes: Sizes) -> nn.Module:
    """The features themselves. Raises CheckpointError unless both widths are equal."""
    if sizes.vision_width != sizes.text_width:
        raise CheckpointError(
            f"connector identity between widths {sizes.vision_width} and {sizes.text_width}",
            "it needs equal widths; use linear",
        )
    return nn.Identity()


def linear(sizes: Sizes) -> nn.Module:
    """One linear layer."""
    return nn.Linear(sizes.vision_width, sizes.text_width)

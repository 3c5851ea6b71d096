"""SigLIP 2's NaFlex tower at one square size."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Siglip2VisionModel


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

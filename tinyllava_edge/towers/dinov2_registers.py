"""DINOv2 with registers: the registers work inside and are left out of what the connector reads."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Dinov2WithRegistersModel


class PlainDinov2WithRegisters(Dinov2WithRegistersModel):
    """The Hugging Face class, whose `hidden_states` hold the class token and the patches, as DINOv2's do.

    Registers are scratch tokens that no output is made of (Darcet et al. 2023); stock Llava would pass them on.
    """

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """(b, 3, s, s) → the class's output; `hidden_states` holds (b, 1 + p, v)."""
        out = super().forward(pixel_values, **kwargs)
        skipped = 1 + int(self.config.num_register_tokens)
        if out.hidden_states is not None:  # of states that nobody asked for there is None
            out.hidden_states = tuple(
                None if h is None else torch.cat((h[:, :1], h[:, skipped:]), dim=1) for h in out.hidden_states
            )
        return out

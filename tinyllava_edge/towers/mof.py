"""A mixture of two towers (TinyLLaVA Factory's `mof`; the interleaved one of Tong et al. 2024).

Both towers see the same pixels, prepared by the first one's numbers. Each gives its patches without the class token;
patch k becomes tokens 2k (first tower) and 2k + 1 (second). Legend: b pictures, n patches of one tower, v width.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..errors import CheckpointError
from . import FAMILIES, TOWERS
from .mof_config import MofConfig


class MixtureOfFeatures(PreTrainedModel):
    """Two towers whose `hidden_states` are one: (b, 2n, v), class tokens left out."""

    config_class = MofConfig
    base_model_prefix = "mof"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        from ..model import build_tower

        self.first, self.second = build_tower(config.first), build_tower(config.second)
        self.skipped = tuple(class_tokens(part) for part in (config.first, config.second))
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """(b, 3, s, s) → `hidden_states` that hold (b, 2n, v).

        Raises:
            CheckpointError: the towers cut the picture into different numbers of patches.
        """
        kwargs = {"output_hidden_states": True, **kwargs, "return_dict": True}
        first, second = (tower(pixel_values, **kwargs).hidden_states for tower in (self.first, self.second))
        a, b = self.skipped
        hidden = tuple(  # of states that nobody asked for there is None
            None if x is None or y is None else interleave(x[:, a:], y[:, b:])
            for x, y in zip(first, second, strict=True)
        )
        return BaseModelOutputWithPooling(hidden_states=hidden)


def class_tokens(config: Any) -> int:
    """Tokens of a plain tower that are no patches."""
    return int(TOWERS[FAMILIES[config.model_type]].class_token)


def interleave(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Tokens of both in turn: (b, n, v) twice → (b, 2n, v). Raises CheckpointError for unequal counts."""
    if first.shape[1:] != second.shape[1:]:
        raise CheckpointError(
            f"the mixed towers give {first.shape[1]} and {second.shape[1]} patches of a picture",
            "mix towers that cut a picture into the same patches",
        )
    return torch.cat((first, second), dim=-1).reshape(first.shape[0], -1, first.shape[2])

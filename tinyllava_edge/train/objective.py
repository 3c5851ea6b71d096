"""Eq. 2 and 3 of the paper as a module: the log-likelihood of the answer tokens, given the picture and what precedes.

Legend: b packs, i packs with a picture, p visual tokens, v tower width, n positions, h LM width, a answer tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.utils import is_flash_attn_2_available

from ..errors import UsageError
from ..model import TinyLlava
from .collate import IGNORED
from .memory_plan import CHUNK
from .recipes import StageRecipe


class Objective(nn.Module):
    """A model and its loss; the head runs on answer positions only, about a fifth of all."""

    accepts_loss_kwargs = True  # Trainer then passes the answer tokens of the whole accumulated batch

    def __init__(self, model: TinyLlava) -> None:
        super().__init__()
        self.model = model
        self.config = model.config  # DeepSpeed reads widths here

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        sources: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **lengths: Any,
    ) -> dict[str, torch.Tensor]:
        """Loss of a batch from `collate`, with its pictures as pixels or as tower features.

        Args:
            lengths: FlashAttention's boundaries of packs that stand end to end, in place of a mask.

        Returns:
            `loss`: the summed cross-entropy over `num_items_in_batch` (by default this batch's answer tokens).
            `hits`: (b, a), whether the highest logit is the label; False where there is none.
        """
        if pixel_values is not None:
            image_features = self._features(pixel_values)  # V = tower(X)             (i, p, v)
        embeds = self.model.embed(input_ids, image_features)  # text and P(V)         (b, n, h)
        hidden = self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, **lengths
        ).last_hidden_state  # (b, n, h)

        counted = labels != IGNORED  # Eq. 3's indicator                              (b, a)
        rows = torch.arange(len(labels), device=labels.device).unsqueeze(1).expand_as(labels)
        total, right = self._head(hidden[rows[counted], sources[counted]], labels[counted])  # (counted, h), (counted,)
        hits = torch.zeros_like(counted)
        hits[counted] = right
        items = counted.sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / items, "hits": hits}

    def _head(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss and hits of answer positions, a chunk at a time: (c, h), (c,) → (), (c,).

        Each chunk's logits are computed again in the backward pass, so that those of one chunk are alive at most.
        """
        if len(labels) <= CHUNK:
            return self._chunk(hidden, labels)
        parts = [
            checkpoint(self._chunk, part, wanted, use_reentrant=False)
            for part, wanted in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
        ]
        return torch.stack([loss for loss, _ in parts]).sum(), torch.cat([right for _, right in parts])

    def _chunk(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model.lm_head(hidden).float()  # (c, vocabulary)
        return functional.cross_entropy(logits, labels, reduction="sum"), logits.detach().argmax(-1) == labels

    def train(self, mode: bool = True) -> Objective:
        """Training mode for what is trained; the tower stays in eval mode unless a part of it is trained."""
        super().train(mode)
        tower = self.model.model.vision_tower
        tower.train(mode and any(p.requires_grad for p in tower.parameters()))
        return self

    def trainable(self) -> dict[str, torch.Tensor]:
        """Name → parameter of what the stage trains."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tuned = any(p.requires_grad for p in self.model.model.vision_tower.parameters())
        with torch.set_grad_enabled(tuned and torch.is_grad_enabled()):
            return self.model.tower_features(pixel_values)


def batch_to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on another device."""
    return {key: value.to(device) for key, value in batch.items()}


def attention_of(stage: StageRecipe, device: torch.device, half: bool) -> str:
    """Which attention the language model runs, as transformers names it: `sdpa` or `flash_attention_2`.

    Args:
        half: whether it computes in bf16.

    Raises:
        UsageError: the recipe wants FlashAttention, which is not there or can't run so.
    """
    fits = device.type == "cuda" and half and stage.max_turns == 1 and is_flash_attn_2_available()
    if stage.attention == "flash" and not fits:
        raise UsageError(
            f"stage {stage.name}: attention = 'flash' on {device.type} in {'bf16' if half else 'fp32'}",
            "it needs a GPU, bf16 and the package flash-attn; attention = 'auto' takes what is there",
        )
    return "flash_attention_2" if fits and stage.attention != "sdpa" else "sdpa"

"""Eq. 2 and 3 of the paper as a module: the log-likelihood of the answer tokens, given the picture and what precedes.

Legend: b packs, i packs with a picture, p visual tokens, v tower width, n positions, h LM width, a answer tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..model import TinyLlava, is_dead, tower_layer
from .collate import IGNORED
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
        attention_mask: torch.Tensor,
        sources: torch.Tensor,
        labels: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Loss of a batch from `collate`, with its pictures as pixels or as tower features.

        Returns:
            `loss`: the summed cross-entropy over `num_items_in_batch` (by default this batch's answer tokens).
            `hits`: (b, a), whether the highest logit is the label; False where there is none.
        """
        if pixel_values is not None:
            image_features = self._features(pixel_values)  # V = tower(X)             (i, p, v)
        embeds = self.model.embed(input_ids, image_features)  # text and P(V)         (b, n, h)
        if image_features is None and torch.distributed.is_initialized():
            embeds = embeds + 0.0 * self._unused_connector()
        hidden = self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state  # (b, n, h)

        counted = labels != IGNORED  # Eq. 3's indicator                              (b, a)
        rows = torch.arange(len(labels), device=labels.device).unsqueeze(1).expand_as(labels)
        logits = self.model.lm_head(hidden[rows[counted], sources[counted]]).float()  # (counted, vocabulary)
        total = functional.cross_entropy(logits, labels[counted], reduction="sum")
        hits = torch.zeros_like(counted)
        hits[counted] = logits.detach().argmax(-1) == labels[counted]
        items = counted.sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / items, "hits": hits}

    def train(self, mode: bool = True) -> Objective:
        """Training mode for what is trained; the tower stays in eval mode unless a part of it is trained."""
        super().train(mode)
        tower = self.model.model.vision_tower
        tower.train(mode and any(p.requires_grad for p in tower.parameters()))
        return self

    def trainable(self) -> dict[str, torch.Tensor]:
        """Name → parameter of what the stage trains."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _unused_connector(self) -> torch.Tensor:
        """A scalar that depends on the connector: on several devices each must give every trained tensor a gradient."""
        parameters = list(self.model.model.multi_modal_projector.parameters())  # none of an identity
        return (
            torch.stack([p.sum() for p in parameters]).sum()
            if parameters
            else torch.zeros((), device=self.model.device)
        )

    def _features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tuned = any(p.requires_grad for p in self.model.model.vision_tower.parameters())
        with torch.set_grad_enabled(tuned and torch.is_grad_enabled()):
            return self.model.tower_features(pixel_values)


def freeze(model: TinyLlava, stage: StageRecipe) -> None:
    """Mark what a stage trains (Figure 3): the connector, the language model with its head, upper tower layers."""
    layers = int(model.config.vision_config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = _trains(name, stage, int(model.config.vision_feature_layer), layers)


def _trains(name: str, stage: StageRecipe, feature_layer: int, layers: int) -> bool:
    if ".multi_modal_projector." in name:
        return True
    if ".vision_tower." in name:
        first, layer = stage.vision_from_layer, tower_layer(name)
        return first is not None and layer is not None and layer >= first and not is_dead(name, feature_layer, layers)
    return stage.trains == "connector+llm"


def batch_to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on another device."""
    return {key: value.to(device) for key, value in batch.items()}

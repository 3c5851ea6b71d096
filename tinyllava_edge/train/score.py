"""Score a model on held-out rows without generating: one forward pass over questions with their answers.

An answer counts as exact when every one of its tokens, the end mark included, has the highest logit given the right
tokens before it. That holds precisely when greedy decoding would write this answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import Checkpoint
from .collate import IGNORED, Pack
from .dataset import StageData, prepare
from .objective import Objective, batch_to
from .pictures import CACHE_BYTES
from .recipes import StageRecipe

BATCH = 32  # packs per forward pass


@dataclass(frozen=True)
class Score:
    """What a model makes of held-out rows."""

    rows: int
    """conversations"""
    exact: int
    """conversations whose answers greedy decoding would write as they stand"""
    loss: float
    """nats per answer token"""

    @property
    def accuracy(self) -> float:
        """Share of exact conversations, 0 to 1."""
        return self.exact / self.rows


def score(
    checkpoint: Checkpoint,
    stage: StageRecipe,
    data: Path | Sequence[Path],
    images: Path | Sequence[Path],
    *,
    max_turns: int = 16,
    max_bad: int | float = 0,
    cache_bytes: int = CACHE_BYTES,
    cache: Path | None = None,
) -> Score:
    """Score the checkpoint's model in float32 on LLaVA JSON; `cache` as `prepare`. Raises DataError as `train` does."""
    packed = replace(stage, max_turns=max_turns, pack_length=0)
    prepared = prepare(
        checkpoint, packed, data, images, max_bad=max_bad, cache_bytes=cache_bytes, cache=cache, alone=True
    )
    was_training = checkpoint.model.training
    objective = Objective(checkpoint.model).eval()
    order = np.argsort(-prepared.packs.lengths, kind="stable").tolist()
    rows = exact = tokens = 0
    total = 0.0
    for begin in range(0, len(order), BATCH):
        part = [prepared.packs[k] for k in order[begin : begin + BATCH]]
        loss, hits, labels = _forward(objective, prepared, part)
        total += loss
        tokens += int((labels != IGNORED).sum())
        for item, hit in zip(part, hits, strict=True):
            rows += len(item.rows)
            exact += _exact(item, hit)
    objective.train(was_training)
    return Score(rows, exact, total / tokens)


def _forward(
    objective: Objective, prepared: StageData, part: Sequence[Pack]
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Summed loss, hits (b, a) and labels (b, a) of some packs."""
    batch = batch_to(prepared.batch(part), objective.model.device)
    with torch.inference_mode():
        out = objective(**batch, num_items_in_batch=1)
    return float(out["loss"]), out["hits"].cpu(), batch["labels"].cpu()


def _exact(item: Pack, hits: torch.Tensor) -> int:
    """How many of a pack's rows have only hits; `hits` (a,) holds their answer tokens one row after another."""
    counts = [int(row.is_answer.sum()) for row in item.rows]
    return sum(bool(part.all()) for part in hits[: sum(counts)].split(counts))

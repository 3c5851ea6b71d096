"""A gradient for every trained weight in every process and step, whatever its rows are.

A batch of text alone gives tower and connector no gradient: on one process AdamW would pass them over where several
processes, of which one has a picture, move them; and where weights are divided, the others would wait for ever. So such
a batch gets one more sequence, a row with a picture, of which no answer counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import DataError

PICTURES = ("pixel_values", "image_features")


class DealtData(Dataset[Any]):
    """Packs by index, and their batches."""

    def __init__(self, data: Any, processes: int) -> None:
        self.data, self.processes = data, processes

    @cached_property
    def spare(self) -> Any:
        """The first pack with a picture, without answers; None if there is none.

        Raises:
            DataError: there is none, and there are several processes.
        """
        for k in range(len(self.data)):
            item = self.data[k]
            if item.images:
                blank = [replace(row, is_answer=np.zeros(len(row.ids), np.bool_)) for row in item.rows[:1]]
                return replace(item, rows=tuple(blank))
        if self.processes > 1:
            raise DataError("no row has a picture", "text alone is trained on one process")
        return None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]

    def batch(self, packs: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Tensors of a batch as `data.batch` makes them, with one more row where it would have no picture."""
        if not any(item.images for item in packs) and self.spare is not None:
            packs = [*packs, self.spare]
        batch: dict[str, torch.Tensor] = self.data.batch(packs)
        return batch

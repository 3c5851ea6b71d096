"""A gradient for every trained weight in each process, whatever rows it gets.

PackSampler deals every process the same number of packs, gaps included. A batch of text alone or of gaps gets one row
more that brings a picture and carries no answer: tower and connector would otherwise have no gradient or, where weights
are divided, leave the other processes waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch.utils.data import Dataset

from ..errors import DataError
from .collate import Pack, without_answers
from .dataset import StageData


class DealtData(Dataset[Pack]):
    """Packs by index, and batches as `data.batch` makes them."""

    def __init__(self, data: StageData, processes: int) -> None:
        self.data, self.processes = data, processes

    @cached_property
    def spare(self) -> Pack | None:
        """The shortest pack with a picture, without its answers; None if there is none.

        Raises:
            DataError: there is none, and several processes.
        """
        place = self.data.packs.shortest_with_picture()
        if place is None and self.processes > 1:
            raise DataError("no row has a picture", "text alone is trained on one process")
        return None if place is None else without_answers(self.data.packs[place])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Pack:
        return self.data[index]

    def batch(self, packs: Sequence[Pack]) -> dict[str, Any]:
        """Tensors of a batch; with one more row where it would have no picture."""
        if self.spare is not None and not any(item.images for item in packs):
            packs = [*packs, self.spare]
        return self.data.batch(packs)

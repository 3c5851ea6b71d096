"""The same batches on any number of processes, and a gradient for every trained weight in each of them.

Packs are dealt to processes in the order of one process, so that step k trains on the same packs everywhere. Two kinds
of rows carry no answer: they fill up an epoch's short last batch where it can't be split evenly, and they bring a
picture into a batch of text alone, whose tower and connector would otherwise have no gradient (or, where weights are
divided, leave the other processes waiting).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from ..errors import DataError
from .collate import IGNORED

PICTURES = ("pixel_values", "image_features")


@dataclass(frozen=True)
class Dealt:
    """A pack in a batch."""

    pack: Any
    """the pack"""
    counts: bool
    """whether its answers are trained; the rest only fills up"""


class DealtData(Dataset[Dealt]):
    """Packs by index; -1 - k is pack k without its answers. Batches as `data.batch` makes them."""

    def __init__(self, data: Any, processes: int) -> None:
        self.data, self.processes = data, processes

    @cached_property
    def spare(self) -> Any:
        """The first pack with a picture; None if there is none. Raises DataError for that on several processes."""
        for k in range(len(self.data)):
            if any(key in self.data.batch([self.data[k]]) for key in PICTURES):
                return self.data[k]
        if self.processes > 1:
            raise DataError("no row has a picture", "text alone is trained on one process")
        return None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Dealt:
        return Dealt(self.data[index], True) if index >= 0 else Dealt(self.data[-1 - index], False)

    def batch(self, items: Sequence[Dealt]) -> dict[str, torch.Tensor]:
        """Tensors of a batch; with one more row where it would have no picture."""
        batch = self.data.batch([item.pack for item in items])
        if not any(key in batch for key in PICTURES) and self.spare is not None:
            items = [*items, Dealt(self.spare, False)]
            batch = self.data.batch([item.pack for item in items])
        blank = torch.tensor([not item.counts for item in items])
        return {**batch, "labels": batch["labels"].masked_fill(blank.unsqueeze(1), IGNORED)}


class DealtSampler(Sampler[int]):
    """The order of `order`, filled up with answerless packs to a multiple of what all processes take at once."""

    def __init__(self, order: Any, at_once: int) -> None:
        self.order, self.at_once = order, at_once

    def __len__(self) -> int:
        return -(-len(self.order) // self.at_once) * self.at_once

    def __iter__(self) -> Iterator[int]:
        last = 0
        for last in self.order:
            yield last
        yield from [-1 - last] * (len(self) - len(self.order))

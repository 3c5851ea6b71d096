"""The order of an epoch: given by seed and epoch alone, whatever the number of processes and workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

GROUP = 16  # batches that are sorted by length together, so that little padding is computed
Order = npt.NDArray[np.int64]


class PackSampler(Sampler[int]):
    """A new order every epoch; packs of like length come in the same batch.

    An epoch has the same number of whole batches each time. The last one is filled up with the index `len(lengths)`,
    which stands for nothing, so that several processes get equally many packs and none is repeated.

    Args:
        lengths: (packs,) positions of each pack.
        batch: packs per optimiser step, over all processes.
        seed: of every epoch's order.
        order: epoch → the packs to draw, with repetitions in a mixture, in random order; the same number for every
            epoch. By default a permutation.
        group: sort by length within windows of `GROUP` batches; off keeps `order` as it is.
    """

    def __init__(
        self,
        lengths: Sequence[int] | npt.NDArray[np.integer],
        batch: int,
        seed: int,
        *,
        order: Callable[[int], Order] | None = None,
        group: bool = True,
    ) -> None:
        self.lengths, self.size, self.seed, self.epoch, self.group = np.asarray(lengths), batch, seed, 0, group
        self.order = order or self._permutation
        self.draws = len(lengths) if order is None else len(order(0))

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order `__iter__` gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.draws // self.size) * self.size

    def __iter__(self) -> Iterator[int]:
        order = self.order(self.epoch)
        full = len(order) // self.size
        if self.group:
            order = self._grouped(order)
            batches = order[: full * self.size].reshape(full, self.size)
            rng = np.random.default_rng((self.seed, self.epoch, 1))
            order = np.concatenate([batches[rng.permutation(full)].reshape(-1), order[full * self.size :]])
        for k in range(full):
            yield from order[k * self.size : (k + 1) * self.size].tolist()
        yield from self._filled(order[full * self.size :]).tolist()

    def _permutation(self, epoch: int) -> Order:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))

    def _grouped(self, order: Order) -> Order:
        window = self.size * GROUP
        parts = (order[start : start + window] for start in range(0, len(order), window))
        return np.concatenate([part[np.argsort(-self.lengths[part], kind="stable")] for part in parts])

    def _filled(self, last: Order) -> Order:
        """The short last batch with gaps spread over it: each process and micro-batch gets something to do."""
        if not len(last):
            return last
        filled = np.full(self.size, len(self.lengths), np.int64)
        filled[np.arange(len(last)) * self.size // len(last)] = last
        return filled

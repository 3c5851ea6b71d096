"""What the reference gave for each picture, kept on disk while builds are compared with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tinyllava_edge.runtimes.base import Answer, Probe


class Spooled:
    """Reference probes on disk: at full size, 66 of them would take a gigabyte of memory.

    `noise` is how far rounding alone moves the reference's features, see tolerances.float32_features.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._answers: list[tuple[tuple[int, ...], Answer]] = []
        self.noise = 0.0

    def add(self, probe: Probe) -> None:
        """Keep the next picture's probe."""
        arrays = (probe.pixel_values, probe.image_features, probe.image_embeds, probe.first_logits)
        np.savez(self._root / f"{len(self._answers)}.npz", *arrays)
        self._answers.append((probe.prompt_ids, probe.answer))

    def __getitem__(self, number: int) -> Probe:
        ids, answer = self._answers[number]
        with np.load(self._root / f"{number}.npz", allow_pickle=False) as arrays:
            pixels, features, embeds, logits = (arrays[f"arr_{k}"] for k in range(4))
        return Probe(pixels, features, embeds, ids, logits, answer)

    def ids(self, number: int) -> tuple[int, ...]:
        """Prompt ids of a picture's question."""
        return self._answers[number][0]

"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default is greedy, as in the paper's evaluation."""

    temperature: float = 0.0
    """0 takes the most likely token; above 0 draws from softmax(logits / temperature)"""
    top_p: float = 1.0
    """draw among the most likely tokens whose probabilities reach this sum"""
    top_k: int = 0
    """draw among this many most likely tokens; 0 is no limit"""
    seed: int | None = None
    """seed of the draws; None takes a fresh one"""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        limits = {"temperature": 0 <= self.temperature <= 100, "top_p": 0 < self.top_p <= 1, "top_k": self.top_k >= 0}
        for name, good in limits.items():
            if not good:
                raise UsageError(
                    f"{name}={getattr(self, name)} is out of range", "temperature 0..100, top_p 0..1, top_k >= 0"
                )
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed={self.seed} is negative")


GREEDY = Sampling()


class Sampler:
    """Draws tokens for one answer."""

    def __init__(self, sampling: Sampling = GREEDY) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed) if sampling.temperature > 0 else None

    def pick(self, logits: npt.NDArray[np.float32]) -> int:
        """(vocab,) → token id. Greedy ties go to the lowest id."""
        if self._random is None:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")
        if self._sampling.top_k:
            order = order[: self._sampling.top_k]
        scaled = (logits[order].astype(np.float64) - float(logits[order[0]])) / self._sampling.temperature
        weights = np.exp(scaled)
        weights /= weights.sum()
        kept = int(np.searchsorted(np.cumsum(weights), self._sampling.top_p)) + 1
        weights = weights[:kept] / weights[:kept].sum()
        return int(order[self._random.choice(len(weights), p=weights)])

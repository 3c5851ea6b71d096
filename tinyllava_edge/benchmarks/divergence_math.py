"""Two distributions over the vocabulary at the same place of an answer: how far apart they are.

KL(p‖q) in nats, p the reference's, computed in float64 from float32 logits. Other than llama.cpp's
`perplexity --kl-divergence`, which keeps the base logits in 16 bits, equal logits give exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava_edge.errors import EngineError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
_ROWS = 32  # held in float64 at once: 150,000 ids take 40 MB an array


@dataclass(frozen=True)
class Positions:
    """A variant beside the reference at every token of one answer, the end token included."""

    kl: tuple[float, ...]
    """KL(reference‖variant) in nats"""
    moved: tuple[float, ...]
    """the variant's probability of the reference's token minus the reference's own"""
    changed: tuple[int, ...]
    """positions whose most probable token is another one"""
    margins: tuple[float, ...]
    """at those positions: log-probability of the reference's first choice minus its second's, in nats"""

    @property
    def mean(self) -> float:
        """Mean KL of the answer's tokens, in nats."""
        return sum(self.kl) / len(self.kl)

    def detail(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "positions": len(self.kl),
            "same_top": len(self.kl) - len(self.changed),
            "kl": list(self.kl),
            "moved": list(self.moved),
            "changed": list(self.changed),
            "margins": list(self.margins),
        }


def log_softmax(logits: Floats) -> Doubles:
    """(n, vocab) logits → log-probabilities in float64."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return rows


def kl_divergence(reference: Floats, variant: Floats) -> Doubles:
    """KL(p‖q) of each row in nats, over the ids that both have (a padded vocabulary is longer).

    Never below 0 by more than rounding, about 1e-15.

    Args:
        reference: logits (n, vocab) of p.
        variant: logits (n, vocab) of q; the vocabularies may differ in length.

    Raises:
        EngineError: other numbers of rows, no ids in common, or logits that are not finite.
    """
    parts = [(np.exp(p) * (p - q)).sum(axis=1) for p, q in _log_pairs(reference, variant)]
    kl: Doubles = np.concatenate(parts)
    return kl


def compare(reference: Floats, variant: Floats, tokens: Sequence[int]) -> Positions:
    """Everything about one answer's positions.

    Args:
        reference: logits (n, vocab) before each token.
        variant: the same of the variant, fed the same tokens.
        tokens: the reference's n tokens.

    Raises:
        EngineError: as `kl_divergence`, or a token that is not among the ids that both have.
    """
    kl: list[float] = []
    moved: list[float] = []
    changed: list[int] = []
    margins: list[float] = []
    for p, q in _log_pairs(reference, variant):
        start, (n, vocabulary) = len(kl), p.shape
        ids = np.asarray(tokens[start : start + n], np.int64)
        if len(tokens) != len(reference) or ids.min() < 0 or ids.max() >= vocabulary:
            raise EngineError(
                f"{len(tokens)} tokens for {len(reference)} positions of {vocabulary:,} ids", "export the bundle again"
            )
        rows = np.arange(n)
        top_two = np.partition(p, -min(2, vocabulary), axis=1)[:, -2:]
        other = np.flatnonzero(p.argmax(axis=1) != q.argmax(axis=1))
        kl += (np.exp(p) * (p - q)).sum(axis=1).tolist()
        moved += (np.exp(q[rows, ids]) - np.exp(p[rows, ids])).tolist()
        changed += (start + other).tolist()
        margins += (top_two[other, -1] - top_two[other, 0]).tolist()
    return Positions(tuple(kl), tuple(moved), tuple(changed), tuple(margins))


def _log_pairs(reference: Floats, variant: Floats) -> Iterator[tuple[Doubles, Doubles]]:
    """Log-probabilities of both over the ids that both have, a block of rows at a time."""
    shapes = f"logits of shape {reference.shape} and {variant.shape}"
    if reference.ndim != 2 or variant.ndim != 2 or not len(reference) or len(reference) != len(variant):
        raise EngineError(f"{shapes} can't be compared", "the two runs must be fed the same tokens")
    both = min(reference.shape[1], variant.shape[1])
    if not both:
        raise EngineError(f"{shapes} have no ids in common", "export the bundle again")
    for start in range(0, len(reference), _ROWS):
        p, q = reference[start : start + _ROWS, :both], variant[start : start + _ROWS, :both]
        for name, logits in (("the reference's", p), ("the variant's", q)):
            if not np.isfinite(logits).all():
                raise EngineError(f"{name} logits are not finite", "verify the bundle; the weights may be damaged")
        yield log_softmax(p), log_softmax(q)

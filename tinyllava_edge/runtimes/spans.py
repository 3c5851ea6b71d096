"""A prompt's ids with picture places → stretches of positions: tokens, or one picture's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .base import IMAGE_PLACE
from .prefix_cache import Key


@dataclass(frozen=True)
class Span:
    """Neighbouring positions that one decoder call computes."""

    start: int
    """first position"""
    length: int
    """positions"""
    tokens: tuple[int, ...] = ()
    """ids; none where a picture stands"""
    picture: int | None = None
    """number of the picture in order of appearance"""

    @property
    def end(self) -> int:
        """First position after it."""
        return self.start + self.length


def spans(ids: Sequence[int], visual_tokens: int, end_of_turn: int | None = None) -> list[Span]:
    """Stretches in order; every IMAGE_PLACE takes `visual_tokens` positions, and a turn's end mark begins a new one.

    A prompt is always computed in these stretches, whatever the KV cache holds of it, because another division would
    round otherwise.
    """
    found: list[Span] = []
    tokens: list[int] = []
    place = pictures = 0
    for token in [*ids, None]:
        if tokens and token in (IMAGE_PLACE, end_of_turn, None):
            found.append(Span(place, len(tokens), tuple(tokens)))
            place += len(tokens)
            tokens = []
        if token == IMAGE_PLACE:
            found.append(Span(place, visual_tokens, picture=pictures))
            place += visual_tokens
            pictures += 1
        elif token is not None:
            tokens.append(token)
    return found


def position_keys(stretches: Sequence[Span], pictures: Sequence[str]) -> list[Key]:
    """What stands at each position: a token's id, or the picture's key for each of its rows."""
    keys: list[Key] = []
    for span in stretches:
        keys += span.tokens if span.picture is None else [pictures[span.picture]] * span.length
    return keys

"""A prompt's positions: which token or picture row stands where."""

from __future__ import annotations

from tinyllava_edge.runtimes.base import IMAGE_PLACE
from tinyllava_edge.runtimes.spans import Span, position_keys, spans


def test_stretches_and_keys() -> None:
    found = spans([1, 5, IMAGE_PLACE, 6, IMAGE_PLACE, IMAGE_PLACE, 7, 8], 3)
    assert found == [
        Span(0, 2, (1, 5)),
        Span(2, 3, picture=0),
        Span(5, 1, (6,)),
        Span(6, 3, picture=1),
        Span(9, 3, picture=2),
        Span(12, 2, (7, 8)),
    ]
    keys = position_keys(found, ["a", "b", "a"])
    assert keys == [1, 5, "a", "a", "a", 6, "b", "b", "b", "a", "a", "a", 7, 8] and found[-1].end == len(keys)


def test_a_turn_begins_with_the_mark_that_ended_the_last_one() -> None:
    found = spans([1, 5, 2, 6, IMAGE_PLACE, 2, 7], 3, end_of_turn=2)
    assert [(span.start, span.tokens) for span in found] == [(0, (1, 5)), (2, (2, 6)), (4, ()), (7, (2, 7))]


def test_without_text_or_picture() -> None:
    assert spans([IMAGE_PLACE], 2) == [Span(0, 2, picture=0)]
    assert spans([4], 2) == [Span(0, 1, (4,))] and spans([], 2) == []

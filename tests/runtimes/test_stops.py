"""Stop strings: the same cut however the text arrives."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from tinyllava_edge.errors import UsageError
from tinyllava_edge.runtimes.stops import StopStrings


def expected(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Letter by letter: the first prefix that ends with a stop string, cut before the longest such string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_random_texts_and_cuts() -> None:
    chance = random.Random(0)
    hits = 0
    for _ in range(5000):
        text = "".join(chance.choices("ab\né", k=chance.randrange(30)))
        stops = ["".join(chance.choices("ab\né", k=chance.randrange(1, 6))) for _ in range(chance.randrange(4))]
        stream, parts, rest = StopStrings(stops), [], text
        while rest:
            size = chance.randrange(1, 6)
            parts.append(stream.push(rest[:size]))
            rest = rest[size:]
            given = "".join(parts)
            assert text.startswith(given) and not any(stop in given for stop in stops)
        parts.append(stream.finish())
        assert ("".join(parts), stream.hit) == expected(text, stops), (text, stops)
        if stream.hit is not None:
            hits += 1
            assert len({*stops}) > 1 or "".join(parts) == text.split(stops[0])[0]
    assert 1000 < hits < 4000  # both outcomes were met


def test_only_what_may_be_a_stop_is_held() -> None:
    stream = StopStrings(["\nUSER:"])
    assert [stream.push(piece) for piece in ("red", "\n", "US", "A\n", "USER")] == ["red", "", "", "\nUSA", ""]
    assert stream.push(": what") == "" and stream.hit == "\nUSER:"
    assert stream.push("more") == "" and stream.finish() == ""


def test_no_stops() -> None:
    stream = StopStrings()
    assert stream.push("a") == "a" and stream.finish() == "" and stream.hit is None


@pytest.mark.parametrize("stops", [["x"] * 9, [""], ["x" * 257], [5], "abc", None, {"x"}])
def test_refused(stops: object) -> None:
    with pytest.raises(UsageError):
        StopStrings(stops)  # type: ignore[arg-type]


def test_limits_are_inside() -> None:
    stop = "x" * 256
    stream = StopStrings([stop] * 8)
    assert "".join(stream.push("x") for _ in range(256)) == "" and stream.hit == stop

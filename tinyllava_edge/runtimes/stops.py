"""Stop strings in streamed text: what is certain goes on, what may be the start of a stop string waits."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError

MAX_STOPS = 8
MAX_STOP_LENGTH = 256  # characters


class StopStrings:
    """Cuts an answer before the first stop string that is complete in it, however the text is cut into pieces.

    Of several that end at the same character the longest counts, so that none of them is left in the answer.

    Raises:
        UsageError: more than MAX_STOPS strings, or one that is empty, too long, or not text.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = check_stops(stops)
        self._held = ""
        self.hit: str | None = None
        """the stop string that ended the text, once there is one"""

    def push(self, text: str) -> str:
        """Add text; returns what is certain not to belong to a stop string. After a hit: nothing."""
        if self.hit is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.hit = min(found)
            self._held = ""
            return text[:at]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """End the text; returns what was held back and is no stop string after all."""
        rest, self._held = self._held, ""
        return rest


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """The stop strings as a tuple. Raises UsageError, see StopStrings."""
    if isinstance(stops, str) or not isinstance(stops, Sequence):
        raise UsageError(f"stop is a {type(stops).__name__}, not a list", "pass a list of strings")
    if len(stops) > MAX_STOPS:
        raise UsageError(f"{len(stops)} stop strings, at most {MAX_STOPS} are looked for", "pass fewer")
    for stop in stops:
        if not isinstance(stop, str):
            raise UsageError(f"a stop string is a {type(stop).__name__}, not text", "pass strings")
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise UsageError(f"a stop string of {len(stop)} characters", f"1 to {MAX_STOP_LENGTH} are possible")
    return tuple(stops)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a stop string, not yet whole, starts with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

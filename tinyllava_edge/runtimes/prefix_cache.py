"""What the KV cache holds, so that a prompt that begins like an earlier one computes only what is new.

Sequence 0 is the one that works. When a prompt leaves it for another beginning, its cells are saved to memory, within a
bound, and come back when a prompt begins with them: a second question on a picture, or a chat that goes on.
A position is known by a key: a token's id, or for each row of a picture that picture's cache key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from .llama import Llama

Key = int | str
MIN_SAVED = 16  # positions; fewer are computed faster than they are copied


@dataclass(frozen=True)
class _State:
    keys: list[Key]
    data: npt.NDArray[np.uint8]


class PrefixCache:
    """Positions of sequence 0 and saved states of earlier ones. Not for several threads at once.

    Args:
        llama: the decoder; nobody else may write to its sequence 0 without `forget`.
        max_bytes: most memory of saved states; 0 keeps none, and then nothing is reused at all.
    """

    def __init__(self, llama: Llama, max_bytes: int) -> None:
        self._llama = llama
        self._max_bytes = max_bytes
        self._held: list[Key] = []
        self._states: OrderedDict[int, _State] = OrderedDict()  # oldest use first
        self._next = 0
        self._bytes = 0
        self._counts = {"hits": 0, "misses": 0, "positions": 0, "restored": 0, "evictions": 0}

    def reuse(self, keys: list[Key], starts: Sequence[int]) -> int:
        """Leave in sequence 0 the longest known beginning of a prompt that may be taken over.

        A conversation that goes on keeps all that it has, tokens that were decoded one by one included. Another prompt
        that begins alike keeps whole stretches only: a single question's answer is then the same to the last bit as
        without a cache.

        Args:
            keys: what stands at each position of the prompt.
            starts: first positions of its stretches, ascending.

        Returns:
            How many positions are there; the caller computes the others and calls `hold`.
        """
        if not self._max_bytes:
            self.forget()
            return 0
        best, length = None, _usable(self._held, keys, starts)
        for number, state in self._states.items():
            found = _usable(state.keys, keys, starts)
            if found >= length + MIN_SAVED:
                best, length = number, found
        if best is not None:
            self._states.move_to_end(best)
        saved = self._states[best] if best is not None else None  # making room may drop it from the table
        self._save_before_losing(length if saved is None else common(self._held, saved.keys, length))
        if saved is not None:
            self._held = []
            try:
                self._llama.restore(0, saved.data)
                self._held = list(saved.keys)
                self._counts["restored"] += 1
            except EngineError:
                length = 0
                if best is not None and best in self._states:
                    self._drop(best)
        self._llama.remove(0, length)
        del self._held[length:]
        self._counts["hits" if length else "misses"] += 1
        self._counts["positions"] += length
        return length

    def hold(self, keys: list[Key]) -> None:
        """Say that the next positions of sequence 0 hold these keys."""
        if self._max_bytes:
            self._held += keys

    def cut(self) -> None:
        """Drop what was computed after the last `hold`: a call that was cancelled may have left a part of itself."""
        if self._held:
            self._llama.remove(0, len(self._held))
        else:
            self.forget()

    def forget(self) -> None:
        """Empty sequence 0; saved states stay."""
        self._held = []
        self._llama.clear()

    def close(self) -> None:
        """Let go of the saved states."""
        self._held, self._bytes = [], 0
        self._states.clear()

    def stats(self) -> dict[str, int]:
        """Counts of hits, misses, reused positions, restored states and evictions; bytes and entries now."""
        return {**self._counts, "bytes": self._bytes, "entries": len(self._states)}

    def _save_before_losing(self, kept: int) -> None:
        """Save sequence 0 unless little is lost, a saved state covers it, or it alone is beyond the bound."""
        if len(self._held) - kept < MIN_SAVED:
            return
        if any(common(state.keys, self._held, len(self._held)) == len(self._held) for state in self._states.values()):
            return
        size = self._llama.saved_bytes(0)
        if size > self._max_bytes:
            return
        covered = [n for n, s in self._states.items() if common(s.keys, self._held, len(s.keys)) == len(s.keys)]
        for number in covered:  # beginnings of what is saved now
            self._drop(number)
        while self._bytes + size > self._max_bytes:
            self._drop(next(iter(self._states)))
            self._counts["evictions"] += 1
        try:
            data = self._llama.save(0)
        except (EngineError, MemoryError):  # then it is computed again one day
            return
        self._states[self._next] = _State(list(self._held), data)
        self._next += 1
        self._bytes += data.nbytes

    def _drop(self, number: int) -> None:
        self._bytes -= self._states.pop(number).data.nbytes


def _usable(held: list[Key], keys: list[Key], starts: Sequence[int]) -> int:
    """Positions of a prompt that may be taken from what is held: all of it or whole stretches, never the last one."""
    length = common(held, keys, len(keys) - 1)
    if length == len(held):
        return length
    return max((start for start in starts if start <= length), default=0)


def common(a: list[Key], b: list[Key], most: int) -> int:
    """Length of the common beginning, at most `most`."""
    most = min(len(a), len(b), most)
    if a[:most] == b[:most]:
        return most
    return next(i for i in range(most) if a[i] != b[i])

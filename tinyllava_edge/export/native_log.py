"""llama.cpp's log, kept off the screen and at hand for the error message."""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Iterator

KEPT_LINES = 200


class NativeLog:
    """The last lines that llama.cpp logged."""

    def __init__(self, kept: int | None = KEPT_LINES) -> None:
        self.pieces: deque[str] = deque(maxlen=kept)

    def lines(self) -> list[str]:
        """Whole lines; llama.cpp logs some of them in pieces."""
        return [line.strip() for line in "".join(self.pieces).splitlines() if line.strip()]

    def reason(self) -> str:
        """What an error message should quote: the lines that speak of failure, or else the last ones; at most three."""
        lines = self.lines()
        failures = [line for line in lines if any(word in line.lower() for word in ("error", "fail", "invalid"))]
        return "; ".join((failures or lines)[-3:]) or "llama.cpp gave no reason"


@contextlib.contextmanager
def captured(kept: int | None = KEPT_LINES) -> Iterator[NativeLog]:
    """Collect llama.cpp's log for the length of the block; the callback that was there before comes back after it.

    `kept` pieces at most, the last ones; None keeps all.
    """
    import llama_cpp

    log = NativeLog(kept)

    keep = llama_cpp.llama_log_callback(lambda _level, text, _data: log.pieces.append(text.decode("utf-8", "replace")))
    before, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(user_data))
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        yield log
    finally:
        llama_cpp.llama_log_set(before, user_data)

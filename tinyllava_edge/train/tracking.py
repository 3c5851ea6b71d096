"""Where the figures of a training go: JSON lines and TensorBoard beside the checkpoint, other trackers by name.

A tracker that fails while it is written to is left out from then on, and this is said: a log must not end a training.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import TinyLlavaEdgeError, UsageError
from .track_files import JsonLines, Run, TensorBoard, Tracker
from .track_services import Mlflow, Trackio, Wandb

DEFAULT = ("jsonl", "tensorboard")


@dataclass(frozen=True)
class Known:
    """A tracker that can be named."""

    open: Callable[[Run], Tracker]
    """makes one"""
    package: str
    """module that it needs; empty for none"""
    install: str
    """what pip is given to bring it"""


TRACKERS: dict[str, Known] = {
    "jsonl": Known(JsonLines, "", ""),
    "tensorboard": Known(TensorBoard, "tensorboard", "tinyllava-edge[train]"),
    "wandb": Known(Wandb, "wandb", "tinyllava-edge[wandb]"),
    "trackio": Known(Trackio, "trackio", "trackio"),
    "mlflow": Known(Mlflow, "mlflow", "tinyllava-edge[mlflow]"),
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise UsageError for an unknown tracker, or one whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"unknown tracker {name!r}", f"known: {', '.join(TRACKERS)}")
        known = TRACKERS[name]
        if known.package and importlib.util.find_spec(known.package) is None:
            raise UsageError(f"--track {name}: {known.package} is not installed", f"pip install '{known.install}'")


class Trackers:
    """Several trackers as one. What one of them can't take is said once, and it gets no more."""

    def __init__(self, names: Sequence[str], run: Run, say: Callable[[str], None] | None = None) -> None:
        """Open them in order, each name once.

        Raises:
            UsageError: an unknown tracker, one whose package is not installed, or one that can't be opened.
            StorageError: a file can't be written.
        """
        check_trackers(names)
        self.say = say or (lambda line: print(line, file=sys.stderr))
        self.open: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            try:
                with contextlib.redirect_stdout(sys.stderr):  # some greet on stdout, which is data
                    self.open[name] = TRACKERS[name].open(run)
            except TinyLlavaEdgeError:
                raise
            except Exception as error:  # each library has errors of its own
                raise UsageError(f"--track {name}: {_line(error)}", f"mend its settings, or drop {name}") from error

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        """Figures of one step; None is one that isn't known."""
        known = {name: value for name, value in values.items() if value is not None}
        self._each(lambda tracker: tracker.step(step, known))

    def text(self, step: int, name: str, text: str) -> None:
        """A text of one step."""
        self._each(lambda tracker: tracker.text(step, name, text))

    def close(self) -> None:
        """Close all of them, once."""
        self._each(lambda tracker: tracker.close())
        self.open = {}

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    act(tracker)
            except Exception as error:  # each library has errors of its own
                del self.open[name]
                self.say(f"tracker {name} is left out from here on: {_line(error)}")


def _line(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__

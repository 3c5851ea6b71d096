"""How a run is asked to stop, and how several processes stop at the same step.

Ctrl-C (SIGINT), SIGTERM and SIGUSR1 (Slurm's `--signal=USR1@SECONDS`) ask for an orderly stop: the step is finished,
the state saved, and the command leaves with exit code 1. A second Ctrl-C ends it at once. A signal that reaches one
process reaches all: after each step they compare notes, three numbers each.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
AGAIN_SECONDS = 1.0  # torchrun passes on a Ctrl-C that the terminal has sent to every process already
REASONS = ("", "time", "interrupt", "loss")  # the last one of any process counts for all


class Signals:
    """Within the block a signal sets `watch.reason`; a second Ctrl-C raises KeyboardInterrupt."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch
        self.seen: dict[int, float] = {}  # signal → when it came first
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._stop) for number in ASKED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def name(self) -> str:
        """What asked for the stop: `Ctrl-C`, the signal's name, or another process."""
        if not self.seen:
            return "another process"
        number = max(self.seen)
        return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

    def _stop(self, number: int, frame: FrameType | None) -> None:
        first = self.seen.setdefault(number, time.monotonic())
        if number == signal.SIGINT and time.monotonic() - first > AGAIN_SECONDS:  # schedulers repeat the others
            raise KeyboardInterrupt
        self.watch.reason = "interrupt"


class Agreement(TrainerCallback):
    """After each step: if one process stops, saves or has a reason to, all do. Comes after `watch` in the list."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One all-reduce of three numbers."""
        if args.world_size > 1:
            notes = (control.should_training_stop, control.should_save, REASONS.index(self.watch.reason))
            agreed = highest(args.device, *(int(note) for note in notes))
            control.should_training_stop, control.should_save = bool(agreed[0]), bool(agreed[1])
            self.watch.reason = REASONS[agreed[2]]


def highest(device: torch.device, *numbers: int) -> list[int]:
    """The largest of each number over all processes. Collective."""
    if not torch.distributed.is_initialized():
        return list(numbers)
    shared = torch.tensor(numbers, device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return [int(number) for number in shared]

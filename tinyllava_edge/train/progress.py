"""What a person sees while a stage trains (on stderr), and how a time limit and a broken loss end it."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import TinyLlavaEdgeError

LINE_SECONDS = 15.0  # between two lines where stderr is no terminal
REDRAW_SECONDS = 0.2


class Interrupted(TinyLlavaEdgeError):
    """Ctrl-C or another signal ended a stage in good order; its state is kept."""


class Meter:
    """One line on stderr: redrawn in a terminal, printed now and then elsewhere, silent when it is off."""

    def __init__(self, shown: bool) -> None:
        self.shown, self.live = shown, sys.stderr.isatty()
        self.next = time.monotonic() + (0 if self.live else LINE_SECONDS)

    def show(self, text: str, last: bool = False) -> None:
        """Draw the line if its time has come, or if it is the last one."""
        now = time.monotonic()
        if not self.shown or (now < self.next and not last):
            return
        self.next = now + (REDRAW_SECONDS if self.live else LINE_SECONDS)
        if self.live:
            sys.stderr.write(f"\r\x1b[K{text}" + ("\n" if last else ""))
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()


class Watch(TrainerCallback):
    """Progress line, time limit, loss check; notes why training stopped early."""

    def __init__(self, stage: str, pictures: int, max_seconds: float | None, shown: bool) -> None:
        self.stage, self.pictures, self.max_seconds = stage, pictures, max_seconds
        self.meter = Meter(shown)
        self.reason = ""  # "", "interrupt", "time" or "loss"
        self.loss = math.nan
        self.first_step = 0
        self.began = 0.0
        self.seconds = 0.0  # of training, known when it has ended

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.first_step, self.began = state.global_step, time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop on Ctrl-C (state saved first), or when the time is up; else draw."""
        done, seconds = state.global_step - self.first_step, time.monotonic() - self.began
        if not self.reason and self.max_seconds is not None and seconds > self.max_seconds:
            self.reason = "time"
        if self.reason:
            control.should_training_stop = True
            control.should_save = control.should_save or self.reason == "interrupt"
        rate = done / seconds if seconds else 0.0
        left = (state.max_steps - state.global_step) / rate if rate else 0.0
        self.meter.show(
            f"{self.stage}: step {state.global_step}/{state.max_steps}  loss {self.loss:.4f}  "
            f"{rate * self.pictures:.0f} images/s  {_clock(left)} left"
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the latest loss; a loss that is not finite ends the run."""
        if logs and "loss" in logs:
            self.loss = float(logs["loss"])
            if not math.isfinite(self.loss):
                self.reason, control.should_training_stop, control.should_save = "loss", True, False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last line stays."""
        self.seconds = seconds = time.monotonic() - self.began
        rate = self.pictures * (state.global_step - self.first_step) / seconds if seconds else 0.0
        self.meter.show(
            f"{self.stage}: step {state.global_step}/{state.max_steps}  loss {self.loss:.4f}  "
            f"{rate:.0f} images/s  {_clock(seconds)} in all",
            last=True,
        )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

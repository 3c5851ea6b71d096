"""What a person sees while a stage trains (on stderr), and how a time limit and a broken loss end it."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import TinyLlavaEdgeError
from .throughput import Rates, Throughput, memory_bytes
from .tracking import Trackers

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
            text = text if last else text[: shutil.get_terminal_size().columns - 1]  # a wrapped line can't be redrawn
            sys.stderr.write(f"\r\x1b[K{text}" + ("\n" if last else ""))
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def say(self, text: str) -> None:
        """A line that stays, above the one that is redrawn."""
        if self.shown:
            sys.stderr.write(("\r\x1b[K" if self.live else "") + text + "\n")
            sys.stderr.flush()


class Watch(TrainerCallback):
    """Progress line, records for the trackers, time limit, loss check; notes why training stopped early."""

    def __init__(
        self,
        stage: str,
        pictures: int,
        max_seconds: float | None,
        shown: bool,
    ) -> None:
        self.stage, self.max_seconds = stage, max_seconds
        self.throughput = Throughput(None, None, None, pictures)
        self.track: Callable[[int], Trackers] | None = None  # opens the trackers for a run that goes on from a step
        self.trackers: Trackers | None = None
        self.meter = Meter(shown)
        self.reason = ""  # "", "interrupt", "time" or "loss"
        self.loss = math.nan
        self.first_step = 0
        self.began = 0.0
        self.seconds = 0.0  # of training, known when it has ended
        self.mark = 0.0  # when the step began that is running
        self.memory = 0  # bytes, at the last step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the trackers and start the clock."""
        if self.track is not None:
            self.trackers = self.track(state.global_step)
        self.first_step, self.began = state.global_step, time.monotonic()
        self.mark = self.began

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop on Ctrl-C (state saved first), or when the time is up."""
        seconds = time.monotonic() - self.began
        if not self.reason and self.max_seconds is not None and seconds > self.max_seconds:
            self.reason = "time"
        if self.reason:
            control.should_training_stop = True
            control.should_save = control.should_save or self.reason == "interrupt"

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Draw and record the step; a loss that is not finite ends the run."""
        if not logs or "loss" not in logs:
            return
        self.loss = float(logs["loss"])
        if not math.isfinite(self.loss):
            self.reason, control.should_training_stop, control.should_save = "loss", True, False
        now = time.monotonic()
        rates = self.throughput.step(now - self.mark, args.device)
        self.mark, self.memory = now, memory_bytes(args.device)
        self.meter.show(self._line(state, float(logs["learning_rate"])))
        if self.trackers is not None:
            self.trackers.step(
                state.global_step,
                {
                    "epoch": logs.get("epoch"),
                    "loss": self.loss,
                    "lr": logs.get("learning_rate"),
                    "grad_norm": logs.get("grad_norm"),
                    "images_per_s": rates.images_per_s,
                    "tokens_per_s": rates.tokens_per_s,
                    "mfu": rates.mfu,
                    "hfu": rates.hfu,
                    "memory_bytes": self.memory,
                    "seconds": now - self.began,
                },
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The time that saving took is no training."""
        self.mark = time.monotonic()

    def pause(self, seconds: float) -> None:
        """Leave time out of the rates that went into something else than training."""
        self.mark += seconds

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last line stays."""
        self.seconds = time.monotonic() - self.began
        rates = self.throughput.whole
        self.meter.show(f"{self._start(state, f'{_clock(self.seconds)} in all')}  {self._rates(rates)}", last=True)

    def close(self) -> None:
        """Finish the trackers, however training ended."""
        if self.trackers is not None:
            self.trackers.close()

    def _line(self, state: TrainerState, rate: float) -> str:
        done = state.global_step - self.first_step
        left = (state.max_steps - state.global_step) * (time.monotonic() - self.began) / max(1, done)
        start = self._start(state, f"{_clock(left)} left")
        return f"{start}  lr {rate:.1e}  {self._rates(self.throughput.lately())}"

    def _start(self, state: TrainerState, when: str) -> str:
        """What must not be cut off in a narrow terminal."""
        return f"{self.stage}: step {state.global_step}/{state.max_steps}, {when}  loss {self.loss:.4f}"

    def _rates(self, rates: Rates) -> str:
        parts = [f"{rates.images_per_s:,.0f} images/s", f"{rates.tokens_per_s:,.0f} tokens/s"]
        parts += [f"MFU {100 * rates.mfu:.1f} %"] if rates.mfu is not None else []
        return "  ".join([*parts, f"{self.memory / 1e9:.2f} GB"])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"

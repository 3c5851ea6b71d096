"""What a person wants to see of a training, and what is set up for it before the first step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..errors import UsageError
from .progress import Watch
from .recipes import StageRecipe
from .samples import SampleAnswers, choose, prompts
from .source import Source
from .throughput import Throughput, device_peak
from .track_files import Run
from .tracking import DEFAULT, Trackers, check_trackers


@dataclass(frozen=True)
class Monitor:
    """Settings of what is shown and logged; none of them changes what is trained."""

    track: tuple[str, ...] = DEFAULT
    """keys of TRACKERS"""
    samples: int = 4
    """rows that are answered now and then: held-out ones where there are any; 0 for none"""
    sample_every: int | None = None
    """steps between two rounds of answers; 0 turns them off, None takes the recipe's `save_steps`"""
    peak_tflops: float | None = None
    """dense peak of one device in 10¹² operations per second; None looks the GPU up"""

    def check(self) -> None:
        """Raise UsageError for an unknown or missing tracker, or a number out of range: before anything is loaded."""
        check_trackers(self.track)
        for name in ("samples", "sample_every"):
            given = getattr(self, name)
            if given is not None and not 0 <= given < 1 << 31:
                raise UsageError(f"{name} = {given}", "a number from 0 on is needed; 0 turns samples off")
        device_peak("bf16", self.peak_tflops, torch.device("cpu"))


USUAL = Monitor()


def attach(
    monitor: Monitor,
    trainer: Any,
    watch: Watch,
    start: Checkpoint,
    stage: StageRecipe,
    source: Source,
    out: Path,
    throughput: Throughput,
) -> None:
    """Give a trainer its counters, trackers and sample answers.

    Args:
        trainer: a StageTrainer that has not begun; `freeze` marked its model.
        watch: the trainer's own.
        start: the checkpoint whose model it trains.
        source: rows to choose samples from.
        throughput: what its batches are counted by.

    Raises:
        DataError: no row to choose from.
    """
    settings = trainer.args
    precision = "bf16" if settings.bf16 else "fp32"
    throughput.set_peak(device_peak(precision, monitor.peak_tflops, settings.device), settings.world_size)
    watch.throughput = throughput
    trainer.model.register_forward_pre_hook(watch.throughput.count, with_kwargs=True)
    if not settings.should_save:  # of several processes, one talks and writes
        return
    say = watch.meter.say if watch.meter.shown else None
    name = f"{out.name} {stage.name}"
    watch.track = lambda step: Trackers(monitor.track, Run(out, name, asdict(stage), step), say)
    every = stage.save_steps if monitor.sample_every is None else monitor.sample_every
    if not monitor.samples or not every:
        return
    if trainer.engine.name != "ddp":
        watch.meter.say(f"{stage.name}: no sample answers, for the weights are spread over devices")
        return
    asked = prompts(start, stage, choose(source, monitor.samples), source)
    place = out.parent / f"{out.name}.samples.jsonl"
    trainer.add_callback(SampleAnswers(start, stage, asked, every, place, watch))

"""Trackers that write files beside the checkpoint: JSON lines and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..files import storage_errors
from .lines import Lines


@dataclass(frozen=True)
class Run:
    """What a tracker is told of a training before its first step."""

    out: Path
    """the checkpoint that will be written; a tracker's own files lie beside it"""
    name: str
    """name for people"""
    recipe: Mapping[str, Any]
    """the resolved stage recipe"""
    resumed_from: int
    """step that training goes on from; 0 for a fresh start"""

    def beside(self, name: str) -> Path:
        """A file or directory beside the checkpoint."""
        return self.out.parent / f"{self.out.name}.{name}"


class Tracker(Protocol):
    """One place that figures go to."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of one step."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text of one step."""

    def close(self) -> None:
        """Finish writing."""


FIGURES = ("step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "tokens_per_s", "mfu", "hfu", "memory_bytes")


class JsonLines:
    """`{out}.log.jsonl`: one object a step with FIGURES and `seconds`; one that isn't known is null."""

    def __init__(self, run: Run) -> None:
        self.lines = Lines(run.beside("log.jsonl"), run.resumed_from)
        last = self.lines.last.get("seconds")
        self.before = float(last) if isinstance(last, int | float) else 0.0  # trained by earlier calls

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """One line; `seconds` goes on from those of earlier calls."""
        line = dict.fromkeys(FIGURES) | {"step": step, **values}
        self.lines.add({**line, "seconds": self.before + values.get("seconds", 0.0)})

    def text(self, step: int, name: str, text: str) -> None:
        """Texts have a file of their own."""

    def close(self) -> None:
        """Every line is written already."""


class TensorBoard:
    """`{out}.tensorboard/`; of a resumed run the viewer drops the steps that were done twice."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.beside("tensorboard")
        with storage_errors(folder):
            for old in folder.glob("events.out.tfevents.*") if not run.resumed_from else ():
                old.unlink()
            purge = run.resumed_from + 1 if run.resumed_from else None
            self.writer = SummaryWriter(str(folder), flush_secs=10, purge_step=purge)
        self.text(run.resumed_from, "recipe", f"```json\n{json.dumps(dict(run.recipe), indent=2)}\n```")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars below `train/`."""
        for name, value in values.items():
            self.writer.add_scalar(f"train/{name}", value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text, shown as Markdown."""
        self.writer.add_text(name, text, step)

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()
